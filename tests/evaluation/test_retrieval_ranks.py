"""Retrieval against loops over float64 scores, and what its definition promises."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.evaluation import retrieval
from pipeline.evaluation.paired import draws
from pipeline.evaluation.retrieval import Ranks, chance, evaluate, rank, statistics


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def ragged_pairs(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Between one and six captions an image, in shuffled order."""
    sizes = rng.integers(1, 7, size=n)
    owner = np.repeat(np.arange(n), sizes)
    text = rng.permutation(len(owner))
    return owner, text


def by_loops(images, texts, pair_image, pair_text):
    """Ranks by sorting each list, written from the protocol's words."""
    scores = images.astype(np.float64) @ texts.astype(np.float64).T
    i2t = []
    for i in range(len(images)):
        own = {int(t) for a, t in zip(pair_image, pair_text, strict=True) if a == i}
        best = max(scores[i, t] for t in own)
        i2t.append(1 + sum(scores[i, t] > best for t in range(len(texts)) if t not in own))
    t2i = []
    for i, t in zip(pair_image, pair_text, strict=True):
        t2i.append(1 + sum(scores[j, t] > scores[i, t] for j in range(len(images)) if j != i))
    return np.array(i2t), np.array(t2i)


@pytest.mark.parametrize("block", [8_000_000, 97, 1])
def test_ranks_equal_brute_force_with_any_number_of_captions_and_any_block(monkeypatch, block):
    rng = np.random.default_rng(3)
    pair_image, pair_text = ragged_pairs(rng, 23)
    images, texts = unit(rng, 23, 8), unit(rng, len(pair_text), 8)
    monkeypatch.setattr(retrieval, "BLOCK_SCORES", block)
    ranks = rank(images, texts, pair_image, pair_text)
    i2t, t2i = by_loops(images, texts, pair_image, pair_text)
    np.testing.assert_array_equal(ranks.images, i2t)
    np.testing.assert_array_equal(ranks.pairs, t2i)


def test_a_caption_shared_by_two_images_is_right_for_both_and_still_has_one_rank_a_pair():
    images = np.eye(3, dtype=np.float32)
    texts = np.array([[0.8, 0.6, 0.0], [0.0, 0.0, 1.0]], dtype=np.float32)
    ranks = rank(images, texts, np.array([0, 1, 2]), np.array([0, 0, 1]))
    np.testing.assert_array_equal(ranks.images, [1, 1, 1])
    np.testing.assert_array_equal(ranks.pairs, [1, 2, 1])


def test_perfect_embeddings_rank_first_everywhere():
    x = np.eye(20, dtype=np.float32)
    ranks = rank(x, x, np.arange(20), np.arange(20))
    assert set(ranks.images) == set(ranks.pairs) == {1}


def test_constant_embeddings_rank_last_not_first():
    rng = np.random.default_rng(0)
    v = unit(rng, 1, 33)
    images, texts = np.repeat(v, 37, axis=0), np.repeat(v, 74, axis=0)
    ranks = rank(images, texts, np.repeat(np.arange(37), 2), np.arange(74))
    assert set(ranks.images) == {73}  # 72 wrong captions tie
    assert set(ranks.pairs) == {37}


def test_recall_equals_the_definition_of_clip_benchmark():
    """Its recall@k for texts is the share of pairs found; for images, whether any pair of the image is found."""
    rng = np.random.default_rng(5)
    n, per = 40, 5
    images, texts = unit(rng, n, 6), unit(rng, n * per, 6)
    owner = np.repeat(np.arange(n), per)
    found = {m.metric: m.value for m in evaluate({"gated": (images, texts)}, owner, np.arange(n * per), split="test")}
    scores = texts @ images.T
    positive = np.zeros((n * per, n), dtype=bool)
    positive[np.arange(n * per), owner] = True
    for k in (1, 5, 10):
        top = np.argsort(-scores, axis=1)[:, :k]
        assert found[f"retrieval/t2i_recall@{k}"] == pytest.approx(np.take_along_axis(positive, top, 1).sum(1).mean())
        top = np.argsort(-scores.T, axis=1)[:, :k]
        hits = np.take_along_axis(positive.T, top, 1).sum(1) > 0
        assert found[f"retrieval/i2t_recall@{k}"] == pytest.approx(hits.mean())
    both = (found["retrieval/i2t_recall@1"] + found["retrieval/t2i_recall@1"]) / 2
    assert found["retrieval/mean_recall@1"] == pytest.approx(both)


def test_median_ranks_are_numpys_medians():
    ranks = Ranks(np.array([1, 4, 9, 2]), np.array([3, 1, 7, 7, 2]))
    owner = np.array([0, 1, 1, 2, 3])
    found = statistics(ranks, owner)
    once = np.ones((1, 4))
    assert found["retrieval/i2t_median_rank"](once)[0] == np.median(ranks.images)
    assert found["retrieval/t2i_median_rank"](once)[0] == np.median(ranks.pairs)


def test_resampling_moves_captions_with_their_image():
    ranks = Ranks(np.array([1, 2]), np.array([1, 1, 1, 9]))
    owner = np.array([0, 0, 0, 1])
    statistic = statistics(ranks, owner)["retrieval/t2i_recall@1"]
    np.testing.assert_allclose(statistic(np.array([[2.0, 0.0], [1.0, 1.0], [0.0, 2.0]])), [1.0, 0.75, 0.0])


def test_intervals_of_median_ranks_draw_images_together_with_their_captions():
    rng = np.random.default_rng(7)
    owner, text = ragged_pairs(rng, 15)
    shuffled = rng.permutation(len(owner))
    owner, text = owner[shuffled], text[shuffled]
    images, texts = unit(rng, 15, 6), unit(rng, len(text), 6)
    found = {m.metric: m for m in evaluate({"gated": (images, texts)}, owner, text, split="test")}
    i2t, t2i = by_loops(images, texts, owner, text)
    drawn = [np.repeat(np.arange(15), counts.astype(int)) for counts in np.concatenate(list(draws(15)))]
    medians = {
        "retrieval/i2t_median_rank": [np.median(i2t[units]) for units in drawn],
        "retrieval/t2i_median_rank": [np.median(np.concatenate([t2i[owner == k] for k in units])) for units in drawn],
    }
    for name, values in medians.items():
        np.testing.assert_allclose((found[name].low, found[name].high), np.quantile(values, [0.025, 0.975]))
        np.testing.assert_array_equal(np.concatenate([found[name].statistic(c) for c in draws(15)]), values)


def test_chance_equals_random_embeddings_in_the_mean():
    rng = np.random.default_rng(1)
    owner, text = ragged_pairs(rng, 30)
    want = {m.metric: m.value for m in chance(30, len(text), owner, split="test")}
    values: dict[str, list[float]] = {name: [] for name in want}
    for _ in range(150):
        images, texts = unit(rng, 30, 40), unit(rng, len(text), 40)
        found = statistics(rank(images, texts, owner, text), owner)
        for name in want:
            values[name].append(float(found[name](np.ones((1, 30)))[0]))
    for name, expected in want.items():
        assert np.mean(values[name]) == pytest.approx(expected, abs=0.012), name
