"""The array `saturated`: how many values of a row were cut off when it was quantised, by scale, all views together.

A count belongs to its row, so that a row keeps it wherever it goes: into a larger shard, or into a copy. (Caches of
older writers have one count for a whole shard, which no part of its rows can be told from; they go on as they are.)

Legend: R rows, S rows a shard, n rows of one shard, L scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.cache import layout
from pipeline.cache.shards import with_crc

ATTRIBUTE, BY_ROW = "saturated_by", "row"


def by_row(attributes: Mapping[str, Any]) -> bool:
    """Whether a cache with these attributes counts row by row."""
    return bool(attributes.get(ATTRIBUTE) == BY_ROW)


def document(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """zarr.json of `saturated`: (R, L) int32, a chunk a shard; of older writers (⌈R/S⌉, L) int64."""
    rows, shard_rows, scales = attributes["rows"], attributes["shard_rows"], len(attributes["scales"])
    if by_row(attributes):
        return layout.plain_array_document((rows, scales), (shard_rows, scales), np.dtype("<i4"), ("row", "scale"))
    shards = -(-rows // shard_rows)
    return layout.plain_array_document((shards, scales), (1, scales), np.dtype("<i8"), ("shard", "scale"))


def chunk_bytes(attributes: Mapping[str, Any]) -> int:
    """Length of one chunk without its checksum."""
    scales = len(attributes["scales"])
    return 4 * attributes["shard_rows"] * scales if by_row(attributes) else 8 * scales


def chunk(counts: np.ndarray, attributes: Mapping[str, Any]) -> bytes:
    """One shard's chunk as it is on disk; counts (n, L) of its rows, zero where a row is not there."""
    if not by_row(attributes):
        return with_crc(counts.sum(axis=0).astype("<i8").tobytes())
    padded = np.zeros((attributes["shard_rows"], counts.shape[1]), "<i4")
    padded[: len(counts)] = counts
    return with_crc(padded.tobytes())


def parse(body: bytes, attributes: Mapping[str, Any]) -> np.ndarray:
    """A chunk without its checksum → (S, L) int64, or (1, L) for the whole shard."""
    values = np.frombuffer(body, "<i4" if by_row(attributes) else "<i8")
    return values.reshape(-1, len(attributes["scales"])).astype(np.int64)
