"""Batches for training: image, caption and cached teacher row read together, in one worker, by one row number.

B: pairs in this process's batch; L: context length; C: components of a scale; g²: its tokens.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.cache.layout import GEOMETRY
from pipeline.cache.reader import Cache
from pipeline.console import log
from pipeline.data.augment import SimCLRViews
from pipeline.data.geometry import ViewSpec, replay, view_choice
from pipeline.data.roi import BOXES, RoiSpec
from pipeline.data.samples import SampleError, SampleReader
from pipeline.data.views import Preprocess, View
from pipeline.errors import PipeError
from pipeline.training.sampler import Step, caption_choice
from pipeline.training.second_captions import SecondCaption

LEFT_AFTER_SIGTERM_SECONDS = 30  # for a data worker: what clusters leave between SIGTERM and SIGKILL
TEACHER_PIXELS = "teacher_pixels"  # among a batch's targets, for the teacher in the loop to look at: see online.py


@dataclass
class Batch:
    """One process's share of a batch; rows that could not be read are left out and named in `failed`."""

    step: int
    epoch: int
    rows: Tensor  # (B,) int64
    images: Tensor  # (B, 3, H, W) float32, normalised for the trunk
    tokens: Tensor  # (B, L) int64
    targets: dict[str, Tensor] | None  # as stored: scale (B, g², C), global (B, C) float16; BOXES (B, 4)
    failed: list[tuple[int, str]] = field(default_factory=list)
    second_tokens: Tensor | None = None  # (B, L) int64, of a second caption
    augmented: Tensor | None = None  # (B, 2, 3, H, W) float32, two views that are no one else's

    def pin_memory(self) -> Batch:
        return self._moved(Tensor.pin_memory)

    def to(self, device: torch.device) -> Batch:
        """Copies to `device`; the cached targets cross as they are stored (int8) and are scaled there."""
        return self._moved(lambda x: x.to(device, non_blocking=True))

    def _moved(self, move: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with everything that the model reads moved."""
        return replace(
            self,
            images=move(self.images),
            tokens=move(self.tokens),
            targets=None if self.targets is None else {k: move(v) for k, v in self.targets.items()},
            second_tokens=None if self.second_tokens is None else move(self.second_tokens),
            augmented=None if self.augmented is None else move(self.augmented),
        )

    @property
    def inputs(self) -> dict[str, Any]:
        """What the objective's forward takes besides `progress`, by its own names."""
        names = ("images", "tokens", "targets", "second_tokens", "augmented")
        return {name: getattr(self, name) for name in names}


@dataclass
class _Pair:
    """One row of a batch in the making."""

    row: int
    image: Tensor
    caption: str
    view: ViewSpec | None
    box: np.ndarray | None
    teacher_pixels: np.ndarray | None
    second: str | None
    augmented: Tensor | None


class PairDataset(Dataset[Batch]):
    """Turns a `Step` into a `Batch`. Everything is a function of the step, so workers need no random state.

    Args:
        target_rows: (manifest rows,) int64, the cache row to read for each row (the identity, except in the
            control that permutes targets); None trains without a cache.
        views: further views that epochs take in turns with the base view. With a cache their geometry is read from it,
            so that image and target are of the same view; without, the same geometry is drawn.
        view_seed: that views were drawn from.
        roi: crops of the base view, another one in every epoch; the batch carries their boxes (B, 4) float32 beside
            the base view's targets, under data.roi.BOXES. Validation sees whole views.
        teacher_view: what a teacher in the loop looks at; then the batch carries its pixels (B, S, S, 3) uint8 under
            TEACHER_PIXELS in the place of cached targets: of the stored views in turns, and of whole views for crops.
        second: gives each row a second caption. augment: gives each image two augmented views.
    """

    def __init__(
        self,
        samples: SampleReader,
        preprocess: Preprocess,
        tokenizer: Callable[[list[str]], Tensor],
        *,
        cache: Cache | None = None,
        target_rows: np.ndarray | None = None,
        seed: int = 0,
        views: Sequence[ViewSpec] = (),
        view_seed: int = 0,
        roi: RoiSpec | None = None,
        teacher_view: View | None = None,
        second: SecondCaption | None = None,
        augment: SimCLRViews | None = None,
    ) -> None:
        self.samples, self.preprocess, self.tokenizer = samples, preprocess, tokenizer
        self.cache, self.target_rows, self.seed = cache, target_rows, seed
        self.views, self.view_seed, self.roi = tuple(views), view_seed, roi
        self.teacher_view = teacher_view
        self.second, self.augment = second, augment

    def __getitem__(self, step: Step) -> Batch:
        self._read_ahead(step)
        found: list[_Pair] = []
        failed = []
        for row in step.rows.tolist():
            try:
                found.append(self._pair(step, row))
            except SampleError as error:
                failed.append((row, str(error)))
        rows = np.array([pair.row for pair in found], dtype=np.int64)
        if self.teacher_view is None:
            targets = self._targets(rows, [pair.view for pair in found])
        else:
            targets = {TEACHER_PIXELS: _pixels([pair.teacher_pixels for pair in found], self.teacher_view.size)}
        if targets is not None and (cut := [pair.box for pair in found if pair.box is not None]):
            targets[BOXES] = torch.from_numpy(np.stack(cut))
        size = self.preprocess.view.size
        return Batch(
            step=step.step,
            epoch=step.epoch,
            rows=torch.from_numpy(rows),
            images=_stacked([pair.image for pair in found], (3, size, size)),
            tokens=self._tokens([pair.caption for pair in found]),
            targets=targets,
            failed=failed,
            second_tokens=None if self.second is None else self._tokens([pair.second or "" for pair in found]),
            augmented=_stacked([pair.augmented for pair in found], (2, 3, size, size)) if self.augment else None,
        )

    def _pair(self, step: Step, row: int) -> _Pair:
        """Everything of one row that does not come from the cache."""
        view, box = None if step.validates else self._view_of(step.epoch, row), self._box_of(step, row)
        image, captions = self.samples.read(row)
        chosen = caption_choice(self.seed, step.epoch, row, len(captions))
        geometry = self._geometry(view, row, image)
        return _Pair(
            row,
            image=self.preprocess(image, geometry, box=box),
            caption=captions[chosen],
            view=view,
            box=box,
            teacher_pixels=self._teacher_pixels(image, geometry),
            second=self.second(step.epoch, row, captions, chosen) if self.second else None,
            augmented=self.augment(image, (self.seed, step.epoch, row)) if self.augment else None,
        )

    def _tokens(self, captions: list[str]) -> Tensor:
        return self.tokenizer(captions) if captions else self.tokenizer([""])[:0]  # (0, L)

    def _view_of(self, epoch: int, row: int) -> ViewSpec | None:
        """The view that an epoch takes of a row; None is the base view."""
        choice = view_choice(self.seed, epoch, row, 1 + len(self.views)) if self.views else 0
        return None if choice == 0 else self.views[choice - 1]

    def _box_of(self, step: Step, row: int) -> np.ndarray | None:
        return None if self.roi is None or step.validates else self.roi.draw(self.seed, step.epoch, row)

    def _geometry(self, view: ViewSpec | None, row: int, image: Image.Image) -> np.ndarray | None:
        if view is None:
            return None
        if self.cache is None:
            return view.draw(self.view_seed, row, image.width, image.height)
        stored: np.ndarray = self.cache.geometry([row], view.name)[0]
        return stored

    def _teacher_pixels(self, image: Image.Image, geometry: np.ndarray | None) -> np.ndarray | None:
        """(S, S, 3) uint8, what stage one would show the teacher; None where no teacher asks."""
        if self.teacher_view is None:
            return None
        size = self.teacher_view.size
        return np.asarray(self.teacher_view(image) if geometry is None else replay(image, geometry, size))

    def _read_ahead(self, step: Step) -> None:
        """Ask the disk for what comes next while this batch is decoded."""
        rows = step.ahead
        if not len(rows):
            return
        self.samples.will_need(rows)
        if self.cache is None:
            return
        due = [self._view_of(*when) for when in zip(step.ahead_epochs.tolist(), rows.tolist(), strict=True)]
        for view in dict.fromkeys(due):
            own = rows[[other is view for other in due]]
            self.cache.will_need(self._target_rows(own), view=None if view is None else view.name)

    def _target_rows(self, rows: np.ndarray) -> np.ndarray:
        return rows if self.target_rows is None else self.target_rows[rows]

    def _targets(self, rows: np.ndarray, chosen: Sequence[ViewSpec | None]) -> dict[str, Tensor] | None:
        """The cached rows, each of the view that its image is of."""
        if self.cache is None:
            return None
        targets: dict[str, np.ndarray] = {}
        of_view = np.array([-1 if view is None else self.views.index(view) for view in chosen], np.int64)
        for number in np.unique(of_view).tolist() or [-1]:
            own = np.flatnonzero(of_view == number)
            name = None if number < 0 else self.views[number].name
            stored = self.cache.read_raw(self._target_rows(rows[own]), view=name)
            stored.pop(GEOMETRY, None)
            if len(own) == len(rows):
                targets = stored
                break
            for key, values in stored.items():
                whole = targets.setdefault(key, np.empty((len(rows), *values.shape[1:]), values.dtype))
                whole[own] = values
        return {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in targets.items()}


def _stacked(parts: Sequence[Tensor | None], shape: tuple[int, ...]) -> Tensor:
    """(n, *shape), for n = 0 too."""
    there = [part for part in parts if part is not None]
    return torch.stack(there) if there else torch.empty(0, *shape)


def _pixels(pictures: Sequence[np.ndarray | None], size: int) -> Tensor:
    """(n, size, size, 3) uint8, for n = 0 too."""
    there = [picture for picture in pictures if picture is not None]
    return torch.from_numpy(np.stack(there) if there else np.zeros((0, size, size, 3), np.uint8))


def permuted_rows(rows: np.ndarray, *, manifest_rows: int, seed: int) -> np.ndarray:
    """(manifest_rows,) int64: one seeded permutation among `rows`, the identity elsewhere (control shuffled-cache)."""
    target = np.arange(manifest_rows, dtype=np.int64)
    target[rows] = np.random.default_rng([seed, 0x5F]).permutation(rows)
    return target


def batches(
    dataset: PairDataset, steps: Iterable[Step], *, workers: int, pin_memory: bool = False
) -> Generator[Batch, None, None]:
    """Batches in the order of `steps`, read ahead by `workers` processes (0: in this one); closing it ends them.

    Raises:
        PipeError: a worker met an error, or was killed.
    """
    loader = DataLoader(
        _Carrying(dataset),
        sampler=_Steps(steps),
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_is,  # a worker's answer is a whole batch already
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_leave_signals_to_the_trainer if workers else None,
    )
    try:
        for batch in loader:
            if isinstance(batch, PipeError):
                raise batch
            yield batch
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        reason = " ".join(str(error).split())
        fix = "where memory ran out, lower data.workers; then go on with --resume"
        raise PipeError(f"a process that reads batches was killed ({reason})", fix=fix) from error


class _Carrying(Dataset[Batch | PipeError]):
    """Hands an error on as a value, in one line: torch would make a worker's traceback its message."""

    def __init__(self, dataset: PairDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, step: Step) -> Batch | PipeError:
        try:
            return self.dataset[step]
        except PipeError as error:
            return error
        except Exception as error:
            log.debug("reading a batch failed", exc_info=True)
            what = f"unexpected {type(error).__name__} while a batch was read: {error}"
            rows = ", ".join(str(row) for row in step.rows[:8].tolist())
            return PipeError(what, where=f"rows {rows}, …", fix="please report it with the output of --debug")


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Ctrl-C and a cluster's SIGTERM reach every process of a job. Batches must come until the trainer has saved; it
    ends its workers itself. One that it forgets ends a while after the SIGTERM that every exit sends to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(LEFT_AFTER_SIGTERM_SECONDS))


class _Steps:
    """An iterable without a length: DataLoader asks a sampler for one only where it needs it."""

    def __init__(self, steps: Iterable[Step]) -> None:
        self.steps = steps

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)


def _as_is(batch: Any) -> Any:
    return batch
