"""What is fitted before a cache's first row is written: bases, steps, baselines, and the fidelity they reach.

One forward of the teacher over the calibration and held-out rows; its features go to a temporary file beside the cache
(float32, deleted by the system when we end, however we end), since the basis must be known before the steps can be,
and the steps before the baselines. Memory is independent of the number of rows.

    1. second moments of the calibration rows          → basis
    2. maxima of their coefficients (int8 only)        → steps
    3. their dequantised coefficients                  → baselines
    4. the held-out rows' dequantised coefficients     → the baselines' losses, fidelity against the raw features
    5. crops of a few held-out images                  → how far a stored map, resampled over a crop, can stand for it

Legend: n rows of a block, T tokens, C channels, K components.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.cache.baselines import Baselines
from pipeline.cache.codec import ComponentMaxima, Fidelity, ScaleCodec, SecondMoment, fit_basis, to_float16
from pipeline.cache.layout import GLOBAL, StoredDtype
from pipeline.cache.writer import CacheFit
from pipeline.console import log
from pipeline.data.roi import SHARES, cosines, probes, resample
from pipeline.errors import PipeError

CALIBRATION_SHARE = 0.8
HELDOUT_SHARE = 1 / 8  # of the calibration's number, within the following bounds
HELDOUT_ROWS = (256, 1024)  # one block of relational distances at least
LEAST_HELDOUT = 2  # relational distances need a pair
CROPPED_ROWS = (8, 32)  # held-out rows whose crops are looked at: one in 100 of all rows, within these bounds
BLOCK_BYTES = 64 * 2**20

Features = dict[str, np.ndarray]  # scale → (n, T, C) float32, "global" → (n, C) float32
FeatureStream = Callable[[np.ndarray], Iterator[tuple[np.ndarray, Features]]]  # rows → (decodable rows, their features)
Crops = Callable[[int, np.ndarray], Features]  # row, boxes (m, 4) → features of these crops of it, m for n


def choose_rows(train_rows: np.ndarray, calibration_rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random calibration rows, min(calibration_rows, 80 %) of the training rows, and others that are held out.

    Held out are an eighth as many, 256 to 1,024, as far as there are so many others (our reading of "64 to 1,024").
    Calibration rows are ascending (they are read in the order in which they lie); held-out rows stay shuffled, because
    relational baselines are taken in blocks, as if these were batches.

    Raises:
        PipeError: fewer than 3 training rows.
    """
    count = len(train_rows)
    if count < LEAST_HELDOUT + 1:
        raise PipeError(
            f"{count} usable training rows are too few to calibrate on", where="manifest", fix="index more data"
        )
    asked = min(calibration_rows, int(CALIBRATION_SHARE * count), count - LEAST_HELDOUT)
    shuffled = np.random.default_rng(seed).permutation(train_rows)
    calibration, others = shuffled[: max(asked, 1)], shuffled[max(asked, 1) :]
    low, high = HELDOUT_ROWS
    return np.sort(calibration), others[: min(max(int(HELDOUT_SHARE * asked), low), high)]


class Spool:
    """Feature rows in an unnamed temporary file in `folder`, read back block by block, any number of times."""

    def __init__(self, folder: Path) -> None:
        self.file = tempfile.TemporaryFile(dir=folder, prefix=".calibration-")  # noqa: SIM115 (closed by __exit__)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.rows = 0

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def append(self, features: Features) -> None:
        self.shapes = {name: values.shape[1:] for name, values in features.items()}
        count = len(features[GLOBAL])
        flat = [np.ascontiguousarray(values, np.float32).reshape(count, -1) for values in features.values()]
        try:
            self.file.write(np.concatenate(flat, axis=1).tobytes())
        except OSError as error:
            raise PipeError(
                f"cannot keep the calibration's features ({error.strerror})",
                where="beside the cache",
                fix="free some space, or lower teacher.calibration_rows",
            ) from error
        self.rows += count

    def blocks(self) -> Iterator[Features]:
        """All rows in order, a bounded number at a time."""
        sizes = {name: int(np.prod(shape)) for name, shape in self.shapes.items()}
        width = sum(sizes.values())
        at_once = max(1, BLOCK_BYTES // (4 * width)) if width else 1
        self.file.seek(0)
        for start in range(0, self.rows, at_once):
            count = min(at_once, self.rows - start)
            block = np.frombuffer(self.file.read(4 * count * width), np.float32).reshape(count, width)
            ends = np.cumsum(list(sizes.values()))[:-1]
            parts = zip(self.shapes.items(), np.split(block, ends, axis=1), strict=True)
            yield {name: np.ascontiguousarray(part).reshape(count, *shape) for (name, shape), part in parts}


def calibrate(
    stream: FeatureStream,
    calibration: np.ndarray,
    heldout: np.ndarray,
    *,
    widths: Mapping[str, int],
    pca: int | None,
    dtype: StoredDtype,
    folder: Path,
    crops: Crops | None = None,
    seed: int = 0,
) -> CacheFit:
    """Fit on `calibration` rows, measure on `heldout` rows; rows that cannot be decoded drop out of both.

    Args:
        stream: the teacher's features of rows, batch by batch; called once for each of the two.
        widths: scale → C.
        pca: components to keep, at most C; None keeps all channels as they are.
        dtype: how coefficients are stored.
        folder: where the temporary files go.
        crops: the teacher's features of crops of a row; None: how far maps resample is not measured.
        seed: of these crops.

    Raises:
        PipeError: too few rows can be decoded, features are not finite, or the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with Spool(folder) as fitted, Spool(folder) as held:
        moments = {name: SecondMoment(width) for name, width in widths.items()}
        used = _fill(fitted, stream(calibration), moments if pca is not None else {})
        scored = _fill(held, stream(heldout), {})
        if len(used) < 1 or len(scored) < LEAST_HELDOUT:
            raise PipeError(
                f"only {len(used)} calibration and {len(scored)} held-out images could be decoded",
                where="manifest",
                fix="run: pipe index, and look at its summary",
            )
        codecs = {}
        for name, moment in moments.items():
            basis, explained = fit_basis(moment, pca)
            codecs[name] = ScaleCodec(dtype, widths[name], basis, None, explained)
        if dtype == "int8":
            codecs = _with_steps(codecs, fitted)
        baselines, fidelity = _measure(codecs, fitted, held)
        cropped = scored[: min(max((len(used) + len(scored)) // 100, CROPPED_ROWS[0]), CROPPED_ROWS[1])]
        roi_cosine = {} if crops is None else _measure_crops(codecs, held, cropped, crops, seed)
    log.info("calibrated on %d training rows, measured on %d others", len(used), len(scored))
    return CacheFit(codecs, used, scored, baselines.arrays(), baselines.losses(), fidelity, roi_cosine)


def _fill(
    spool: Spool, features: Iterable[tuple[np.ndarray, Features]], moments: Mapping[str, SecondMoment]
) -> np.ndarray:
    """Keep all features, add them to `moments`; returns the rows that there were features of, int64."""
    used = [np.zeros(0, np.int64)]
    for rows, batch in features:
        spool.append(batch)
        used.append(rows)
        for name, moment in moments.items():
            moment.update(batch[name])
    return np.concatenate(used)


def _with_steps(codecs: Mapping[str, ScaleCodec], spool: Spool) -> dict[str, ScaleCodec]:
    maxima = {name: ComponentMaxima(codec.components) for name, codec in codecs.items()}
    for block in spool.blocks():
        for name, codec in codecs.items():
            maxima[name].update(codec.project(block[name]))
    return {name: codec.with_steps(maxima[name].steps()) for name, codec in codecs.items()}


def _measure(codecs: Mapping[str, ScaleCodec], fitted: Spool, held: Spool) -> tuple[Baselines, dict[str, Any]]:
    baselines, fidelity = Baselines(list(codecs)), {name: Fidelity() for name in codecs}
    for block in fitted.blocks():
        baselines.fit(_targets(codecs, block))
    for block in held.blocks():
        targets = _targets(codecs, block)
        baselines.score(targets)
        for name, codec in codecs.items():
            fidelity[name].update(block[name], targets[name], codec.basis)
    return baselines, {name: of.result() for name, of in fidelity.items()}


def _measure_crops(
    codecs: Mapping[str, ScaleCodec], held: Spool, rows: np.ndarray, crops: Crops, seed: int
) -> dict[str, dict[str, float]]:
    """Of the first held-out `rows`, which lie in `held` in this order: what training with `data.roi` takes for the
    teacher's map of a crop, against the teacher's own coefficients of it; `global` as it is against the crop's."""
    stored = _targets(codecs, _first(held, len(rows)))
    found: dict[str, list[np.ndarray]] = {name: [] for name in stored}
    for place, row in enumerate(rows.tolist()):
        boxes = probes(seed, row)
        live = crops(row, boxes)
        for name, values in stored.items():
            own = np.repeat(values[place : place + 1], len(boxes), axis=0)
            if name in codecs:
                resampled = resample(torch.from_numpy(own), torch.from_numpy(boxes)).numpy()
                found[name].append(cosines(resampled, codecs[name].project(live[name])))
            else:
                found[name].append(cosines(own, live[name]))
    means = {name: np.mean(values, axis=0) for name, values in found.items()}
    return {name: {f"{s:g}": float(x) for s, x in zip(SHARES, of, strict=True)} for name, of in means.items()}


def _first(spool: Spool, count: int) -> Features:
    """The first `count` rows."""
    taken: list[Features] = []
    blocks = spool.blocks()
    while (more := count - sum(len(block[GLOBAL]) for block in taken)) > 0:
        taken.append({name: values[:more] for name, values in next(blocks).items()})
    return {name: np.concatenate([block[name] for block in taken]) for name in taken[0]}


def _targets(codecs: Mapping[str, ScaleCodec], features: Features) -> Features:
    """What a reader of the cache would get for these rows."""
    targets = {GLOBAL: to_float16(features[GLOBAL])[0].astype(np.float32)}
    for name, codec in codecs.items():
        stored = codec.encode(features[name])
        targets[name] = codec.dequantise(stored.values, stored.token_steps)
    return targets
