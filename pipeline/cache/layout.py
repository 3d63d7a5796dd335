"""The names and shapes of a teacher cache: the code of cache_layout.md. Reader and writer speak only through this.

Legend: R rows, S rows a shard, T = grid² tokens, K components of a scale, C width of `global`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.errors import PipeError

FORMAT, VERSION = "dinorankclip-teacher-cache", 1
METADATA, DIGEST, LOCK, TEMPORARY = "zarr.json", "digest.json", ".lock", ".tmp"
GROWING = "growing.json"  # the metadata of a larger cache, while it replaces that of a smaller one
GLOBAL, STATE, SATURATED, GLOBAL_MEAN = "global", "state", "saturated", "global_mean"
VIEWS, GEOMETRY = "views", "geometry"
CALIBRATION_ROWS, HELDOUT_ROWS = "calibration_rows", "heldout_rows"

ABSENT, OK, UNDECODABLE = 0, 1, 2  # values of `state`

SHARD_ROWS = (512, 4096)
SHARD_BYTES = 128 * 2**20  # what a writer holds in memory for one shard, all arrays together

StoredDtype = Literal["int8", "int8_token", "float16"]


def steps_name(scale: str) -> str:
    """Per-component steps (K,) of an int8 scale, or per-token steps (R, T) of an int8_token scale."""
    return f"{scale}_steps"


def basis_name(scale: str) -> str:
    """The scale's PCA basis (C, K) float32; absent where nothing was projected."""
    return f"{scale}_basis"


def gram_mean_name(scale: str) -> str:
    """The scale's mean Gram matrix (g², g²) float32 over the calibration rows."""
    return f"{scale}_gram_mean"


@dataclass(frozen=True)
class ScaleSpec:
    """A named layer of the teacher, area-pooled to grid × grid tokens."""

    name: str
    layer: int
    grid: int

    @property
    def tokens(self) -> int:
        return self.grid**2


@dataclass(frozen=True)
class ScaleInfo:
    """How one scale is stored: K components of the teacher's `width` channels, `explained` of their second moment."""

    name: str
    layer: int
    grid: int
    components: int
    dtype: StoredDtype
    width: int
    explained: float

    @property
    def tokens(self) -> int:
        return self.grid**2

    @property
    def spec(self) -> ScaleSpec:
        return ScaleSpec(self.name, self.layer, self.grid)


@dataclass(frozen=True)
class CacheIdentity:
    """What a cache is a cache of. Known before anything is fitted; an extraction resumes only where all of it agrees.

    Args:
        rows: rows of the manifest, broken ones included (cache row = manifest row).
        scales: in the order asked for.
        global_width: C.
        teacher: the teacher's fingerprint (name, weights hash, image size, layers, norm, mean, std), JSON-able.
        view: {"kind": "crop" | "squash", "size": pixels}.
        manifest_fingerprint: SHA-256 over row, source, key and image hash.
        settings: whatever else shapes the stored numbers (dtype, pca, calibration_rows, seed), JSON-able.
        prefix_fingerprint: the manifest's fingerprint over its first n rows: how a grown manifest shows that it begins
            as the one that a smaller cache was made of. None: a smaller cache is of something else.
    """

    rows: int
    scales: tuple[ScaleSpec, ...]
    global_width: int
    teacher: Mapping[str, Any]
    view: Mapping[str, Any]
    manifest_fingerprint: str
    settings: Mapping[str, Any]
    prefix_fingerprint: Callable[[int], str] | None = field(default=None, compare=False)

    def to_json(self) -> dict[str, Any]:
        """The identity as the JSON values that the group's attributes hold (tuples become lists)."""
        value = {
            "rows": self.rows,
            "scales": [{"name": s.name, "layer": s.layer, "grid": s.grid} for s in self.scales],
            "global_width": self.global_width,
            "teacher": dict(self.teacher),
            "view": dict(self.view),
            "manifest_fingerprint": self.manifest_fingerprint,
            "settings": dict(self.settings),
        }
        as_json: dict[str, Any] = json.loads(json.dumps(value, allow_nan=False))
        return as_json


def first_difference(wanted: Any, found: Any, name: str = "", *, whole: bool = False) -> str | None:
    """`teacher.weights_sha256: a in the cache, b asked for`, or None where they agree.

    Mappings are compared by the keys of `wanted`, so that a caller may ask about a few fields (with `whole`, a field
    that only `found` has is a difference too); lists item by item; all as the JSON values that they are stored as.
    """
    if isinstance(wanted, Mapping) and isinstance(found, Mapping):
        for key in [*wanted, *(sorted(set(found) - set(wanted)) if whole else [])]:
            path = f"{name}.{key}" if name else str(key)
            if key not in found:
                return f"{path}: not recorded in the cache, {_short(wanted[key])} asked for"
            if key not in wanted:
                return f"{path}: {_short(found[key])} in the cache, not asked for"
            if difference := first_difference(wanted[key], found[key], path, whole=whole):
                return difference
        return None
    if isinstance(wanted, list | tuple) and isinstance(found, list | tuple) and len(wanted) == len(found):
        pairs = enumerate(zip(wanted, found, strict=True))
        differences = (first_difference(w, f, f"{name}[{i}]", whole=whole) for i, (w, f) in pairs)
        return next((difference for difference in differences if difference), None)
    if json.loads(json.dumps(wanted)) == found:
        return None
    return f"{name}: {_short(found)} in the cache, {_short(wanted)} asked for"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 160 else text[:157] + "..."


# --- arrays -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowArray:
    """An array with one entry a row, stored in shards of whole rows: name, shape and dtype of a row, names of axes."""

    name: str
    row_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    axes: tuple[str, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row's values, without its checksum."""
        return math.prod(self.row_shape) * self.dtype.itemsize

    def file(self, root: Path, shard: int) -> Path:
        return root / chunk_path(self.name, shard, len(self.row_shape) + 1)


def row_arrays(scales: Iterable[ScaleInfo], global_width: int, views: Sequence[str] = ()) -> list[RowArray]:
    """The sharded arrays of a cache, in the order in which a shard's files are written; the base view's come first."""
    arrays = []
    for scale in scales:
        value_dtype = np.dtype("<f2") if scale.dtype == "float16" else np.dtype("i1")
        shape = (scale.tokens, scale.components)
        arrays.append(RowArray(scale.name, shape, value_dtype, ("token", "component")))
        if scale.dtype == "int8_token":
            arrays.append(RowArray(steps_name(scale.name), (scale.tokens,), np.dtype("<f4"), ("token",)))
    arrays.append(RowArray(GLOBAL, (global_width,), np.dtype("<f2"), ("channel",)))
    further = [RowArray(GEOMETRY, (5,), np.dtype("<f4"), ("number",)), *arrays]
    return [*arrays, *(replace(array, name=view_name(view, array.name)) for view in views for array in further)]


def view_name(view: str, array: str) -> str:
    """`views/crop1/fine`: an array of a further view."""
    return f"{VIEWS}/{view}/{array}"


def chunk_path(array: str, first: int, dimensions: int) -> str:
    """`fine/c/3/0/0`: the file of the chunk (or shard) whose grid position is (first, 0, 0)."""
    return "/".join([array, "c", str(first), *["0"] * (dimensions - 1)])


def auto_shard_rows(row_bytes: int, rows: int) -> int:
    """Rows a shard: the largest power of two in 512-4,096 that keeps a shard within 128 MiB and a cache in 8 shards."""
    low, high = SHARD_ROWS
    size = high
    while size > low and (size * row_bytes > SHARD_BYTES or size * 8 > rows):
        size //= 2
    return size


_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
_CRC = {"name": "crc32c"}
_ZARR_TYPES = {"i1": "int8", "u1": "uint8", "f2": "float16", "f4": "float32", "i4": "int32", "i8": "int64"}


def _value_codecs(dtype: np.dtype[Any]) -> list[dict[str, Any]]:
    return [_BYTES if dtype.itemsize > 1 else {"name": "bytes"}, _CRC]


def _array_document(
    shape: Sequence[int], chunk: Sequence[int], dtype: np.dtype[Any], codecs: list[dict[str, Any]], axes: Sequence[str]
) -> dict[str, Any]:
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": _ZARR_TYPES[dtype.str[1:]],
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0 if dtype.kind in "iu" else 0.0,
        "codecs": codecs,
        "attributes": {},
        "dimension_names": list(axes),
    }


def row_array_document(array: RowArray, rows: int, shard_rows: int) -> dict[str, Any]:
    """zarr.json of a sharded array: outer chunk = shard_rows rows, inner chunk = one row, CRC-32C on both levels."""
    sharding = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": [1, *array.row_shape],
            "codecs": _value_codecs(array.dtype),
            "index_codecs": [_BYTES, _CRC],
            "index_location": "end",
        },
    }
    shape, chunk = (rows, *array.row_shape), (shard_rows, *array.row_shape)
    return _array_document(shape, chunk, array.dtype, [sharding], ("row", *array.axes))


def plain_array_document(
    shape: Sequence[int], chunk: Sequence[int], dtype: np.dtype[Any], axes: Sequence[str]
) -> dict[str, Any]:
    """zarr.json of an array without shards (state, saturated, basis, steps, baselines, row lists)."""
    return _array_document(shape, chunk, dtype, _value_codecs(dtype), axes)


def group_document(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """zarr.json of the group, which carries everything that is not an array."""
    return {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)}


def json_bytes(value: Any) -> bytes:
    """The one form in which the store's JSON is written: sorted keys, two spaces, no NaN."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def digest_of(root: Path, files: Sequence[str], contents: Mapping[str, bytes] | None = None) -> str:
    """SHA-256 (hex) over `files`, relative POSIX paths in sorted order: path, NUL, length as 8 bytes LE, content.

    Args:
        contents: of files that are not read from below `root`, by name.
    """
    total = hashlib.sha256()
    for name in sorted(files):
        try:
            content = contents[name] if contents and name in contents else (root / name).read_bytes()
        except (OSError, ValueError) as error:
            raise PipeError(f"cannot read the cache's metadata: {error}", where=root / name) from error
        total.update(name.encode() + b"\0" + len(content).to_bytes(8, "little"))
        total.update(content)
    return total.hexdigest()
