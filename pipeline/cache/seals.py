"""Seals: a hash per file of a shard, so that a sound file in the wrong place is noticed.

Every chunk carries its own checksum, but nothing in a shard file says which shard, or which cache, it belongs to: two
shards of one array that were exchanged look sound. (A CRC over the whole file would not help: the CRC-32C of data that
is followed by its own CRC-32C is one constant, whatever the data.) The array `seals` holds, for every shard, a SHA-256
for each of its files, over

    the array's name (UTF-8), a zero byte, the shard's number as uint64, and the CRC-32C of each chunk in row order,

the numbers little-endian. Each CRC is the one that ends its chunk, so that sealing costs nothing beside writing.

Legend: S rows a shard, A sharded arrays; the files of a shard are A shard files, its `saturated` and its `state` chunk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cache import layout
from pipeline.cache.layout import RowArray
from pipeline.cache.shards import CRC_BYTES, with_crc, without_crc
from pipeline.cache.store import publish, read_bytes
from pipeline.errors import PipeError

SEALS = "seals"
SEAL_BYTES = 32
AXES = ("shard", "file", "byte")


def sealed_names(arrays: Sequence[RowArray]) -> list[str]:
    """The arrays whose files are sealed, in the order of the seals' second axis."""
    return [*(array.name for array in arrays), layout.SATURATED, layout.STATE]


def document(arrays: Sequence[RowArray], shards: int) -> dict[str, Any]:
    """zarr.json of `seals`: (shards, A + 2, 32) uint8, one chunk a shard."""
    files = len(arrays) + 2
    return layout.plain_array_document((shards, files, SEAL_BYTES), (1, files, SEAL_BYTES), np.dtype("u1"), AXES)


def seal(name: str, shard: int, checksums: bytes) -> bytes:
    """SHA-256 of one file; `checksums`: the CRC-32C bytes of its chunks in row order, 4 each, contiguous."""
    return hashlib.sha256(name.encode() + b"\0" + shard.to_bytes(8, "little") + checksums).digest()


def seal_file(root: Path, shard: int) -> Path:
    """The file with the seals of one shard."""
    return root / layout.chunk_path(SEALS, shard, 3)


def write_seals(
    root: Path, shard: int, arrays: Sequence[RowArray], checksums: Mapping[str, bytes], saturated: bytes, state: bytes
) -> None:
    """Publish the seals of one shard; before its `state` chunk, which promises that they are there.

    Args:
        checksums: sharded array → its chunks' CRC-32C bytes in row order (of `assemble_shard`'s chunks: `[:, -4:]`).
        saturated, state: the two small chunks as they are on disk, checksum included.
    """
    plain = {layout.SATURATED: saturated[-CRC_BYTES:], layout.STATE: state[-CRC_BYTES:]}
    parts = [seal(name, shard, plain[name] if name in plain else checksums[name]) for name in sealed_names(arrays)]
    publish(root, seal_file(root, shard), with_crc(b"".join(parts)))


def read_seals(root: Path, shard: int, arrays: Sequence[RowArray]) -> dict[str, bytes]:
    """Array → seal of its file of this shard.

    Raises:
        PipeError: the file is not there, damaged, or of another length.
    """
    file, names = seal_file(root, shard), sealed_names(arrays)
    body = without_crc(read_bytes(file), file)
    if len(body) != len(names) * SEAL_BYTES:
        raise PipeError(f"{len(body)} bytes where {len(names)} seals take {len(names) * SEAL_BYTES}", where=file)
    return {name: body[i * SEAL_BYTES : (i + 1) * SEAL_BYTES] for i, name in enumerate(names)}
