"""The gap measures by hand and by loops over pairs."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from pipeline.evaluation import nodes
from pipeline.evaluation.paired import draws, point


def pairs(n: int = 40, width: int = 6, shift: float = 0.0, seed: int = 0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, width))
    y = x + 0.5 * rng.normal(size=(n, width)) + shift
    return tuple(v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y))


def values(x, y) -> dict[str, float]:
    found = nodes.evaluate({"gated": (x.astype(np.float32), y.astype(np.float32))}, split="test")
    return {m.metric: m.value for m in found}


def test_identical_modalities_have_no_gap():
    x, _ = pairs()
    found = values(x, x)
    assert found["nodes/gap"] == pytest.approx(0, abs=1e-7)
    assert found["nodes/centroid_cosine"] == pytest.approx(1)
    assert found["nodes/relative_gap"] == pytest.approx(0, abs=1e-6)
    assert found["nodes/alignment"] == pytest.approx(0, abs=1e-10)


def test_two_opposite_points_by_hand():
    x = np.tile([1.0, 0.0], (10, 1))
    found = values(x, -x)
    assert found["nodes/gap"] == pytest.approx(2)
    assert found["nodes/centroid_cosine"] == pytest.approx(-1)
    assert found["nodes/relative_gap"] == pytest.approx(1)  # pairs at distance 1, strangers at 0
    assert found["nodes/alignment"] == pytest.approx(4)
    assert found["nodes/uniformity_image"] == pytest.approx(0, abs=1e-6)
    assert found["nodes/separability"] == 1


def test_measures_equal_loops_over_pairs():
    x, y = pairs(30, shift=0.4)
    found = values(x, y)
    n = len(x)
    off = [(i, j) for i in range(n) for j in range(n) if i != j]
    m = np.mean([(1 - x[i] @ y[i]) / 2 for i in range(n)])
    a = np.mean([np.mean([(1 - v[i] @ v[j]) / 2 for i, j in off]) for v in (x, y)])
    assert found["nodes/gap"] == pytest.approx(np.linalg.norm(x.mean(0) - y.mean(0)), rel=1e-5)
    assert found["nodes/relative_gap"] == pytest.approx(m / (a + m), rel=1e-5)
    assert found["nodes/alignment"] == pytest.approx(np.mean([np.sum((x[i] - y[i]) ** 2) for i in range(n)]), rel=1e-5)
    for name, v in (("image", x), ("text", y)):
        spread = np.log(np.mean([np.exp(-2 * np.sum((v[i] - v[j]) ** 2)) for i, j in off]))
        assert found[f"nodes/uniformity_{name}"] == pytest.approx(spread, rel=1e-5)


@pytest.mark.parametrize("name", ["gap", "centroid_cosine", "relative_gap"])
def test_resampled_measures_equal_the_measure_of_the_drawn_pairs(name):
    """relative_gap: without the pairs of a unit with its own copy, which are no strangers."""
    x, y = pairs(12, shift=0.3)
    measure = getattr(nodes, name)
    for counts in np.concatenate(list(draws(12, 8))):
        drawn = np.repeat(np.arange(12), counts.astype(int))
        got = float(measure(x, y)(counts[None])[0])
        if name == "relative_gap":
            off = [(i, j) for i in drawn for j in drawn if i != j]
            m = np.mean([(1 - x[i] @ y[i]) / 2 for i in drawn])
            a = np.mean([np.mean([(1 - v[i] @ v[j]) / 2 for i, j in off]) for v in (x, y)])
            assert got == pytest.approx(m / (a + m))
        else:
            assert got == pytest.approx(point(measure(x[drawn], y[drawn]), len(drawn)))


def test_separability_is_that_of_scikit_learns_regression():
    x, y = pairs(200, shift=0.25, seed=3)
    order = np.random.default_rng(nodes.SEED).permutation(200)
    a, b = order[:100], order[100:]
    model = LogisticRegression(C=1.0, tol=1e-10, max_iter=2000).fit(np.concatenate([x[a], y[a]]), [0] * 100 + [1] * 100)
    right = (model.predict(x[b]) == 0).mean() / 2 + (model.predict(y[b]) == 1).mean() / 2
    assert nodes.told_apart(x, y).mean() == pytest.approx(right)
    assert 0.6 < right < 1.0


def test_modalities_of_one_distribution_cannot_be_told_apart():
    rng = np.random.default_rng(0)
    x, y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in rng.normal(size=(2, 400, 8)))
    assert nodes.told_apart(x, y).mean() == pytest.approx(0.5, abs=0.08)


def test_every_interval_holds_its_value():
    x, y = pairs(60, shift=0.2)
    for m in nodes.evaluate({"gated": (x, y)}, split="test"):
        assert m.low <= m.value <= m.high, m.metric


def test_too_few_pairs_are_not_measured():
    x, y = pairs(nodes.MIN_PAIRS - 1)
    assert nodes.evaluate({"gated": (x, y)}, split="test") == []


def test_large_sets_are_measured_on_a_seeded_subset():
    rows = nodes.subset(5000)
    assert len(rows) == nodes.MAX_PAIRS
    assert (np.diff(rows) > 0).all()
    np.testing.assert_array_equal(rows, nodes.subset(5000))
    np.testing.assert_array_equal(nodes.subset(7), np.arange(7))
