"""Stopping at a good moment: long work asks now and then whether a signal has arrived."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from pipeline.console import log

ONE_WISH_SECONDS = 3.0  # Ctrl-C reaches a process from the terminal, and again from the launcher that started it


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """SIGTERM and SIGINT ask for a stop after the batch at hand; a SIGINT some seconds after the first is Python's
    own."""
    asked: list[float] = []

    def note(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        asked.append(now)
        if len(asked) == 1:
            log.warning("stopping after this batch (signal %d)", number)
        elif number == signal.SIGINT and now - asked[0] > ONE_WISH_SECONDS:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # only the main thread may ask for signals
        yield lambda: False
        return
    before: dict[int, Any] = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
