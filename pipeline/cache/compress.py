"""A compressed copy of a finished cache: the same arrays, attributes and states; chunks by Blosc or Zstd, and CRC-32C.

Quantised features hardly shrink; float16 ones do. The copy is standard Zarr v3 with standard codecs. Its zarr.json
files differ from the source's, so its digest does too.

Legend: S rows a shard, P rows a chunk, n rows present in a shard.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.cache import layout
from pipeline.cache.layout import RowArray
from pipeline.cache.reader import Cache, open_cache
from pipeline.cache.shards import MISSING_CHUNK, read_state, with_crc
from pipeline.cache.store import publish, read_bytes, read_json
from pipeline.errors import PipeError

Codec = Literal["blosc", "zstd"]
LEVELS = {"blosc": range(10), "zstd": range(1, 23)}


def compress_cache(
    source: str | Path,
    out: str | Path,
    codec: Codec = "blosc",
    level: int = 5,
    rows_per_chunk: int = 1,
    progress: Callable[[int], object] | None = None,
) -> Path:
    """Copy the cache `source` into the new folder `out`, its row arrays compressed.

    Every row is checked against its CRC-32C as it is read. `digest.json` is written last: a copy that was cut off is
    no cache. More rows a chunk compress better, but one row then costs the reading of all of them.

    Args:
        codec: "blosc" (Zstd within, bytes shuffled by significance) or "zstd".
        level: 0-9 for blosc, 1-22 for zstd.
        rows_per_chunk: P; divides the rows of a shard.
        progress: called with the number of rows of each shard that is done.

    Raises:
        PipeError: no cache there, a damaged row, something at `out`, or a level or P that cannot be.
    """
    if codec not in LEVELS or level not in LEVELS[codec]:
        raise PipeError(f"no codec {codec} of level {level}", fix="blosc has levels 0 to 9, zstd 1 to 22")
    out = Path(out)
    cache = open_cache(source, verify=True)
    if rows_per_chunk < 1 or cache.shard_rows % rows_per_chunk:
        fix = f"take a divisor of {cache.shard_rows}"
        raise PipeError(f"chunks of {rows_per_chunk} rows do not fill a shard", where=source, fix=fix)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PipeError("there is something already", where=out, fix="name a new folder, or move it away")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PipeError(f"cannot write here: {error.strerror}", where=out, fix="fix the permissions") from error
    covered = _copy_header(cache, out, codec, level, rows_per_chunk)
    for shard in range(cache.shards):
        _copy_shard(cache, out, shard, codec, level, rows_per_chunk)
        if progress is not None:
            progress(min(cache.shard_rows, cache.rows - shard * cache.shard_rows))
    digest = {"sha256": layout.digest_of(out, covered), "files": covered}
    publish(out, out / layout.DIGEST, layout.json_bytes(digest))
    if (out / layout.TEMPORARY).is_dir():
        (out / layout.TEMPORARY).rmdir()
    return out


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


def _copy_header(cache: Cache, out: Path, codec: Codec, level: int, rows_per_chunk: int) -> list[str]:
    """All metadata but digest.json, which lists the names that this returns."""
    covered: list[str] = read_json(cache.path / layout.DIGEST)["files"]
    arrays = {f"{array.name}/{layout.METADATA}": array for array in cache.arrays}
    for name in covered:
        data = read_bytes(cache.path / name)
        if name in arrays:
            document = read_json(cache.path / name)
            sharding = document["codecs"][0]["configuration"]
            sharding["chunk_shape"] = [rows_per_chunk, *arrays[name].row_shape]
            sharding["codecs"] = codec_documents(codec, level, arrays[name].dtype)
            data = layout.json_bytes(document)
        publish(out, out / name, data)
    return sorted(covered)


def _copy_shard(cache: Cache, out: Path, shard: int, codec: Codec, level: int, rows_per_chunk: int) -> None:
    """One shard of every array, what was cut off in it, and its states last, as the writer does."""
    state = read_state(cache.path, shard, cache.shard_rows)
    if state is None:
        return
    slots = np.flatnonzero(state == layout.OK)
    raw = cache.read_raw(slots + shard * cache.shard_rows)
    for array in cache.arrays if len(slots) else []:
        encode = encoder(codec, level, array.dtype)
        parts = compressed_shard(array, raw[array.name], slots, cache.shard_rows, rows_per_chunk, encode)
        publish(out, array.file(out, shard), *parts)
    for name, dimensions in ((layout.SATURATED, 2), (layout.STATE, 1)):
        file = layout.chunk_path(name, shard, dimensions)
        if (cache.path / file).exists():
            publish(out, out / file, read_bytes(cache.path / file))


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
