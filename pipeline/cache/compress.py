"""Compressed copies of a cache: the same arrays, attributes and states; chunks by Blosc or Zstd, and CRC-32C.

Quantised features hardly shrink; float16 ones do. The copy is standard Zarr v3 with standard codecs. Its zarr.json
files differ from the source's, so its digest does too; it has no seals, which are over the rows of plain files.

Legend: S rows a shard, P rows a chunk, n rows.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from pipeline.cache import counts, layout, seals
from pipeline.cache.layout import RowArray
from pipeline.cache.locks import StoreLock
from pipeline.cache.reader import open_cache
from pipeline.cache.shards import MISSING_CHUNK, with_crc
from pipeline.cache.store import publish
from pipeline.errors import PipeError

Codec = Literal["blosc", "zstd"]
LEVELS = {"blosc": range(10), "zstd": range(1, 23)}


@dataclass(frozen=True)
class Compression:
    """How chunks are compressed.

    Args:
        codec: "blosc" (Zstd within, bytes shuffled by significance) or "zstd".
        level: 0-9 for blosc, 1-22 for zstd.
        rows_per_chunk: P; divides the rows of a shard. More compress better, but one row then costs the reading of all.

    Raises:
        PipeError: no such codec or level.
    """

    codec: Codec = "blosc"
    level: int = 5
    rows_per_chunk: int = 1

    def __post_init__(self) -> None:
        if self.codec not in get_args(Codec) or self.level not in LEVELS[self.codec]:
            fix = "blosc has levels 0 to 9, zstd 1 to 22"
            raise PipeError(f"no codec {self.codec} of level {self.level}", where="--compress", fix=fix)

    def contents(self, plain: Mapping[str, bytes], arrays: Mapping[str, RowArray], shard_rows: int) -> dict[str, bytes]:
        """The metadata files of a compressed store, from those of the plain one (see `header.header_contents`).

        Args:
            arrays: of rows, by name.

        Raises:
            PipeError: P does not divide `shard_rows`.
        """
        if self.rows_per_chunk < 1 or shard_rows % self.rows_per_chunk:
            fix = f"take a divisor of {shard_rows}"
            raise PipeError(f"chunks of {self.rows_per_chunk} rows do not fill a shard", fix=fix)
        found = {name: data for name, data in plain.items() if name.split("/")[0] != seals.SEALS}
        for name, array in arrays.items():
            file = f"{name}/{layout.METADATA}"
            document = json.loads(found[file])
            sharding = document["codecs"][0]["configuration"]
            sharding["chunk_shape"] = [self.rows_per_chunk, *array.row_shape]
            sharding["codecs"] = codec_documents(self.codec, self.level, array.dtype)
            found[file] = layout.json_bytes(document)
        return found


class CompressedWriter:
    """Writes the shards of a compressed store that has been set up, as `CacheWriter` does; threads may share one.

    Args:
        path: of the store.
        lock: that this process holds on it; let go of at the end.
        compression: the one that its metadata speaks of.
    """

    def __init__(self, path: Path, lock: StoreLock, compression: Compression) -> None:
        cache = open_cache(path)
        self.path, self.compression, self._lock = path, compression, lock
        self.arrays, self.scales, self.rows, self.shard_rows = cache.arrays, cache.scales, cache.rows, cache.shard_rows
        self.counting = cache.counting

    def __enter__(self) -> CompressedWriter:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            (self.path / layout.TEMPORARY).rmdir()
        self._lock.close()

    def rows_of(self, index: int) -> range:
        """Manifest rows of shard `index`; the last shard has fewer."""
        return range(index * self.shard_rows, min((index + 1) * self.shard_rows, self.rows))

    def write_shard(
        self, index: int, arrays: Mapping[str, np.ndarray], state: np.ndarray, saturated: np.ndarray
    ) -> None:
        """Arguments as those of `CacheWriter.write_shard`; `state` last, as there."""
        slots, how = np.flatnonzero(state == layout.OK), self.compression
        for array in self.arrays:
            encode = encoder(how.codec, how.level, array.dtype)
            values = arrays[array.name][slots]
            parts = compressed_shard(array, values, slots, self.shard_rows, how.rows_per_chunk, encode)
            publish(self.path, array.file(self.path, index), *parts)
        cut_off = counts.chunk(saturated, self.counting)
        publish(self.path, self.path / layout.chunk_path(layout.SATURATED, index, 2), cut_off)
        padded = np.zeros(self.shard_rows, np.uint8)
        padded[: len(state)] = state
        publish(self.path, self.path / layout.chunk_path(layout.STATE, index, 1), with_crc(padded.tobytes()))


def codec_documents(codec: Codec, level: int, dtype: np.dtype[Any]) -> list[dict[str, Any]]:
    """What zarr.json says of a value's way into a chunk: bytes, compressed, checksum."""
    if codec == "blosc":
        configuration: dict[str, Any] = {"cname": "zstd", "clevel": level, "blocksize": 0, "typesize": dtype.itemsize}
        configuration["shuffle"] = "shuffle" if dtype.itemsize > 1 else "noshuffle"
    else:
        configuration = {"level": level, "checksum": False}
    first, *checks = layout.plain_array_document((1,), (1,), dtype, ("row",))["codecs"]
    return [first, {"name": codec, "configuration": configuration}, *checks]


def encoder(codec: Codec, level: int, dtype: np.dtype[Any]) -> Callable[[np.ndarray], bytes]:
    """The function that compresses a chunk as `codec_documents` says, checksum not included."""
    if codec == "zstd":
        from numcodecs import zstd

        return lambda values: bytes(zstd.compress(values.tobytes(), level))
    from numcodecs import Blosc

    shuffle = Blosc.SHUFFLE if dtype.itemsize > 1 else Blosc.NOSHUFFLE
    blosc = Blosc(cname="zstd", clevel=level, shuffle=shuffle, blocksize=0)
    return lambda values: bytes(blosc.encode(values))


def compressed_shard(
    array: RowArray,
    values: np.ndarray,
    slots: np.ndarray,
    shard_rows: int,
    rows_per_chunk: int,
    encode: Callable[[np.ndarray], bytes],
) -> list[bytes]:
    """The pieces of a shard file: chunks in order, then the index.

    Args:
        values: (n, ...) as stored.
        slots: (n,) ascending, their rows in the shard; the other rows of a chunk are zeros, and a chunk without any is
            not stored.
    """
    index = np.full((shard_rows // rows_per_chunk, 2), MISSING_CHUNK, "<u8")
    parts, offset = [], 0
    for number in np.unique(slots // rows_per_chunk).tolist():
        own = slots // rows_per_chunk == number
        chunk = np.zeros((rows_per_chunk, *array.row_shape), array.dtype)
        chunk[slots[own] % rows_per_chunk] = values[own]
        parts.append(with_crc(encode(chunk)))
        index[number] = offset, len(parts[-1])
        offset += len(parts[-1])
    return [*parts, with_crc(index.tobytes())]
