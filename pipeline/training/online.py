"""The frozen teacher in the training loop, in place of the cache that holds what it would say.

For comparison (what does the cache save?) and to check a cache: the same pixels, view, precision, projection and
quantisation, so that the objective gets the numbers that the cache holds or would hold. Basis, steps and baselines come
from a cache, of which the calibration is all that must be there.

On a CPU the teacher takes four images at a time, as stage one does. That a feature does not depend on its company is
up to the libraries: targets are equal to the cached ones or one int8 step off, see tests/training/test_online.py.

Legend: B pairs of this process, S the teacher's image size, T tokens, K components, C width of `global`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.cache.layout import GLOBAL, OK, steps_name
from pipeline.cache.reader import Cache, check_matches
from pipeline.cache.writer import stored_codec
from pipeline.console import log
from pipeline.data.samples import SampleError, SampleReader
from pipeline.data.views import View
from pipeline.errors import PipeError
from pipeline.teacher.encode import TensorCodec, to_float16
from pipeline.teacher.feed import seen_by
from pipeline.teacher.teacher import Teacher
from pipeline.training.data import TEACHER_PIXELS, Batch

CHECKED_ROWS = 64
SMALL_STEPS = 1  # int8 steps that rounding may move a value by
SMALL_COSINE, LEAST_COSINE = 0.999, 0.99  # below: another precision or library; another teacher, view or decoder


class OnlineTeacher:
    """Turns the teacher's pixels of a batch into its targets, as a cache stores them.

    Args:
        teacher: what the cache was made with; moved to `device`.
        cache: gives basis, steps and the forward's precision.
        batch_size: images a forward on a GPU.

    Raises:
        PipeError: the cache is of another teacher (the field is named).
    """

    def __init__(self, teacher: Teacher, cache: Cache, device: torch.device, *, batch_size: int) -> None:
        view = cache.view["kind"]
        check_matches(cache, teacher={**teacher.describe(), "view": view})
        self.teacher, self.batch_size = teacher.to(device), batch_size
        self.view = View(view, teacher.image_size)
        self.precision = cache.settings.get("precision", "float32")
        self.codecs = {scale.name: TensorCodec(stored_codec(cache, scale), device) for scale in cache.scales}

    def __call__(self, batch: Batch) -> Batch:
        """The same batch, its targets in the place of the teacher's pixels; whatever else is among them stays."""
        stored = dict(batch.targets or {})
        return replace(batch, targets=stored | self.targets(stored.pop(TEACHER_PIXELS)))

    def targets(self, pixels: Tensor) -> dict[str, Tensor]:
        """pixels (B, S, S, 3) uint8 → what `Cache.read_raw` gives of those rows, on the teacher's device.

        scale (B, T, K) int8 or float16, "<scale>_steps" (B, T) float32 for int8_token, "global" (B, C) float16.
        """
        if not len(pixels):  # none of a process's images could be read: the shapes of any other batch
            blank = pixels.new_zeros(1, *pixels.shape[1:])
            return {name: values[:0] for name, values in self.targets(blank).items()}
        features = seen_by(self.teacher, pixels, self.precision, at_once=self.batch_size)
        found = {}
        for name, codec in self.codecs.items():
            found[name], token_steps, _ = codec.encode(features[name])
            if token_steps is not None:
                found[steps_name(name)] = token_steps
        found[GLOBAL] = to_float16(features[GLOBAL])[0]
        return found

    def difference(self, cache: Cache, reader: SampleReader, rows: np.ndarray) -> Difference | None:
        """How far the cached targets of `rows` (n,) int64 are from those of now; None where none can be compared."""
        state = np.zeros(max(int(rows.max(initial=-1)) + 1, cache.rows), np.uint8)
        state[: cache.rows] = cache.state()
        pixels, compared = [], []
        for row in rows[state[rows] == OK].tolist():
            try:
                pixels.append(np.asarray(self.view(reader.image(row))))
            except SampleError:
                continue  # training will name it
            compared.append(row)
        if not compared:
            return None
        online = self.targets(torch.from_numpy(np.stack(pixels)))
        stored = {name: torch.from_numpy(values) for name, values in cache.read_raw(compared).items()}
        return compare({name: values.cpu() for name, values in online.items()}, stored, cache.steps)


@dataclass(frozen=True)
class Difference:
    """Targets of now against cached ones.

    Attributes:
        rows: how many were compared.
        most, mean: largest and mean |difference| of int8 values, in steps; 0 where none are int8.
        cosine: mean over tokens of the scale (or `global`) where it is least. worst: the least of all tokens.
    """

    rows: int
    most: int
    mean: float
    cosine: float
    worst: float

    def __str__(self) -> str:
        return (
            f"at most {self.most} and on average {self.mean:.2g} int8 steps apart, "
            f"cosine {self.cosine:.6f}, worst {self.worst:.6f}"
        )


def compare(online: Mapping[str, Tensor], stored: Mapping[str, Tensor], steps: Mapping[str, Any]) -> Difference:
    """Both as `OnlineTeacher.targets` gives them; steps: scale → (K,) or None."""
    apart, cosines = [torch.zeros(1, dtype=torch.int64)], []
    for name in [GLOBAL, *steps]:
        a, b = online[name], stored[name]
        if b.dtype == torch.int8:
            apart.append((a.long() - b.long()).abs().flatten())
        unit = 1.0 if name == GLOBAL or steps[name] is None else torch.as_tensor(np.array(steps[name]))
        # A step a token scales all of a token's values: no cosine depends on it.
        cosines.append(F.cosine_similarity(a.double() * unit, b.double() * unit, dim=-1).flatten())
    values = torch.cat(apart[1:] or apart)
    least = min(float(of.mean()) for of in cosines)
    worst = min(float(of.min()) for of in cosines)
    return Difference(len(online[GLOBAL]), int(values.max()), float(values.double().mean()), least, worst)


def judge(found: Difference | None, where: object, *, show: bool = True) -> None:
    """Say once how well a cache agrees with its teacher.

    Args:
        where: the cache. show: whether this process logs.

    Raises:
        PipeError: they are not of the same features.
    """
    if found is None:
        if show:
            log.info("teacher in the loop; the cache has none of its rows, and was not checked")
        return
    if found.cosine < LEAST_COSINE:
        fix = "extract it again into a new workspace, or put the images back that it was made of"
        raise PipeError(f"the cached targets are not the teacher's: {found}", where=str(where), fix=fix)
    if not show:
        return
    if found.most > SMALL_STEPS or found.worst < SMALL_COSINE:
        log.warning("teacher in the loop; %d cached rows differ from it: %s", found.rows, found)
    else:
        log.info("teacher in the loop; %d cached rows agree with it: %s", found.rows, found)
