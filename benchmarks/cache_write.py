"""How fast are whole shards of a teacher cache written, against other writers of the same store? And verified, copied?

Rows have the shape of a PCA-256 int8 cache of a ViT-B teacher (76.8 kB), random numbers, 512 a shard, four arrays. All
writers write shards of the same Zarr v3 layout, CRC-32C on every row and on the index, and have them on the disk when
the clock stops. Each round is one shard, and they take turns:

    flat files        the same bytes into four files, fsync: what the disk and the copy into it take
    CacheWriter       ours: checksums, files renamed into place, folders synced, `saturated`, seals and `state`
    tensorstore       one write an array; its file driver syncs what it writes
    zarr-python       one assignment an array, then fsync of its files and their folders
    zarr + zarrs      the same with the zarrs pipeline, where that is installed; this project does not need it
    verify            `pipe cache verify` of a cache of four shards, from the page cache; here and for copy, times are
    copy              a shard's share; `pipe cache copy` of it, setting the new cache up included

Memory that a virtual machine has never touched costs its host a page fault of some 20 µs for each 4 KiB, ten times what
writing it takes; so before any clock runs, twice as much is touched as all tasks together write.

Memory is measured in a fresh process that writes one shard: how far RssAnon rises above what it was with the shard's
values in memory, looked at every millisecond.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import tensorstore
import zarr
from common import Timing, interleave, load, machine, markdown, parse, parser, report
from stores import Rows, identity_and_fit, random_rows

from pipeline.cache import layout
from pipeline.cache.audit import verify
from pipeline.cache.chunks import OUR_KEYS
from pipeline.cache.copy import copy_cache
from pipeline.cache.layout import RowArray
from pipeline.cache.reader import open_cache
from pipeline.cache.shards import open_shard, with_crc
from pipeline.cache.writer import CacheWriter

Write = Callable[[int], object]  # takes the shard's number

LIMIT, OURS = "flat files", "CacheWriter"
EXAMINED = {"verify": 4, "copy": 4}  # shards of the cache that these tasks are about
ZARRS = "zarrs.ZarrsCodecPipeline"


def our_writer(path: Path, rows: Rows, shards: int) -> Write:
    count = len(rows[layout.GLOBAL])
    identity, fit = identity_and_fit(shards * count)
    writer = CacheWriter.create(path, identity, fit, shard_rows=count)
    if writer is None:
        raise RuntimeError("another process writes this store")
    state = np.full(count, layout.OK, np.uint8)
    return lambda shard: writer.write_shard(shard, rows, state)


def flat_writer(path: Path, rows: Rows) -> Write:
    path.mkdir()

    def write(shard: int) -> None:
        for name, values in rows.items():
            with open(path / f"{name}.{shard}", "wb") as file:
                values.tofile(file)
                os.fsync(file.fileno())

    return write


def tensorstore_writer(path: Path, arrays: list[RowArray], rows: Rows, shards: int) -> Write:
    count, opened = len(rows[layout.GLOBAL]), {}
    for array in arrays:
        document = layout.row_array_document(array, shards * count, count)
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{path / array.name}/"},
            "metadata": {key: document[key] for key in (*OUR_KEYS, "fill_value")},
            "store_data_equal_to_fill_value": True,
        }
        opened[array.name] = tensorstore.open(spec, create=True).result()

    def write(shard: int) -> None:
        span = slice(shard * count, (shard + 1) * count)
        for future in [opened[name][span].write(values) for name, values in rows.items()]:
            future.result()

    return write


def zarr_writer(path: Path, arrays: list[RowArray], rows: Rows, shards: int, pipeline: str | None = None) -> Write:
    count = len(rows[layout.GLOBAL])
    with zarr.config.set({"codec_pipeline.path": pipeline} if pipeline else {}):
        opened = {
            array.name: zarr.create_array(
                path / array.name,
                shape=(shards * count, *array.row_shape),
                shards=(count, *array.row_shape),
                chunks=(1, *array.row_shape),
                dtype=array.dtype,
                compressors=(zarr.codecs.Crc32cCodec(),),
                filters=None,
                config={"write_empty_chunks": True},
            )
            for array in arrays
        }

    def write(shard: int) -> None:
        for name, values in rows.items():
            opened[name][shard * count : (shard + 1) * count] = values
        for array in arrays:
            file = array.file(path, shard)
            for place in (file, file.parent):
                handle = os.open(place, os.O_RDONLY)
                os.fsync(handle)
                os.close(handle)

    return write


def writers(folder: Path, rows: Rows, shards: int) -> dict[str, Write]:
    """Name → what writes one shard; each into a store of its own below `folder`."""
    found = {LIMIT: flat_writer(folder / LIMIT, rows), OURS: our_writer(folder / OURS, rows, shards)}
    arrays = open_cache(folder / OURS).arrays
    found["tensorstore"] = tensorstore_writer(folder / "tensorstore", arrays, rows, shards)
    found["zarr-python"] = zarr_writer(folder / "zarr-python", arrays, rows, shards)
    if importlib.util.find_spec("zarrs") is not None:
        found["zarr + zarrs"] = zarr_writer(folder / "zarr + zarrs", arrays, rows, shards, ZARRS)
    return found


def check_agreement(folder: Path, rows: Rows) -> None:
    """Raise unless the first shard holds the same chunks and such an index in all stores, and ours is sound."""
    count = len(rows[layout.GLOBAL])
    arrays = open_cache(folder / OURS).arrays
    if report := verify(folder / OURS).findings:
        raise ValueError(f"{OURS}: {report[0].line()}")
    for store in sorted(path for path in folder.iterdir() if path.name not in (LIMIT, OURS)):
        for array in arrays:
            handle, _, offsets = open_shard(array, array.file(store, 0), count, np.arange(count))
            os.close(handle)
            data = array.file(store, 0).read_bytes()
            for row, offset in enumerate(offsets.at(np.arange(count)).tolist()):
                if data[offset : offset + array.row_bytes + 4] != with_crc(rows[array.name][row].tobytes()):
                    raise ValueError(f"{store.name} and {OURS} differ in {array.name}, row {row}")


def touch_memory(folder: Path, size: int) -> None:
    """Fill `size` bytes of the page cache, and give them back."""
    block = np.ones(min(size, 2**26), np.uint8)
    with open(folder / "touched", "wb") as file:
        for _ in range(-(-size // len(block))):
            file.write(block)
    (folder / "touched").unlink()


# --- memory -----------------------------------------------------------------------------------------------------------


def anonymous() -> int:
    """Bytes that this process has to itself."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def writer_memory(path: Path, count: int) -> float:
    """MB by which RssAnon rises while one shard is written, in this process, at most."""
    rows = random_rows(np.random.default_rng(1), count)
    write = our_writer(path, rows, 1)
    before, seen, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            seen.append(anonymous() - before)

    watching = threading.Thread(target=watch)
    watching.start()
    write(0)
    done.set()
    watching.join()
    return max(seen) / 1e6


# --- the table --------------------------------------------------------------------------------------------------------


def tabulate(timings: dict[str, Timing], shard_bytes: int) -> tuple[str, dict[str, float]]:
    """The table, and its figures by name."""
    cells: list[list[str]] = []
    figures: dict[str, float] = {}
    for name, timing in timings.items():
        shards = EXAMINED.get(name, 1)
        rate, cpu = shards * shard_bytes / timing.median() / 1e6, timing.median("cpu") / shards * 1e3
        ratio, ours = (shards / timing.ratio(timings[other]) for other in (LIMIT, OURS))
        key = name.replace(" + ", "_").replace(" ", "_").replace("-", "_")
        figures |= {
            f"{key}/megabytes_per_second": rate,
            f"{key}/ratio_of_rate_to_flat_files": ratio,
            f"{key}/ratio_of_rate_to_ours": ours,
            f"{key}/cpu_milliseconds_per_shard": cpu,
        }
        cells.append([name, f"{rate:,.0f}", f"{ratio:.3g}", f"{ours:.3g}", f"{cpu:,.1f}", str(len(timing.wall))])
    return markdown(["task", "MB/s", "rate / flat files", "rate / ours", "CPU ms a shard", "rounds"], cells), figures


def main() -> None:
    command = parser(__doc__)
    counts = {
        "rows": (512, 24, "rows a shard"),
        "rounds": (12, 2, "timed shards of each task"),
        "slow-rounds": (4, 1, "timed shards of zarr-python, and copies"),
    }
    arguments, (count, rounds, slow_rounds) = parse(command, counts)
    measure(arguments, count, rounds, slow_rounds)


def measure(arguments: argparse.Namespace, count: int, rounds: int, slow_rounds: int) -> None:
    load_before, rows = load(), random_rows(np.random.default_rng(0), count)
    with tempfile.TemporaryDirectory(prefix="cache_write.") as name:
        folder, stores = Path(name), Path(name) / "stores"
        stores.mkdir()
        shard_bytes = sum(values.nbytes for values in rows.values())
        written = 3 * (rounds + 1) + 5 * (slow_rounds + 1) + EXAMINED["copy"]
        touch_memory(folder, 2 * written * shard_bytes)
        few, write_few = folder / "few", our_writer(folder / "few", rows, 4)
        for shard in range(4):
            write_few(shard)
        found = writers(stores, rows, rounds + 1)
        for write in found.values():
            write(0)
        check_agreement(stores, rows)
        found |= {"verify": lambda i: verify(few), "copy": lambda i: copy_cache(few, folder / f"copy{i}")}
        timings = interleave(found, rounds, at_most=dict.fromkeys(("zarr-python", "copy"), slow_rounds))
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
            grown = fresh.submit(writer_memory, folder / "memory", count).result()
    table, figures = tabulate(timings, shard_bytes)
    figures |= {"rows": count, "shard_megabytes": shard_bytes / 1e6, "writer_rssanon_growth_megabytes": grown}
    left_out = "" if "zarr + zarrs" in found else "\nzarrs is not installed: left out"
    table += (
        f"\n\n{OURS}: {grown:.0f} MB more in memory while it writes a shard of {shard_bytes / 1e6:.0f} MB{left_out}"
    )
    report(arguments, machine(("numpy", "zarr", "tensorstore")), load_before, table, figures)


if __name__ == "__main__":
    main()
