"""Predictors that ignore the image, and the distillation losses that they reach: the unit of every distillation term.

A student that scores worse than these has learned nothing of the image (our reading: every term is logged as a ratio).
Fitted on the dequantised targets of the calibration rows, scored on held-out rows:

    Gram        S = X̂ X̂ᵀ, X̂ the unit rows of X (T, K)             predictor: mean S̄       loss: mean (S̄ − S)²
    relational  d_ij = ‖p_i − p_j‖ / mean_{i≠j}, p the mean token   predictor: d_ij = 1     loss: mean_{i≠j} h(1 − d_ij)
    global      ĝ = g / ‖g‖, g the teacher's `global`               predictor: μ = mean ĝ   loss: mean (1 − cos(μ, g))

h(x) = x²/2 below |x| = 1, |x| − 1/2 above (Park et al., arXiv 1904.05068). Relational distances are taken within blocks
of 256 held-out rows, as a batch would; for `global` (the text branch's target) between unit vectors.

Legend: n images, T tokens, K components, C width of `global`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.cache import layout
from pipeline.errors import PipeError

BLOCK = 256
EPS = 1e-6


class Baselines:
    """Running sums only: memory is independent of the number of rows.

    Args:
        scales: names of the scales, as in the targets.
    """

    def __init__(self, scales: Sequence[str]) -> None:
        self.scales = list(scales)
        self.gram_sum: dict[str, np.ndarray] = {}
        self.global_sum: np.ndarray | None = None
        self.fitted = self.scored = 0
        self.gram_loss = dict.fromkeys(self.scales, 0.0)
        self.global_loss = 0.0
        self.relational = {name: Relational() for name in [*self.scales, layout.GLOBAL]}

    def fit(self, targets: Mapping[str, np.ndarray]) -> None:
        """Add calibration rows: scale → (n, T, K) float32 dequantised, "global" → (n, C) as stored."""
        for name in self.scales:
            tokens = targets[name].shape[1]
            total = self.gram_sum.setdefault(name, np.zeros((tokens, tokens)))
            for x in targets[name]:
                total += gram(x)
        total = unit(targets[layout.GLOBAL]).sum(axis=0)
        self.global_sum = total if self.global_sum is None else self.global_sum + total
        self.fitted += len(targets[layout.GLOBAL])

    def score(self, targets: Mapping[str, np.ndarray]) -> None:
        """Add held-out rows, in batches of any size; every `fit` comes before the first `score`."""
        arrays = self.arrays()
        for name in self.scales:
            mean = arrays[layout.gram_mean_name(name)].astype(np.float64)
            self.gram_loss[name] += sum(float(((mean - gram(x)) ** 2).mean()) for x in targets[name])
            self.relational[name].add(targets[name].astype(np.float64).mean(axis=1))
        vectors = unit(targets[layout.GLOBAL])
        self.relational[layout.GLOBAL].add(vectors)
        mean = unit(arrays[layout.GLOBAL_MEAN])
        self.global_loss += float((1 - vectors @ mean).sum())
        self.scored += len(vectors)

    def arrays(self) -> dict[str, np.ndarray]:
        """`<scale>_gram_mean` (T, T) and `global_mean` (C,), float32."""
        if self.global_sum is None:
            raise PipeError("no calibration rows to fit baselines on", fix="the manifest needs usable training rows")
        found = {layout.gram_mean_name(name): total / self.fitted for name, total in self.gram_sum.items()}
        found[layout.GLOBAL_MEAN] = self.global_sum / self.fitted
        return {name: value.astype(np.float32) for name, value in found.items()}

    def losses(self) -> dict[str, Any]:
        """{"gram": {scale}, "rkd": {scale, "global"}, "global"} over the rows scored so far (two at least)."""
        if self.scored < 2:
            raise PipeError(f"baselines need at least 2 held-out rows, there are {self.scored}")
        return {
            "gram": {name: loss / self.scored for name, loss in self.gram_loss.items()},
            "rkd": {name: of.loss() for name, of in self.relational.items()},
            "global": self.global_loss / self.scored,
        }


class Relational:
    """Mean Huber loss of "all distances equal" over pairs in blocks of 256 rows; a short last block counts by pairs."""

    def __init__(self) -> None:
        self.waiting: list[np.ndarray] = []
        self.total, self.pairs = 0.0, 0

    def add(self, vectors: np.ndarray) -> None:
        """vectors (n, D) float64, in row order."""
        self.waiting.extend(vectors)
        while len(self.waiting) >= BLOCK:
            self._score(self.waiting[:BLOCK])
            del self.waiting[:BLOCK]

    def loss(self) -> float:
        rest = Relational()
        rest._score(self.waiting)
        return (self.total + rest.total) / max(self.pairs + rest.pairs, 1)

    def _score(self, block: list[np.ndarray]) -> None:
        if len(block) < 2:
            return
        distances = pair_distances(np.stack(block))
        self.total += float(huber(1 - distances / max(distances.mean(), EPS)).sum())
        self.pairs += distances.size


def gram(x: np.ndarray) -> np.ndarray:
    """Cosine Gram matrix of one image's tokens: x (T, K) → (T, T) float64."""
    rows = unit(x)
    return rows @ rows.T


def pair_distances(vectors: np.ndarray) -> np.ndarray:
    """‖p_i − p_j‖ over ordered pairs i ≠ j: (n, D) → (n (n − 1),) float64."""
    squares = (vectors**2).sum(axis=1)
    squared = np.clip(squares[:, None] + squares[None] - 2 * vectors @ vectors.T, 0, None)
    distances: np.ndarray = np.sqrt(squared)[~np.eye(len(vectors), dtype=bool)]
    return distances


def huber(x: np.ndarray) -> np.ndarray:
    """x²/2 where |x| < 1, |x| − 1/2 elsewhere."""
    size = np.abs(x)
    return np.where(size < 1, 0.5 * size**2, size - 0.5)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors along the last axis over their lengths, float64; zero stays zero."""
    vectors = np.asarray(vectors, np.float64)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), EPS)
