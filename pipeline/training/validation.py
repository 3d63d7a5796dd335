"""The objective, a small retrieval and the injection's drift on validation rows, without touching the training state.

Legend: B pairs of a batch, n of all batches and processes, D joint width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.distributed import all_gather_sizes, gather_with_grad
from pipeline.losses.gate import drift
from pipeline.losses.plackett_luce import at_least_float32
from pipeline.training.data import Batch
from pipeline.training.sampler import Step

if TYPE_CHECKING:
    from pipeline.models.dinorankclip import Forward


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
) -> dict[str, float]:
    """Means of the objective's logs over the batches; recall at 1 and drift among all rows that all processes read.

    Args:
        objective: the (wrapped) training objective.
        model: the dual encoder in it; images, tokens → `Forward`.
        image_numbers: of each row; see `number_images`.
    """
    was_training = objective.training
    objective.eval()
    sums: dict[str, list[float]] = defaultdict(list)
    vectors, numbers, out = [], [], None
    try:
        for batch in batches:
            if not any(all_gather_sizes(len(batch.rows), device)):
                continue  # no process could read any of its images
            numbers.append(torch.tensor([image_numbers[row] for row in batch.rows.tolist()], device=device))
            batch = batch.to(device)
            _, logs = objective(**batch.inputs, progress=1.0)
            for key, value in logs.items():
                sums[key].append(float(value))
            out = model(batch.images, batch.tokens)
            vectors.append(_vectors(out))
    finally:
        objective.train(was_training)
    means = {key: float(np.mean(values)) for key, values in sums.items()}
    if out is not None:
        means |= _retrieved(out, gather_with_grad(torch.cat(vectors)), gather_with_grad(torch.cat(numbers)))
    return means


def _vectors(out: Forward) -> Tensor:
    """v, w, and where something is injected z, t and the tangents Δ⊥ of both sides (0 on a side without): (B, 2 or 6,
    D)."""
    kept = [out.v, out.w]
    if out.image is not None or out.text is not None:
        sides = ((out.image, out.z), (out.text, out.t))
        kept += [out.z, out.t, *(torch.zeros_like(base) if side is None else side.tangent for side, base in sides)]
    return torch.stack([at_least_float32(x) for x in kept], 1)


def _retrieved(out: Forward, vectors: Tensor, numbers: Tensor) -> dict[str, float]:
    """Recall of the output, and where something is injected that of the trunk (γ = 0) beside it, and the drift.

    Args:
        out: of any batch, for γ and s, which all share.
        vectors: (n, 2 or 6, D), as `_vectors` has them. numbers: (n,).
    """
    images, texts, *injection = vectors.unbind(1)
    found = recall_at_1(images, texts, numbers)
    if injection:
        z, t, of_image, of_text = injection
        found |= {f"{key}_trunk": value for key, value in recall_at_1(z, t, numbers).items()}
        of_sides = [0.0 if side is None else float(side.gamma) for side in (out.image, out.text)]
        moved = drift(z, t, of_image, of_text, of_sides[0], of_sides[1], float(out.logit_scale))
        found |= {f"drift/{key}": value for key, value in asdict(moved).items()}
    return found


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
