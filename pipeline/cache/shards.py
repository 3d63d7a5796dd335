"""The bytes of a shard: checksums, the index at its end, assembling one in memory and mapping one safely.

Legend: S rows a shard, n rows given.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from pipeline.cache import layout
from pipeline.cache.layout import RowArray
from pipeline.errors import PipeError

CRC_BYTES = 4
INDEX_ENTRY_BYTES = 16
MISSING_CHUNK = 2**64 - 1  # both numbers of an index entry whose chunk does not exist (Zarr v3)
FIX_SHARD = "delete this file and run pipe extract-teacher: it writes the shard again"


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
    chunks[:, :row_bytes] = values[kept].reshape(len(kept), -1).view(np.uint8)
    checksums = [crc32c(chunk[:row_bytes]) for chunk in chunks]
    chunks[:, row_bytes:] = np.array(checksums, "<u4").view(np.uint8).reshape(-1, CRC_BYTES)
    index = np.full((len(present), 2), MISSING_CHUNK, "<u8")
    index[kept, 0] = np.arange(len(kept), dtype=np.uint64) * np.uint64(row_bytes + CRC_BYTES)
    index[kept, 1] = row_bytes + CRC_BYTES
    return chunks, with_crc(index.tobytes())


def index_bytes(shard_rows: int) -> int:
    """Length of the index at the end of a shard file."""
    return shard_rows * INDEX_ENTRY_BYTES + CRC_BYTES


@dataclass(frozen=True)
class ShardMap:
    """A mapped shard file: its bytes and each row's offset in them (S,) int64, -1 where the row has no chunk."""

    data: memoryview
    offsets: np.ndarray


def read_state(root: Path, shard: int, shard_rows: int) -> np.ndarray | None:
    """(S,) uint8, the state of one shard's rows (the last shard padded with zeros), or None where none is written."""
    file = root / layout.chunk_path(layout.STATE, shard, 1)
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return None
    state = np.frombuffer(without_crc(data, file), np.uint8)
    if len(state) != shard_rows:
        raise PipeError(f"{len(state)} states where a shard has {shard_rows} rows", where=file, fix=FIX_SHARD)
    return state


def map_shard(array: RowArray, file: Path, shard_rows: int, ok_rows: np.ndarray) -> ShardMap:
    """Map one shard after checking that all it promises lies within it: beyond a file's end a map kills the process."""
    stride, index_size = array.row_bytes + CRC_BYTES, index_bytes(shard_rows)
    least = len(ok_rows) * stride + index_size
    try:
        handle = os.open(file, os.O_RDONLY)
    except FileNotFoundError as error:
        raise PipeError(
            "a shard that `state` promises is missing", where=file, fix="run: pipe extract-teacher"
        ) from error
    except OSError as error:
        raise PipeError(f"cannot open this shard: {error.strerror}", where=file) from error
    try:
        size = os.fstat(handle).st_size
        if size < least:
            raise PipeError(f"this shard was cut short: {size:,} of {least:,} bytes", where=file, fix=FIX_SHARD)
        index = os.pread(handle, index_size, size - index_size)
        entries = np.frombuffer(without_crc(index, file), "<u8").reshape(shard_rows, 2)
        data = memoryview(mmap.mmap(handle, size, access=mmap.ACCESS_READ))
    finally:
        os.close(handle)
    missing = (entries == MISSING_CHUNK).all(axis=1)
    beyond = np.uint64(size - index_size - stride) if size >= index_size + stride else np.uint64(0)
    sound = missing | ((entries[:, 0] <= beyond) & (entries[:, 1] == stride))
    if not sound.all():
        raise PipeError("this shard's index points outside it", where=file, fix=FIX_SHARD)
    if missing[ok_rows].any():
        raise PipeError(
            f"{int(missing[ok_rows].sum())} rows are marked ok but have no chunk", where=file, fix=FIX_SHARD
        )
    offsets = np.where(missing, np.int64(-1), entries[:, 0].astype(np.int64))
    return ShardMap(data, offsets)
