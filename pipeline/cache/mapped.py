"""Rows out of memory maps: the fastest way where files lie on a local disk and stay in the page cache.

All shards of an array are mapped into one reserved span of addresses, each at its own place. A row is then an element
of one NumPy array, with the address within the span as its index, and a batch is one fancy index: a copy at the speed
of np.memmap, whatever number of shards the rows lie in. A map keeps no file open.

An address outside the maps would kill the process, so that every offset comes from an index that was checked against
its file when the shard was mapped (`shards.open_shard`), and a shard's size is checked first.

Legend: S rows a shard, R rows, n rows asked for.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cache import layout
from pipeline.cache.ahead import read_ahead
from pipeline.cache.layout import RowArray
from pipeline.cache.shards import CRC_BYTES, States, crc32c, index_bytes, open_shard, refuse_damaged
from pipeline.errors import PipeError

MOST_MAPS = 16384  # each is two entries in a table for which Linux allows 65,530 (vm.max_map_count)
_PROT_NONE, _MAP_FIXED, _MAP_NORESERVE = 0, 0x10, 0x4000 if os.uname().sysname == "Linux" else 0x40


class NoSpan(Exception):
    """This system does not reserve so many addresses, or does not map these files."""


class MappedShards:
    """The shard files below `root`; a `RowSource`.

    Args:
        states: which rows are there, and how many a shard has.
        max_open: shards mapped at once; those used longest ago make room.

    Raises:
        NoSpan: by a read, where addresses cannot be reserved or a file cannot be mapped.
    """

    def __init__(self, root: Path, states: States, *, max_open: int | None = None) -> None:
        self.root, self.states, self.max_open = root, states, max_open or MOST_MAPS
        self._start()

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "states": self.states, "max_open": self.max_open}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def _start(self) -> None:
        self.spans: dict[str, _Span] = {}
        self._locks: dict[int, threading.Lock] = {}

    def forget(self) -> None:
        with self._locked():
            self.spans = {}

    @property
    def mapped(self) -> int:
        """Shards that are mapped now, all arrays together."""
        return sum(int(span.mapped.sum()) for span in self.spans.values())

    def gather(self, array: RowArray, rows: np.ndarray, check: bool) -> np.ndarray:
        with self._locked():  # nothing is unmapped while somebody copies
            span = self._span(array)
            places = self._places(span, rows)
            found = span.rows[places]  # (n,) void: the copy
            stored = span.checksums[places + array.row_bytes] if check else None
        flat = found.view(np.uint8).reshape(len(rows), array.row_bytes)  # (n, bytes of a row)
        if stored is not None:
            sound = np.fromiter(map(crc32c, flat), np.uint32, len(flat)) == stored
            if not sound.all():
                refuse_damaged(array, self.root, rows[~sound], self.states.shard_rows)
        return flat.view(array.dtype).reshape(len(rows), *array.row_shape)

    def will_need(self, array: RowArray, rows: np.ndarray) -> None:
        if not len(rows):
            return
        with self._locked():
            span = self._span(array)
            shard_of, offsets = np.divmod(self._places(span, np.unique(rows)), span.room)
        for shard in np.unique(shard_of).tolist():
            read_ahead(array.file(self.root, shard), offsets[shard_of == shard], span.stride)

    def _locked(self) -> threading.Lock:
        """One for each process: a fork copies a lock that may be held. The maps stay good."""
        return self._locks.setdefault(os.getpid(), threading.Lock())  # atomic: threads get the same one

    def _span(self, array: RowArray) -> _Span:
        if array.name not in self.spans:
            self.spans[array.name] = _Span(array, self.root, self.states)
        return self.spans[array.name]

    def _places(self, span: _Span, rows: np.ndarray) -> np.ndarray:
        """rows (n,) → (n,) int64, where they begin in the span; their shards are mapped."""
        shard_of, slots = np.divmod(rows, self.states.shard_rows)
        there = span.mapped[shard_of]
        if not there.all():
            lacking = np.unique(shard_of[~there])
            self._make_room(len(lacking), span, shard_of)
            for shard in lacking.tolist():
                span.map(shard)
        span.tick(shard_of)
        return span.places(shard_of, slots, rows)

    def _make_room(self, count: int, keep: _Span, needed: np.ndarray) -> None:
        """Unmap what was used longest ago, an eighth of all at least, but nothing that this batch needs."""
        surplus = self.mapped + count - self.max_open
        if surplus <= 0:
            return
        candidates: list[tuple[int, _Span, int]] = []
        for span in self.spans.values():
            for shard in np.flatnonzero(span.mapped).tolist():
                candidates.append((int(span.used[shard]), span, shard))
        candidates.sort(key=lambda candidate: candidate[0])
        kept = set(needed.tolist())
        for _, span, shard in candidates[: max(surplus, self.max_open // 8)]:
            if not (span is keep and shard in kept):
                span.unmap(shard)


class _Span:
    """The addresses of one array's shards.

    Attributes:
        mapped: (shards,) bool.
        used: (shards,) int64, when each was last used.
        rows: element i is the row at address i of the span; only those of `places` may be touched.
        checksums: element i is the uint32 at address i.
    """

    clock = 0

    def __init__(self, array: RowArray, root: Path, states: States) -> None:
        self.array, self.root, self.states = array, root, states
        self.stride, self.shards = array.row_bytes + CRC_BYTES, -(-states.rows // states.shard_rows)
        size = states.shard_rows * self.stride + index_bytes(states.shard_rows)
        self.room = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE  # of one shard
        self.length = self.room * self.shards
        self.base = _reserve(self.length)
        memory = memoryview((ctypes.c_uint8 * self.length).from_address(self.base))
        void = np.dtype((np.void, array.row_bytes))
        self.rows = np.ndarray((self.length - array.row_bytes + 1,), void, buffer=memory, strides=(1,))
        self.checksums = np.ndarray((self.length - CRC_BYTES + 1,), "<u4", buffer=memory, strides=(1,))
        self.mapped, self.dense = np.zeros(self.shards, bool), np.ones(self.shards, bool)
        self.used = np.zeros(self.shards, np.int64)
        self.offsets: np.ndarray | None = None  # (R rounded up to shards,) of shards that are not dense
        self.refused = ""  # why a file could not be mapped: then nothing is any more
        self.lost: int | None = None  # the shard it was

    def __del__(self) -> None:
        if getattr(self, "base", 0):
            _free(self.base, self.length, getattr(self, "lost", None), self.room)

    def map(self, shard: int) -> None:
        if self.refused:
            raise NoSpan(self.refused)
        ok = np.flatnonzero(self.states.of(shard) == layout.OK)
        file = self.array.file(self.root, shard)
        descriptor, size, offsets = open_shard(self.array, file, self.states.shard_rows, ok)
        try:
            if size > self.room:
                raise PipeError(
                    "this shard holds more than its rows", where=file, fix="set data.cache_access=read to read it"
                )
            self._place(shard, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor)
        finally:
            os.close(descriptor)
        self.dense[shard] = offsets.dense
        if not offsets.dense:
            if self.offsets is None:  # pages of it that nobody writes take no memory
                small = self.room <= 2**32
                self.offsets = np.zeros(self.shards * self.states.shard_rows, np.uint32 if small else np.int64)
            first = shard * self.states.shard_rows
            self.offsets[first + ok] = offsets.at(ok)
        self.mapped[shard] = True

    def unmap(self, shard: int) -> None:
        self.mapped[shard] = False  # first: a process that is forked in between must not believe in this map
        self._place(shard, self.room, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)

    def _place(self, shard: int, length: int, protection: int, flags: int, descriptor: int) -> None:
        try:
            _place(self.base + shard * self.room, length, protection, flags, descriptor)
        except NoSpan as error:
            self.refused, self.lost = str(error), shard
            raise

    def tick(self, shards: np.ndarray) -> None:
        _Span.clock += 1
        self.used[shards] = _Span.clock

    def places(self, shard_of: np.ndarray, slots: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Where rows of mapped shards begin, (n,) int64."""
        offsets = slots * self.stride
        if self.offsets is not None:
            offsets = np.where(self.dense[shard_of], offsets, self.offsets[rows])
        return shard_of * self.room + offsets


@cache
def _libc() -> Any:
    library = ctypes.CDLL(None, use_errno=True)
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    library.mmap.restype, library.mmap.argtypes = pointer, [pointer, size, number, number, number, ctypes.c_int64]
    library.munmap.argtypes = [pointer, size]
    return library


def _reserve(length: int) -> int:
    """Addresses for `length` bytes, backed by nothing."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    base: int | None = _libc().mmap(None, length, _PROT_NONE, flags, -1, 0)
    if base is None or base == ctypes.c_void_p(-1).value:
        raise NoSpan(os.strerror(ctypes.get_errno()))
    return base


def _free(base: int, length: int, lost: int | None, room: int) -> None:
    """Give a span back; but where the system refused a map, it may have given these addresses to somebody else."""
    if lost is None:
        _libc().munmap(base, length)
        return
    for start, end in ((0, lost * room), ((lost + 1) * room, length)):
        if start < end:
            _libc().munmap(base + start, end - start)


def _place(address: int, length: int, protection: int, flags: int, descriptor: int) -> None:
    """Map at exactly `address`, which lies in a span of ours, over whatever is there."""
    found = _libc().mmap(address, length, protection, flags | _MAP_FIXED, descriptor, 0)
    if found != address:
        raise NoSpan(os.strerror(ctypes.get_errno()))
