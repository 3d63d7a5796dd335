"""One logger and one progress helper: live bars on a terminal, plain lines in a log file. Both write to stderr."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger("pipe")

LINE_EVERY_SECONDS = 15.0  # in a log file a line this often is enough to see that work goes on


def setup_logging(level: int = logging.INFO) -> None:
    """Send the logger's lines to stderr, once, without touching other libraries' loggers."""
    if log.handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.addHandler(handler)
    log.setLevel(level)
    log.propagate = False


class Progress:
    """What `progress` hands out. `advance` counts, `note` sets the short text behind the figures."""

    def __init__(self, description: str, total: int | None, unit: str) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done, self.text = 0, ""
        self.started = self.last_line = time.monotonic()

    def advance(self, n: int = 1) -> None:
        self.done += n
        now = time.monotonic()
        if now - self.last_line >= LINE_EVERY_SECONDS:
            self.last_line = now
            log.info(self.line())

    def note(self, text: str) -> None:
        self.text = text

    def line(self) -> str:
        """`training: 1,200/4,000 pairs, 310/s, 0:09 left, loss 1.2`"""
        seconds = max(time.monotonic() - self.started, 1e-9)
        rate = self.done / seconds
        of = f"/{self.total:,}" if self.total is not None else ""
        parts = [
            f"{self.description}: {self.done:,}{of} {self.unit}",
            f"{rate:,.1f}/s" if rate < 100 else f"{rate:,.0f}/s",
        ]
        if self.total is not None and 0 < self.done < self.total:
            parts.append(f"{clock((self.total - self.done) / rate)} left")
        else:
            parts.append(f"{clock(seconds)}")
        return ", ".join(parts + ([self.text] if self.text else []))


class _TerminalProgress(Progress):
    def __init__(self, description: str, total: int | None, unit: str) -> None:
        super().__init__(description, total, unit)
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self.bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}  {task.fields[rate]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[text]}"),
            console=Console(stderr=True),
        )
        self.task = self.bar.add_task(description, total=total, unit=unit, rate="", text="")

    def advance(self, n: int = 1) -> None:
        self.done += n
        rate = self.done / max(time.monotonic() - self.started, 1e-9)
        self.bar.update(self.task, advance=n, rate=f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2f}/s")

    def note(self, text: str) -> None:
        self.bar.update(self.task, text=text)


@contextmanager
def progress(description: str, total: int | None = None, unit: str = "items") -> Iterator[Progress]:
    """Show progress with rate and time left; on a terminal a bar, elsewhere a line every 15 s and one at the end."""
    if sys.stderr.isatty():
        shown = _TerminalProgress(description, total, unit)
        with shown.bar:
            yield shown
        return
    plain = Progress(description, total, unit)
    yield plain
    log.info(plain.line())


def clock(seconds: float) -> str:
    """`75` → `1:15`, `3700` → `1:01:40`."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
