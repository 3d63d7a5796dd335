"""How fast are rows read that are not in memory, against the disk's own sequential rate?

The store of cache_read.py (76.8 kB a row, four arrays), its pages dropped before every round (posix_fadvise). Tasks,
in turns, each reads as many bytes:

    sequential          the shard files from start to end, 8 MiB at a time: what the disk gives
    random              read_raw of batches of 256 random rows
    random, ahead       the same, each batch asked for `will_need` 8 batches before it is read, as training does
    shards, ahead       batches as `data.shuffle: shards` makes them, with its own hints

Bytes are those of rows; a disk reads somewhat more. The figures depend on the disk as on nothing else: one that answers
many requests at a time hides the random order, a spinning one does not.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from common import Timing, interleave, load, machine, markdown, parse, parser, report
from stores import build_store

from pipeline.cache.reader import Cache, open_cache
from pipeline.training.sampler import STEPS_AHEAD, BatchPlan

BLOCK = 8 * 2**20
BASE = "sequential"


def drop_pages(cache: Cache) -> None:
    """Close all maps, then ask the system to forget the files' pages."""
    cache.refresh()
    for file in cache.path.rglob("c/**/*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_files(cache: Cache) -> int:
    """All shard files once; returns their bytes."""
    total, buffer = 0, bytearray(BLOCK)
    for array in cache.arrays:
        for shard in range(cache.shards):
            with open(array.file(cache.path, shard), "rb", buffering=0) as handle:
                while got := handle.readinto(buffer):
                    total += got
    return total


def random_batches(rows: int, batch: int, seed: int) -> list[np.ndarray]:
    """Every row once, in random order."""
    order = np.random.default_rng(seed).permutation(rows)
    return [order[start : start + batch] for start in range(0, rows - batch + 1, batch)]


def plain(cache: Cache, batch: int) -> Callable[[int], None]:
    def task(index: int) -> None:
        for rows in random_batches(cache.rows, batch, index):
            cache.read_raw(rows)

    return task


def ahead(cache: Cache, batch: int) -> Callable[[int], None]:
    def task(index: int) -> None:
        batches = random_batches(cache.rows, batch, index)
        for rows in batches[:STEPS_AHEAD]:
            cache.will_need(rows)
        for number, rows in enumerate(batches):
            if number + STEPS_AHEAD < len(batches):
                cache.will_need(batches[number + STEPS_AHEAD])
            cache.read_raw(rows)

    return task


def in_shards(cache: Cache, batch: int) -> Callable[[int], None]:
    def task(index: int) -> None:
        plan = BatchPlan(
            np.arange(cache.rows), batch, cache.rows // batch, index, "shards", cache.shard_rows, buffer_shards=2
        )
        for step in plan.steps():
            if len(step.ahead):
                cache.will_need(step.ahead)
            cache.read_raw(step.rows)

    return task


def measure(arguments: argparse.Namespace, rows: int, batch: int, rounds: int) -> None:
    load_before = load()
    with tempfile.TemporaryDirectory(prefix="cache_cold.", dir=arguments.folder) as folder:
        cache = build_store(Path(folder) / "teacher.zarr", Path(folder) / "flat", rows)
        cache = open_cache(cache.path)
        tasks = {
            BASE: lambda _: read_files(cache),
            "random": plain(cache, batch),
            "random, ahead": ahead(cache, batch),
            "shards, ahead": in_shards(cache, batch),
        }
        row_bytes = sum(array.row_bytes for array in cache.arrays)
        read = {name: (rows if name == BASE else rows // batch * batch) * row_bytes for name in tasks}
        timings = interleave(tasks, rounds, before=lambda: drop_pages(cache))
        shard_rows = cache.shard_rows
    table, figures = tabulate(timings, read)
    figures |= {"rows": rows, "batch": batch, "row_bytes": row_bytes, "shard_rows": shard_rows}
    report(arguments, machine(("numpy",)), load_before, table, figures)


def tabulate(timings: dict[str, Timing], read: dict[str, int]) -> tuple[str, dict[str, float]]:
    cells, figures = [], {}
    for name, timing in timings.items():
        rate = read[name] / timing.median() / 1e6
        ratio = read[name] / read[BASE] / timing.ratio(timings[BASE])
        key = name.replace(", ", "_")
        figures |= {f"{key}/megabytes_per_second": rate, f"{key}/ratio_of_rate_to_sequential": ratio}
        figures[f"{key}/cpu_share"] = timing.median("cpu") / timing.median()
        share = f"{100 * figures[f'{key}/cpu_share']:.0f} %"
        cells.append([name, f"{rate:,.0f}", f"{ratio:.2f}", share, str(len(timing.wall))])
    return markdown(["task", "MB/s", "rate / sequential", "CPU busy", "rounds"], cells), figures


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--folder", type=Path, help="where to put the store: on the disk in question")
    counts = {"rows": (8192, 256, "rows of the store"), "batch": (256, 32, "rows a batch"), "rounds": (5, 1, "rounds")}
    arguments, (rows, batch, rounds) = parse(command, counts)
    if rows < batch:
        command.error("--rows takes at least one --batch")
    measure(arguments, rows, batch, rounds)


if __name__ == "__main__":
    main()
