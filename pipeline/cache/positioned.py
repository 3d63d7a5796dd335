"""Rows by positioned reads, many at a time: for network disks, where each page fault of a map is a round trip of 4 kB.

A server that goes away, or a file that is cut while it is read, is an error here; with a map it kills the process.

Legend: S rows a shard, n rows asked for.
"""

from __future__ import annotations

import os
import resource
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cache import layout
from pipeline.cache.ahead import read_ahead
from pipeline.cache.layout import RowArray
from pipeline.cache.shards import CRC_BYTES, FIX_SHARD, RowOffsets, States, crc32c, open_shard, refuse_damaged
from pipeline.errors import PipeError

WANTED_FILES = 32768
READS_AT_ONCE = 16  # what hides the latency of a network disk


class _OpenShard:
    """A shard's descriptor, closed with the last reader that holds it, and where its rows lie."""

    def __init__(self, file: Path, descriptor: int, offsets: RowOffsets) -> None:
        self.file, self.descriptor, self.offsets = file, descriptor, offsets

    def __del__(self) -> None:
        os.close(self.descriptor)


class PositionedShards:
    """The shard files below `root`; a `RowSource`.

    Args:
        states: which rows are there, and how many a shard has.
        max_open: files open at once; the one used longest ago makes room. Half of what the system allows at most.
    """

    def __init__(self, root: Path, states: States, *, max_open: int | None = None) -> None:
        self.root, self.states, self.shard_rows = root, states, states.shard_rows
        most = _default_open()
        self.max_open = min(max_open or most, most)
        self._start()

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "states": self.states, "shard_rows": self.shard_rows, "max_open": self.max_open}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def _start(self) -> None:
        self.opened: dict[tuple[str, int], _OpenShard] = {}
        self._locks: dict[int, threading.Lock] = {}
        self._pool: tuple[int, ThreadPoolExecutor] | None = None

    def forget(self) -> None:
        with self._locked():
            self.opened = {}

    def _locked(self) -> threading.Lock:
        """One for each process: a fork copies a lock that may be held."""
        return self._locks.setdefault(os.getpid(), threading.Lock())  # atomic: threads get the same one

    def _readers(self) -> ThreadPoolExecutor:
        """A fork copies a pool without its threads."""
        with self._locked():
            if self._pool is None or self._pool[0] != os.getpid():
                self._pool = os.getpid(), ThreadPoolExecutor(READS_AT_ONCE, thread_name_prefix="cache")
            return self._pool[1]

    def gather(self, array: RowArray, rows: np.ndarray, check: bool) -> np.ndarray:
        out = np.empty((len(rows), *array.row_shape), array.dtype)
        if not len(rows):
            return out
        opened, offsets = self._located(array, rows)
        flat = out.reshape(len(rows), -1).view(np.uint8)  # (n, row bytes)
        stored = np.empty((len(rows), CRC_BYTES), np.uint8)
        sound = np.ones(len(rows), bool)

        def read(some: range) -> None:
            for i in some:
                shard = opened[i]
                try:
                    whole = _fill(shard.descriptor, flat[i], stored[i], offsets[i])
                except OSError as error:
                    raise PipeError(f"cannot read this shard: {error.strerror}", where=shard.file) from error
                if not whole:
                    raise PipeError("this shard was cut short", where=shard.file, fix=FIX_SHARD)
                if check:
                    sound[i] = crc32c(flat[i]) == int.from_bytes(stored[i], "little")

        shares = [range(first, len(rows), READS_AT_ONCE) for first in range(READS_AT_ONCE)]
        for _ in self._readers().map(read, shares):
            pass
        if not sound.all():
            refuse_damaged(array, self.root, rows[~sound], self.shard_rows)
        return out

    def will_need(self, array: RowArray, rows: np.ndarray) -> None:
        if not len(rows):
            return
        opened, offsets = self._located(array, np.unique(rows))
        by_file: dict[Path, list[int]] = {}
        for shard, offset in zip(opened, offsets, strict=True):
            by_file.setdefault(shard.file, []).append(offset)
        for file, of_file in by_file.items():
            read_ahead(file, np.array(of_file), array.row_bytes + CRC_BYTES)

    def _located(self, array: RowArray, rows: np.ndarray) -> tuple[list[_OpenShard], list[int]]:
        """Each row's shard, open, and its offset there."""
        shard_of, slots = np.divmod(rows, self.shard_rows)
        order = np.argsort(shard_of, kind="stable")
        numbers, starts = np.unique(shard_of[order], return_index=True)
        opened, offsets = np.empty(len(rows), object), np.empty(len(rows), np.int64)
        for number, own in zip(numbers.tolist(), np.split(order, starts[1:]), strict=True):
            opened[own] = shard = self._open(array, number)
            offsets[own] = shard.offsets.at(slots[own])
        return opened.tolist(), offsets.tolist()

    def _open(self, array: RowArray, shard: int) -> _OpenShard:
        key = (array.name, shard)
        with self._locked():
            found = self.opened.pop(key, None)
            if found is None:
                while len(self.opened) >= self.max_open:
                    del self.opened[next(iter(self.opened))]
                ok, file = np.flatnonzero(self.states.of(shard) == layout.OK), array.file(self.root, shard)
                descriptor, _, offsets = open_shard(array, file, self.shard_rows, ok)
                found = _OpenShard(file, descriptor, offsets)
            self.opened[key] = found
        return found


def _fill(descriptor: int, values: np.ndarray, checksum: np.ndarray, offset: int) -> bool:
    """Read both from `offset` on; False where the file ends before. Network disks may give less at a time."""
    got, wanted = 0, len(values) + len(checksum)
    while got < wanted:
        buffers: list[Any] = [values[got:], checksum[max(got - len(values), 0) :]]
        count = os.preadv(descriptor, buffers, offset + got)
        if count == 0:
            return False
        got += count
    return True


def _default_open() -> int:
    """Half of the files that this process may open, after asking for more: a cache has thousands, and to open one anew
    on a network disk costs more than a row."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED_FILES if hard == resource.RLIM_INFINITY else min(hard, WANTED_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):  # some systems have a lower limit of their own
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max(64, (WANTED_FILES if soft == resource.RLIM_INFINITY else soft) // 2)
