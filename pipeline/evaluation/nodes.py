"""The modality gap at every node: where images and texts lie relative to each other.

For N pairs of unit vectors x_i (images) and y_i (texts):

    gap              ‖mean x − mean y‖                                       (Liang et al. 2022, arXiv 2203.02053)
    centroid_cosine  cos(mean x, mean y)
    relative_gap     m / (a + m), m = mean_i d(x_i, y_i), a = half the sum of the two modalities' mean_{i≠j} d, with
                     d = (1 − cos) / 2                                       (after Schrodi et al. 2024; our reading)
    alignment        mean_i ‖x_i − y_i‖²                                     (Wang and Isola 2020, arXiv 2005.10242)
    uniformity       log mean_{i≠j} exp(−2 ‖x_i − x_j‖²), images and texts apart (the same)
    separability     how often a logistic regression tells an image's vector from a text's, on held-out pairs

The centroid distance alone misleads: two nodes can share it and differ in all others; so they stand together.
Pair statistics resample pairs: a pair drawn twice is not its own neighbour (i ≠ j runs over different pairs).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from pipeline.console import log
from pipeline.evaluation.logistic import fit
from pipeline.evaluation.paired import mean_of, measure
from pipeline.evaluation.records import Measurement, Statistic

MAX_PAIRS = 1000  # pairwise statistics are quadratic; a seeded thousand pairs give ±1 % of them
MIN_PAIRS = 8
SEED = 0

Matrix = NDArray[np.float64]
Floats = NDArray[np.float32]


def gap(x: Matrix, y: Matrix) -> Statistic:
    """‖mean x − mean y‖ of pairs (N, D)."""
    apart = x - y

    def statistic(counts: Matrix) -> Matrix:
        return np.linalg.norm(counts @ apart, axis=1) / counts.sum(axis=1)

    return statistic


def centroid_cosine(x: Matrix, y: Matrix) -> Statistic:
    """cos(mean x, mean y); 0 where a mean vanishes."""

    def statistic(counts: Matrix) -> Matrix:
        a, b = counts @ x, counts @ y
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        return np.divide(np.einsum("rd,rd->r", a, b), norms, out=np.zeros(len(a)), where=norms > 1e-12)

    return statistic


def relative_gap(x: Matrix, y: Matrix) -> Statistic:
    """m / (a + m), in [0, 1]: 0 where pairs coincide, ½ where a pair is as far apart as strangers of one modality."""
    matched = (1 - np.einsum("nd,nd->n", x, y)) / 2

    def strangers(counts: Matrix, v: Matrix) -> Matrix:
        # Σ_{i≠j} w_i w_j cos_ij = ‖Σ w_i v_i‖² − Σ w_i², because the vectors are unit-norm.
        squares = (counts**2).sum(axis=1)
        total = counts.sum(axis=1) ** 2 - squares
        cosine = (((counts @ v) ** 2).sum(axis=1) - squares) / total
        return (1 - cosine) / 2

    def statistic(counts: Matrix) -> Matrix:
        m = counts @ matched / counts.sum(axis=1)
        a = (strangers(counts, x) + strangers(counts, y)) / 2
        total = a + m
        return np.divide(m, total, out=np.zeros_like(m), where=total > 1e-12)

    return statistic


def uniformity(x: Matrix) -> Statistic:
    """log mean_{i≠j} exp(−2 ‖x_i − x_j‖²): 0 where all coincide, lower where they spread over the sphere."""
    kernel = np.exp(4 * (x @ x.T) - 4)  # ‖a − b‖² = 2 − 2 ⟨a, b⟩
    np.fill_diagonal(kernel, 0.0)

    def statistic(counts: Matrix) -> Matrix:
        total = counts.sum(axis=1) ** 2 - (counts**2).sum(axis=1)
        return np.log(((counts @ kernel) * counts).sum(axis=1) / total)

    return statistic


def told_apart(x: Matrix, y: Matrix, *, seed: int = SEED) -> Matrix:
    """For each held-out pair, the share (0, ½, 1) of its two vectors whose modality is named right: (N − ⌊N/2⌋,).

    The regression (C = 1) is fitted on a seeded half of the pairs, so a pair is never on both sides.
    """
    order = np.random.default_rng(seed).permutation(len(x))
    fitted, held = order[: len(x) // 2], order[len(x) // 2 :]
    labels = np.repeat(np.array([0, 1]), len(fitted))
    classifier = fit(np.concatenate([x[fitted], y[fitted]]), labels, 2, c=1.0)
    return ((classifier.predict(x[held]) == 0).astype(float) + (classifier.predict(y[held]) == 1)) / 2


def subset(n: int, most: int = MAX_PAIRS, *, seed: int = SEED) -> NDArray[np.int64]:
    """The pairs that are measured: all, or a seeded `most` of them, ascending."""
    if n <= most:
        return np.arange(n)
    return np.sort(np.random.default_rng(seed).choice(n, most, replace=False))


def evaluate(nodes: Mapping[str, tuple[Floats, Floats]], *, split: str) -> list[Measurement]:
    """The measures above at every node.

    Args:
        nodes: name → (image (N, D), text (N, D)), row i of both is one pair.
    """
    found: list[Measurement] = []
    for node, (images, texts) in nodes.items():
        if len(images) < MIN_PAIRS:
            log.warning("%s: %d pairs are too few for the gap (%d are needed)", split, len(images), MIN_PAIRS)
            return []
        rows = subset(len(images))
        x, y = _unit(images[rows]), _unit(texts[rows])
        statistics = {
            "nodes/gap": gap(x, y),
            "nodes/centroid_cosine": centroid_cosine(x, y),
            "nodes/relative_gap": relative_gap(x, y),
            "nodes/alignment": mean_of(((x - y) ** 2).sum(axis=1)),
            "nodes/uniformity_image": uniformity(x),
            "nodes/uniformity_text": uniformity(y),
        }
        found += measure(statistics, len(rows), node=node, split=split)
        named = told_apart(x, y)
        found += measure({"nodes/separability": mean_of(named)}, len(named), node=node, split=split)
    return found


def _unit(x: Floats) -> Matrix:
    wide = x.astype(np.float64)
    return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)
