"""The teacher's targets as training sees them: stored numbers back to coefficients, and the unit of each loss.

Legend: B rows, T tokens, K components, C width of `global`, P width of the projected space.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeline.console import log
from pipeline.data.roi import BOXES, resample
from pipeline.errors import PipeError
from pipeline.losses.measured import SMALLEST as SMALLEST_BASELINE
from pipeline.losses.measured import Measured

if TYPE_CHECKING:
    from pipeline.cache.reader import Cache

GLOBAL = "global"
TEXT = "global/text"  # the text branch's target; no scale can have this name


@dataclass(frozen=True)
class TargetInfo:
    """What the objective must know of a cache.

    Attributes:
        scales: names of the scales.
        steps: scale → (K,) float32 int8 steps; None for float16, and for int8_token, whose steps come with each batch.
        baselines: {"gram": {scale: loss}, "rkd": {scale | "global": loss}, "global": loss} of the predictor that
            ignores the image.
        measured: what the optional terms need besides; None where none is asked for.
    """

    scales: tuple[str, ...]
    steps: Mapping[str, Tensor | None]
    baselines: Mapping[str, Any]
    measured: Measured | None = None

    @classmethod
    def from_cache(cls, cache: Cache, measured: Measured | None = None) -> TargetInfo:
        """The same of an open cache."""
        names = tuple(scale.name for scale in cache.scales)
        steps = {name: None if cache.steps[name] is None else torch.as_tensor(cache.steps[name]) for name in names}
        return cls(names, steps, cache.baseline_losses, measured)

    def baseline(self, term: str, name: str | None = None) -> float:
        """The loss of the predictor that ignores the image: gram and rkd by name, global without."""
        found = self.baselines[term]
        value = float(found if name is None else found[name])
        if value >= SMALLEST_BASELINE:
            return value
        log.warning(
            "the teacher's %s baseline is %.2g: too small a unit, %.0e stands in", term, value, SMALLEST_BASELINE
        )
        return SMALLEST_BASELINE


class Targets(nn.Module):
    """Holds a cache's steps on the training device and turns a batch's stored numbers into coefficients."""

    def __init__(self, info: TargetInfo) -> None:
        super().__init__()
        self.scales = info.scales
        projection = info.measured.projection if info.measured else None
        for of, value in () if projection is None else projection.named_buffers():
            self.register_buffer(f"projection_{of}", value.clone(), persistent=False)
        self.projects = projection is not None
        for name in info.scales:
            # Not persistent: the cache keeps them, and a checkpoint must not depend on it.
            self.register_buffer(f"steps_{name}", info.steps.get(name), persistent=False)

    def forward(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """stored: scale (B, T, K) int8 or float16, "<scale>_steps" (B, T) where per token, "global" (B, C) float16;
                where the images are crops of the view that was stored, their boxes (B, 4) float32 under data.roi.BOXES.

        Returns:
            scale → (B, T, K) float32, resampled over the boxes if there are any; "global" → (B, C) float32, always of
            the stored view: a vector cannot be resampled; "global/text" → the text branch's target, (B, C) or (B, P).

        Raises:
            PipeError: the batch lacks a scale, or the steps of an int8 one.
        """
        missing = [name for name in (*self.scales, GLOBAL) if name not in stored]
        if missing:
            raise PipeError(
                f"the batch has no teacher targets for {', '.join(missing)}", fix="read them from the cache"
            )
        values = {GLOBAL: stored[GLOBAL].float()}
        values[TEXT] = self._projected(values[GLOBAL])
        for name in self.scales:
            steps, per_token = getattr(self, f"steps_{name}"), stored.get(f"{name}_steps")
            values[name] = stored[name].float()
            if per_token is not None:
                values[name] = values[name] * per_token.float().unsqueeze(-1)
            elif steps is not None:
                values[name] = values[name] * steps
            elif stored[name].dtype == torch.int8:
                raise PipeError("int8 targets came without their steps", where=f"scale {name}", fix="extract it again")
            if BOXES in stored:
                values[name] = resample(values[name], stored[BOXES])
        return values

    def _projected(self, vectors: Tensor) -> Tensor:
        if not self.projects:
            return vectors
        weight, bias = (getattr(self, f"projection_{of}").to(vectors.dtype) for of in ("weight", "bias"))
        return nn.functional.linear(vectors, weight, bias)
