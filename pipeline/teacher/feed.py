"""From manifest rows to the teacher's features: decoding in threads ahead of the network, memory bounded.

What waits for the network are bytes (S, S, 3) of a few batches, never floats. The order and composition of batches
are the caller's.

Legend: n rows of a batch, m of them decodable, K further views, S image size, T tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.data.decoding import Decoder
from pipeline.data.geometry import NUMBERS, ViewSpec, replay
from pipeline.data.samples import SampleReader
from pipeline.data.views import View
from pipeline.errors import PipeError
from pipeline.teacher.teacher import Teacher

AHEAD = 3  # batches that are decoded or being decoded while a GPU works
AHEAD_ON_CPU = 0  # there both want the same cores, and disturb each other when they work at the same time
CPU_IMAGES = 4  # a forward on a CPU: larger ones leave its caches and get fresh pages each time (twice the time at 64)

Precision = Literal["float32", "bfloat16"]


Features = dict[str, Tensor]  # scale → (m, T, C) float32, "global" → (m, C) float32, on the device


@dataclass(frozen=True)
class FeatureBatch:
    """What the teacher saw of a batch.

    Args:
        rows: (n,) int64.
        ok: (n,) bool, False where the image cannot be decoded.
        features: of the m others, in the view that everyone has.
        views: name → features of a further view of them, and its geometry (m, 5) float32.
    """

    rows: np.ndarray
    ok: np.ndarray
    features: Features
    views: dict[str, tuple[Features, np.ndarray]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Seen:
    """One image: pixels (1 + K, S, S, 3) uint8, the base view first; geometry (K, 5) of the further views."""

    pixels: np.ndarray
    geometry: np.ndarray


class Feed:
    """Calls the teacher on batches of manifest rows.

    Args:
        reader: gives images by row; shared by all threads.
        view: geometry; its size is the teacher's.
        precision: of the network's forward; features are float32 in any case.
        views: further views to look at, drawn from `seed`.

    Attributes:
        failed: rows whose image could not be used so far, with the reason.
        changed: those among them that hold another image than when they were indexed.
    """

    def __init__(
        self,
        reader: SampleReader,
        teacher: Teacher,
        view: View,
        *,
        workers: int | Literal["auto"] = "auto",
        precision: Precision = "float32",
        views: Sequence[ViewSpec] = (),
        seed: int = 0,
    ) -> None:
        self.reader, self.teacher, self.view = reader, teacher, view
        self.views, self.seed = tuple(views), seed
        self.decoder, self.precision = Decoder(reader, workers), precision
        self.threads, self.failed, self.changed = self.decoder.threads, self.decoder.failed, self.decoder.changed

    def __call__(
        self, batches: Iterable[np.ndarray], *, base_only: bool = False
    ) -> Generator[FeatureBatch, None, None]:
        """One `FeatureBatch` for each of `batches` (n,) int64, in order."""
        views = () if base_only else self.views
        on_cpu = self.teacher.get_buffer("_mean").device.type == "cpu"
        decoded = self.decoder(batches, lambda row: self._look(row, views), ahead=AHEAD_ON_CPU if on_cpu else AHEAD)
        with closing(decoded):
            yield from self._looked_at(decoded, views)

    def _looked_at(
        self, decoded: Iterable[tuple[np.ndarray, list[_Seen | None]]], views: Sequence[ViewSpec]
    ) -> Generator[FeatureBatch, None, None]:
        for rows, images in decoded:
            ok = np.array([image is not None for image in images])
            usable = [image for image in images if image is not None]
            if not usable:
                yield FeatureBatch(rows, ok, {})
                continue
            further = {
                spec.name: (
                    self._features([image.pixels[1 + k] for image in usable]),
                    np.stack([image.geometry[k] for image in usable]),
                )
                for k, spec in enumerate(views)
            }
            yield FeatureBatch(rows, ok, self._features([image.pixels[0] for image in usable]), further)

    def crops(self, row: int, boxes: np.ndarray) -> Features:
        """What the teacher sees in `boxes` (m, 4) of the view that everyone has of a row (see data.roi)."""
        image = self.reader.image(row)
        return self._features([np.asarray(self.view.part(image, box)) for box in boxes.tolist()])

    def _look(self, row: int, views: Sequence[ViewSpec]) -> _Seen:
        """Every view of an image."""
        image = self.reader.image(row)
        drawn = [spec.draw(self.seed, row, image.width, image.height) for spec in views]
        pixels = [self.view(image), *(replay(image, geometry, self.view.size) for geometry in drawn)]
        return _Seen(np.stack([np.asarray(picture) for picture in pixels]), np.array(drawn).reshape(-1, NUMBERS))

    def _features(self, pixels: Sequence[np.ndarray]) -> Features:
        """m pictures (S, S, 3) uint8 → scale → (m, T, C) float32, "global" → (m, C) float32."""
        return seen_by(self.teacher, torch.from_numpy(np.stack(pixels)), self.precision, at_once=len(pixels))


@torch.inference_mode()
def seen_by(teacher: Teacher, pixels: Tensor, precision: Precision, *, at_once: int) -> Features:
    """What the teacher makes of pictures: scale → (m, T, C) float32, "global" → (m, C) float32, on its device.

    Args:
        pixels: (m, S, S, 3) uint8, m at least 1.
        at_once: images a forward, on a GPU; on a CPU they are `CPU_IMAGES`.

    Raises:
        PipeError: they do not fit into the GPU's memory.
    """
    device = teacher.get_buffer("_mean").device
    at_once = CPU_IMAGES if device.type == "cpu" else at_once
    parts = []
    try:
        for images in pixels.split(at_once):
            with torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext():
                parts.append(teacher(teacher.normalise(images.to(device, non_blocking=True))))
    except torch.OutOfMemoryError as error:
        raise PipeError(
            f"a batch of {at_once} images does not fit on {device}", where="teacher.batch_size", fix="make it smaller"
        ) from error
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def in_batches(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """rows (n,) cut into batches of `size`, the last one smaller."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]
