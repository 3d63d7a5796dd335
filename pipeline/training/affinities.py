"""How near are the student's patch affinities to the teacher's, beside its own before training and beside the trunk's?

Legend: B pairs, g a scale's grid, P channels of a trunk's map.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from pipeline.distributed import mean_over_ranks
from pipeline.losses.distillation import gram_loss
from pipeline.models.trunk_map import at_grid, trunk_maps
from pipeline.training.data import Batch


@torch.no_grad()
def compare_affinities(
    objective: Any, initial: Any, batches: Iterable[Batch], device: torch.device, *, at_once: int | None = None
) -> dict[str, float]:
    """The Gram loss of two others than the student, in the units that the student's has.

    Args:
        objective: the (bare) training objective, with targets. initial: the model as it was before its first step.
        batches: this process's validation batches; every process calls this, with as many rows.
        at_once: rows that networks see at once; None: a whole batch.

    Returns:
        "gram_init/SCALE": the student at its start. "gram_trunk/SCALE": the trained trunk's own map, pooled to the
        grid (see `trunk_map`). Means over all rows of all processes; {} without distillation.
    """
    if objective.targets is None:
        return {}
    student, visual = initial.student["image"].to(device), objective.model.trunk.clip.visual
    was_training = objective.training
    objective.eval()
    initial.eval()
    grids = student.grids
    sums = {f"{who}/{name}": torch.zeros(2, device=device) for who in ("gram_init", "gram_trunk") for name in grids}
    try:
        for batch in batches:
            for images, targets in _parts(batch.to(device), at_once):
                teacher, maps = objective.targets(targets), trunk_maps(visual, images)
                began: dict[str, Tensor] = student.distilled(student(images))
                for name, grid in grids.items():
                    for who, tokens in (("gram_init", began[name]), ("gram_trunk", at_grid(maps, grid))):
                        loss = gram_loss(tokens, teacher[name]).float()
                        sums[f"{who}/{name}"] += torch.stack([loss.sum(), loss.new_tensor(len(loss))])
    finally:
        objective.train(was_training)
    found = {}
    for key, own in sums.items():
        total, rows = mean_over_ranks(own).tolist()
        found[key] = total / max(rows, 1e-12) / objective.baselines[f"gram/{key.split('/')[1]}"]
    return found


def _parts(batch: Batch, at_once: int | None) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Images and targets of a batch, `at_once` rows at a time; none of a batch without targets."""
    if batch.targets is None or not len(batch.rows):
        return
    size = at_once or len(batch.rows)
    for first in range(0, len(batch.rows), size):
        rows = slice(first, first + size)
        yield batch.images[rows], {name: values[rows] for name, values in batch.targets.items()}
