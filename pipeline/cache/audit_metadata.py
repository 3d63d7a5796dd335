"""Auditing what all rows of a store share: digest.json, every zarr.json, and the small arrays.

Metadata is not believed, it is compared: every zarr.json with the bytes that `layout` gives for it, the digest with the
files. Where the group's own zarr.json is damaged, the arrays' documents say what there is, so that rows are still read.

Legend: R rows, S rows a shard, T tokens, K components, W the teacher's width, C width of `global`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np

from pipeline.cache import layout, seals
from pipeline.cache.audit_shard import Plan
from pipeline.cache.findings import RESTORE, Finding
from pipeline.cache.layout import RowArray, ScaleInfo
from pipeline.cache.shards import CRC_BYTES, without_crc
from pipeline.errors import PipeError

OWN_SHAPE = (layout.CALIBRATION_ROWS, layout.HELDOUT_ROWS)  # arrays whose length no attribute states


class MetadataAudit:
    """What was found in the metadata; `run` does the work.

    Attributes:
        findings: all of them.
        plan: what rows to look for, or None where nothing says so any more.
        covered: the files that the digest should cover, relative paths.
        header: the group's attributes, {} where they cannot be read.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.findings = root, list[Finding]()
        self.plan: Plan | None = None
        self.covered: set[str] = {layout.METADATA}
        self.header: dict[str, Any] = {}
        self.growing: dict[str, bytes] = {}  # files that are about to be replaced by these

    def run(self) -> MetadataAudit:
        self._growth()
        recorded = self._digest_file()
        listed = set(recorded["files"]) if recorded else set()
        documents = self._documents()
        planned = self._plan_of_header(documents, listed)
        expected = {} if planned is None else _expected(self.header, planned, documents, listed)
        self._compare(expected, documents)
        self._small_arrays(expected, planned)
        intact = self._check_digest(recorded, listed)
        if planned is not None and (intact or _agree(planned, expected, documents, listed)):
            self.plan = planned
        else:
            self.plan = _plan_of_documents(self.root, documents) or planned
        if not intact:  # what the attributes leave out is then not yet a stray file
            self.covered |= listed | {f"{name}/{layout.METADATA}" for name in documents}
        return self

    def _note(self, what: str, file: str, array: str | None = None, *, fix: str = RESTORE) -> None:
        self.findings.append(Finding(what, file, array, fix=fix))

    def _read(self, name: str, array: str | None = None) -> bytes | None:
        """A file's bytes, or None after a finding."""
        if name in self.growing:
            return self.growing[name]
        try:
            return (self.root / name).read_bytes()
        except FileNotFoundError:
            self._note("the file is missing", name, array)
        except OSError as error:
            self._note(f"the file cannot be read ({error.strerror})", name, array)
        return None

    def _json(self, name: str, array: str | None = None) -> dict[str, Any] | None:
        """A file's JSON object, which must be written in the store's one form; None after a finding."""
        if (data := self._read(name, array)) is None:
            return None
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            self._note("damaged (no JSON object)", name, array)
            return None
        if not _is_canonical(value, data):
            self._note("altered (not in the form in which it was written)", name, array)
        return value

    def _growth(self) -> None:
        """What growing.json holds counts for the files that it is about to replace; that is no damage."""
        if not (self.root / layout.GROWING).exists() or (value := self._json(layout.GROWING)) is None:
            return
        files = value.get("files")
        if not isinstance(files, dict) or not all(isinstance(text, str) for text in files.values()):
            self._note("altered (not a list of files)", layout.GROWING)
            return
        self.growing = {name: text.encode(errors="surrogatepass") for name, text in files.items()}
        what = "the cache is being made larger, or that was cut off; pipe extract-teacher goes on with it"
        self.findings.append(Finding(what, layout.GROWING, kind="unfinished"))

    def _digest_file(self) -> dict[str, Any] | None:
        """digest.json, where it has what it must."""
        recorded = self._json(layout.DIGEST)
        if recorded is None:
            return None
        files, digest = recorded.get("files"), recorded.get("sha256")
        sound = isinstance(files, list) and all(isinstance(name, str) for name in files) and isinstance(digest, str)
        if not sound or set(recorded) != {"files", "sha256"} or sorted(set(files or ())) != files:
            self._note("altered (not a sorted list of files and their digest)", layout.DIGEST)
        return recorded if sound else None

    def _documents(self) -> dict[str, dict[str, Any]]:
        """Array → its zarr.json as it is, the group's attributes into `header`."""
        group = self._json(layout.METADATA)
        if group is not None:
            attributes = group.get("attributes")
            self.header = attributes if isinstance(attributes, dict) else {}
            if group != layout.group_document(self.header):
                self._note("altered (not the metadata of a group)", layout.METADATA)
        found = {}
        for file in sorted(self.root.glob(f"*/{layout.METADATA}")):
            name = file.parent.name
            if (document := self._json(f"{name}/{layout.METADATA}", name)) is not None:
                found[name] = document
        return found

    def _plan_of_header(self, documents: Mapping[str, Any], listed: set[str]) -> Plan | None:
        """What the group's attributes say is there, or None after a finding."""
        header = self.header
        if not header:
            return None
        try:
            if header["format"] != layout.FORMAT or header["version"] != layout.VERSION:
                self._note(f"not a {layout.FORMAT} of version {layout.VERSION}", layout.METADATA)
            scales = [ScaleInfo(**scale) for scale in header["scales"]]
            arrays = tuple(layout.row_arrays(scales, header["global_width"]))
            rows, shard_rows = header["rows"], header["shard_rows"]
            segments = header.get("segments", [rows])  # as the cache grew
            if segments != sorted(set(segments)) or segments[-1:] != [rows]:
                raise ValueError
            sizes = [rows, shard_rows, *(side for array in arrays for side in array.row_shape)]
            sizes += [scale.width for scale in scales]
            if not all(type(size) is int and size > 0 for size in sizes):
                raise ValueError
            if not {scale.dtype for scale in scales} <= set(get_args(layout.StoredDtype)):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            self._note("altered (its attributes are not those of a teacher cache)", layout.METADATA)
            return None
        sealed = seals.SEALS in documents or f"{seals.SEALS}/{layout.METADATA}" in listed
        return Plan(self.root, rows, shard_rows, arrays, len(scales), sealed)

    def _compare(self, expected: Mapping[str, Any], documents: Mapping[str, Any]) -> None:
        """Every zarr.json against what `layout` writes."""
        for name, document in expected.items():
            file = f"{name}/{layout.METADATA}"
            self.covered.add(file)
            if name not in documents:
                if not (self.root / file).exists():
                    self._note("the file is missing", file, name)
            elif documents[name] != document:
                fields = [key for key in document if documents[name].get(key) != document[key]]
                what = ", ".join(f"`{key}`" for key in fields) or "unknown keys"
                self._note(f"not what the cache's attributes say: {what}", file, name)

    def _small_arrays(self, expected: Mapping[str, Any], plan: Plan | None) -> None:
        """The chunk of each small array: length, checksum, values."""
        several = {layout.STATE, layout.SATURATED, seals.SEALS, *(a.name for a in plan.arrays)} if plan else set()
        for name in (name for name in expected if name not in several):
            shape, dtype = expected[name]["shape"], np.dtype(expected[name]["data_type"]).newbyteorder("<")
            if 0 in shape:
                continue
            file = layout.chunk_path(name, 0, len(shape))
            self.covered.add(file)
            if (data := self._read(file, name)) is None:
                continue
            length = int(np.prod(shape)) * dtype.itemsize + CRC_BYTES
            if len(data) != length:
                self._note(f"{len(data):,} bytes where there should be {length:,}", file, name)
                continue
            try:
                values = np.frombuffer(without_crc(data, self.root / file), dtype)
            except PipeError:
                self._note("the checksum does not fit", file, name)
                continue
            if name in OWN_SHAPE and plan is not None and not ((values >= 0) & (values < plan.rows)).all():
                self._note("rows that the cache does not have", file, name)
            if name not in OWN_SHAPE and not np.isfinite(values).all():
                self._note("values are not finite", file, name)

    def _check_digest(self, recorded: Mapping[str, Any] | None, listed: set[str]) -> bool:
        """The digest against the files; whether it fits."""
        if recorded is None:
            return False
        for name in sorted(listed - self.covered) if self.plan_known else []:
            self._note(f"lists a file that it does not cover: {name}", layout.DIGEST)
        for name in sorted(self.covered - listed) if self.plan_known else []:
            self._note(f"does not cover {name}", layout.DIGEST)
        try:
            digest = layout.digest_of(self.root, recorded["files"], self.growing)
        except PipeError:
            self._note("cannot be compared: a file that it covers cannot be read", layout.DIGEST)
            return False
        if digest != recorded["sha256"]:
            named = any(finding.file in self.covered or finding.file == layout.DIGEST for finding in self.findings)
            what = "the files that it covers" if named else "the attributes in zarr.json: one of the two was altered"
            self._note(f"does not fit {what}", layout.DIGEST)
        return bool(digest == recorded["sha256"])

    @property
    def plan_known(self) -> bool:
        """Whether `covered` holds more than the group's own file."""
        return len(self.covered) > 1


def _is_canonical(value: Any, data: bytes) -> bool:
    try:
        return layout.json_bytes(value) == data
    except (ValueError, RecursionError):  # NaN, half a surrogate pair
        return False


def _expected(
    header: Mapping[str, Any], plan: Plan, documents: Mapping[str, Any], listed: set[str]
) -> dict[str, dict[str, Any]]:
    """Array → zarr.json, of all arrays that the attributes ask for; an optional one where anything hints at it."""
    float32, int64 = np.dtype("<f4"), np.dtype("<i8")
    found = {a.name: layout.row_array_document(a, plan.rows, plan.shard_rows) for a in plan.arrays}
    found[layout.STATE] = layout.plain_array_document((plan.rows,), (plan.shard_rows,), np.dtype("u1"), ("row",))
    shape, chunk = (plan.shards, plan.scales), (1, plan.scales)
    found[layout.SATURATED] = layout.plain_array_document(shape, chunk, int64, ("shard", "scale"))
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


def _agree(plan: Plan, expected: Mapping[str, Any], documents: Mapping[str, Any], listed: set[str]) -> bool:
    """Whether most arrays of rows bear the attributes out, and none of them is unknown to the digest's list."""
    names = [*(array.name for array in plan.arrays), layout.STATE]
    known = listed or {f"{name}/{layout.METADATA}" for name in documents}
    fits = sum(documents.get(name) == expected[name] for name in names)
    return 2 * fits > len(names) and all(f"{name}/{layout.METADATA}" in known for name in names)


def _plan_of_documents(root: Path, documents: Mapping[str, Any]) -> Plan | None:
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
    scales = sum(array.name != layout.GLOBAL and len(array.row_shape) == 2 for array in arrays)
    return Plan(root, rows, shard_rows, tuple(arrays), scales, sealed=False)
