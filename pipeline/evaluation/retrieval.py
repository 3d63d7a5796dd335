"""Image ↔ text retrieval: recall at 1, 5, 10 and the median rank, in both directions.

What counts (Karpathy and Fei-Fei 2015, with any number of captions an image):

* candidates are the unique images (equal bytes are one image) and the unique captions (equal words are one text);
* image → text: the rank of an image is that of its best caption, counted over captions that are not its own;
* text → image: every (caption, image) pair asks once, and that image's rank counts; another image with the same
  words stays a competitor, as in the published protocol;
* a tie counts against the model: rank = 1 + the number of wrong candidates scoring at least as high. So constant
  embeddings rank last instead of first. Scores closer than `TIE` are ties: float32 products of equal vectors differ
  by their place in the matrix.

Scores are made in blocks of rows, so memory grows with N, never with N².
Legend: N images, T texts, P (caption, image) pairs, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import lgamma

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.paired import average, mean_of, mean_of_items, measure, median_of_items
from pipeline.evaluation.records import Measurement, Statistic

TOP = (1, 5, 10)
TIE = 1e-6
BLOCK_SCORES = 8_000_000  # scores of one block: 32 MB of float32

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Ranks:
    """`images` (N,) int64: rank of each image's best caption. `pairs` (P,) int64: rank of each pair's image. From 1."""

    images: Ints
    pairs: Ints


def rank(images: Floats, texts: Floats, pair_image: Ints, pair_text: Ints) -> Ranks:
    """Ranks of all queries by cosine.

    Args:
        images: (N, D) float32 unit vectors, one a unique image.
        texts: (T, D) float32 unit vectors, one a unique caption.
        pair_image, pair_text: (P,) indices; each image stands in at least one pair.
    """
    return Ranks(
        images=_best_of_own(images, texts, pair_image, pair_text),
        pairs=_rank_of_each(texts, images, pair_text, pair_image),
    )


def _best_of_own(images: Floats, texts: Floats, pair_image: Ints, pair_text: Ints) -> Ints:
    order = np.lexsort((pair_text, pair_image))
    owner, own = pair_image[order], pair_text[order]
    ranks = np.empty(len(images), dtype=np.int64)
    step = max(1, BLOCK_SCORES // max(len(texts), 1))
    for start in range(0, len(images), step):
        scores = images[start : start + step] @ texts.T  # (b, T)
        first, last = np.searchsorted(owner, [start, start + len(scores)])
        row, column = owner[first:last] - start, own[first:last]
        best = np.full(len(scores), -np.inf, dtype=np.float32)
        np.maximum.at(best, row, scores[row, column])
        scores[row, column] = -np.inf  # its own captions do not compete with each other
        ranks[start : start + step] = 1 + (scores >= best[:, None] - TIE).sum(axis=1)
    return ranks


def _rank_of_each(queries: Floats, candidates: Floats, pair_query: Ints, pair_target: Ints) -> Ints:
    order = np.argsort(pair_query, kind="stable")
    asks, wants = pair_query[order], pair_target[order]
    ranks = np.empty(len(order), dtype=np.int64)
    step = max(1, BLOCK_SCORES // max(len(candidates), 1))
    for start in range(0, len(order), step):
        scores = queries[asks[start : start + step]] @ candidates.T  # (b, N)
        target = wants[start : start + step]
        own = scores[np.arange(len(scores)), target]
        # The pair's own image is among the scores at least as high, so the count itself starts at 1.
        ranks[order[start : start + step]] = (scores >= own[:, None] - TIE).sum(axis=1)
    return ranks


def statistics(ranks: Ranks, pair_image: Ints) -> dict[str, Statistic]:
    """The table's numbers as functions of how often each image was drawn; captions come along with their image."""
    n = len(ranks.images)
    found: dict[str, Statistic] = {}
    for k in TOP:
        found[f"retrieval/i2t_recall@{k}"] = mean_of(ranks.images <= k)
        found[f"retrieval/t2i_recall@{k}"] = mean_of_items(ranks.pairs <= k, pair_image, n)
    found["retrieval/mean_recall@1"] = average(found["retrieval/i2t_recall@1"], found["retrieval/t2i_recall@1"])
    found["retrieval/i2t_median_rank"] = median_of_items(ranks.images, np.arange(n))
    found["retrieval/t2i_median_rank"] = median_of_items(ranks.pairs, pair_image)
    return found


def evaluate(
    nodes: Mapping[str, tuple[Floats, Floats]], pair_image: Ints, pair_text: Ints, *, split: str
) -> list[Measurement]:
    """Retrieval at every node.

    Args:
        nodes: name → (image (N, D), text (T, D)), unit-norm, as `embeddings.Embedder` gives them.
        pair_image, pair_text: (P,) which caption belongs to which image.
    """
    found: list[Measurement] = []
    for node, (images, texts) in nodes.items():
        ranks = rank(images, texts, pair_image, pair_text)
        found += measure(statistics(ranks, pair_image), len(images), node=node, split=split)
    return found


def chance(n: int, texts: int, pair_image: Ints, *, split: str) -> list[Measurement]:
    """What a random order scores: K / N for texts; for images with c captions of T, 1 − C(T−c, K) / C(T, K)."""
    captions = np.bincount(pair_image, minlength=n)
    found = []
    for k in TOP:
        i2t = float(np.mean([1 - _share_without(texts, int(c), k) for c in captions]))
        found.append(Measurement(f"retrieval/i2t_recall@{k}", "none", split, i2t, None, None, n))
        found.append(Measurement(f"retrieval/t2i_recall@{k}", "none", split, min(1.0, k / n), None, None, n))
    return found


def _share_without(total: int, own: int, k: int) -> float:
    """The share of k-subsets of `total` texts that hold none of `own`."""
    if own + k > total:
        return 0.0

    def log_choose(a: int) -> float:
        return lgamma(a + 1) - lgamma(k + 1) - lgamma(a - k + 1)

    return float(np.exp(log_choose(total - own) - log_choose(total)))
