"""Rows that could not be read: each is named once in the log, each time in skipped.jsonl, and counted in the record.

    {"step": 120, "epoch": 2, "split": "train", "row": 813, "reason": "..."}

The main process writes for all. Legend: one `Skip` is one row at one time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.console import log
from pipeline.training.tracking import read_metrics

NAMED_IN_LOG = 100  # rows; beyond, a sick disk would bury everything else


@dataclass(frozen=True)
class Skip:
    """One row that was left out.

    Args:
        step: updates done when it was met. split: train or val.
    """

    step: int
    epoch: int
    split: str
    row: int
    reason: str


class Skipped:
    """What has been left out so far, over all sessions.

    Args:
        path: skipped.jsonl; None on processes that do not write.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.times: dict[tuple[str, int], int] = {}

    def read(self) -> None:
        """Go on from what the file holds."""
        self.times = {}
        for line in read_metrics(self.path) if self.path is not None else ():
            self._count(line["split"], line["row"])

    def add(self, found: Iterable[Skip]) -> None:
        """Write down, and name what has not been named."""
        if self.path is None:
            return
        lines = []
        for skip in sorted(found, key=lambda skip: (skip.step, skip.split, skip.row)):
            lines.append(json.dumps(asdict(skip), ensure_ascii=False) + "\n")
            if not self._count(skip.split, skip.row):
                continue
            if len(self.times) <= NAMED_IN_LOG:
                log.warning("skipped %srow %d: %s", "" if skip.split == "train" else f"{skip.split} ", *_of(skip))
            if len(self.times) == NAMED_IN_LOG:
                log.warning("further rows that cannot be read are named in %s only", self.path)
        if lines:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(lines)

    def summary(self) -> dict[str, dict[str, int]]:
        """Split → how many rows, and how many times in all: {"train": {"rows": 3, "times": 41}}."""
        found: dict[str, dict[str, int]] = {}
        for (split, _), times in self.times.items():
            of = found.setdefault(split, {"rows": 0, "times": 0})
            of["rows"] += 1
            of["times"] += times
        return found

    def _count(self, split: str, row: int) -> bool:
        """Count once more; whether it is the first time."""
        self.times[split, row] = self.times.get((split, row), 0) + 1
        return self.times[split, row] == 1


def _of(skip: Skip) -> tuple[int, str]:
    return skip.row, skip.reason
