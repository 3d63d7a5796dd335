"""Uncertainty: the bootstrap over test units, for one run and for the difference of two (paired).

A resample of n units is a row of counts w (how often each unit was drawn, Σ w = n), and a statistic is a function of
counts: (R, n) → (R,). So a thousand resamples are a few matrix products, units may carry several items (an image's
captions), and two runs are compared on the very same draws.

Percentile intervals (Efron 1979); legend: n units, R resamples, m items, G groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.evaluation.records import Measurement, Statistic

RESAMPLES = 1000
LEVEL = 0.95
SEED = 0
CHUNK_ENTRIES = 4_000_000  # counts in memory at once: 32 MB, whatever n


def draws(n: int, resamples: int = RESAMPLES, seed: int = SEED) -> Iterator[NDArray[np.float64]]:
    """Counts of `resamples` bootstrap samples of n units, in chunks (r, n) float64 whose rows sum to n.

    The stream depends on (n, resamples, seed) alone, so that runs on the same test set are resampled alike.
    """
    rng = np.random.default_rng([seed, n])
    per_chunk = max(1, CHUNK_ENTRIES // max(n, 1))
    for start in range(0, resamples, per_chunk):
        r = min(per_chunk, resamples - start)
        picked = rng.integers(n, size=(r, n)) + np.arange(r)[:, None] * n
        yield np.bincount(picked.ravel(), minlength=r * n).reshape(r, n).astype(np.float64)


def point(statistic: Statistic, n: int) -> float:
    """The statistic on the sample itself: every unit once."""
    return float(statistic(np.ones((1, n)))[0])


def percentile(samples: NDArray[np.float64], level: float = LEVEL) -> tuple[float, float]:
    """The central `level` share of bootstrap values (R,)."""
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def measure(
    statistics: Mapping[str, Statistic],
    n: int,
    *,
    node: str,
    split: str,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> list[Measurement]:
    """Value and 95 % interval of each named statistic of n units, all on the same draws."""
    samples: dict[str, list[NDArray[np.float64]]] = {name: [] for name in statistics}
    for counts in draws(n, resamples, seed):
        for name, statistic in statistics.items():
            samples[name].append(statistic(counts))
    found = []
    for name, statistic in statistics.items():
        low, high = percentile(np.concatenate(samples[name]))
        found.append(Measurement(name, node, split, point(statistic, n), low, high, n, statistic))
    return found


def difference(
    a: Statistic, b: Statistic, n: int, *, resamples: int = RESAMPLES, seed: int = SEED
) -> tuple[float, float, float]:
    """a − b on the same n units: (value, low, high). It is significant where low and high share a sign."""
    samples = np.concatenate([a(counts) - b(counts) for counts in draws(n, resamples, seed)])
    return (point(a, n) - point(b, n), *percentile(samples))


def mean_of(values: ArrayLike) -> Statistic:
    """The mean of one value (n,) a unit: Σ w_i x_i / Σ w_i."""
    x = np.asarray(values, dtype=np.float64)

    def statistic(counts: NDArray[np.float64]) -> NDArray[np.float64]:
        return counts @ x / counts.sum(axis=1)

    return statistic


def mean_of_items(values: ArrayLike, unit_of_item: NDArray[np.int64], n: int) -> Statistic:
    """The mean over items (m,) that come along with their unit: captions with their image."""
    sums = np.bincount(unit_of_item, weights=np.asarray(values, dtype=np.float64), minlength=n)
    sizes = np.bincount(unit_of_item, minlength=n).astype(np.float64)

    def statistic(counts: NDArray[np.float64]) -> NDArray[np.float64]:
        return (counts @ sums) / (counts @ sizes)

    return statistic


def mean_of_groups(values: ArrayLike, groups: NDArray[np.int64]) -> Statistic:
    """The mean over groups of each group's mean (accuracy per class): groups that a resample misses are left out."""
    order = np.argsort(groups, kind="stable")
    x = np.asarray(values, dtype=np.float64)[order]
    starts = np.flatnonzero(np.diff(groups[order], prepend=groups[order][:1] - 1))

    def statistic(counts: NDArray[np.float64]) -> NDArray[np.float64]:
        sorted_counts = counts[:, order]
        sizes = np.add.reduceat(sorted_counts, starts, axis=1)  # (R, G)
        sums = np.add.reduceat(sorted_counts * x, starts, axis=1)
        present = sizes > 0
        means = np.divide(sums, sizes, out=np.zeros_like(sums), where=present)
        return means.sum(axis=1) / present.sum(axis=1)

    return statistic


def median_of_items(values: ArrayLike, unit_of_item: NDArray[np.int64]) -> Statistic:
    """The median over items (m,), as numpy's: the mean of the two middle ones where their number is even."""
    x = np.asarray(values, dtype=np.float64)
    order = np.argsort(x, kind="stable")
    x, unit = x[order], unit_of_item[order]

    def statistic(counts: NDArray[np.float64]) -> NDArray[np.float64]:
        through = np.cumsum(counts[:, unit], axis=1)  # items up to and including this one
        total = through[:, -1:]
        lower = np.argmax(through > (total - 1) // 2, axis=1)
        upper = np.argmax(through > total // 2, axis=1)
        return (x[lower] + x[upper]) / 2

    return statistic


def average(*statistics: Statistic) -> Statistic:
    """The mean of several statistics of the same units (recall of both directions)."""

    def statistic(counts: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.mean([s(counts) for s in statistics], axis=0)

    return statistic
