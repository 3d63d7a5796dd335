"""From manifest rows to the teacher's features: decoding in threads ahead of the network, memory bounded.

Pillow decodes and resizes outside Python's lock, so threads keep several cores busy; what waits for the network are
bytes (S, S, 3) of a few batches, never floats. The order and composition of batches are the caller's.

Legend: n rows of a batch, m of them decodable, K further views, S image size, T tokens, C channels.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.console import log
from pipeline.data.geometry import NUMBERS, ViewSpec, replay
from pipeline.data.samples import SampleChanged, SampleError, SampleReader, SampleUnavailable
from pipeline.data.views import View
from pipeline.errors import PipeError
from pipeline.teacher.teacher import Teacher

AHEAD = 3  # batches that are decoded or being decoded while a GPU works
AHEAD_ON_CPU = 0  # there both want the same cores, and disturb each other when they work at the same time
CPU_IMAGES = 4  # a forward on a CPU: larger ones leave its caches and get fresh pages each time (twice the time at 64)
NAMED_FAILURES = 5  # rows whose problem is logged one by one
MOST_THREADS = 16

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


def decoding_threads(workers: int | Literal["auto"]) -> int:
    """How many threads decode: as told, or one for each core this process may use."""
    if workers != "auto":
        return max(1, workers)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_THREADS, cores)


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
        self.threads, self.precision = decoding_threads(workers), precision
        self.failed: dict[int, str] = {}
        self.changed: set[int] = set()

    def __call__(
        self, batches: Iterable[np.ndarray], *, base_only: bool = False
    ) -> Generator[FeatureBatch, None, None]:
        """One `FeatureBatch` for each of `batches` (n,) int64, in order."""
        views = () if base_only else self.views
        for rows, images in self._decoded(batches, views):
            ok = np.array([image is not None for image in images])
            self._refuse_replaced(rows)
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

    def _refuse_replaced(self, rows: np.ndarray) -> None:
        """One damaged image in a million is left out; where most of a batch are others, their source was replaced."""
        changed = [row for row in rows.tolist() if row in self.changed]
        if 2 * len(changed) > len(rows) > 1:
            raise PipeError(
                f"{self.failed[changed[0]]}, and {len(changed) - 1} more of {len(rows)}: was this source replaced?",
                where=f"{self.reader.manifest.root}",
                fix="put it back and run the same command, or move the manifest away and run: pipe index",
            )

    def _decoded(
        self, batches: Iterable[np.ndarray], views: Sequence[ViewSpec]
    ) -> Iterator[tuple[np.ndarray, list[_Seen | None]]]:
        waiting: deque[tuple[np.ndarray, list[Future[_Seen | None]]]] = deque()
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="decode")
        ahead = AHEAD_ON_CPU if self.teacher.get_buffer("_mean").device.type == "cpu" else AHEAD
        try:
            for rows, later in _with_next(batches):
                self.reader.will_need(later)  # the disk works in any case
                waiting.append((rows, [pool.submit(self._look, int(row), views) for row in rows]))
                if len(waiting) > ahead:
                    yield _collected(*waiting.popleft())
            while waiting:
                yield _collected(*waiting.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _look(self, row: int, views: Sequence[ViewSpec]) -> _Seen | None:
        """Every view of an image, or None where it cannot be decoded.

        Raises:
            PipeError: the file of an image that was indexed cannot be read. It may be back tomorrow, and to pass over
                it would mark the image undecodable for good.
        """
        try:
            image = self.reader.image(row)
            drawn = [spec.draw(self.seed, row, image.width, image.height) for spec in views]
            pixels = [self.view(image), *(replay(image, geometry, self.view.size) for geometry in drawn)]
            return _Seen(np.stack([np.asarray(picture) for picture in pixels]), np.array(drawn).reshape(-1, NUMBERS))
        except SampleUnavailable as error:
            raise PipeError(
                str(error),
                where=f"{self.reader.manifest.root}",
                fix="put it back and run the same command, or move the manifest away and run: pipe index",
            ) from error
        except SampleError as error:
            if isinstance(error, SampleChanged):
                self.changed.add(row)
            if row not in self.failed:
                self.failed[row] = str(error)
                if len(self.failed) <= NAMED_FAILURES:
                    log.warning("row %d is left out: %s", row, error)
            return None

    @torch.inference_mode()
    def _features(self, pixels: Sequence[np.ndarray]) -> Features:
        """m pictures (S, S, 3) uint8 → scale → (m, T, C) float32, "global" → (m, C) float32."""
        device = self.teacher.get_buffer("_mean").device
        at_once = CPU_IMAGES if device.type == "cpu" else len(pixels)
        parts = []
        try:
            for start in range(0, len(pixels), at_once):
                images = torch.from_numpy(np.stack(pixels[start : start + at_once])).to(device)
                with torch.autocast(device.type, torch.bfloat16) if self.precision == "bfloat16" else nullcontext():
                    parts.append(self.teacher(self.teacher.normalise(images)))
        except torch.OutOfMemoryError as error:
            raise PipeError(
                f"a batch of {len(pixels)} images does not fit on {device}",
                where="teacher.batch_size",
                fix="make it smaller",
            ) from error
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _collected(rows: np.ndarray, futures: list[Future[_Seen | None]]) -> tuple[np.ndarray, list[_Seen | None]]:
    return rows, [future.result() for future in futures]


def _with_next(batches: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each batch and the one after it, which for the last is empty."""
    iterator = iter(batches)
    current = next(iterator, None)
    while current is not None:
        after = next(iterator, None)
        yield current, np.zeros(0, np.int64) if after is None else after
        current = after


def in_batches(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """rows (n,) cut into batches of `size`, the last one smaller."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]
