"""Reading ahead: bringing what comes next into the page cache, in a thread, while something else is going on.

Rows that lie together are read in sequence, by ordinary reads into a buffer that nobody looks at: for these the system
reads ahead itself, in large pages. Single rows are only asked for. (Asking for everything, with MADV_WILLNEED or
posix_fadvise, was tried: on long runs it gave two thirds of the rate.)
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cache.shards import runs_of
from pipeline.console import log

WAITING = 64  # hints that wait; more are let go
PATIENCE = 60.0  # seconds that a read waits for a hint
SEQUENCE = 2**20  # bytes from which on a run is read rather than asked for
BLOCK = 4 * 2**20


class Ahead:
    """A thread that carries out hints, one after the other. Starts with the first; picklable; may be forked.

    Whoever reads rows that a hint is about waits for it: to read them beside it would make the disk go to and fro.
    """

    def __init__(self) -> None:
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._forget()

    def _forget(self) -> None:
        self._pid, self._pending = os.getpid(), dict[int, _Hint]()
        self._jobs: queue.SimpleQueue[_Hint | None] | None = None

    def __del__(self) -> None:
        if getattr(self, "_jobs", None) is not None and self._pid == os.getpid():
            self._jobs.put(None)  # type: ignore[union-attr]  # the thread ends

    def hint(self, rows: np.ndarray, job: Callable[[], None]) -> None:
        """Have `job`, which brings `rows` (n,) into memory, called soon, or never where too many wait already.

        It may raise: a later read will do so again.
        """
        if self._pid != os.getpid():
            self._forget()
        if self._jobs is None:
            self._jobs = queue.SimpleQueue()
            threading.Thread(target=_work, args=(self._jobs, self._pending), name="ahead", daemon=True).start()
        if len(self._pending) <= WAITING:  # one of them is under way
            hint = _Hint(np.unique(rows), job)
            self._pending[id(hint)] = hint
            self._jobs.put(hint)

    def wait_for(self, rows: np.ndarray) -> None:
        """Until no hint about any of `rows` (n,) is waiting or under way."""
        if not self._pending or self._pid != os.getpid():
            return
        deadline = time.monotonic() + PATIENCE
        for hint in list(self._pending.values()):
            if not hint.done.is_set() and np.isin(rows, hint.rows).any():
                hint.done.wait(max(0.0, deadline - time.monotonic()))

    def wait(self) -> None:
        """Until all hints so far have been carried out."""
        if self._pid == os.getpid():
            for hint in list(self._pending.values()):
                hint.done.wait()


class _Hint:
    def __init__(self, rows: np.ndarray, job: Callable[[], None]) -> None:
        self.rows, self.job, self.done = rows, job, threading.Event()


def _work(jobs: queue.SimpleQueue[_Hint | None], pending: dict[int, _Hint]) -> None:
    while (hint := jobs.get()) is not None:
        try:
            hint.job()
        except Exception as error:  # whatever it is: without this thread, reads would wait for hints in vain
            log.debug("reading ahead: %s", error)
        finally:
            del hint.job  # or the last hint would keep its cache alive
            hint.done.set()
            pending.pop(id(hint), None)
            del hint


def read_ahead(file: Path, offsets: np.ndarray, length: int) -> None:
    """Bring chunks of `length` bytes at `offsets` of a file into the page cache.

    Raises:
        OSError: the file cannot be read.
    """
    handle = os.open(file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    try:
        for start, end in runs_of(offsets, length):
            if end - start >= SEQUENCE:
                buffer = memoryview(bytearray(BLOCK))
                for at in range(start, end, BLOCK):
                    os.preadv(handle, [buffer[: min(BLOCK, end - at)]], at)
            elif hasattr(os, "posix_fadvise"):
                os.posix_fadvise(handle, start, end - start, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(handle)
