"""The baselines' losses as their papers state them, in float64 loops over single numbers: slow, and nothing shared.

Legend: v images, w texts, c synthetic captions, a and b two views of the images; each (N, width), a list of rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Rows = Sequence[Sequence[float]] | np.ndarray


def dot(x: Sequence[float], y: Sequence[float]) -> float:
    return math.fsum(float(p) * float(q) for p, q in zip(x, y, strict=True))


def cross_entropy(logits: Sequence[float], own: int) -> float:
    top = max(logits)
    return math.log(math.fsum(math.exp(x - top) for x in logits)) + top - logits[own]


def clip(v: Rows, w: Rows, s: float) -> list[float]:
    """Each pair's mean of its two cross-entropies."""
    n = range(len(v))
    to_texts = [cross_entropy([s * dot(v[i], w[j]) for j in n], i) for i in n]
    to_images = [cross_entropy([s * dot(w[i], v[j]) for j in n], i) for i in n]
    return [(p + q) / 2 for p, q in zip(to_texts, to_images, strict=True)]


def cyclip(v: Rows, w: Rows, s: float) -> tuple[float, float]:
    """In-modal and cross-modal: the mean over N² squared differences of logits, / s², · N."""
    n = len(v)
    in_modal = [(s * dot(v[j], v[k]) - s * dot(w[j], w[k])) ** 2 for j in range(n) for k in range(n)]
    cross = [(s * dot(v[j], w[k]) - s * dot(v[k], w[j])) ** 2 for j in range(n) for k in range(n)]
    return math.fsum(in_modal) / n**2 / s**2 * n, math.fsum(cross) / n**2 / s**2 * n


class Alip:
    """ALIP's loss with its memory: one call a training step."""

    def __init__(self) -> None:
        self.h_tc = self.h_it = self.h_ic = 1.0

    def weights(self, v: Rows, w: Rows, c: Rows) -> list[tuple[float, float, float]]:
        """(sample, image-text, image-caption) of each sample, after the running means have seen the batch."""
        n = range(len(v))
        s_tc, s_it, s_ic = ([dot(x[i], y[i]) for i in n] for x, y in ((w, c), (v, w), (v, c)))
        self.h_tc = self.h_tc * 0.99 + 0.01 * math.fsum(s_tc) / len(v)
        self.h_it = self.h_it * 0.99 + 0.01 * math.fsum(s_it) / len(v)
        self.h_ic = self.h_ic * 0.99 + 0.01 * math.fsum(s_ic) / len(v)
        found = []
        for i in n:
            e = math.exp(s_tc[i] - self.h_tc) ** 2
            if e < 1:
                found.append((e, math.exp(s_it[i] - self.h_it) ** 2, math.exp(s_ic[i] - self.h_ic) ** 2))
            else:
                found.append((1.0, 1.0, 1.0))
        return found

    def __call__(self, v: Rows, w: Rows, c: Rows, s: float) -> float:
        weights = self.weights(v, w, c)
        texts, captions = clip(v, w, s), clip(v, c, s)
        weighted_texts = [x * p * q for x, (p, q, _) in zip(texts, weights, strict=True)]
        weighted_captions = [x * p * q for x, (p, _, q) in zip(captions, weights, strict=True)]
        return math.fsum(weighted_texts) / len(v) + math.fsum(weighted_captions) / len(v)


def simclr(a: Rows, b: Rows, temperature: float) -> float:
    """NT-Xent: 2N samples, each with its other view as the positive and all but itself as candidates; their mean."""
    unit = [[x / math.sqrt(dot(row, row)) for x in row] for row in [*a, *b]]
    n, losses = len(a), []
    for i in range(2 * n):
        positive = (i + n) % (2 * n)
        others = [k for k in range(2 * n) if k != i]
        logits = [dot(unit[i], unit[k]) / temperature for k in others]
        losses.append(cross_entropy(logits, others.index(positive)))
    return math.fsum(losses) / len(losses)
