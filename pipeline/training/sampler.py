"""Which rows form which batch: a function of (seed, epoch) alone, whatever the number of processes or workers.

Two ways to shuffle. `full`: every order of all rows is equally likely; what a disk sees are single rows at random.
`shards`: whole shards of the cache in random order, and the rows of several neighbours in that order mixed; what a disk
sees, thanks to the hints of what comes next, are images and features of whole shards, one after the other. (Our
reading of a shuffle buffer, webdataset's for instance, as a function of the seed: it needs no state to resume.)

Legend: n training rows, N batch over all processes, B this process's share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from pipeline.errors import PipeError

Shuffle = Literal["full", "shards"]

STEPS_AHEAD = 8  # how far ahead of their batch the rows of a full shuffle are asked for


@dataclass(frozen=True)
class Step:
    """One process's share of one global batch.

    Args:
        step: from 0 over the whole run.
        rows: (B,) int64.
        ahead: int64 rows that this process will need soon, in the order in which a disk should read them.
        ahead_epochs: int64, the epoch in which it will need each of them.
        validates: whether the rows are only looked at: in the view that everyone has.
    """

    step: int
    epoch: int
    rows: np.ndarray
    ahead: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    ahead_epochs: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    validates: bool = False


@dataclass(frozen=True)
class _Epoch:
    """An epoch's order (n,) int64, cut at `bounds` into groups of rows that are mixed among themselves."""

    order: np.ndarray
    bounds: np.ndarray


@dataclass(frozen=True)
class BatchPlan:
    """The batches of a whole run.

    Args:
        rows: (n,) int64 training rows, ascending.
        batch_size: N, over all processes. The last uneven batch of an epoch is dropped: a contrastive loss on fewer
            candidates is another loss.
        total_steps: length of the run.
        seed: of the epochs' orders.
        shuffle: "full" or "shards".
        shard_rows: rows a shard of the cache, for "shards".
        buffer_shards: how many shards are mixed with each other, for "shards".
    """

    rows: np.ndarray
    batch_size: int
    total_steps: int
    seed: int
    shuffle: Shuffle = "full"
    shard_rows: int = 1024
    buffer_shards: int = 8

    def __post_init__(self) -> None:
        if len(self.rows) < self.batch_size:
            raise PipeError(
                f"{len(self.rows):,} training rows do not fill one batch of {self.batch_size:,}",
                where="train.batch_size",
                fix="lower it or index more data",
            )

    @property
    def steps_per_epoch(self) -> int:
        return len(self.rows) // self.batch_size

    def epoch_order(self, epoch: int) -> np.ndarray:
        """(n,) int64: the rows in epoch `epoch`'s order."""
        return self._epoch(epoch).order

    def _epoch(self, epoch: int) -> _Epoch:
        rng = np.random.default_rng([self.seed, epoch])
        if self.shuffle == "full":
            return _Epoch(rng.permutation(self.rows), np.array([0, len(self.rows)]))
        starts = np.flatnonzero(np.diff(self.rows // self.shard_rows, prepend=-1))
        shards = np.split(self.rows, starts[1:])  # as `rows` ascends
        order = rng.permutation(len(shards)).tolist()
        groups = [
            rng.permutation(np.concatenate([shards[k] for k in order[first : first + self.buffer_shards]]))
            for first in range(0, len(order), self.buffer_shards)
        ]
        return _Epoch(np.concatenate(groups), np.cumsum([0, *map(len, groups)]))

    def steps(self, *, start: int = 0, rank: int = 0, world_size: int = 1) -> Iterator[Step]:
        """Steps `start` … `total_steps`, with the rows that process `rank` takes of each global batch."""
        if self.batch_size % world_size:
            raise PipeError(
                f"a global batch of {self.batch_size} does not divide among {world_size} processes",
                where="train.batch_size",
                fix=f"use a multiple of {world_size}",
            )
        own = self.batch_size // world_size
        epochs: dict[int, _Epoch] = {}

        def epoch_of(number: int) -> _Epoch:
            if number not in epochs:
                for old in [known for known in epochs if known < number - 1]:
                    del epochs[old]
                epochs[number] = self._epoch(number)
            return epochs[number]

        def rows_of(step: int) -> np.ndarray:
            epoch, place = divmod(step, self.steps_per_epoch)
            first = place * self.batch_size + rank * own
            return epoch_of(epoch).order[first : first + own]

        # A group that is hardly more than a batch is over before the next one could be asked for part by part.
        by_group = self.shuffle == "shards" and self.buffer_shards * self.shard_rows >= 2 * self.batch_size
        for step in range(start, self.total_steps):
            if by_group:
                ahead = [self._next_group(step, epoch_of, rank, own)]
                if step == start:  # and what is left of the group that the run begins in
                    ahead.insert(0, self._rest_of_group(step, epoch_of, rank, own))
            else:
                later = range(step + 1 if step == start else step + STEPS_AHEAD, step + STEPS_AHEAD + 1)
                known = [number for number in later if number < self.total_steps]
                ahead = [(rows_of(number), number // self.steps_per_epoch) for number in known]
            rows = np.concatenate([np.zeros(0, np.int64), *(rows for rows, _ in ahead)])
            due = np.concatenate([np.zeros(0, np.int64), *(np.full(len(rows), epoch) for rows, epoch in ahead)])
            yield Step(step, step // self.steps_per_epoch, rows_of(step), rows, due)

    def _rest_of_group(
        self, step: int, epoch_of: Callable[[int], _Epoch], rank: int, own: int
    ) -> tuple[np.ndarray, int]:
        """This process's rows of the step's group from the step on, ascending; and their epoch."""
        number, place = divmod(step, self.steps_per_epoch)
        first, epoch = place * self.batch_size, epoch_of(number)
        end = int(epoch.bounds[np.searchsorted(epoch.bounds, first, side="right")])
        span = np.arange(first, min(end, self.steps_per_epoch * self.batch_size))
        return np.sort(epoch.order[span[span % self.batch_size // own == rank]]), number

    def _next_group(self, step: int, epoch_of: Callable[[int], _Epoch], rank: int, own: int) -> tuple[np.ndarray, int]:
        """This process's rows of the group after the step's, ascending: the part that is due in this step; and their
        epoch."""
        number, place = divmod(step, self.steps_per_epoch)
        first, used = place * self.batch_size, self.steps_per_epoch * self.batch_size
        bounds = epoch_of(number).bounds
        group = int(np.searchsorted(bounds, first, side="right")) - 1
        start, end = int(bounds[group]), min(int(bounds[group + 1]), used)
        if end == used:
            if (number + 1) * self.steps_per_epoch >= self.total_steps:
                return np.zeros(0, np.int64), number
            number, group = number + 1, -1
        epoch = epoch_of(number)
        span = np.arange(epoch.bounds[group + 1], min(int(epoch.bounds[group + 2]), used))
        rows = np.sort(epoch.order[span[span % self.batch_size // own == rank]])
        begins, ends = -(-start // self.batch_size), end // self.batch_size  # places that lie wholly in this group
        parts = np.array_split(rows, max(1, (ends - begins) // 2))  # in half the time: a slow disk has the other half
        return (parts[place - begins] if place - begins < len(parts) else np.zeros(0, np.int64)), number


def caption_choice(seed: int, epoch: int, row: int, captions: int) -> int:
    """Which of a row's captions an epoch uses: every caption once before any comes again, starting at a seeded one."""
    start = np.random.default_rng([seed, int(row), 0xCA]).integers(captions)
    return int((start + epoch) % captions)
