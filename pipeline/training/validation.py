"""The objective and a small retrieval on validation rows, without touching the training state."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.distributed import all_gather_sizes, gather_with_grad
from pipeline.losses.chunks import in_chunks
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
        yield Step(number, 0, rows[first : first + own], validates=True)


@torch.no_grad()
def validate(
    objective: nn.Module,
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device,
    *,
    image_numbers: Mapping[int, int],
    at_once: int | None = None,
) -> dict[str, float]:
    """Means of the objective's logs over the batches, and recall at 1 among all rows that all processes read.

    Args:
        objective: the (wrapped) training objective.
        model: the dual encoder in it; encode_image, encode_text.
        image_numbers: of each row; see `number_images`.
        at_once: rows that the model encodes at once; None: a process's whole share of a batch.
    """

    def encode(images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return model.encode_image(images), model.encode_text(tokens)  # type: ignore[operator]

    was_training = objective.training
    objective.eval()
    sums: dict[str, list[float]] = defaultdict(list)
    features, numbers = [], []
    try:
        for batch in batches:
            if not any(all_gather_sizes(len(batch.rows), device)):
                continue  # no process could read any of its images
            numbers.append(torch.tensor([image_numbers[row] for row in batch.rows.tolist()], device=device))
            batch = batch.to(device)
            _, logs = objective(**batch.inputs, progress=1.0)
            for key, value in logs.items():
                sums[key].append(float(value))
            pair = in_chunks(encode, (batch.images, batch.tokens), at_once, inside=model)
            features.append(torch.stack([x.float() for x in pair], 1))
    finally:
        objective.train(was_training)
    means = {key: float(np.mean(values)) for key, values in sums.items()}
    if features:
        images, texts = gather_with_grad(torch.cat(features)).unbind(1)
        means |= recall_at_1(images, texts, gather_with_grad(torch.cat(numbers)))
    return means


def number_images(rows: np.ndarray, hashes: Sequence[str]) -> dict[int, int]:
    """row → a number that rows of one image share; hashes: their images' SHA-256, beside `rows`."""
    numbers: dict[str, int] = {}
    return {int(row): numbers.setdefault(of, len(numbers)) for row, of in zip(rows, hashes, strict=True)}


def recall_at_1(image_features: Tensor, text_features: Tensor, image_numbers: Tensor) -> dict[str, float]:
    """Share of rows whose own partner scores above those of all other images, both directions.

    Rows of one image (a table of one row a caption) are no rivals. A tie with another image's partner is a miss, so a
    collapsed model scores 0.

    Args:
        image_features, text_features: (n, D), unit-norm. image_numbers: (n,), equal for rows of one image.
    """
    similarity = image_features @ text_features.T
    own = similarity.diagonal()
    rivals = similarity.masked_fill(image_numbers[:, None] == image_numbers, -torch.inf)
    return {
        "i2t_r1": float((own > rivals.amax(1)).float().mean()),
        "t2i_r1": float((own > rivals.amax(0)).float().mean()),
    }
