"""The linear probe: how much of a dataset's classes a linear map reads from frozen, unit-norm embeddings.

The protocol of DINOv3's logistic regression (arXiv 2508.10104): L2 logistic regression by L-BFGS, C out of
10^linspace(−6, 5, 45) chosen on validation rows (ours: 10 % of the training rows, stratified and seeded; of equals
the strongest penalty), refitted on all training rows. Reported: top-1 and the mean of the classes' accuracies.
Legend: n rows, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from pipeline.evaluation.logistic import fit, path
from pipeline.evaluation.paired import mean_of, mean_of_groups, measure
from pipeline.evaluation.records import Measurement, Statistic

CS = tuple(float(c) for c in 10.0 ** np.linspace(-6, 5, 45))
VALIDATION_SHARE = 0.1
SEED = 0
SWEEP_TOLERANCE = 1e-5  # of the gradient, while choosing C: a tenth of what moves a validation row
FIT_TOLERANCE = 1e-8
SMALL = 20_000_000  # multiplications of one step below which a second BLAS thread costs more than it brings

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Outcome:
    """`predicted` (n_test,) int64, the chosen `c`, and the validation accuracy it was chosen by (None: by none)."""

    predicted: Ints
    c: float
    validation: float | None


def probe(
    train: Floats, train_labels: Ints, test: Floats, classes: int, *, seed: int = SEED, cs: Sequence[float] = CS
) -> Outcome:
    """Choose C, refit, predict.

    Args:
        train: (n_train, D), train_labels: (n_train,), test: (n_test, D); rows are made unit-norm here.
    """
    with threadpool_limits(1 if train.size * classes < SMALL else None):
        return _probe(_unit(train), train_labels, _unit(test), classes, seed, cs)


def _probe(train: Floats, train_labels: Ints, test: Floats, classes: int, seed: int, cs: Sequence[float]) -> Outcome:
    held_out = validation_rows(train_labels, seed=seed)
    if not held_out.any():  # one row a class: nothing to choose by
        return Outcome(fit(train, train_labels, classes, c=1.0, tolerance=FIT_TOLERANCE).predict(test), 1.0, None)
    fitted = ~held_out
    truth = train_labels[held_out]
    solutions = path(train[fitted], train_labels[fitted], classes, cs=cs, tolerance=SWEEP_TOLERANCE)
    accuracy = np.array([np.mean(s.predict(train[held_out]) == truth) for s in solutions])
    best = int(np.argmax(accuracy))  # the first of equals: the strongest penalty
    final = fit(train, train_labels, classes, c=cs[best], tolerance=FIT_TOLERANCE)
    return Outcome(final.predict(test), cs[best], float(accuracy[best]))


def validation_rows(labels: Ints, *, share: float = VALIDATION_SHARE, seed: int = SEED) -> NDArray[np.bool_]:
    """A seeded, stratified mask (n,): `share` of the rows in all, each class by its size, never a class's last row.

    Quotas are largest remainders, so that classes of five rows give their tenth as one row of every other class.
    """
    rng = np.random.default_rng(seed)
    classes, sizes = np.unique(labels, return_counts=True)
    wanted = sizes * share
    quota = np.floor(wanted).astype(np.int64)
    missing = max(1, round(len(labels) * share)) - int(quota.sum())
    by_remainder = np.lexsort((rng.permutation(len(classes)), -(wanted - quota)))
    quota[by_remainder[: max(missing, 0)]] += 1
    mask = np.zeros(len(labels), dtype=bool)
    for label, size, take in zip(classes, sizes, quota, strict=True):
        rows = np.flatnonzero(labels == label)
        mask[rng.permutation(rows)[: min(int(take), int(size) - 1)]] = True
    return mask


def statistics(correct: NDArray[np.bool_], labels: Ints) -> dict[str, Statistic]:
    """What a probe is scored by: correct (n,) bool and labels (n,) → name → statistic."""
    return {"probe/top1": mean_of(correct), "probe/mean_per_class": mean_of_groups(correct, labels)}


def evaluate(predicted: Mapping[str, Ints], labels: Ints, *, split: str) -> list[Measurement]:
    """Accuracy of the predictions (n,) of every node, over test images."""
    found: list[Measurement] = []
    for node, classes in predicted.items():
        found += measure(statistics(classes == labels, labels), len(labels), node=node, split=split)
    return found


def evaluate_mean(
    predicted: Mapping[str, Sequence[Ints]], labels: Sequence[Ints], *, split: str = "mean"
) -> list[Measurement]:
    """The average over domains, each left out in turn: nodes' predictions and labels, one array a domain."""
    domain = np.repeat(np.arange(len(labels)), [len(part) for part in labels])
    truth = np.concatenate(labels)
    found: list[Measurement] = []
    for node, parts in predicted.items():
        statistic = mean_of_groups(np.concatenate(parts) == truth, domain)
        found += measure({"probe/top1": statistic}, len(truth), node=node, split=split)
    return found


def chance(labels: Ints, classes: int, *, split: str) -> list[Measurement]:
    """A random class: 1 / C."""
    return [Measurement("probe/top1", "none", split, 1 / classes, None, None, len(labels))]


def _unit(x: Floats) -> Floats:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
