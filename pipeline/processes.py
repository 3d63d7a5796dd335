"""Starting copies of a command, one a GPU: they get our signals, and do not outlive us."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from pipeline.console import log

RESUMABLE = 75  # how a command ends that a signal has stopped: what to go on from is on disk
STOPPED = (RESUMABLE, -signal.SIGTERM)  # the latter: before it could say so itself
_PR_SET_PDEATHSIG = 1


def start(
    command: Sequence[str], environment: Mapping[str, str], *, processes: int, **how: Any
) -> subprocess.Popen[str]:
    """Start one of `processes` copies, with its share of the cores as threads, in a session of its own: Ctrl-C in the
    terminal reaches us alone.

    Args:
        environment: beside our own.
        how: further arguments of Popen.
    """
    around = os.environ | dict(environment)
    if "OMP_NUM_THREADS" not in around:  # else each would take every core for itself
        around["OMP_NUM_THREADS"] = str(max(1, usable_cores() // processes))
    return subprocess.Popen(
        list(command),
        env=around,
        text=True,
        start_new_session=True,
        preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        **how,
    )


def _end_with_parent() -> None:
    """In the child: SIGTERM when the parent is gone, however it went, so that no copy holds a GPU on its own."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def send(copies: Sequence[subprocess.Popen[str]], number: int) -> None:
    """Send a signal to those that still run."""
    for copy in copies:
        if copy.poll() is None:
            copy.send_signal(number)


@contextmanager
def signals_to(copies: Sequence[subprocess.Popen[str]]) -> Iterator[list[int]]:
    """SIGTERM and SIGINT go to every copy, which stops after its batch at hand; so do we, when all have. Gives the
    signals that have come."""
    asked: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        log.warning("stopping %d processes (signal %d)", len(copies), number)
        send(copies, signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before: dict[int, Any] = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
