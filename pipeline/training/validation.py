"""The objective, a small retrieval and the injection's drift on validation rows, without touching the training state.

The objective sees batches of one size, since losses over fewer candidates cannot be averaged with the others; retrieval
and drift see all rows that can be read.

Legend: W processes, B this process's rows of a batch, D joint width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import nn

from pipeline.distributed import all_gather_sizes
from pipeline.training.data import Batch
from pipeline.training.sampler import Step
from pipeline.training.validation_pairs import Captions, Embedded


def validation_steps(rows: np.ndarray, *, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Step]:
    """Process `rank`'s share of each validation batch. The batches are the same for any number of processes, each of
    which takes part in all, with one row more or less than the others."""
    for number, first in enumerate(range(0, len(rows), batch_size)):
        own = np.array_split(rows[first : first + batch_size], world_size)[rank]
        yield Step(number, 0, own, validates=True)


def even_batches(rows: int, batch_size: int) -> int:
    """How many of the batches have one size: all but a last uneven one, and a set smaller than one batch is one."""
    return max(rows // batch_size, min(rows, 1))


@torch.no_grad()
def validate(
    objective: nn.Module,
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device,
    *,
    captions: Captions,
    even: int,
    note: Callable[[Batch], None] = lambda batch: None,
    at_once: int | None = None,
) -> dict[str, float]:
    """Means of the objective's logs over the batches; retrieval and drift among all rows that all processes read.

    Args:
        objective: the (wrapped) training objective.
        model: the dual encoder in it: images, tokens → `Forward`; text_nodes.
        captions: of all validation rows, of every process.
        even: how many batches the objective sees; see `even_batches`.
        note: told of every batch, some of whose rows may not have been readable.
        at_once: rows that the model encodes at once; None: a process's whole share of a batch.
    """
    was_training = objective.training
    objective.eval()
    sums: dict[str, list[float]] = defaultdict(list)
    found = Embedded(model, captions, device, at_once)
    try:
        for batch in batches:
            note(batch)
            if not any(all_gather_sizes(len(batch.rows), device)):
                continue  # no process could read any of its images
            batch = batch.to(device)
            if batch.step < even:
                _, logs = objective(**batch.inputs, progress=1.0)
                for key, value in logs.items():
                    sums[key].append(float(value))
            found.add(batch)
    finally:
        objective.train(was_training)
    return {key: float(np.mean(values)) for key, values in sums.items()} | found.recall() | found.drift()
