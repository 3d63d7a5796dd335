"""Do a manifest and a cache of 3 million rows open at once, stay small in memory, and read as fast as small ones?

The manifest has the shape of CC3M's: tars of 9,000 samples, keys of nine digits, SHA-256, a caption of ten words. The
cache has two tiny scales and a `global` of 16: what is asked is what rows cost, not bytes. Both are made of random
numbers in a temporary folder (2 GB while it runs) and lie in the page cache. What concerns memory or a first read is
measured in fresh processes that import the readers and no torch. Rates of the small and the large ones are taken in
turns in one process, all of their pages mapped before any clock runs. The small ones fit the CPU's caches and the large
ones do not, which slows any reader: np.memmap's fancy indexing of flat files with the same values shows by how much.

Memory, from /proc/self/status: RssAnon is what a process has to itself. RssFile are pages of files that are mapped
(libraries, the manifest, shards): all processes share them and the system takes them back when it needs to.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from common import interleave, load, machine, markdown, parse, parser, report
from stores import Shape, build_store

from pipeline.cache.layout import ScaleSpec
from pipeline.cache.reader import open_cache
from pipeline.cache.shards import index_bytes
from pipeline.data.manifest import SCHEMA, Metadata, Source, SplitRule, read_manifest, write_manifest

Figures = dict[str, float]

TAR_ROWS = 9_000
WORDS = "a the of in with on young old dog man woman red street city light photo background water tree white"
SHARD_ROWS = 4096
TINY = Shape((ScaleSpec("fine", -1, 2), ScaleSpec("coarse", 4, 1)), 64, 16, 16, shard_rows=SHARD_ROWS)
SMALL, LARGE = "small", "large"


@dataclass(frozen=True)
class Stores:
    """A manifest and a cache of the same number of rows, and a folder of flat files with the cache's values."""

    manifest: Path
    cache: Path
    flat: Path


# --- making them ------------------------------------------------------------------------------------------------------


def random_manifest(rows: int, seed: int = 0) -> tuple[pa.Table, Metadata]:
    """A manifest's table in chunks of one tar, as `pipe index` makes it; 1 % of its rows are for validation."""
    rng = np.random.default_rng(seed)
    number = np.arange(rows)
    tar, inside = np.divmod(number, TAR_ROWS)
    names = [f"{index:05d}.tar" for index in range(tar[-1] + 1)]
    offset, size = inside * 40_000, rng.integers(5_000, 40_000, rows)
    hashes = pa.py_buffer(rng.bytes(32 * rows).hex().encode())
    vocabulary = pa.array(WORDS.split())
    words = [vocabulary.take(pa.array(rng.integers(0, len(vocabulary), rows))) for _ in range(10)]
    columns = {
        "row": number,
        "source": pa.array(names).take(pa.array(tar)),
        "key": pc.utf8_lpad(pa.array(tar * 10_000 + inside).cast(pa.string()), 9, "0"),
        "image_offset": offset,
        "image_bytes": size,
        "caption_offset": offset + size,
        "caption_bytes": np.full(rows, 55),
        "captions": pa.ListArray.from_arrays(
            pa.array(np.arange(rows + 1, dtype=np.int32)), pc.binary_join_element_wise(*words, " ")
        ),
        "width": rng.integers(100, 600, rows).astype(np.int32),
        "height": rng.integers(100, 600, rows).astype(np.int32),
        "sha256": pa.StringArray.from_buffers(rows, pa.py_buffer(np.arange(rows + 1, dtype=np.int32) * 64), hashes),
        "split": np.where(rng.random(rows) < 0.01, "val", "train"),
        "status": np.where(rng.random(rows) < 0.02, "image_broken", "ok"),
        "reason": np.full(rows, ""),
    }
    table = pa.table(columns).cast(SCHEMA)
    table = pa.concat_tables([table.slice(first, TAR_ROWS) for first in range(0, rows, TAR_ROWS)])
    sources = [Source(name, "tar", 40_000 * TAR_ROWS, 0, "0" * 64, TAR_ROWS) for name in names]
    return table, Metadata("/data", None, SplitRule(0.01, False), sources)


def build(folder: Path, rows: int) -> Stores:
    folder.mkdir()
    stores = Stores(folder / "manifest.parquet", folder / "teacher.zarr", folder / "flat")
    write_manifest(stores.manifest, *random_manifest(rows))
    build_store(stores.cache, stores.flat, rows, TINY)
    return stores


# --- in a process of its own ------------------------------------------------------------------------------------------


def memory(prefix: str) -> Figures:
    """Memory of this process in MB; nothing where there is no /proc."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    found = {key: value.split() for key, _, value in (line.partition(":") for line in lines)}
    kinds = [kind for kind in ("RssAnon", "RssFile") if kind in found]
    return {f"{prefix}_{kind.lower()}_megabytes": float(found[kind][0]) * 1024 / 1e6 for kind in kinds}


def timed(task: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = task()
    return time.perf_counter() - started, result


def open_both(stores: Stores, reads: int) -> Figures:
    """Open manifest and cache, read some rows of both, as a training process's worker does."""
    if "torch" in sys.modules:
        raise RuntimeError("this process was to have no torch")
    before = memory("imported")
    opening, (manifest, cache) = timed(lambda: (read_manifest(stores.manifest), open_cache(stores.cache)))
    state, _ = timed(cache.state)
    opened = memory("opened")
    rows = np.random.default_rng(1).integers(0, len(manifest), reads)
    first, _ = timed(lambda: (manifest.record(int(rows[0])), manifest.captions(int(rows[0]))))
    first_batch, _ = timed(lambda: cache.read_raw(rows[:256]))
    for start in range(0, reads, 256):
        batch = rows[start : start + 256]
        cache.read_raw(batch)
        for row in batch.tolist():
            manifest.record(row)
            manifest.captions(row)
    return (
        before
        | opened
        | memory("reading")
        | {
            "open_seconds": opening,
            "state_seconds": state,
            "first_record_seconds": first,
            "first_batch_seconds": first_batch,
        }
    )


def whole_columns(stores: Stores) -> Figures:
    """What `pipe train` asks of a manifest once, in the order in which it does."""
    manifest = read_manifest(stores.manifest)
    rows, _ = timed(lambda: (manifest.rows("train"), manifest.rows("val")))
    fingerprint, _ = timed(manifest.fingerprint)
    split, _ = timed(manifest.split_sha256)
    return {"rows_seconds": rows, "fingerprint_seconds": fingerprint, "split_sha256_seconds": split} | memory("columns")


KINDS = ("record", "captions", "cache", "memmap")


def rates(stores: dict[str, Stores], batch: int, rounds: int) -> dict[str, Figures]:
    """CPU microseconds a row of random reads, and their ratios: wall time would tell what else the machine does."""
    rng = np.random.default_rng(2)
    tasks: dict[str, Callable[[int], object]] = {}
    for name, of_name in stores.items():
        manifest, cache, maps = read_manifest(of_name.manifest), open_cache(of_name.cache), _flat_maps(of_name)
        for start in range(0, cache.rows, SHARD_ROWS):  # every shard is mapped, every page touched
            block = np.arange(start, min(start + SHARD_ROWS, cache.rows))
            stored = cache.read_raw(block)
            if not all(np.array_equal(values[block], stored[array]) for array, values in maps.items()):
                raise ValueError("the cache and the flat files differ")
        batches = rng.integers(0, cache.rows, (rounds + 1, batch))
        tasks[f"{name} record"] = lambda i, read=manifest.record, b=batches: [read(row) for row in b[i].tolist()]
        tasks[f"{name} captions"] = lambda i, read=manifest.captions, b=batches: [read(row) for row in b[i].tolist()]
        tasks[f"{name} cache"] = lambda i, read=cache.read_raw, b=batches: read(b[i])
        tasks[f"{name} memmap"] = lambda i, m=maps, b=batches: {array: values[b[i]] for array, values in m.items()}
    timings = interleave(tasks, rounds)
    found: dict[str, Figures] = {}
    for name in stores:
        kinds = {kind: timings[f"{name} {kind}"] for kind in KINDS}
        found[name] = {f"{kind}_cpu_microseconds": timing.median("cpu") / batch * 1e6 for kind, timing in kinds.items()}
        for kind, timing in kinds.items():
            found[name][f"ratio_of_{kind}_rate_to_small"] = timings[f"{SMALL} {kind}"].ratio(timing, "cpu")
        found[name]["ratio_of_cache_rate_to_memmap"] = kinds["memmap"].ratio(kinds["cache"], "cpu")
    return found


def _flat_maps(stores: Stores) -> dict[str, np.ndarray]:
    cache = open_cache(stores.cache)
    return {
        a.name: np.memmap(stores.flat / a.name, a.dtype, "r", shape=(cache.rows, *a.row_shape)) for a in cache.arrays
    }


def on_disk(stores: Stores) -> Figures:
    """Bytes and files of both."""
    files = [path for path in stores.cache.rglob("*") if path.is_file()]
    folders = [stores.cache / array.name / "c" for array in open_cache(stores.cache).arrays]
    shards = {path for folder in folders for path in folder.rglob("*") if path.is_file()}
    metadata = [path for path in files if path not in shards]
    parquet = pq.read_metadata(stores.manifest)
    groups = [parquet.row_group(i) for i in range(parquet.num_row_groups)]
    packed = sum(group.column(j).total_compressed_size for group in groups for j in range(group.num_columns))
    return {
        "manifest_bytes": stores.manifest.stat().st_size,
        "manifest_parquet_bytes": packed,
        "cache_bytes": sum(path.stat().st_size for path in files),
        "cache_files": len(files),
        "cache_metadata_files": len(metadata),
        "cache_metadata_bytes": sum(path.stat().st_size for path in metadata),
        "cache_index_bytes": len(shards) * index_bytes(SHARD_ROWS),
    }


# --- results ----------------------------------------------------------------------------------------------------------

SHOWN: tuple[tuple[str, str, float, str], ...] = (  # line of the table, figure, factor, format
    ("manifest, MB", "manifest_bytes", 1e-6, ",.1f"),
    ("of it as Parquet, MB", "manifest_parquet_bytes", 1e-6, ",.1f"),
    ("cache, MB", "cache_bytes", 1e-6, ",.1f"),
    ("cache, files", "cache_files", 1, ",.0f"),
    ("of them metadata and state, files", "cache_metadata_files", 1, ",.0f"),
    ("metadata and state, kB", "cache_metadata_bytes", 1e-3, ",.0f"),
    ("indexes in the shards, kB", "cache_index_bytes", 1e-3, ",.0f"),
    ("opening both, ms", "open_seconds", 1e3, ",.1f"),
    ("the cache's state, ms", "state_seconds", 1e3, ",.1f"),
    ("first record and captions, ms", "first_record_seconds", 1e3, ",.1f"),
    ("first batch of the cache, ms", "first_batch_seconds", 1e3, ",.1f"),
    ("rows of both splits, ms", "rows_seconds", 1e3, ",.1f"),
    ("fingerprint, ms", "fingerprint_seconds", 1e3, ",.1f"),
    ("split_sha256, ms", "split_sha256_seconds", 1e3, ",.1f"),
    ("RssAnon, imported, MB", "imported_rssanon_megabytes", 1, ",.0f"),
    ("RssAnon, both open, MB", "opened_rssanon_megabytes", 1, ",.0f"),
    ("RssAnon, rows read, MB", "reading_rssanon_megabytes", 1, ",.0f"),
    ("RssAnon, whole columns used, MB", "columns_rssanon_megabytes", 1, ",.0f"),
    ("RssFile, imported, MB", "imported_rssfile_megabytes", 1, ",.0f"),
    ("RssFile, both open, MB", "opened_rssfile_megabytes", 1, ",.0f"),
    ("RssFile, rows read, MB", "reading_rssfile_megabytes", 1, ",.0f"),
    ("RssFile, whole columns used, MB", "columns_rssfile_megabytes", 1, ",.0f"),
    ("random record, CPU µs", "record_cpu_microseconds", 1, ",.1f"),
    ("random captions, CPU µs", "captions_cpu_microseconds", 1, ",.1f"),
    ("random row of the cache, CPU µs", "cache_cpu_microseconds", 1, ",.2f"),
    ("the same by np.memmap, CPU µs", "memmap_cpu_microseconds", 1, ",.2f"),
    ("rate of records / small", "ratio_of_record_rate_to_small", 1, ".2f"),
    ("rate of captions / small", "ratio_of_captions_rate_to_small", 1, ".2f"),
    ("rate of the cache / small", "ratio_of_cache_rate_to_small", 1, ".2f"),
    ("rate of np.memmap / small", "ratio_of_memmap_rate_to_small", 1, ".2f"),
    ("rate of the cache / np.memmap", "ratio_of_cache_rate_to_memmap", 1, ".2f"),
)


def tabulate(found: dict[str, Figures], rows: dict[str, int]) -> str:
    """Small and large beside each other; figures that the system does not give are left out."""
    shown = [line for line in SHOWN if all(line[1] in found[name] for name in rows)]
    cells = [[label, *(format(found[name][key] * factor, form) for name in rows)] for label, key, factor, form in shown]
    return markdown(["", *(f"{count:,} rows" for count in rows.values())], cells)


def main() -> None:
    command = parser(__doc__)
    counts = {
        "rows": (3_000_000, 20_000, "rows of the large ones"),
        "small-rows": (32_768, 4_096, "rows of the small ones"),
        "rounds": (40, 3, "timed batches of 1,024 random rows"),
    }
    arguments, (rows, small_rows, rounds) = parse(command, counts)
    measure(arguments, {SMALL: small_rows, LARGE: rows}, rounds)


def measure(arguments: argparse.Namespace, rows: dict[str, int], rounds: int, batch: int = 1024) -> None:
    load_before = load()
    fresh = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="scale.") as folder:
        stores = {name: build(Path(folder) / name, count) for name, count in rows.items()}
        found = {name: on_disk(of_name) for name, of_name in stores.items()}
        with ProcessPoolExecutor(1, mp_context=fresh, max_tasks_per_child=1) as pool:
            for name, of_name in stores.items():
                found[name] |= pool.submit(open_both, of_name, rounds * batch).result()
                found[name] |= pool.submit(whole_columns, of_name).result()
            for name, of_rates in pool.submit(rates, stores, batch, rounds).result().items():
                found[name] |= of_rates
    figures = {f"{name}/{key}": value for name, of_name in found.items() for key, value in of_name.items()}
    figures |= {f"{name}/rows": count for name, count in rows.items()} | {
        "batch": batch,
        "shard_rows": SHARD_ROWS,
    }
    report(arguments, machine(("numpy", "pyarrow")), load_before, tabulate(found, rows), figures)


if __name__ == "__main__":
    main()
