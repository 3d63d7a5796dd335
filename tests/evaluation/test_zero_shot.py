"""Zero-shot against the protocol written with loops, and against scikit-learn's top-k accuracy."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from pipeline.evaluation.zero_shot import chance, class_weights, evaluate, prompts, rank_of_label


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(90) % 7)
    images = rng.normal(size=(90, 12))
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    texts = rng.normal(size=(7 * 3, 12))
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    return images.astype(np.float32), texts.astype(np.float32), labels


def values(found) -> dict[str, float]:
    return {m.metric: m.value for m in found}


def test_class_weights_are_normalise_mean_normalise(data):
    _, texts, _ = data
    weights = class_weights(texts * np.linspace(1, 9, 21, dtype=np.float32)[:, None], 7)  # lengths must not matter
    for c in range(7):
        mean = np.zeros(12)
        for template in range(3):
            row = texts[3 * c + template].astype(np.float64)
            mean += row / np.sqrt((row**2).sum())
        np.testing.assert_allclose(weights[c], mean / np.sqrt((mean**2).sum()), atol=1e-6)


def test_accuracies_equal_scikit_learns(data):
    images, texts, labels = data
    found = values(evaluate({"gated": (images, texts)}, labels, 7, split="test"))
    scores = images @ class_weights(texts, 7).T
    for k in (1, 3, 5):
        assert found[f"zero_shot/top{k}"] == pytest.approx(top_k_accuracy_score(labels, scores, k=k))
    assert found["zero_shot/mean_per_class"] == pytest.approx(balanced_accuracy_score(labels, scores.argmax(1)))


def test_top_k_is_given_only_where_there_are_more_than_k_classes(data):
    images, _, labels = data
    few = values(evaluate({"gated": (images, images[:3])}, labels % 3, 3, split="test"))
    assert set(few) == {"zero_shot/top1", "zero_shot/mean_per_class"}


def test_constant_embeddings_score_class_zero_and_no_more():
    same = np.full((30, 4), 0.5, dtype=np.float32)
    labels = np.arange(30) % 3
    ranks = rank_of_label(same, same[:3], labels)
    np.testing.assert_array_equal(ranks, labels + 1)


def test_constant_embeddings_score_class_zeros_share_whatever_their_products_round_to():
    """At this size products of equal vectors differ in their last bits, by their place in the matrix."""
    rng = np.random.default_rng(0)
    image, text = (v / np.linalg.norm(v) for v in rng.normal(size=(2, 511)))
    images, texts = np.tile(image.astype(np.float32), (500, 1)), np.tile(text.astype(np.float32), (37, 1))
    labels = rng.permutation(np.arange(500) % 37)
    found = values(evaluate({"gated": (images, texts)}, labels, 37, split="test"))
    assert [found[f"zero_shot/top{k}"] for k in (1, 3, 5)] == [np.mean(labels < k) for k in (1, 3, 5)]
    assert found["zero_shot/mean_per_class"] == pytest.approx(1 / 37)


def test_classes_whose_scores_differ_in_the_last_bits_are_ranked_by_number():
    images = np.ones((37, 1), dtype=np.float32)
    weights = (1 + np.arange(37)[:, None] * 2.0**-26).astype(np.float32)  # up to 5e-7 apart
    assert len(np.unique(weights)) > 3
    np.testing.assert_array_equal(rank_of_label(images, weights, np.arange(37)), 1 + np.arange(37))


def test_mean_per_class_weighs_classes_not_images():
    images = np.eye(2, dtype=np.float32)[[0] * 9 + [0]]
    labels = np.array([0] * 9 + [1])
    found = values(evaluate({"gated": (images, np.eye(2, dtype=np.float32))}, labels, 2, split="test"))
    assert found["zero_shot/top1"] == pytest.approx(0.9)
    assert found["zero_shot/mean_per_class"] == pytest.approx(0.5)


def test_prompts_run_class_by_class_and_fill_the_name_in():
    assert prompts(["ant", "bee"], ["a {c}.", "{c}!"]) == ["a ant.", "ant!", "a bee.", "bee!"]


def test_chance_is_k_over_classes():
    assert values(chance(np.zeros(9, dtype=int), 10, split="test")) == {
        "zero_shot/top1": 0.1,
        "zero_shot/top3": 0.3,
        "zero_shot/top5": 0.5,
    }
