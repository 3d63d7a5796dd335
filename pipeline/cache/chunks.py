"""Chunks of a Zarr v3 array and how they become rows: the codecs that we read, checked and decoded without tensorstore.

A compressed store has the arrays of a plain one; only `codecs` and the rows in a chunk differ. Read here: one level of
`sharding_indexed` or none, chunks of whole rows, `bytes` (little-endian), `blosc`, `zstd`, `gzip`, `crc32c`.

Legend: S rows a shard (a file), P rows a chunk, n rows asked for.
"""

from __future__ import annotations

import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.cache import layout
from pipeline.cache.layout import RowArray
from pipeline.cache.remote_path import read_ranges
from pipeline.cache.shards import (
    CRC_BYTES,
    FIX_SHARD,
    INDEX_ENTRY_BYTES,
    MISSING_CHUNK,
    crc32c,
    named_rows,
    without_crc,
)
from pipeline.errors import PipeError

FIX_COPY = "copy the cache again"
INDEX_POOL = 64 * 2**20  # bytes of shard indexes that are kept
OUR_KEYS = ("shape", "data_type", "chunk_grid", "chunk_key_encoding", "codecs")


class DamagedRows(PipeError):
    """Rows that are missing or damaged, where everything else is well: the store could be read.

    Attributes:
        reason: in a clause without their numbers.
    """

    def __init__(self, reason: str, named: str, *, where: object, fix: str | None = None) -> None:
        super().__init__(f"{reason}: {named}", where=where, fix=fix)
        self.reason, self.named = reason, named

    def __reduce__(self) -> tuple[object, ...]:
        return (_damaged_rows, (self.reason, self.named, self.where, self.fix))


def _damaged_rows(reason: str, named: str, where: object, fix: str | None) -> DamagedRows:
    return DamagedRows(reason, named, where=where, fix=fix)


def is_plain(document: Mapping[str, Any], array: RowArray, rows: int, shard_rows: int) -> bool:
    """Whether zarr.json is our own uncompressed layout, whose shards are read without a codec."""
    expected = layout.row_array_document(array, rows, shard_rows)
    return all(document.get(key) == expected[key] for key in OUR_KEYS)


def check_foreign_document(document: Mapping[str, Any], array: RowArray, rows: int) -> None:
    """Pass a zarr.json of any codecs and chunks, as long as the values are what the cache's attributes say.

    Raises:
        PipeError: another shape or data type, or no checksums: damage would go unnoticed.
    """
    expected = layout.row_array_document(array, rows, 1)
    for key in ("zarr_format", "node_type", "shape", "data_type"):
        if document.get(key) != expected[key]:
            raise PipeError(
                f"`{key}` of the array {array.name} is {_short(document.get(key))}, not {_short(expected[key])} as the "
                "cache's attributes say",
                fix=FIX_COPY,
            )
    codecs = document.get("codecs")
    names = codec_names(codecs) if isinstance(codecs, list) else []
    if "crc32c" not in names:
        raise PipeError(
            f"the chunks of the array {array.name} have no checksums, so damage to them would go unnoticed",
            fix=f"{FIX_COPY}, with the codec crc32c",
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def codec_names(codecs: Iterable[Any]) -> list[str]:
    """Names of the codecs that a chunk passes, those of the inner chunks where there are shards."""
    names: list[str] = []
    for codec in codecs:
        name = codec.get("name") if isinstance(codec, Mapping) else None
        if name == "sharding_indexed":
            return codec_names(codec.get("configuration", {}).get("codecs", []))
        names.append(str(name))
    return names


@dataclass(frozen=True)
class Chunking:
    """How an array's rows lie in files.

    Args:
        file_rows: S; a file is a shard, or a chunk where there are no shards.
        chunk_rows: P.
        codecs: what a chunk passed when it was written, after `bytes`.
        index: "end" or "start" of a shard; None: no shards.
    """

    file_rows: int
    chunk_rows: int
    codecs: tuple[str, ...]
    index: str | None

    @property
    def index_bytes(self) -> int:
        return self.file_rows // self.chunk_rows * INDEX_ENTRY_BYTES + CRC_BYTES

    @classmethod
    def of(cls, document: Mapping[str, Any], array: RowArray, where: Any) -> Chunking:
        """From zarr.json; PipeError where it needs more than is read here."""
        try:
            encoding, codecs = document["chunk_key_encoding"], document["codecs"]
            shape = document["chunk_grid"]["configuration"]["chunk_shape"]
            separator = encoding.get("configuration", {}).get("separator", "/")
            known = (encoding["name"], separator) == ("default", "/") and shape[1:] == list(array.row_shape)
            file_rows, chunk_rows, index = shape[0], shape[0], None
            if codecs[0]["name"] == "sharding_indexed":
                inner = codecs[0]["configuration"]
                index, codecs, shape = inner.get("index_location", "end"), inner["codecs"], inner["chunk_shape"]
                chunk_rows = shape[0]
                known &= shape[1:] == list(array.row_shape) and codec_names(inner["index_codecs"]) == [
                    "bytes",
                    "crc32c",
                ]
            first, *others = codec_names(codecs)
            little = codecs[0].get("configuration", {}).get("endian", "little") == "little"
            known &= first == "bytes" and little and set(others) <= set(DECODERS) and file_rows % chunk_rows == 0
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
            raise PipeError("this zarr.json is not that of an array", where=where, fix=FIX_COPY) from error
        if not known:
            fix = "start workers by spawn instead of fork, or copy it without --compress"
            raise PipeError("this array's codecs or chunks are read by tensorstore only", where=where, fix=fix)
        return cls(file_rows, chunk_rows, tuple(others), index)

    def decode(self, data: bytes, array: RowArray) -> np.ndarray:
        """A chunk as it lies in the file → (P, ...) values; ValueError where it is damaged or of another length."""
        for codec in reversed(self.codecs):
            data = DECODERS[codec](data)
        return np.frombuffer(data, array.dtype).reshape(self.chunk_rows, *array.row_shape)


def _checked(data: bytes) -> bytes:
    body = memoryview(data)[:-CRC_BYTES]
    if len(data) < CRC_BYTES or crc32c(body) != int.from_bytes(data[-CRC_BYTES:], "little"):
        raise ValueError("a checksum does not fit")
    return bytes(body)


def _blosc(data: bytes) -> bytes:
    from numcodecs import blosc

    return bytes(blosc.decompress(data))


def _zstd(data: bytes) -> bytes:
    from numcodecs import zstd

    return bytes(zstd.decompress(data))


DECODERS = {"crc32c": _checked, "blosc": _blosc, "zstd": _zstd, "gzip": lambda data: zlib.decompress(data, wbits=31)}


class ChunkRows:
    """Rows by byte ranges, decoded here: for schemes that only fsspec knows, and for processes without tensorstore.

    Args:
        root: the store, a Path or a RemotePath.
        array: which array.
        document: its zarr.json.
    """

    def __init__(self, root: Any, array: RowArray, document: Mapping[str, Any]) -> None:
        self.root, self.array = root, array
        self.chunking = Chunking.of(document, array, root / array.name / layout.METADATA)
        self.indexes: OrderedDict[int, np.ndarray] = OrderedDict()  # the one used longest ago first
        self._lock = threading.Lock()

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """rows (n,) int64, in any order → (n, ...); each chunk is fetched and decoded once. PipeError if damaged."""
        out = np.empty((len(rows), *self.array.row_shape), self.array.dtype)
        chunk_of, slots = np.divmod(rows, self.chunking.chunk_rows)
        chunks, which = np.unique(chunk_of, return_inverse=True)
        order = np.argsort(which, kind="stable")
        groups = np.split(order, np.searchsorted(which[order], np.arange(1, len(chunks))))
        for chunk, own, data in zip(chunks.tolist(), groups, self._fetch(chunks, rows, which), strict=True):
            try:
                out[own] = self.chunking.decode(data, self.array)[slots[own]]
            except (ValueError, RuntimeError, zlib.error) as error:
                raise self._damaged("damaged rows, their chunk cannot be decoded", chunk, rows[own]) from error
        return out

    def _fetch(self, chunks: np.ndarray, rows: np.ndarray, which: np.ndarray) -> list[bytes]:
        """The bytes of each of `chunks`; `rows[which == i]` are in the i-th."""
        if self.chunking.index is None:
            return self._ranges([(chunk, (None, None)) for chunk in chunks.tolist()], rows)
        files, slots = np.divmod(chunks, self.chunking.file_rows // self.chunking.chunk_rows)
        indexes = self._open_indexes(np.unique(files).tolist(), rows)
        entries = np.array([indexes[file][slot] for file, slot in zip(files.tolist(), slots.tolist(), strict=True)])
        for i in np.flatnonzero((entries == MISSING_CHUNK).any(axis=1)):
            raise self._damaged("rows are marked ok but have no chunk", int(chunks[i]), rows[which == i])
        spans = [(int(offset), int(offset + length)) for offset, length in entries]
        found = self._ranges(list(zip(files.tolist(), spans, strict=True)), rows)
        for number, (part, (first, end)) in enumerate(zip(found, spans, strict=True)):
            if len(part) != end - first:
                raise self._damaged("this shard was cut short", int(chunks[number]), rows[which == number])
        return found

    def _open_indexes(self, files: list[int], rows: np.ndarray) -> dict[int, np.ndarray]:
        """file → (S/P, 2) uint64, offset and length of each chunk."""
        size = self.chunking.index_bytes
        span = (None, size) if self.chunking.index == "end" else (0, size)
        with self._lock:
            found = {file: self.indexes[file] for file in files if file in self.indexes}
        absent = [file for file in files if file not in found]
        for file, data in zip(absent, self._ranges([(file, span) for file in absent], rows), strict=True):
            own = named_rows(rows[rows // self.chunking.file_rows == file])
            if len(data) < size:
                what = f"this shard was cut short: {len(data):,} bytes"
                raise DamagedRows(what, own, where=self._file(file), fix=FIX_SHARD)
            try:
                found[file] = np.frombuffer(without_crc(data, self._file(file)), "<u8").reshape(-1, 2)
            except PipeError as error:
                raise DamagedRows(error.what, own, where=error.where, fix=error.fix) from error
        with self._lock:
            for file in files:
                self.indexes[file] = found[file]
                self.indexes.move_to_end(file)
            while len(self.indexes) * size > INDEX_POOL and len(self.indexes) > 1:
                self.indexes.popitem(last=False)
        return found

    def _ranges(self, wanted: list[tuple[int, Any]], rows: np.ndarray) -> list[bytes]:
        names = [
            (layout.chunk_path(self.array.name, file, len(self.array.row_shape) + 1), span) for file, span in wanted
        ]
        try:
            return read_ranges(self.root, names)
        except FileNotFoundError as error:
            lost = {file for file, _ in wanted if not self._there(file)}
            own = rows[np.isin(rows // self.chunking.file_rows, list(lost))] if lost else rows
            where = self._file(min(lost)) if lost else self.root / self.array.name
            what = f"a file of the array {self.array.name} that `state` promises is missing"
            raise DamagedRows(what, named_rows(own), where=where, fix=FIX_COPY) from error
        except OSError as error:
            raise PipeError(f"cannot read the cache: {error.strerror}", where=self.root / self.array.name) from error

    def _there(self, file: int) -> bool:
        try:
            return bool(self._file(file).exists())
        except OSError:
            return True  # it is not known to be missing

    def _file(self, file: int) -> Any:
        return self.root / layout.chunk_path(self.array.name, file, len(self.array.row_shape) + 1)

    def _damaged(self, what: str, chunk: int, rows: np.ndarray) -> DamagedRows:
        file = chunk * self.chunking.chunk_rows // self.chunking.file_rows
        return DamagedRows(what, f"{self.array.name}, {named_rows(rows)}", where=self._file(file), fix=FIX_SHARD)
