"""Intervals against scipy's bootstrap and against loops; paired differences; statistics as functions of counts."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from pipeline.evaluation import paired
from pipeline.evaluation.paired import difference, draws, mean_of, mean_of_groups, mean_of_items, measure
from pipeline.evaluation.paired import median_of_items as median_of
from pipeline.evaluation.records import Measurement


def one(statistic, n, **options) -> Measurement:
    return measure({"m": statistic}, n, node="gated", split="test", **options)[0]


def test_interval_of_a_mean_agrees_with_scipy():
    x = np.random.default_rng(0).exponential(size=200)
    found = one(mean_of(x), 200, resamples=4000)
    ours = (found.low, found.high)
    theirs = stats.bootstrap((x,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1))
    assert found.value == pytest.approx(x.mean())
    np.testing.assert_allclose(ours, tuple(theirs.confidence_interval), atol=0.012)


def test_interval_of_a_median_agrees_with_scipy():
    x = np.random.default_rng(2).integers(1, 80, size=151)
    found = one(median_of(x, np.arange(151)), 151, resamples=3000)
    theirs = stats.bootstrap((x,), np.median, n_resamples=3000, method="percentile", rng=np.random.default_rng(1))
    assert found.value == np.median(x)
    np.testing.assert_allclose((found.low, found.high), tuple(theirs.confidence_interval), atol=2)


def test_paired_interval_agrees_with_scipy_and_is_narrower_than_the_unpaired_one():
    rng = np.random.default_rng(3)
    b = rng.random(300) < 0.5
    a = b | (rng.random(300) < 0.1)  # the same model, better on a tenth
    value, low, high = difference(mean_of(a), mean_of(b), 300, resamples=4000)
    theirs = stats.bootstrap(
        (a.astype(float), b.astype(float)),
        lambda x, y, axis: x.mean(axis) - y.mean(axis),
        paired=True,
        vectorized=True,
        n_resamples=4000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    assert value == pytest.approx(a.mean() - b.mean())
    np.testing.assert_allclose((low, high), tuple(theirs), atol=0.006)
    alone = one(mean_of(a), 300)
    assert high - low < alone.high - alone.low
    assert low > 0


def test_a_run_does_not_differ_from_itself():
    x = mean_of(np.random.default_rng(0).random(50))
    assert difference(x, x, 50) == (0.0, 0.0, 0.0)


def test_draws_are_samples_of_n_and_depend_on_the_seed_alone(monkeypatch):
    rows = np.concatenate(list(draws(17, 60, seed=4)))
    assert rows.shape == (60, 17)
    np.testing.assert_array_equal(rows.sum(axis=1), 17)
    np.testing.assert_array_equal(rows, np.concatenate(list(draws(17, 60, seed=4))))
    assert not np.array_equal(rows, np.concatenate(list(draws(17, 60, seed=5))))
    monkeypatch.setattr(paired, "CHUNK_ENTRIES", 17 * 7)
    np.testing.assert_array_equal(rows, np.concatenate(list(draws(17, 60, seed=4))))


def test_statistics_on_counts_equal_plain_formulas_on_the_drawn_units():
    rng = np.random.default_rng(6)
    n = 25
    x = rng.normal(size=n)
    groups = rng.integers(0, 4, size=n)
    owner = np.repeat(np.arange(n), rng.integers(1, 4, size=n))
    items = rng.integers(1, 50, size=len(owner))
    for counts in np.concatenate(list(draws(n, 20))):
        drawn = np.repeat(np.arange(n), counts.astype(int))
        of_items = np.concatenate([items[owner == unit] for unit in drawn])
        per_group = [x[drawn][groups[drawn] == g].mean() for g in set(groups[drawn])]
        row = counts[None]
        assert mean_of(x)(row)[0] == pytest.approx(x[drawn].mean())
        assert mean_of_items(items, owner, n)(row)[0] == pytest.approx(of_items.mean())
        assert mean_of_groups(x, groups)(row)[0] == pytest.approx(np.mean(per_group))
        assert median_of(items, owner)(row)[0] == np.median(of_items)


def test_clustered_items_give_a_wider_interval_than_independent_ones():
    """Five equal captions an image are one observation, not five."""
    hit = np.random.default_rng(0).random(60) < 0.4
    owner = np.repeat(np.arange(60), 5)
    clustered = one(mean_of_items(hit[owner], owner, 60), 60)
    independent = one(mean_of(hit[owner]), 300)
    assert clustered.high - clustered.low > 1.7 * (independent.high - independent.low)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(11)
    hits = 0
    for _ in range(200):
        found = one(mean_of(rng.random(80) < 0.3), 80, resamples=300)
        hits += found.low <= 0.3 <= found.high
    assert 0.89 <= hits / 200 <= 0.985
