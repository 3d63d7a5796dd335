"""Processes that train together end together: one that fails takes the others along, at once and with one line.

What goes wrong where all processes ask each other anyway (reading, the loss, saving) is agreed on there. What goes
wrong between (memory, a bug, a full disk) leaves the others inside an exchange that will never be completed. The one
that failed therefore leaves a note in the store through which the processes found each other, and a thread of every
other one looks for such a note.

Legend: W processes.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from accelerate import Accelerator

from pipeline.console import log
from pipeline.errors import PipeError, Stopped

LOOK_EVERY_SECONDS = 2.0
PATIENCE_SECONDS = 20.0  # for a process to end by itself after another one has failed


class Agreed(PipeError):
    """A problem that every process knows of and has stopped for."""


class Together:
    """This process among those that train one run."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.ending: BaseException | None = None  # what all processes have agreed to end with

    @property
    def name(self) -> str:
        """` on process 2 of 8`, counted from 1; nothing where there is one only."""
        return f" on process {self.rank + 1} of {self.world}" if self.world > 1 else ""

    def total(self, values: list[float]) -> list[float]:
        """The sums of every process's `values`, float64; the same bits on every process."""
        if self.world == 1:
            return values
        # NCCL and gloo know float64; a GPU that does not (Apple's) trains alone.
        own = torch.tensor(values, dtype=torch.float64, device=self.accelerator.device)
        dist.all_reduce(own)
        found: list[float] = own.tolist()
        return found

    def everyones(self, value: Any) -> list[Any]:
        """Every process's `value`, by rank: for what happens rarely."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def agree(self, problem: PipeError | None) -> None:
        """Where any process has a problem, all raise the first one, whose words must name the process; every process
        calls it.

        Raises:
            Agreed: on the main process.
            SystemExit: on the others, which have nothing to add.
        """
        if self.total([problem is not None])[0]:
            self.stop_for(problem)

    def stop_for(self, problem: PipeError | None) -> None:
        """`agree`, where all processes know already that some has a problem."""
        first = next(found for found in self.everyones(problem) if found is not None)
        self.ending = SystemExit(1) if self.rank > 0 else Agreed(first.what, where=first.where, fix=first.fix)
        raise self.ending from problem

    def stop(self, stopped: Stopped) -> NoReturn:
        """End here as every other process does, at a signal."""
        self.ending = stopped
        raise stopped

    @contextmanager
    def guard(self, explain: Callable[[Exception], PipeError | None]) -> Iterator[None]:
        """What leaves this block as an error takes the other processes along.

        Args:
            explain: an unforeseen error in our words; None where there are none for it.
        """
        with _looking(_Note(self.rank)) if self.world > 1 else nullcontext() as note:
            try:
                yield
            except BaseException as raised:
                error = self._why(raised)
                if isinstance(error, Exception) and not isinstance(error, (Agreed, Stopped)):
                    error = self._unforeseen(error, note, explain)
                if error is raised:
                    raise
                raise error from raised

    def _why(self, raised: BaseException) -> BaseException:
        """What is ending this process. A launcher that sees one process end sends the others SIGTERM, which must not
        hide what they have to say."""
        found = raised
        if isinstance(raised, KeyboardInterrupt):
            on_its_way = raised.__context__ if isinstance(raised.__context__, Exception) else None
            found = self.ending or on_its_way or raised
        ours = threading.current_thread() is threading.main_thread() and not isinstance(found, KeyboardInterrupt)
        if self.world > 1 and ours:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return found

    def _unforeseen(
        self, error: Exception, note: _Note | None, explain: Callable[[Exception], PipeError | None]
    ) -> BaseException:
        """An error that no other process knows of, or that comes of another one's end."""
        if note is None or not _lost_contact(error):
            if note is not None:
                note.leave()
            return explain(error) or error
        if note.read(patience=5.0) is not None:
            return SystemExit(1)  # the one that failed says why
        gone = PipeError("another process is gone", fix="see its own lines: it may have been killed, or out of memory")
        return explain(gone) or gone


def _lost_contact(error: Exception) -> bool:
    """Whether an exchange failed because its other side is gone."""
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed", "NCCL", "gloo")
    backend = isinstance(error, dist.DistError | dist.DistBackendError)
    return backend or (isinstance(error, RuntimeError) and any(word in str(error) for word in words))


class _Note:
    """`process 2 has failed`, in the processes' common store. Where there is no store to be had, nobody reads it."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.key = f"pipe/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        try:
            self.store: Any = dist.distributed_c10d._get_default_store()
        except (AttributeError, RuntimeError, ValueError):
            self.store = None

    def leave(self) -> None:
        """Tell the others; for a store that is gone they are too."""
        if self.store is not None:
            try:
                self.store.set(self.key, str(self.rank))
            except RuntimeError as error:
                log.debug("no store: %s", error)

    def read(self, *, patience: float = 0.0) -> str | None:
        """Who has failed, after waiting for `patience` seconds at most."""
        end = time.monotonic() + patience
        while self.store is not None:
            try:
                if self.store.check([self.key]):
                    return str(self.store.get(self.key).decode())
            except RuntimeError as error:
                log.debug("no store: %s", error)
                return None
            if time.monotonic() >= end:
                return None
            time.sleep(0.1)
        return None


@contextmanager
def _looking(note: _Note) -> Iterator[_Note]:
    """End this process where another has failed and this one hangs in an exchange with it, as NCCL's do."""
    done = threading.Event()

    def look() -> None:
        while not done.wait(LOOK_EVERY_SECONDS):
            who = note.read()
            if who is not None and who != str(note.rank) and not done.wait(PATIENCE_SECONDS):
                log.error("process %d has failed; ending here too", int(who) + 1)
                os._exit(1)

    thread = threading.Thread(target=look, daemon=True, name="pipe-others")
    thread.start()
    try:
        yield note
    finally:
        done.set()
        thread.join(timeout=LOOK_EVERY_SECONDS)
