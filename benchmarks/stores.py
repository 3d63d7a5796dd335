"""Caches of random numbers for the benchmarks to write and read, in the shape that a question is about."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.cache import layout
from pipeline.cache.codec import ScaleCodec
from pipeline.cache.layout import CacheIdentity, ScaleSpec
from pipeline.cache.reader import Cache, open_cache
from pipeline.cache.writer import CacheFit, CacheWriter

Rows = dict[str, np.ndarray]


@dataclass(frozen=True)
class Shape:
    """What a row holds: int8 scales of `components` out of `width` channels, and `global`.

    Args:
        shard_rows: rows a shard; None: as the writer has it.
    """

    scales: tuple[ScaleSpec, ...]
    width: int
    components: int
    global_width: int
    shard_rows: int | None = None


VIT_B = Shape((ScaleSpec("fine", -1, 14), ScaleSpec("mid", 8, 7), ScaleSpec("coarse", 4, 7)), 768, 256, 768)


def identity_and_fit(rows: int, shape: Shape = VIT_B, seed: int = 0) -> tuple[CacheIdentity, CacheFit]:
    """What a cache of `rows` rows is set up with: random steps, and neither baselines nor fidelity."""
    rng = np.random.default_rng(seed)
    basis = np.eye(shape.width, shape.components, dtype=np.float32)
    steps = {spec.name: rng.uniform(0.01, 0.1, shape.components).astype(np.float32) for spec in shape.scales}
    identity = CacheIdentity(
        rows=rows,
        scales=shape.scales,
        global_width=shape.global_width,
        teacher={"name": "random numbers"},
        view={"kind": "crop", "size": 224},
        manifest_fingerprint="0" * 64,
        settings={"seed": seed},
    )
    fit = CacheFit(
        codecs={name: ScaleCodec("int8", shape.width, basis, step) for name, step in steps.items()},
        calibration_rows=np.arange(0),
        heldout_rows=np.arange(0),
        baselines={layout.gram_mean_name(s.name): np.zeros((s.tokens, s.tokens), np.float32) for s in shape.scales}
        | {layout.GLOBAL_MEAN: np.zeros(shape.global_width, np.float32)},
        baseline_losses={},
        fidelity={},
    )
    return identity, fit


def random_rows(rng: np.random.Generator, count: int, shape: Shape = VIT_B) -> Rows:
    """Values of `count` rows, as a shard is written."""
    values: Rows = {s.name: rng.integers(-127, 128, (count, s.tokens, shape.components), np.int8) for s in shape.scales}
    return values | {layout.GLOBAL: rng.standard_normal((count, shape.global_width), np.float32).astype(np.float16)}


def build_store(path: Path, flat: Path, rows: int, shape: Shape = VIT_B, seed: int = 0) -> Cache:
    """A finished cache at `path`, and the same arrays as flat files in `flat`."""
    rng = np.random.default_rng(seed)
    identity, fit = identity_and_fit(rows, shape, seed)
    flat.mkdir()
    with CacheWriter.create(path, identity, fit, shard_rows=shape.shard_rows) as writer:
        for shard in range(writer.shards):
            count = len(writer.rows_of(shard))
            arrays = random_rows(rng, count, shape)
            writer.write_shard(shard, arrays, np.full(count, layout.OK, np.uint8))
            for name, values in arrays.items():
                with open(flat / name, "ab") as file:
                    values.tofile(file)
    return open_cache(path)
