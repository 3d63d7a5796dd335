"""Processes that train together end together: one that fails takes the others along, at once and with one line.

What goes wrong where all processes ask each other anyway (reading, the loss, saving) is agreed on there. What goes
wrong between (memory, a bug, a full disk) leaves the others inside an exchange that will never be completed. The one
that failed therefore leaves a note in the store through which the processes found each other, and a thread of every
other one looks for such a note.

Legend: W processes.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

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
        if self.rank > 0:
            raise SystemExit(1)
        raise Agreed(first.what, where=first.where, fix=first.fix) from problem

    @contextmanager
    def guard(self, explain: Callable[[Exception], PipeError | None]) -> Iterator[None]:
        """What leaves this block as an error takes the other processes along.

        Args:
            explain: an unforeseen error in our words; None where there are none for it.
        """
        if self.world == 1:
            try:
                yield
            except Exception as error:
                _raise_explained(error, explain)
            return
        with _looking(_Note(self.rank)) as note:
            try:
                yield
            except (Agreed, Stopped):
                raise
            except Exception as error:
                if _lost_contact(error):
                    who = note.read(patience=5.0)
                    if who is not None:
                        raise SystemExit(1) from error
                    what = f"another process is gone (seen{self.name})"
                    problem = explain(PipeError(what, fix="see its own lines: it may have been killed, out of memory"))
                    raise problem or error from error
                note.leave()
                _raise_explained(error, explain)


def _raise_explained(error: Exception, explain: Callable[[Exception], PipeError | None]) -> None:
    found = None if isinstance(error, (Agreed, Stopped)) else explain(error)
    if found is None or found is error:
        raise error
    raise found from error


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
