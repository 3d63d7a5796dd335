"""How fast are random rows of a teacher cache read, against the limit and against other readers of the same store?

The store has the shape of a PCA-256 int8 cache of a ViT-B teacher (76.8 kB a row), filled with random numbers, in a
temporary folder, and stays in the page cache. All readers fetch the same batches of random rows, in turns:

    np.memmap              fancy indexing of four flat files with the same values: the limit of a copy
    np.memmap, to float32  the same and the multiplication with the steps: the limit for `read`
    read_raw               ours, as stored
    read_raw, verify       ours, with every row's CRC-32C checked
    read                   ours, dequantised to float32
    tensorstore            one gather an array, one after the other; a 16 MB cache pool keeps the shard indexes
    zarr oindex            zarr-python, one gather an array; few batches, since it is slow
    read_raw, blosc, zstd  with --compressed: ours, of copies by `pipe cache copy --compress`, read through tensorstore

Wall time is what a training job feels; CPU time (all threads) hardly depends on what else the machine does.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorstore
import zarr
from common import Timing, interleave, load, machine, markdown, parse, parser, report
from stores import Rows, build_store

from pipeline.cache.codec import dequantise
from pipeline.cache.compress import Compression
from pipeline.cache.copy import copy_cache
from pipeline.cache.reader import Cache

Reader = Callable[[np.ndarray], Rows]

LIMIT, FLOAT_READERS, SLOW = "np.memmap", ("np.memmap, to float32", "read"), "zarr oindex"
COMPRESSIONS = (Compression("blosc", 5), Compression("zstd", 3))
TENSORSTORE_POOL = 16_000_000  # bytes: far more than all shard indexes, far less than the rows


def readers(cache: Cache, flat: Path) -> dict[str, Reader]:
    """Name → a function of row numbers (n,) that gives every array of those rows."""
    maps = {
        array.name: np.memmap(flat / array.name, array.dtype, "r", shape=(cache.rows, *array.row_shape))
        for array in cache.arrays
    }
    stores = {array.name: _open_tensorstore(cache.path / array.name) for array in cache.arrays}
    group = zarr.open_group(cache.path, mode="r")
    opened = {array.name: group[array.name] for array in cache.arrays}

    def memmap(rows: np.ndarray) -> Rows:
        return {name: np.asarray(values[rows]) for name, values in maps.items()}

    def memmap_to_float(rows: np.ndarray) -> Rows:
        return {name: dequantise(values, cache.steps.get(name)) for name, values in memmap(rows).items()}

    return {
        "np.memmap": memmap,
        "np.memmap, to float32": memmap_to_float,
        "read_raw": cache.read_raw,
        "read_raw, verify": lambda rows: cache.read_raw(rows, verify=True),
        "read": cache.read,
        "tensorstore": lambda rows: {name: store[rows].read().result() for name, store in stores.items()},
        "zarr oindex": lambda rows: {name: array.oindex[rows] for name, array in opened.items()},
    }


def compressed_readers(cache: Cache, folder: Path) -> dict[str, Reader]:
    """The same of compressed copies, which are made below `folder`; random numbers hardly shrink."""
    copies = {
        how.codec: copy_cache(cache.path, folder / f"{how.codec}.zarr", compress=how).cache for how in COMPRESSIONS
    }
    return {f"read_raw, {codec}": copy.read_raw for codec, copy in copies.items()}


def _open_tensorstore(path: Path) -> tensorstore.TensorStore:
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{path}/"},
        "context": {"cache_pool": {"total_bytes_limit": TENSORSTORE_POOL}},
        "recheck_cached_data": "open",  # nobody writes: no file needs to be looked at twice
    }
    return tensorstore.open(spec, read=True, write=False).result()


def check_agreement(found: dict[str, Reader], rows: np.ndarray) -> None:
    """Raise unless all readers give the same values, the float32 ones among themselves."""
    raw, floats = found[LIMIT](rows), found[FLOAT_READERS[0]](rows)
    for name, reader in found.items():
        wanted, given = floats if name in FLOAT_READERS else raw, reader(rows)
        for array, values in wanted.items():
            if given[array].dtype != values.dtype or not np.array_equal(given[array], values):
                raise ValueError(f"{name} and {LIMIT} differ in {array}")


def tabulate(timings: dict[str, Timing], batch: int, row_bytes: int) -> tuple[str, dict[str, float]]:
    """The table, and its figures by name."""
    cells: list[list[str]] = []
    figures: dict[str, float] = {}
    for name, timing in timings.items():
        rate, ratio = batch / timing.median(), 1 / timing.ratio(timings[LIMIT])
        cpu = timing.median("cpu") / batch * 1e6
        cpu_ratio = timing.ratio(timings[LIMIT], "cpu")
        key = name.replace(", ", "_").replace(" ", "_").replace("np.", "")
        figures |= {
            f"{key}/rows_per_second": rate,
            f"{key}/ratio_of_rate_to_memmap": ratio,
            f"{key}/cpu_microseconds_per_row": cpu,
            f"{key}/ratio_of_cpu_time_to_memmap": cpu_ratio,
        }
        speed = f"{rate * row_bytes / 1e6:,.0f}"
        shown = (f"{rate:,.0f}", speed, f"{ratio:.3g}", f"{cpu:,.1f}", f"{cpu_ratio:.3g}", str(len(timing.wall)))
        cells.append([name, *shown])
    columns = ["reader", "rows/s", "MB/s stored", "rate / memmap", "CPU µs a row", "CPU / memmap", "batches"]
    return markdown(columns, cells), figures


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--compressed", action="store_true", help="read compressed copies too")
    counts = {
        "rows": (4096, 256, "rows of the store"),
        "batch": (256, 32, "rows a batch"),
        "rounds": (40, 3, "timed batches of each reader"),
        "slow-rounds": (3, 1, "timed batches of zarr-python"),
    }
    arguments, (rows, batch, rounds, slow_rounds) = parse(command, counts)
    measure(arguments, rows, batch, rounds, slow_rounds)


def measure(arguments: argparse.Namespace, rows: int, batch: int, rounds: int, slow_rounds: int) -> None:
    load_before = load()
    rng = np.random.default_rng(1)
    with tempfile.TemporaryDirectory(prefix="cache_read.") as folder:
        flat = Path(folder) / "flat"
        cache = build_store(Path(folder) / "teacher.zarr", flat, rows)
        found = readers(cache, flat)
        if arguments.compressed:
            found |= compressed_readers(cache, Path(folder))
        for start in range(0, rows, batch):  # every page of both kinds of files is mapped before any clock runs
            block = np.arange(start, min(start + batch, rows))
            found[LIMIT](block)
            cache.read_raw(block)
        batches = rng.integers(0, rows, (rounds + 1, batch))
        check_agreement(found, batches[0])
        tasks = {name: lambda i, read=reader: read(batches[i]) for name, reader in found.items()}
        timings = interleave(tasks, rounds, at_most={SLOW: slow_rounds})
        row_bytes = sum(array.row_bytes for array in cache.arrays)
    table, figures = tabulate(timings, batch, row_bytes)
    figures |= {"rows": rows, "batch": batch, "row_bytes": row_bytes, "shard_rows": cache.shard_rows}
    described = machine(("numpy", "zarr", "tensorstore"))
    report(arguments, described, load_before, table, figures)


if __name__ == "__main__":
    main()
