"""The objective and a small retrieval on validation rows, without touching the training state."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.training.data import Batch
from pipeline.training.sampler import Step


def validation_steps(rows: np.ndarray, *, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Step]:
    """Process `rank`'s share of each validation batch; every process takes part in every batch, all of one size.

    A set smaller than one batch is one batch; else a last uneven batch is dropped, since losses over fewer candidates
    cannot be averaged with the others.
    """
    size = min(batch_size, len(rows)) // world_size * world_size
    own = size // world_size
    for number in range(len(rows) // size if size else 0):
        first = number * size + rank * own
        yield Step(number, 0, rows[first : first + own])


@torch.no_grad()
def validate(
    objective: nn.Module, model: nn.Module, batches: Iterable[Batch], device: torch.device
) -> dict[str, float]:
    """Means of the objective's logs over the batches, and recall at 1 among all validation rows of this process.

    Args:
        objective: the (wrapped) training objective.
        model: the dual encoder in it; encode_image, encode_text.
    """
    was_training = objective.training
    objective.eval()
    sums: dict[str, list[float]] = defaultdict(list)
    image_features, text_features = [], []
    try:
        for batch in batches:
            batch = batch.to(device)
            _, logs = objective(batch.images, batch.tokens, batch.targets, 1.0)
            for key, value in logs.items():
                sums[key].append(float(value))
            image_features.append(model.encode_image(batch.images).float())  # type: ignore[operator]
            text_features.append(model.encode_text(batch.tokens).float())  # type: ignore[operator]
    finally:
        objective.train(was_training)
    means = {key: float(np.mean(values)) for key, values in sums.items()}
    if image_features:
        means |= recall_at_1(torch.cat(image_features), torch.cat(text_features))
    return means


def recall_at_1(image_features: Tensor, text_features: Tensor) -> dict[str, float]:
    """Share of rows whose own partner scores above all others, both directions. (n, D) unit-norm each.

    A tie with another row's partner is a miss, so a collapsed model scores 0.
    """
    similarity = image_features @ text_features.T
    own = similarity.diagonal()
    others = similarity.clone().fill_diagonal_(-torch.inf)
    return {
        "i2t_r1": float((own > others.amax(1)).float().mean()),
        "t2i_r1": float((own > others.amax(0)).float().mean()),
    }
