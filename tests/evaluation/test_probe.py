"""The probe against scikit-learn's LogisticRegression under the same protocol."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from scipy.optimize import check_grad
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score

from pipeline.evaluation import probe as module
from pipeline.evaluation.logistic import fit
from pipeline.evaluation.probe import CS, evaluate, evaluate_mean, probe, validation_rows


def clusters(seed: int, n: int, classes: int, width: int = 24, spread: float = 0.5):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, width))
    labels = rng.permutation(np.arange(n) % classes)
    x = centres[labels] * spread + rng.normal(size=(n, width))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32), labels


def sklearn_fit(x, labels, c, tol=1e-10):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LogisticRegression(C=c, tol=tol, max_iter=1000).fit(x.astype(np.float64), labels)


@pytest.mark.parametrize("classes", [2, 3, 9])
@pytest.mark.parametrize("c", [1e-2, 1.0, 100.0])
def test_fit_reaches_scikit_learns_solution(classes, c):
    x, labels = clusters(0, 150, classes)
    ours, theirs = fit(x, labels, classes, c=c), sklearn_fit(x, labels, c)
    weights = ours.weights - ours.weights.mean(0)
    if classes == 2:
        np.testing.assert_allclose(ours.weights[1] - ours.weights[0], theirs.coef_[0], atol=2e-3 * max(1, c**0.5))
    else:
        np.testing.assert_allclose(weights, theirs.coef_ - theirs.coef_.mean(0), atol=2e-3 * max(1, c**0.5))
    test, _ = clusters(1, 500, classes)
    assert np.mean(ours.predict(test) == theirs.predict(test.astype(np.float64))) >= 0.998


def test_gradient_is_the_derivative_of_the_objective(monkeypatch):
    from pipeline.evaluation import logistic

    caught = {}

    def catch(objective, first, **_):
        caught["f"] = objective
        return type("Result", (), {"x": first})()

    monkeypatch.setattr(logistic, "minimize", catch)
    x, labels = clusters(0, 20, 3, width=5)
    fit(x, labels, 3, c=0.7)
    at = np.random.default_rng(0).normal(size=18)
    assert check_grad(lambda p: caught["f"](p)[0], lambda p: caught["f"](p)[1], at) < 1e-6


def test_probe_equals_the_protocol_done_with_scikit_learn():
    """The sweep, the choice and the refit, independently: accuracy to 1e-3."""
    x, labels = clusters(2, 240, 6)
    test, truth = clusters(3, 1000, 6)
    cs = CS[::4]
    held = validation_rows(labels)
    scores = [np.mean(sklearn_fit(x[~held], labels[~held], c).predict(x[held]) == labels[held]) for c in cs]
    theirs = sklearn_fit(x, labels, cs[int(np.argmax(scores))]).predict(test)
    ours = probe(x, labels, test, 6, cs=cs)
    assert ours.c == cs[int(np.argmax(scores))]
    assert abs(np.mean(ours.predicted == truth) - np.mean(theirs == truth)) <= 1e-3


def test_the_sweep_has_dinov3s_45_values():
    assert len(CS) == 45
    assert CS[0] == pytest.approx(1e-6)
    assert CS[-1] == pytest.approx(1e5)


def test_probe_ignores_the_length_of_embeddings():
    x, labels = clusters(4, 90, 3)
    test, _ = clusters(5, 60, 3)
    scale = np.random.default_rng(0).uniform(0.5, 20, size=(90, 1)).astype(np.float32)
    a, b = probe(x, labels, test, 3, cs=CS[::11]), probe(x * scale, labels, test * 7, 3, cs=CS[::11])
    np.testing.assert_array_equal(a.predicted, b.predicted)


def test_probe_never_sees_validation_rows_while_choosing(monkeypatch):
    x, labels = clusters(6, 100, 4)
    seen = []

    def spy(features, *args, **kwargs):
        seen.append(len(features))
        return fit(features, *args, **kwargs)

    monkeypatch.setattr("pipeline.evaluation.logistic.fit", spy)
    monkeypatch.setattr(module, "fit", spy)
    probe(x, labels, x, 4, cs=(0.1, 1.0))
    assert seen == [90, 90, 100]


def test_validation_rows_are_a_stratified_tenth():
    labels = np.repeat(np.arange(4), [100, 50, 40, 10])
    mask = validation_rows(labels)
    np.testing.assert_array_equal(np.bincount(labels[mask]), [10, 5, 4, 1])
    np.testing.assert_array_equal(mask, validation_rows(labels))
    assert not np.array_equal(mask, validation_rows(labels, seed=1))


def test_small_classes_share_the_tenth_and_no_class_loses_its_last_row():
    labels = np.concatenate([np.repeat(np.arange(100), 5), [100]])
    mask = validation_rows(labels)
    assert mask.sum() == 50
    assert not mask[-1]
    assert not validation_rows(np.arange(30)).any()


def test_one_row_a_class_is_fitted_without_a_choice_of_c():
    x = np.eye(5, dtype=np.float32)
    found = probe(x, np.arange(5), x[::-1], 5)
    np.testing.assert_array_equal(found.predicted, [4, 3, 2, 1, 0])
    assert (found.c, found.validation) == (1.0, None)


def test_noise_features_probe_at_chance():
    rng = np.random.default_rng(0)
    x, test = rng.normal(size=(300, 16)).astype(np.float32), rng.normal(size=(1500, 16)).astype(np.float32)
    predicted = probe(x, np.arange(300) % 5, test, 5, cs=CS[::11]).predicted
    assert np.mean(predicted == np.arange(1500) % 5) == pytest.approx(0.2, abs=0.04)


def test_reported_accuracies_are_the_predictions():
    labels = np.array([0, 0, 0, 1, 2, 2])
    predicted = np.array([0, 0, 1, 1, 2, 0])
    found = {m.metric: m.value for m in evaluate({"gated": predicted}, labels, split="test")}
    assert found["probe/top1"] == pytest.approx(np.mean(labels == predicted))
    assert found["probe/mean_per_class"] == pytest.approx(balanced_accuracy_score(labels, predicted))


def test_the_mean_over_domains_weighs_domains_alike():
    truth = [np.zeros(10, dtype=int), np.zeros(2, dtype=int)]
    predicted = {"gated": [np.zeros(10, dtype=int), np.ones(2, dtype=int)]}
    (found,) = evaluate_mean(predicted, truth)
    assert (found.value, found.split, found.n) == (0.5, "mean", 12)
