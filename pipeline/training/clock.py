"""How long a run has trained, and the bar that shows it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.console import Progress, progress


class Clock:
    """Seconds spent, counted on from an earlier session."""

    def __init__(self, already: float) -> None:
        self.started = time.monotonic() - already

    def now(self) -> float:
        """Seconds since the run's beginning, less the time between sessions."""
        return time.monotonic() - self.started


@contextmanager
def bar_of(total: int, done: int, shown: bool) -> Iterator[Progress]:
    """Progress from `done` to `total` pairs; where it is not to be shown, one that only counts."""
    if not shown:
        yield Progress("training", total, "pairs")
        return
    with progress("training", total=total - done, unit="pairs") as bar:
        yield bar
