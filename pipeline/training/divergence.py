"""A loss that is not finite, or that has left all bounds: found before the update, with the rows at fault.

Exploded (our definition, `train.explosion`): the loss, averaged over processes, is more than `factor` times the median
of the last `WINDOW` steps' (a median below 1 counts as 1) in `steps` steps in a row. A single spike, which a run
survives, is none; a rise over hundreds of steps, as the ramps of the ranking terms cause, raises the median with it.

Legend: B rows of this process's batch.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import PipeError
from pipeline.training.data import Batch
from pipeline.training.failures import last_good, named_rows
from pipeline.training.together import Together

WINDOW = 100  # steps
LEAST = 20  # steps before anything is compared: the first losses fall fast
ROWS_AT_ONCE = 64
SKIPPED_IN_A_ROW = 200  # updates; fp16's scaler halves its scale at each, so that it has reached 0 long before


class Watch:
    """Looks at every step's loss and gradient, and stops all processes together.

    Args:
        together: this process and the others.
        folder: of the checkpoints, for messages.
        factor: times the median, above which a loss is too large; None: none is.
        steps: in a row, that make an explosion.
        scaled: whether fp16's scaler leaves out updates whose gradient is not finite.
    """

    def __init__(
        self, together: Together, folder: Path, *, factor: float | None = None, steps: int = 20, scaled: bool = False
    ) -> None:
        self.together, self.folder, self.scaled = together, folder, scaled
        self.factor, self.steps = factor, steps
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.above = 0
        self.skipped = 0

    def restore(self, losses: Sequence[float], above: int) -> None:
        """Go on from a checkpoint."""
        self.losses = deque(losses, maxlen=WINDOW)
        self.above = above

    def check(self, loss: Tensor, norm: Any, batch: Batch, model: Any, *, step: int) -> None:
        """Before the update: whether any process's loss or gradient is not finite, or the loss has exploded.

        Args:
            loss: (), this process's. norm: of the gradient before clipping, which makes nan of an infinite one.
            batch: of this process. model: encode_image, encode_text.

        Raises:
            PipeError: it is so; with the process and the rows of its batch, those at fault where they can be told.
        """
        norm = torch.as_tensor(norm, device=loss.device).detach()
        own = torch.stack([loss.detach().double(), norm.double()]).tolist()
        bad = {"loss": not math.isfinite(own[0]), "gradient's norm": not math.isfinite(own[1]) and not self.scaled}
        share = 0.0 if bad["loss"] else own[0] / self.together.world
        *anywhere, mean = self.together.total([*bad.values(), share])
        for (what, here), value, elsewhere in zip(bad.items(), own, anywhere, strict=True):
            if elsewhere:
                self._stop(f"the {what} is {value}", here, batch, model, step)
        if (exploded := self.explodes(mean)) is not None:
            largest = max(self.together.everyones(own[0]))
            self._stop(exploded, own[0] == largest, batch, model, step)

    def after_update(self, *, skipped: bool, step: int) -> None:
        """Whether fp16's scaler has left out so many updates in a row that nothing is trained any more.

        Args:
            skipped: whether it left out this one, which is no error.
        """
        self.skipped = self.skipped + 1 if skipped else 0
        if self.skipped < SKIPPED_IN_A_ROW:
            return
        what = f"fp16's scaler has left out the last {self.skipped} updates, at step {step}"
        fix = f"{last_good(self.folder)}; lower train.lr or use train.precision=bf16"
        self.together.stop_for(PipeError(what, where="train.precision", fix=fix))

    def explodes(self, loss: float) -> str | None:
        """Take the next step's loss, finite and averaged over processes; in words what is wrong with it, if anything.

        Losses that are too large do not enter the median that they are compared with.
        """
        if self.factor is None:
            return None
        median = max(statistics.median(self.losses), 1.0) if len(self.losses) >= LEAST else math.inf
        if loss <= self.factor * median:
            self.losses.append(loss)
            self.above = 0
            return None
        self.above += 1
        if self.above < self.steps:
            return None
        times = f"{self.factor:g} times its median {median:.4g}"
        return f"the loss is {loss:.4g}, above {times} for {self.above} steps in a row,"

    def _stop(self, what: str, suspect: bool, batch: Batch, model: Any, step: int) -> None:
        """Name this process's rows if it is a suspect. A bad embedding spoils every process's loss: of several suspects
        one that finds such rows speaks."""
        bad = rows_not_finite(model, batch) if suspect else []
        if any(self.together.everyones(bool(bad))):
            suspect = bool(bad)
        where = f"{named_rows(bad)}, whose values are not finite" if bad else named_rows(batch.rows.tolist())
        fix = f"{last_good(self.folder)}; lower train.lr or use train.precision=no"
        found = PipeError(f"{what} at step {step}{self.together.name}", where=where, fix=fix)
        self.together.stop_for(found if suspect else None)


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
