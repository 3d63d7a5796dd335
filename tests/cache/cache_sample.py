"""A tiny cache with one scale of every dtype: 21 rows in shards of 8, so that the last one is partial.

`make_sample(views=...)` has further views: other features of the same rows, with a geometry of their own.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cache import layout
from pipeline.cache.baselines import Baselines
from pipeline.cache.codec import ComponentMaxima, Fidelity, ScaleCodec, SecondMoment, fit_basis, to_float16
from pipeline.cache.layout import CacheIdentity, ScaleSpec
from pipeline.cache.writer import CacheFit, CacheWriter
from pipeline.data.geometry import ViewSpec

ROWS, SHARD_ROWS, WIDTH, COMPONENTS, GLOBAL_WIDTH = 21, 8, 6, 4, 5
SPECS = (ScaleSpec("fine", -1, 3), ScaleSpec("mid", 4, 2), ScaleSpec("raw", 2, 2))
DTYPES: dict[str, layout.StoredDtype] = {"fine": "int8", "mid": "int8_token", "raw": "float16"}
UNDECODABLE_ROWS = (3, 20)
VIEWS = ("crop1", "crop2")
IMAGE = (40, 30)  # width and height of each


@dataclass(frozen=True)
class Sample:
    """Everything a cache is made of, before any of it is on disk."""

    identity: CacheIdentity
    fit: CacheFit
    state: np.ndarray
    features: dict[str, np.ndarray]
    views: tuple[str, ...] = ()

    def stored(self, rows: range | np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The rows' arrays as `write_shard` takes them, and what was cut off of each (n, scales)."""
        index, arrays = np.asarray(rows), dict[str, np.ndarray]()
        saturated = np.zeros((len(index), len(self.fit.codecs)), np.int64)
        for view in ("", *(layout.view_name(view, "") for view in self.views)):
            for scale, (name, codec) in enumerate(self.fit.codecs.items()):
                encoded = codec.encode(self.features[view + name][index])
                arrays[view + name] = encoded.values
                alone = [codec.encode(self.features[view + name][[row]]).saturated for row in index]
                saturated[:, scale] += np.where(self.state[index] == layout.OK, alone, 0)
                if encoded.token_steps is not None:
                    arrays[view + layout.steps_name(name)] = encoded.token_steps
            arrays[view + layout.GLOBAL] = self.features[view + layout.GLOBAL][index].astype(np.float16)
            if view:
                arrays[view + layout.GEOMETRY] = self.features[view + layout.GEOMETRY][index]
        return arrays, saturated

    def write(self, writer: CacheWriter, shards: list[int] | None = None) -> None:
        for shard in writer.missing if shards is None else shards:
            rows = np.asarray(writer.rows_of(shard))
            arrays, saturated = self.stored(rows)
            writer.write_shard(shard, arrays, self.state[rows], saturated)

    def build(self, path: Path) -> Path:
        with CacheWriter.create(path, self.identity, self.fit, shard_rows=SHARD_ROWS) as writer:
            self.write(writer)
        return path

    def named(self, **changes: Any) -> CacheIdentity:
        return replace(self.identity, **changes)


def make_sample(seed: int = 0, views: tuple[str, ...] = ()) -> Sample:
    rng = np.random.default_rng(seed)
    features: dict[str, np.ndarray] = {}
    for prefix in ("", *(layout.view_name(view, "") for view in views)):
        for spec in SPECS:
            drawn = rng.normal(size=(ROWS, spec.tokens, WIDTH)) + rng.normal(size=WIDTH)
            features[prefix + spec.name] = drawn.astype(np.float32)
        features[prefix + layout.GLOBAL] = rng.normal(size=(ROWS, GLOBAL_WIDTH)).astype(np.float32)
    for view in views:
        drawn = [ViewSpec(view).draw(seed, row, *IMAGE) for row in range(ROWS)]
        features[layout.view_name(view, layout.GEOMETRY)] = np.stack(drawn)
    calibration, heldout = np.arange(0, 14), np.arange(14, ROWS)
    codecs: dict[str, ScaleCodec] = {}
    for spec in SPECS:
        moment = SecondMoment(WIDTH)
        moment.update(features[spec.name][calibration])
        basis, explained = fit_basis(moment, None if spec.name == "raw" else COMPONENTS)
        codec = ScaleCodec(DTYPES[spec.name], WIDTH, basis, None, explained)
        if codec.dtype == "int8":
            maxima = ComponentMaxima(codec.components)
            maxima.update(codec.project(features[spec.name][calibration]))
            codec = codec.with_steps(maxima.steps())
        codecs[spec.name] = codec
    baselines, fidelity = Baselines([spec.name for spec in SPECS]), {spec.name: Fidelity() for spec in SPECS}
    baselines.fit(_targets(codecs, features, calibration))
    heldout_targets = _targets(codecs, features, heldout)
    baselines.score(heldout_targets)
    for name, measure in fidelity.items():
        measure.update(features[name][heldout], heldout_targets[name], codecs[name].basis)
    identity = CacheIdentity(
        rows=ROWS,
        scales=SPECS,
        global_width=GLOBAL_WIDTH,
        teacher={"name": "toy", "weights_sha256": "ab" * 32, "mean": (0.5, 0.5, 0.5), "scales": [{"name": "fine"}]},
        view={"kind": "crop", "size": 32},
        manifest_fingerprint="cd" * 32,
        settings={"dtype": "int8", "pca": COMPONENTS, "seed": 0}
        | ({"views": [ViewSpec(view).to_json() for view in views]} if views else {}),
    )
    fit = CacheFit(
        codecs=codecs,
        calibration_rows=calibration,
        heldout_rows=heldout,
        baselines=baselines.arrays(),
        baseline_losses=baselines.losses(),
        fidelity={name: measure.result() for name, measure in fidelity.items()},
    )
    state = np.full(ROWS, layout.OK, np.uint8)
    state[list(UNDECODABLE_ROWS)] = layout.UNDECODABLE
    return Sample(identity, fit, state, features, views)


def _targets(codecs: dict[str, ScaleCodec], features: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    targets = {}
    for name, codec in codecs.items():
        encoded = codec.encode(features[name][rows])
        targets[name] = codec.dequantise(encoded.values, encoded.token_steps)
    targets[layout.GLOBAL] = to_float16(features[layout.GLOBAL][rows])[0].astype(np.float32)
    return targets


def die_after_renames(survived: int) -> None:
    """From now on this process dies as it would put its (survived + 1)-th file in place. For the child of a fork."""
    done, replace_file = 0, os.replace

    def replace_or_die(source: Path, target: Path) -> None:
        nonlocal done
        if done == survived:
            os._exit(9)
        done += 1
        replace_file(source, target)

    os.replace = replace_or_die  # type: ignore[assignment]
