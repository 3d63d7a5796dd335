"""Image-independent baselines against plain loops over all rows at once."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.spatial.distance import pdist

from pipeline.cache.baselines import Baselines, huber, pair_distances
from pipeline.errors import PipeError


def targets_of(rows: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "fine": (rng.normal(size=(rows, 4, 3)) + 1).astype(np.float32),
        "mid": (rng.standard_cauchy(size=(rows, 2, 3))).astype(np.float32),
        "global": (rng.normal(size=(rows, 6)) + 0.5).astype(np.float32),
    }


def cut(targets: dict[str, np.ndarray], sizes: list[int]) -> list[dict[str, np.ndarray]]:
    edges = np.cumsum([0, *sizes])
    return [{name: x[a:b] for name, x in targets.items()} for a, b in itertools.pairwise(edges)]


def gram(x: np.ndarray) -> np.ndarray:
    unit = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=-1, keepdims=True)
    return unit @ unit.T


def fitted(calibration: dict[str, np.ndarray], heldout: list[dict[str, np.ndarray]]) -> Baselines:
    baselines = Baselines(["fine", "mid"])
    for part in cut(calibration, [5, 1, 14]):
        baselines.fit(part)
    for part in heldout:
        baselines.score(part)
    return baselines


def test_arrays_are_the_means_over_calibration_rows() -> None:
    calibration = targets_of(20, 0)
    found = fitted(calibration, []).arrays()
    for name in ("fine", "mid"):
        np.testing.assert_allclose(
            found[f"{name}_gram_mean"], np.mean([gram(x) for x in calibration[name]], axis=0), atol=1e-6
        )
    g = calibration["global"]
    np.testing.assert_allclose(
        found["global_mean"], (g / np.linalg.norm(g, axis=1, keepdims=True)).mean(axis=0), atol=1e-6
    )
    assert {x.dtype for x in found.values()} == {np.dtype(np.float32)}


def test_gram_loss_is_that_of_the_mean_gram_matrix_on_held_out_rows() -> None:
    calibration, heldout = targets_of(20, 0), targets_of(31, 1)
    losses = fitted(calibration, cut(heldout, [10, 21])).losses()
    for name in ("fine", "mid"):
        mean = np.mean([gram(x) for x in calibration[name]], axis=0)
        expected = np.mean([(mean - gram(x)) ** 2 for x in heldout[name]])
        assert losses["gram"][name] == pytest.approx(expected, rel=1e-5)


def test_global_loss_is_one_minus_cosine_to_the_mean_direction() -> None:
    calibration, heldout = targets_of(20, 0), targets_of(31, 1)
    unit = calibration["global"] / np.linalg.norm(calibration["global"], axis=1, keepdims=True)
    mean, g = unit.mean(axis=0), heldout["global"]
    cosines = g @ mean / np.linalg.norm(g, axis=1) / np.linalg.norm(mean)
    assert fitted(calibration, [heldout]).losses()["global"] == pytest.approx(np.mean(1 - cosines), rel=1e-5)


def test_relational_loss_is_huber_of_one_minus_normalised_distances() -> None:
    heldout = targets_of(40, 1)
    losses = fitted(targets_of(20, 0), cut(heldout, [7, 33])).losses()
    unit = heldout["global"] / np.linalg.norm(heldout["global"], axis=1, keepdims=True)
    pooled = {"fine": heldout["fine"].mean(axis=1), "mid": heldout["mid"].mean(axis=1), "global": unit}
    for name, p in pooled.items():
        d = pdist(p.astype(np.float64))
        x = np.abs(1 - d / d.mean())
        assert losses["rkd"][name] == pytest.approx(np.where(x < 1, x**2 / 2, x - 0.5).mean(), rel=1e-5)
    assert (pdist(pooled["mid"]) / pdist(pooled["mid"]).mean() > 2).any()  # the linear branch took part


def test_relational_distances_stay_within_blocks_of_256_rows() -> None:
    heldout = targets_of(600, 2)
    loss = fitted(targets_of(20, 0), cut(heldout, [100, 400, 100])).losses()["rkd"]["fine"]
    total, pairs = 0.0, 0
    for block in (slice(0, 256), slice(256, 512), slice(512, 600)):
        d = pdist(heldout["fine"][block].astype(np.float64).mean(axis=1))
        x = np.abs(1 - d / d.mean())
        total += np.where(x < 1, x**2 / 2, x - 0.5).sum()
        pairs += len(d)
    assert loss == pytest.approx(total / pairs, rel=1e-6)


def test_losses_do_not_depend_on_how_rows_were_batched() -> None:
    calibration, heldout = targets_of(20, 0), targets_of(300, 1)
    whole, parts = fitted(calibration, [heldout]).losses(), fitted(calibration, cut(heldout, [1, 255, 10, 34])).losses()
    for family in ("gram", "rkd"):
        for name in whole[family]:
            assert parts[family][name] == pytest.approx(whole[family][name], rel=1e-12)


def test_losses_may_be_asked_twice() -> None:
    baselines = fitted(targets_of(20, 0), [targets_of(300, 1)])
    assert baselines.losses() == baselines.losses()


def test_identical_images_have_no_gram_loss() -> None:
    one = targets_of(1, 3)
    same = {name: np.repeat(x, 20, axis=0) for name, x in one.items()}
    losses = fitted(same, [same]).losses()
    assert losses["gram"]["fine"] == pytest.approx(0, abs=1e-12)
    assert losses["global"] == pytest.approx(0, abs=1e-6)


def test_held_rows_do_not_grow_with_the_number_of_rows() -> None:
    baselines = fitted(targets_of(20, 0), [targets_of(700, 1)])
    assert len(baselines.relational["fine"].waiting) == 700 - 512


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(PipeError, match="calibration"):
        Baselines(["fine"]).arrays()
    with pytest.raises(PipeError, match="at least 2"):
        fitted(targets_of(20, 0), [targets_of(1, 1)]).losses()


def test_pair_distances_equal_scipy() -> None:
    p = np.random.default_rng(0).normal(size=(9, 4))
    np.testing.assert_allclose(np.sort(pair_distances(p))[::2], np.sort(pdist(p)), atol=1e-9)


def test_huber_is_quadratic_then_linear() -> None:
    np.testing.assert_allclose(huber(np.array([0.5, -0.5, 1.0, -3.0])), [0.125, 0.125, 0.5, 2.5])
