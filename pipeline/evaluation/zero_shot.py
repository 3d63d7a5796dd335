"""Zero-shot classification: a class is the normalised mean of its prompts' normalised embeddings (Radford et al. 2021).

    w_c = normalise( mean over templates of normalise(text("a photo of a {c}.")) ),   class = argmax_c ⟨image, w_c⟩

Ties (scores within `TIE`: float32 products of equal vectors differ in their last bits) are broken by class number, so
constant embeddings score what class 0 holds of the test set.
Legend: n images, C classes, P templates, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.paired import mean_of, mean_of_groups, measure
from pipeline.evaluation.records import Measurement, Statistic
from pipeline.evaluation.retrieval import TIE

TOP = (1, 3, 5)
BLOCK_SCORES = 8_000_000

# For datasets that bring none: what a caption of a photograph, a drawing or a detail may say.
TEMPLATES = (
    "a photo of a {c}.",
    "a photo of the {c}.",
    "a close view of a {c}.",
    "a picture with a {c} in it.",
    "a drawing of a {c}.",
    "an image of a {c}.",
)

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


def prompts(class_names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """All prompts, class by class: P in a row for each class."""
    return [template.replace("{c}", name) for name in class_names for template in templates]


def class_weights(prompt_features: Floats, classes: int) -> Floats:
    """(C · P, D) prompt embeddings, class by class → (C, D) float32 unit class vectors."""
    unit = _normalise(prompt_features.astype(np.float64)).reshape(classes, -1, prompt_features.shape[1])
    return _normalise(unit.mean(axis=1)).astype(np.float32)


def rank_of_label(images: Floats, weights: Floats, labels: Ints) -> Ints:
    """1 + the number of classes scored above an image's own (of equals, the lower class number first): (n,)."""
    ranks = np.empty(len(images), dtype=np.int64)
    step = max(1, BLOCK_SCORES // len(weights))
    number = np.arange(len(weights))
    for start in range(0, len(images), step):
        scores = images[start : start + step] @ weights.T  # (b, C)
        label = labels[start : start + step, None]
        own = np.take_along_axis(scores, label, axis=1)
        before = (scores > own + TIE) | ((scores >= own - TIE) & (number < label))
        ranks[start : start + step] = 1 + before.sum(axis=1)
    return ranks


def statistics(ranks: Ints, labels: Ints, classes: int) -> dict[str, Statistic]:
    """top-k where there are more than k classes, and the mean of the classes' accuracies."""
    found = {f"zero_shot/top{k}": mean_of(ranks <= k) for k in TOP if classes > k}
    found["zero_shot/mean_per_class"] = mean_of_groups(ranks == 1, labels)
    return found


def evaluate(
    nodes: Mapping[str, tuple[Floats, Floats]], labels: Ints, classes: int, *, split: str
) -> list[Measurement]:
    """Zero-shot accuracy at every node.

    Args:
        nodes: name → (image features (n, D), prompt features (C · P, D) in the order of `prompts`).
        labels: (n,) class numbers.
    """
    found: list[Measurement] = []
    for node, (images, prompt_features) in nodes.items():
        ranks = rank_of_label(images, class_weights(prompt_features, classes), labels)
        found += measure(statistics(ranks, labels, classes), len(labels), node=node, split=split)
    return found


def chance(labels: Ints, classes: int, *, split: str) -> list[Measurement]:
    """A random class: k / C."""
    return [
        Measurement(f"zero_shot/top{k}", "none", split, k / classes, None, None, len(labels))
        for k in TOP
        if classes > k
    ]


def _normalise(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
