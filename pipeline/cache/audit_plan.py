"""What a store should hold, as its metadata says: the arrays of rows, and the zarr.json that each array must have.

Where the group's own zarr.json is damaged, the arrays' documents say what there is, so that rows are still read.

Legend: R rows, S rows a shard.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from pipeline.cache import counts, layout, seals
from pipeline.cache.chunks import check_foreign_document, codec_names, is_plain
from pipeline.cache.layout import RowArray, ScaleInfo
from pipeline.cache.local import RowSource
from pipeline.data.manifest import Manifest
from pipeline.errors import PipeError

OWN_SHAPE = (layout.CALIBRATION_ROWS, layout.HELDOUT_ROWS)  # arrays whose length no attribute states

Documents = Mapping[str, dict[str, Any]]  # array or group → its zarr.json


@dataclass(frozen=True)
class Plan:
    """What the metadata says that a store holds.

    Args:
        root: of the store; a Path, or what stands for a URL.
        rows, shard_rows: R, S.
        arrays: of rows, those of all views.
        views: names of the further views.
        attributes: of the group, as far as they are needed to read its counts.
        sealed: whether it has seals.
        foreign: arrays that another program encoded, or a compressed copy: their bytes are not known, their values are.
        uneven: those of them whose files are not one a shard.
        source: reads rows where files cannot be examined: of remote stores and foreign arrays. None: files are.
        manifest: has the sizes of the images; None where there is none of these rows.
    """

    root: Path
    rows: int
    shard_rows: int
    arrays: tuple[RowArray, ...]
    views: tuple[str, ...]
    attributes: Mapping[str, Any]
    sealed: bool
    foreign: frozenset[str] = frozenset()
    uneven: frozenset[str] = frozenset()
    source: RowSource | None = None
    manifest: Manifest | None = None

    @property
    def shards(self) -> int:
        return -(-self.rows // self.shard_rows)

    def rows_of(self, shard: int) -> int:
        """Manifest rows of a shard; the last one has fewer."""
        return min(self.shard_rows, self.rows - shard * self.shard_rows)

    def image_sizes(self, shard: int) -> np.ndarray | None:
        """(S, 2) int64, width and height of each image of a shard, 0 where unknown; None where no manifest says."""
        if self.manifest is None:
            return None
        rows = np.arange(shard * self.shard_rows, shard * self.shard_rows + self.rows_of(shard))
        sizes = np.zeros((self.shard_rows, 2), np.int64)
        for axis, name in enumerate(("width", "height")):
            sizes[: len(rows), axis] = self.manifest.column(name, rows)
        return sizes


def plan_of_header(root: Path, header: Mapping[str, Any], documents: Documents, listed: set[str]) -> Plan:
    """What the group's attributes say.

    Args:
        documents: those that there are.
        listed: the files that digest.json covers.

    Raises:
        KeyError, TypeError, ValueError: these are not the attributes of a cache.
    """
    scales, views = [ScaleInfo(**scale) for scale in header["scales"]], header.get("views", [])
    if not isinstance(views, list) or not all(isinstance(view, str) and view for view in views):
        raise ValueError
    arrays = tuple(layout.row_arrays(scales, header["global_width"], views))
    rows, shard_rows = header["rows"], header["shard_rows"]
    segments = header.get("segments", [rows])  # as the cache grew
    if segments != sorted(set(segments)) or segments[-1:] != [rows] or len(set(views)) < len(views):
        raise ValueError
    sizes = [rows, shard_rows, *(side for array in arrays for side in array.row_shape)]
    sizes += [scale.width for scale in scales]
    if not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError
    if not {scale.dtype for scale in scales} <= set(get_args(layout.StoredDtype)):
        raise ValueError
    sealed = seals.SEALS in documents or f"{seals.SEALS}/{layout.METADATA}" in listed
    otherwise = _foreign(arrays, rows, shard_rows, documents)
    return Plan(root, rows, shard_rows, arrays, tuple(views), header, sealed, *otherwise)


def _foreign(
    arrays: tuple[RowArray, ...], rows: int, shard_rows: int, documents: Documents
) -> tuple[frozenset[str], frozenset[str]]:
    """Arrays whose zarr.json is not our writer's, but holds the same values, none where most arrays are our writer's;
    and those of them whose files are not one a shard.

    One that was damaged is neither. Where `state`, which is the same in every copy, does not bear out R and S, and
    nothing is compressed, it is R and S that are wrong.
    """
    state = documents.get(layout.STATE) in (None, _state_document(rows, shard_rows))
    there = [array for array in arrays if array.name in documents]
    found = [array for array in there if not is_plain(documents[array.name], array, rows, shard_rows)]
    passed = {array.name for array in found if _passes(documents[array.name], array, rows, otherwise=state)}
    if 2 * len(passed) <= len(there):
        return frozenset(), frozenset()
    usual = {array.name: layout.row_array_document(array, rows, shard_rows) for array in found}
    files = ("chunk_grid", "chunk_key_encoding")
    uneven = {name for name in passed if any(documents[name].get(key) != usual[name][key] for key in files)}
    return frozenset(passed), frozenset(uneven)


def _passes(document: Mapping[str, Any], array: RowArray, rows: int, *, otherwise: bool) -> bool:
    """Whether the values are what they should be; of arrays that are not compressed only if `otherwise` they may be."""
    try:
        check_foreign_document(document, array, rows)
    except (PipeError, AttributeError, TypeError):
        return False
    return otherwise or bool(set(codec_names(document["codecs"])) - {"bytes", "crc32c"})


def _state_document(rows: int, shard_rows: int) -> dict[str, Any]:
    return layout.plain_array_document((rows,), (shard_rows,), np.dtype("u1"), ("row",))


def group_documents(plan: Plan) -> dict[str, dict[str, Any]]:
    """zarr.json of the groups below the store's own, which only further views have."""
    groups = [layout.VIEWS, *(f"{layout.VIEWS}/{view}" for view in plan.views)] if plan.views else []
    return {name: layout.group_document({}) for name in groups}


def array_documents(
    header: Mapping[str, Any], plan: Plan, documents: Documents, listed: set[str]
) -> dict[str, dict[str, Any]]:
    """Array → zarr.json, of all arrays that the attributes ask for; an optional one where anything hints at it."""
    float32, int64 = np.dtype("<f4"), np.dtype("<i8")
    found = {a.name: layout.row_array_document(a, plan.rows, plan.shard_rows) for a in plan.arrays}
    found |= {name: documents[name] for name in plan.foreign}
    found[layout.STATE] = _state_document(plan.rows, plan.shard_rows)
    found[layout.SATURATED] = counts.document(header)
    if plan.sealed:
        found[seals.SEALS] = seals.document(plan.arrays, plan.shards)
    small: dict[str, tuple[tuple[int, ...], np.dtype[Any], tuple[str, ...]]] = {}
    for scale in (ScaleInfo(**scale) for scale in header["scales"]):
        basis = layout.basis_name(scale.name)
        if basis in documents or f"{basis}/{layout.METADATA}" in listed or scale.components != scale.width:
            small[basis] = ((scale.width, scale.components), float32, ("channel", "component"))
        if scale.dtype == "int8":
            small[layout.steps_name(scale.name)] = ((scale.components,), float32, ("component",))
        small[layout.gram_mean_name(scale.name)] = ((scale.tokens,) * 2, float32, ("token", "token_too"))
    small[layout.GLOBAL_MEAN] = ((header["global_width"],), float32, ("channel",))
    for name in OWN_SHAPE:
        own = documents.get(name, {}).get("shape")
        length = own[0] if isinstance(own, list) and len(own) == 1 and isinstance(own[0], int) else 0
        small[name] = ((length,), int64, ("entry",))
    for name, (sides, dtype, axes) in small.items():
        found[name] = layout.plain_array_document(sides, [max(side, 1) for side in sides], dtype, axes)
    return found


def borne_out(plan: Plan, expected: Documents, documents: Documents, listed: set[str]) -> bool:
    """Whether most arrays of rows bear the attributes out, and none of them is unknown to the digest's list."""
    names = [*(array.name for array in plan.arrays), layout.STATE]
    known = listed or {f"{name}/{layout.METADATA}" for name in documents}
    fits = sum(documents.get(name) == expected[name] for name in names)
    return 2 * fits > len(names) and all(f"{name}/{layout.METADATA}" in known for name in names)


def plan_of_documents(root: Path, documents: Documents) -> Plan | None:
    """What the arrays' own documents say is there; their order, and so the seals, cannot be known from them."""
    arrays, sizes = [], Counter[tuple[int, int]]()
    for name, document in documents.items():
        try:
            if document["codecs"][0]["name"] != "sharding_indexed":
                continue
            rows, *row_shape = document["shape"]
            shard_rows = document["chunk_grid"]["configuration"]["chunk_shape"][0]
            dtype = np.dtype(document["data_type"]).newbyteorder("<")
            array = RowArray(name, tuple(row_shape), dtype, tuple(document["dimension_names"][1:]))
            if min(rows, shard_rows, *row_shape) > 0:
                sizes[rows, shard_rows] += 1
                arrays.append(array)
        except (KeyError, IndexError, TypeError, ValueError):
            continue
    if not arrays:
        return None
    (rows, shard_rows), _ = sizes.most_common(1)[0]
    views = sorted({array.name.split("/")[1] for array in arrays if array.name.count("/") == 2})
    scales = sum(
        "/" not in array.name and array.name != layout.GLOBAL and len(array.row_shape) == 2 for array in arrays
    )
    named = documents.get(layout.SATURATED, {}).get("dimension_names") or [""]
    counting = {"rows": rows, "shard_rows": shard_rows, "scales": [None] * scales, counts.ATTRIBUTE: named[0]}
    otherwise = _foreign(tuple(arrays), rows, shard_rows, documents)
    return Plan(root, rows, shard_rows, tuple(arrays), tuple(views), counting, False, *otherwise)
