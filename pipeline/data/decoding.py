"""Images by row, decoded in threads ahead of whoever looks at them; what cannot be decoded is noted and left out.

Pillow decodes and resizes outside Python's lock, so threads keep several cores busy. The order and composition of
batches are the caller's; what waits in memory are `ahead` batches.

Legend: n rows of a batch.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, TypeVar

import numpy as np

from pipeline.console import log
from pipeline.data.samples import SampleChanged, SampleError, SampleReader, SampleUnavailable
from pipeline.errors import PipeError

NAMED_FAILURES = 5  # rows whose problem is logged one by one
MOST_THREADS = 16

Decoded = TypeVar("Decoded")


def decoding_threads(workers: int | Literal["auto"]) -> int:
    """How many threads decode: as told, or one for each core this process may use."""
    if workers != "auto":
        return max(1, workers)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_THREADS, cores)


class Decoder:
    """Calls a function of a row on batches of rows, in threads.

    Args:
        reader: what the function reads images with; shared by all threads.
        workers: threads; "auto": one a core.

    Attributes:
        failed: rows whose image could not be used so far, with the reason.
        changed: those among them that hold another image than when they were indexed.
    """

    def __init__(self, reader: SampleReader, workers: int | Literal["auto"] = "auto") -> None:
        self.reader, self.threads = reader, decoding_threads(workers)
        self.failed: dict[int, str] = {}
        self.changed: set[int] = set()

    def __call__(
        self, batches: Iterable[np.ndarray], look: Callable[[int], Decoded], *, ahead: int
    ) -> Generator[tuple[np.ndarray, list[Decoded | None]], None, None]:
        """Each of `batches` (n,) int64, in order, with `look(row)` of its rows; None where that is in `failed`.

        Args:
            ahead: batches that are decoded or being decoded while the caller works; 0 where both want the same cores.

        Raises:
            PipeError: a file cannot be read now, or most images of a batch are others than were indexed.
        """
        waiting: deque[tuple[np.ndarray, list[Future[Decoded | None]]]] = deque()
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="decode")
        try:
            for rows, later in _with_next(batches):
                self.reader.will_need(later)  # the disk works in any case
                waiting.append((rows, [pool.submit(self._guarded, look, int(row)) for row in rows]))
                if len(waiting) > ahead:
                    yield self._collected(*waiting.popleft())
            while waiting:
                yield self._collected(*waiting.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _collected(
        self, rows: np.ndarray, futures: list[Future[Decoded | None]]
    ) -> tuple[np.ndarray, list[Decoded | None]]:
        found = [future.result() for future in futures]
        self._refuse_replaced(rows)
        return rows, found

    def _guarded(self, look: Callable[[int], Decoded], row: int) -> Decoded | None:
        """`look(row)`, or None where the image cannot be decoded.

        Raises:
            PipeError: the file of an image that was indexed cannot be read. It may be back tomorrow, and to pass over
                it would mark the image undecodable for good.
        """
        try:
            return look(row)
        except SampleUnavailable as error:
            raise PipeError(
                str(error),
                where=f"{self.reader.manifest.root}",
                fix="put it back and run the same command, or move the manifest away and run: pipe index",
            ) from error
        except SampleError as error:
            if isinstance(error, SampleChanged):
                self.changed.add(row)
            if row not in self.failed:
                self.failed[row] = str(error)
                if len(self.failed) <= NAMED_FAILURES:
                    log.warning("row %d is left out: %s", row, error)
            return None

    def _refuse_replaced(self, rows: np.ndarray) -> None:
        """One damaged image in a million is left out; where most of a batch are others, their source was replaced."""
        changed = [row for row in rows.tolist() if row in self.changed]
        if 2 * len(changed) > len(rows) > 1:
            raise PipeError(
                f"{self.failed[changed[0]]}, and {len(changed) - 1} more of {len(rows)}: was this source replaced?",
                where=f"{self.reader.manifest.root}",
                fix="put it back and run the same command, or move the manifest away and run: pipe index",
            )


def _with_next(batches: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each batch and the one after it, which for the last is empty."""
    iterator = iter(batches)
    current = next(iterator, None)
    while current is not None:
        after = next(iterator, None)
        yield current, np.zeros(0, np.int64) if after is None else after
        current = after
