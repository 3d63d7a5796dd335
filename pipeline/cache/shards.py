"""The bytes of a shard: checksums, the index at its end, assembling one in memory and opening one safely.

Legend: S rows a shard, n rows given.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import google_crc32c
import numpy as np

from pipeline.cache import layout
from pipeline.cache.layout import RowArray
from pipeline.errors import PipeError

CRC_BYTES = 4
INDEX_ENTRY_BYTES = 16
MISSING_CHUNK = 2**64 - 1  # both numbers of an index entry whose chunk does not exist (Zarr v3)
FIX_SHARD = "run: pipe cache verify --repair"
MERGED_GAP = 64 * 1024  # bytes between two rows that are read ahead in one go
NAMED_ROWS = 5  # how many rows an error names


def crc32c(data: Any) -> int:
    """CRC-32C of a contiguous buffer."""
    # The C function takes bytes and arrays, but no memoryview; an array around one copies nothing.
    return int(google_crc32c.value(np.frombuffer(data, np.uint8) if isinstance(data, memoryview) else data))


def with_crc(data: bytes) -> bytes:
    """`data` followed by its CRC-32C, little-endian (Zarr's crc32c codec)."""
    return data + crc32c(data).to_bytes(CRC_BYTES, "little")


def without_crc(data: bytes, where: Path) -> bytes:
    """Undo `with_crc`; PipeError where the checksum does not fit."""
    body, crc = data[:-CRC_BYTES], data[-CRC_BYTES:]
    if len(data) < CRC_BYTES or crc32c(body) != int.from_bytes(crc, "little"):
        raise PipeError("this file is damaged (its checksum does not fit)", where=where, fix=FIX_SHARD)
    return body


def assemble_shard(values: np.ndarray, present: np.ndarray) -> tuple[np.ndarray, bytes]:
    """One shard file as (chunks, index): write the two one after the other.

    Args:
        values: (n, ...) contiguous rows in the stored little-endian dtype, n <= S.
        present: (S,) bool, the rows that get a chunk; only the first n may be set. The others get a missing entry.

    Returns:
        chunks: (present.sum(), row_bytes + 4) uint8, each row's bytes and their CRC-32C, in row order.
        index: S entries (offset, bytes) uint64 and the CRC-32C of them all.
    """
    kept = np.flatnonzero(present)
    row_bytes = values[:1].nbytes
    chunks = np.empty((len(kept), row_bytes + CRC_BYTES), np.uint8)
    rows = values if len(kept) == len(values) else values[kept]  # a copy of a whole shard is spared where it can be
    chunks[:, :row_bytes] = rows.reshape(len(kept), values[:1].size).view(np.uint8)
    checksums = [crc32c(chunk[:row_bytes]) for chunk in chunks]
    chunks[:, row_bytes:] = np.array(checksums, "<u4").view(np.uint8).reshape(-1, CRC_BYTES)
    index = np.full((len(present), 2), MISSING_CHUNK, "<u8")
    index[kept, 0] = np.arange(len(kept), dtype=np.uint64) * np.uint64(row_bytes + CRC_BYTES)
    index[kept, 1] = row_bytes + CRC_BYTES
    return chunks, with_crc(index.tobytes())


def index_bytes(shard_rows: int) -> int:
    """Length of the index at the end of a shard file."""
    return shard_rows * INDEX_ENTRY_BYTES + CRC_BYTES


def read_state(root: Path, shard: int, shard_rows: int) -> np.ndarray | None:
    """(S,) uint8, the state of one shard's rows (the last shard padded with zeros), or None where none is written."""
    file = root / layout.chunk_path(layout.STATE, shard, 1)
    data = bytes_if_there(file)
    return None if data is None else parse_state(data, file, shard_rows)


def bytes_if_there(file: Path) -> bytes | None:
    """A file's bytes, None where there is no such file; PipeError where it cannot be read."""
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise PipeError(f"cannot read the cache: {error.strerror}", where=file) from error


def parse_state(data: bytes, file: Path, shard_rows: int) -> np.ndarray:
    """The bytes of a `state` chunk → (S,) uint8; PipeError where they are damaged."""
    state = np.frombuffer(without_crc(data, file), np.uint8)
    if len(state) != shard_rows:
        raise PipeError(f"{len(state)} states where a shard has {shard_rows} rows", where=file, fix=FIX_SHARD)
    return state


class States:
    """The `state` of all rows of a store, read once, at the first question. Picklable, without what was read.

    Args:
        root: the store.
        rows: R.
        shard_rows: S.
    """

    def __init__(self, root: Path, rows: int, shard_rows: int) -> None:
        self.root, self.rows, self.shard_rows = root, rows, shard_rows
        self._state: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_state": None}

    def all(self) -> np.ndarray:
        """(R,) uint8, read-only."""
        if self._state is None:
            shards = -(-self.rows // self.shard_rows)
            state = np.zeros(shards * self.shard_rows, np.uint8)
            names = [layout.chunk_path(layout.STATE, shard, 1) for shard in range(shards)]
            at_once = getattr(self.root, "read_many", None)  # a remote store answers many questions at a time
            try:
                found = [bytes_if_there(self.root / name) for name in names] if at_once is None else at_once(names)
            except OSError as error:
                where = error.filename or self.root
                raise PipeError(f"cannot read the cache: {error.strerror}", where=where) from error
            for shard, data in enumerate(found):
                if data is not None:
                    part = parse_state(data, self.root / names[shard], self.shard_rows)
                    state[shard * self.shard_rows : (shard + 1) * self.shard_rows] = part
            state.flags.writeable = False
            self._state = state[: self.rows]
        return self._state

    def of(self, shard: int) -> np.ndarray:
        """(up to S,) uint8, of one shard's rows."""
        return self.all()[shard * self.shard_rows : (shard + 1) * self.shard_rows]

    def forget(self) -> None:
        """Read it again at the next question."""
        self._state = None


class RowOffsets:
    """Where each row of a shard lies in its file, as small as it goes: an epoch opens thousands of shards.

    Args:
        offsets: (S,) int64 bytes, -1 where the row has no chunk.
        stride: bytes of a chunk with its checksum. Where all offsets are multiples of it (our own writer's always are),
            their ranks are kept in 4 bytes each, or not at all where rank and slot are the same.
    """

    def __init__(self, offsets: np.ndarray, stride: int) -> None:
        self.stride = stride
        self.offsets: np.ndarray | None = None
        self.ranks: np.ndarray | None = None
        if np.array_equal(offsets, np.arange(len(offsets), dtype=np.int64) * stride):
            return
        ranks, rest = np.divmod(offsets, stride)
        present = offsets >= 0
        if rest[present].any() or (ranks[present] >= 2**32).any():
            self.offsets = offsets
        else:
            self.ranks = np.where(present, ranks, 0).astype(np.uint32)

    @property
    def dense(self) -> bool:
        """Whether row i lies at i strides."""
        return self.offsets is None and self.ranks is None

    def at(self, slots: np.ndarray) -> np.ndarray:
        """slots (n,) int64 of rows that are there → their offsets (n,) int64."""
        if self.offsets is not None:
            return self.offsets[slots]
        if self.ranks is not None:
            return self.ranks[slots].astype(np.int64) * self.stride
        return slots * self.stride


def open_shard(array: RowArray, file: Path, shard_rows: int, ok_rows: np.ndarray) -> tuple[int, int, RowOffsets]:
    """Open a shard file after checking that all it promises lies within it: beyond a map's end lies SIGBUS.

    Args:
        ok_rows: (m,) slots of the rows that `state` promises.

    Returns:
        a file descriptor that the caller closes, the file's size, and where its rows lie.

    Raises:
        PipeError: the file is missing, cut short or unreadable, or its index is damaged or lies.
    """
    stride, index_size = array.row_bytes + CRC_BYTES, index_bytes(shard_rows)
    least = len(ok_rows) * stride + index_size
    handle = _open(file)
    try:
        size = os.fstat(handle).st_size
        if size < least:
            raise PipeError(f"this shard was cut short: {size:,} of {least:,} bytes", where=file, fix=FIX_SHARD)
        index = os.pread(handle, index_size, size - index_size)
        offsets = parse_index(index, file, size, stride)
        if (offsets[ok_rows] < 0).any():
            lost = int((offsets[ok_rows] < 0).sum())
            raise PipeError(f"{lost} rows are marked ok but have no chunk", where=file, fix=FIX_SHARD)
        return handle, size, RowOffsets(offsets, stride)
    except BaseException as error:
        os.close(handle)
        if isinstance(error, OSError):
            raise PipeError(f"cannot read this shard: {error.strerror}", where=file) from error
        raise


def parse_index(index: bytes, where: Any, size: int, stride: int) -> np.ndarray:
    """The index of a shard of `size` bytes → (S,) int64 offsets, -1 where a row has no chunk.

    Raises:
        PipeError: its checksum does not fit, or an entry is no chunk of `stride` bytes within the file.
    """
    entries = np.frombuffer(without_crc(index, where), "<u8").reshape(-1, 2)
    missing = (entries == MISSING_CHUNK).all(axis=1)
    room = size - len(index) - stride  # the last offset at which a chunk may begin
    sound = missing | ((entries[:, 0] <= np.uint64(max(room, 0))) & (entries[:, 1] == stride) & (room >= 0))
    if not sound.all():
        raise PipeError("this shard's index points outside it", where=where, fix=FIX_SHARD)
    return np.where(missing, np.int64(-1), entries[:, 0].astype(np.int64))


def _open(file: Path) -> int:
    try:
        return os.open(file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError as error:
        raise PipeError(
            "a shard that `state` promises is missing", where=file, fix="run: pipe extract-teacher"
        ) from error
    except OSError as error:
        raise PipeError(f"cannot open this shard: {error.strerror}", where=file) from error


def refuse_damaged(array: RowArray, root: Any, damaged: np.ndarray, shard_rows: int) -> NoReturn:
    """The error of rows (n,) whose checksums do not fit."""
    file = array.file(root, int(damaged[0]) // shard_rows)
    raise PipeError(f"damaged rows, checksums do not fit: {named_rows(damaged)}", where=file, fix=FIX_SHARD)


def runs_of(places: np.ndarray, length: int) -> Iterator[tuple[int, int]]:
    """Ranges that cover chunks of `length` bytes at `places`, near ones merged: what to read ahead in one go."""
    ordered = np.sort(places)
    if not len(ordered):
        return
    breaks = np.flatnonzero(np.diff(ordered) > length + MERGED_GAP) + 1
    starts, ends = ordered[np.r_[0, breaks]], ordered[np.r_[breaks - 1, len(ordered) - 1]] + length
    yield from zip(starts.tolist(), ends.tolist(), strict=True)


def named_rows(rows: np.ndarray) -> str:
    """`3 rows (1, 2, 7)` or `90 rows (0, 1, 2, 3, 4, …)`."""
    distinct = np.unique(rows)
    listed = ", ".join(str(row) for row in distinct[:NAMED_ROWS])
    more = ", …" if len(distinct) > NAMED_ROWS else ""
    return f"{len(distinct):,} row{'s' if len(distinct) != 1 else ''} ({listed}{more})"
