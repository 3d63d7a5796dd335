"""A loss that is not finite, or that has left all bounds: found before the update, with the rows at fault.

Exploded (our definition, `train.explosion`): the loss, averaged over processes, is more than `factor` times the median
of the last `WINDOW` steps' (a median below 1 counts as 1) in `steps` steps in a row. A single spike, which a run
survives, is none; a rise over hundreds of steps, as the ramps of the ranking terms cause, raises the median with it.

Legend: B rows of this process's batch.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.training.data import Batch

WINDOW = 100  # steps
LEAST = 20  # steps before anything is compared: the first losses fall fast
ROWS_AT_ONCE = 64
SKIPPED_IN_A_ROW = 200  # fp16's scaler halves its scale at each: from 65536 it has reached 0 long before


class Watch:
    """The last losses, and how long they have been too large.

    Args:
        factor: times the median, above which a loss is too large; None watches for nothing.
        steps: in a row, that make an explosion.
    """

    def __init__(self, factor: float | None = None, steps: int = 20) -> None:
        self.factor, self.steps = factor, steps
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.above = 0
        self.skipped = 0

    def restore(self, losses: Sequence[float], above: int) -> None:
        """Go on from a checkpoint."""
        self.losses = deque(losses, maxlen=WINDOW)
        self.above = above

    def explodes(self, loss: float) -> str | None:
        """Take the next step's finite loss; in words what is wrong with it, if anything is.

        Losses that are too large are not taken into the median they are compared with.
        """
        if self.factor is None:
            return None
        median = max(statistics.median(self.losses), 1.0) if len(self.losses) >= LEAST else None
        if median is None or loss <= self.factor * median:
            self.losses.append(loss)
            self.above = 0
            return None
        self.above += 1
        if self.above < self.steps:
            return None
        return (
            f"the loss, {loss:.4g}, has been above {self.factor:g} times its median {median:.4g} for {self.above} steps"
        )

    def never_steps(self, skipped: bool) -> bool:
        """Whether fp16's scaler has left out so many updates in a row that nothing is trained any more.

        Args:
            skipped: whether it left out this one.
        """
        self.skipped = self.skipped + 1 if skipped else 0
        return self.skipped >= SKIPPED_IN_A_ROW


@torch.no_grad()
def rows_not_finite(model: Any, batch: Batch) -> list[int]:
    """The rows of a batch whose pixels, targets or embeddings are not finite; no other process is asked.

    Args:
        model: encode_image (b, 3, H, W) and encode_text (b, L) → (b, D); left in the mode it is in.
        batch: on the model's device.
    """
    bad = torch.zeros(len(batch.rows), dtype=torch.bool)
    modes = {module: module.training for module in model.modules()} if isinstance(model, nn.Module) else {}
    try:
        if modes:
            model.eval()  # batch norm must neither learn from this nor mix the rows
        for first in range(0, len(bad), ROWS_AT_ONCE):
            part = slice(first, first + ROWS_AT_ONCE)
            inputs = [batch.images[part], *(of[part] for of in (batch.targets or {}).values())]
            outputs = [model.encode_image(batch.images[part]), model.encode_text(batch.tokens[part])]
            for values in (*inputs, *outputs):
                bad[part] |= _not_finite(values)
    finally:
        for module, training in modes.items():
            module.training = training
    return [int(row) for row in batch.rows[bad].tolist()]


def _not_finite(values: Tensor) -> Tensor:
    """(b, ...) → (b,) bool, on the CPU."""
    if not values.is_floating_point():
        return torch.zeros(len(values), dtype=torch.bool)
    return (~values.isfinite()).flatten(1).any(1).cpu()
