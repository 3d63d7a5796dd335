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
from common import Timing, interleave, load, machine, markdown, parser, report

from pipeline.cache import layout
from pipeline.cache.codec import ScaleCodec, dequantise
from pipeline.cache.compress import Compression
from pipeline.cache.copy import copy_cache
from pipeline.cache.layout import CacheIdentity, ScaleSpec
from pipeline.cache.reader import Cache, open_cache
from pipeline.cache.writer import CacheFit, CacheWriter

Rows = dict[str, np.ndarray]
Reader = Callable[[np.ndarray], Rows]

SCALES = (ScaleSpec("fine", -1, 14), ScaleSpec("mid", 8, 7), ScaleSpec("coarse", 4, 7))
WIDTH, COMPONENTS, GLOBAL_WIDTH = 768, 256, 768
LIMIT, FLOAT_READERS, SLOW = "np.memmap", ("np.memmap, to float32", "read"), "zarr oindex"
COMPRESSIONS = (Compression("blosc", 5), Compression("zstd", 3))
TENSORSTORE_POOL = 16_000_000  # bytes: far more than all shard indexes, far less than the rows


def identity_and_fit(rows: int, seed: int = 0) -> tuple[CacheIdentity, CacheFit]:
    """What a cache of `rows` rows is set up with: random steps, and neither baselines nor fidelity."""
    rng = np.random.default_rng(seed)
    basis = np.eye(WIDTH, COMPONENTS, dtype=np.float32)
    steps = {spec.name: rng.uniform(0.01, 0.1, COMPONENTS).astype(np.float32) for spec in SCALES}
    identity = CacheIdentity(
        rows=rows,
        scales=SCALES,
        global_width=GLOBAL_WIDTH,
        teacher={"name": "random numbers"},
        view={"kind": "crop", "size": 224},
        manifest_fingerprint="0" * 64,
        settings={"seed": seed},
    )
    fit = CacheFit(
        codecs={name: ScaleCodec("int8", WIDTH, basis, step) for name, step in steps.items()},
        calibration_rows=np.arange(0),
        heldout_rows=np.arange(0),
        baselines={layout.gram_mean_name(s.name): np.zeros((s.tokens, s.tokens), np.float32) for s in SCALES}
        | {layout.GLOBAL_MEAN: np.zeros(GLOBAL_WIDTH, np.float32)},
        baseline_losses={},
        fidelity={},
    )
    return identity, fit


def random_rows(rng: np.random.Generator, count: int) -> Rows:
    """Values of `count` rows, as a shard is written."""
    values: Rows = {s.name: rng.integers(-127, 128, (count, s.tokens, COMPONENTS), np.int8) for s in SCALES}
    return values | {layout.GLOBAL: rng.standard_normal((count, GLOBAL_WIDTH), np.float32).astype(np.float16)}


def build_store(path: Path, flat: Path, rows: int, seed: int = 0) -> Cache:
    """A finished cache of random values at `path`, and the same arrays as flat files in `flat`."""
    rng = np.random.default_rng(seed)
    identity, fit = identity_and_fit(rows, seed)
    flat.mkdir()
    with CacheWriter.create(path, identity, fit) as writer:
        for shard in range(writer.shards):
            count = len(writer.rows_of(shard))
            arrays = random_rows(rng, count)
            writer.write_shard(shard, arrays, np.full(count, layout.OK, np.uint8))
            for name, values in arrays.items():
                with open(flat / name, "ab") as file:
                    values.tofile(file)
    return open_cache(path)


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
    command.add_argument("--rows", type=int, help="rows of the store (4,096; quick 256)")
    command.add_argument("--batch", type=int, help="rows a batch (256; quick 32)")
    command.add_argument("--rounds", type=int, help="timed batches of each reader (40; quick 3)")
    command.add_argument("--slow-rounds", type=int, help="timed batches of zarr-python (3; quick 1)")
    command.add_argument("--compressed", action="store_true", help="read compressed copies too")
    arguments = command.parse_args()
    defaults = (256, 32, 3, 1) if arguments.quick else (4096, 256, 40, 3)
    given = (arguments.rows, arguments.batch, arguments.rounds, arguments.slow_rounds)
    rows, batch, rounds, slow_rounds = (d if g is None else g for g, d in zip(given, defaults, strict=True))
    if min(rows, batch, rounds, slow_rounds) < 1:
        command.error("--rows, --batch, --rounds and --slow-rounds take whole numbers from 1")
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
