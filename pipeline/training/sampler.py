"""Which rows form which batch: a function of (seed, epoch) alone, whatever the number of processes or workers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.errors import PipeError


@dataclass(frozen=True)
class Step:
    """One process's share of one global batch."""

    step: int  # from 0 over the whole run
    epoch: int
    rows: np.ndarray  # (B,) int64


@dataclass(frozen=True)
class BatchPlan:
    """The batches of a whole run.

    Args:
        rows: (n,) int64 training rows, ascending.
        batch_size: N, over all processes. The last uneven batch of an epoch is dropped: a contrastive loss on fewer
            candidates is another loss.
        total_steps: length of the run.
        seed: of the epochs' orders.
    """

    rows: np.ndarray
    batch_size: int
    total_steps: int
    seed: int

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
        return np.random.default_rng([self.seed, epoch]).permutation(self.rows)

    def steps(self, *, start: int = 0, rank: int = 0, world_size: int = 1) -> Iterator[Step]:
        """Steps `start` … `total_steps`, with the rows that process `rank` takes of each global batch."""
        if self.batch_size % world_size:
            raise PipeError(
                f"a global batch of {self.batch_size} does not divide among {world_size} processes",
                where="train.batch_size",
                fix=f"use a multiple of {world_size}",
            )
        own = self.batch_size // world_size
        order, order_epoch = np.empty(0, np.int64), -1
        for step in range(start, self.total_steps):
            epoch, place = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order, order_epoch = self.epoch_order(epoch), epoch
            first = place * self.batch_size + rank * own
            yield Step(step, epoch, order[first : first + own])


def caption_choice(seed: int, epoch: int, row: int, captions: int) -> int:
    """Which of a row's captions an epoch uses: every caption once before any comes again, starting at a seeded one."""
    start = np.random.default_rng([seed, int(row), 0xCA]).integers(captions)
    return int((start + epoch) % captions)
