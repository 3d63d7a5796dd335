"""What the optional terms of distillation need to know of a cache and no cache stores: measured from its rows.

The units are those of predictors that ignore the image, fitted on calibration rows and scored on held-out ones, as the
stored baselines are (`cache.baselines`):

    KD         x̂_t the unit coefficients of token t     predictor: μ_t = mean x̂_t    loss: mean_t (1 − cos(μ_t, x_t))
    projected  ŷ = y / ‖y‖, y = W g + b                 predictor: μ = mean ŷ        loss: 1 − cos(μ, y)
               d_ij between the ŷ, over their mean      predictor: d_ij = 1          loss: mean_{i≠j} h(1 − d_ij)

At most 1,024 rows of each kind are read, evenly spaced, the same on every process and in every run.

Legend: n rows, T tokens, K components, C width of `global`, P width of the projected space.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pipeline.cache import layout
from pipeline.cache.baselines import Relational, unit
from pipeline.errors import PipeError

if TYPE_CHECKING:
    from pipeline.cache.reader import Cache
    from pipeline.models.projection import TextProjection

ROWS, BLOCK = 1024, 64
SMALLEST = 1e-4  # a teacher that says (nearly) the same of every image cannot be a unit


@dataclass(frozen=True)
class Measured:
    """Predictors that ignore the image, and what they score.

    Attributes:
        global_mean: (C,) the mean unit `global`; text_mean: (C,) or (P,), that of the text branch's target.
        token_means: scale → (T, K), the mean unit token of each place; kd: scale → its loss. Empty unless asked for.
        projection: of the text branch's target, None for `global` itself; text_global, text_rkd: the losses that
            replace those of `global` for it.
    """

    global_mean: Tensor
    text_mean: Tensor
    token_means: Mapping[str, Tensor] = field(default_factory=dict)
    kd: Mapping[str, float] = field(default_factory=dict)
    projection: TextProjection | None = None
    text_global: float | None = None
    text_rkd: float | None = None

    def units(self) -> dict[str, float]:
        """The units that these replace or add, by the name that a term is logged under."""
        found = {f"kd/{name}": max(loss, SMALLEST) for name, loss in self.kd.items()}
        if self.text_global is not None and self.text_rkd is not None:
            found |= {"global/text": max(self.text_global, SMALLEST), "rkd/global": max(self.text_rkd, SMALLEST)}
        return found


def measure(cache: Cache, *, kd: bool, projection: TextProjection | None) -> Measured:
    """Read the rows that the cache was calibrated on and those that it held out, and fit and score on them.

    Args:
        kd: whether tokens are asked for. projection: of the text branch's target, if it has one.

    Raises:
        PipeError: fewer than one calibration row or two held-out rows have been extracted.
    """
    of_global = torch.from_numpy(np.array(cache.baselines[layout.GLOBAL_MEAN]))
    if not kd and projection is None:
        return Measured(of_global, of_global)
    state = cache.state()
    fit, held_out = (_some(rows[state[rows] == layout.OK]) for rows in (cache.calibration_rows, cache.heldout_rows))
    if not len(fit) or len(held_out) < 2:
        raise PipeError(
            "the rows that baselines are measured on are not in the cache yet",
            where=cache.path,
            fix="run: pipe extract-teacher to its end",
        )
    tokens = _TokenBaseline([scale.name for scale in cache.scales] if kd else [])
    projected = None if projection is None else _ProjectedBaseline(projection)
    for targets in _blocks(cache, fit):
        tokens.fit(targets)
        if projected:
            projected.fit(targets)
    for targets in _blocks(cache, held_out):
        tokens.score(targets)
        if projected:
            projected.score(targets)
    means = {name: torch.from_numpy(value.astype(np.float32)) for name, value in tokens.means().items()}
    losses = {name: loss / len(held_out) for name, loss in tokens.loss.items()}
    if projected is None:
        return Measured(of_global, of_global, means, losses)
    text_mean = torch.from_numpy((projected.sum / len(fit)).astype(np.float32))
    of_text = projected.loss / len(held_out)
    return Measured(of_global, text_mean, means, losses, projection, of_text, projected.relational.loss())


class _TokenBaseline:
    """Each place's mean unit token, and 1 − cosine to it."""

    def __init__(self, scales: list[str]) -> None:
        self.sums: dict[str, np.ndarray] = {}
        self.loss = dict.fromkeys(scales, 0.0)

    def fit(self, targets: Mapping[str, np.ndarray]) -> None:
        for name in self.loss:
            self.sums[name] = self.sums.get(name, 0.0) + unit(targets[name]).sum(axis=0)

    def means(self) -> dict[str, np.ndarray]:
        """Unit vectors: their length plays no part in a cosine."""
        return {name: unit(total) for name, total in self.sums.items()}

    def score(self, targets: Mapping[str, np.ndarray]) -> None:
        means = self.means()
        for name in self.loss:
            self.loss[name] += float((1 - (unit(targets[name]) * means[name]).sum(-1)).mean(-1).sum())


class _ProjectedBaseline:
    """The mean unit projected vector, 1 − cosine to it, and the relational loss of equal distances."""

    def __init__(self, projection: TextProjection) -> None:
        self.weight, self.bias = (x.double().numpy() for x in (projection.weight, projection.bias))
        self.sum: np.ndarray = np.zeros(len(self.bias))
        self.loss, self.relational = 0.0, Relational()

    def _unit(self, targets: Mapping[str, np.ndarray]) -> np.ndarray:
        return unit(targets[layout.GLOBAL].astype(np.float64) @ self.weight.T + self.bias)

    def fit(self, targets: Mapping[str, np.ndarray]) -> None:
        self.sum = self.sum + self._unit(targets).sum(axis=0)

    def score(self, targets: Mapping[str, np.ndarray]) -> None:
        vectors = self._unit(targets)
        self.loss += float((1 - vectors @ unit(self.sum)).sum())
        self.relational.add(vectors)


def _some(rows: np.ndarray) -> np.ndarray:
    """At most `ROWS` of them, evenly spaced, in ascending order."""
    rows = np.sort(rows)
    return rows[np.linspace(0, len(rows) - 1, min(len(rows), ROWS)).round().astype(np.int64)] if len(rows) else rows


def _blocks(cache: Cache, rows: np.ndarray) -> Iterator[Mapping[str, np.ndarray]]:
    for start in range(0, len(rows), BLOCK):
        yield cache.read(rows[start : start + BLOCK])
