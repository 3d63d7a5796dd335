"""Rows out of the shard files of a store on this machine's disks: through memory maps, or by positioned reads.

Maps are the fastest where files are on a local disk and stay in the page cache. On a network disk a page fault is a
round trip of 4 kB, and a server that goes away kills the process: there whole rows are read, many at a time.

Legend: S rows a shard, n rows asked for.
"""

from __future__ import annotations

import mmap
import os
import resource
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipeline.cache import layout
from pipeline.cache.layout import RowArray
from pipeline.cache.shards import CRC_BYTES, FIX_SHARD, States, crc32c, named_rows, open_shard
from pipeline.errors import PipeError

NETWORK_DISKS = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "beegfs", "gpfs", "ceph", "glusterfs", "afs", "9p", "juicefs"}
    | {"s3fs", "sshfs", "gcsfuse", "rclone", "weka", "wekafs", "mountpoint-s3", "orangefs", "pvfs2", "quobyte"}
)
READS_AT_ONCE = 16  # positioned reads in flight: what hides a network disk's latency
MERGED_GAP = 64 * 1024  # bytes between two rows that are read ahead in one go


class RowSource(Protocol):
    """Where a `Cache` gets rows from. Picklable; may be forked at any time."""

    def gather(self, array: RowArray, rows: np.ndarray, check: bool) -> np.ndarray:
        """rows (n,) int64, all ok, in any order, with repetitions → (n, ...) as stored; PipeError if damaged."""
        ...

    def will_need(self, array: RowArray, rows: np.ndarray) -> None:
        """Begin to read these rows, and return at once. A hint: it never fails."""
        ...

    def forget(self) -> None:
        """Close everything that is open."""
        ...


class _Shard:
    """An open shard file: its map (else its descriptor), closed with the last reader that holds it."""

    def __init__(self, array: RowArray, file: Path, shard_rows: int, ok_rows: np.ndarray, mapped: bool) -> None:
        self.descriptor = -1
        self.descriptor, size, self.offsets = open_shard(array, file, shard_rows, ok_rows)
        self.map: mmap.mmap | None = None
        if mapped:
            self.map = mmap.mmap(self.descriptor, size, access=mmap.ACCESS_READ)
            self.data, self.bytes = memoryview(self.map), np.frombuffer(self.map, np.uint8)
            os.close(self.descriptor)
            self.descriptor = -1

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class LocalShards:
    """The shard files below `root`.

    Args:
        states: which rows are there, and how many a shard has.
        mapped: memory maps, else positioned reads.
        max_open: shard files open at once; the one used longest ago makes room.
    """

    def __init__(self, root: Path, states: States, *, mapped: bool = True, max_open: int | None = None) -> None:
        self.root, self.states, self.mapped = root, states, mapped
        self.shard_rows = states.shard_rows
        self.max_open = max_open or _default_open()
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        own = {"opened", "_lock", "_pid", "_pool"}
        return {key: value for key, value in self.__dict__.items() if key not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.forget()

    def forget(self) -> None:
        self.opened: dict[tuple[str, int], _Shard] = {}
        self._after_fork()

    def _after_fork(self) -> None:
        """A fork copies a lock that may be held and a pool without its threads; maps and descriptors stay good."""
        self._lock, self._pid = threading.Lock(), os.getpid()
        self._pool: ThreadPoolExecutor | None = None

    def gather(self, array: RowArray, rows: np.ndarray, check: bool) -> np.ndarray:
        out = np.empty((len(rows), *array.row_shape), array.dtype)
        if not len(rows):
            return out
        opened, which, offsets = self._located(array, rows)
        flat = out.reshape(len(rows), -1).view(np.uint8)  # (n, row bytes)
        if self.mapped:
            found, wanted = _copy_mapped(opened, which, offsets, flat, check)
        else:
            found, wanted = self._read(array, opened, which, offsets, flat, check)
        if check and not np.array_equal(found, wanted):
            self._refuse_damaged(array, rows[found != wanted])
        return out

    def will_need(self, array: RowArray, rows: np.ndarray) -> None:
        if not len(rows):
            return
        opened, which, offsets = self._located(array, np.unique(rows))
        for number, shard in enumerate(opened):
            for start, end in _runs(offsets[which == number], array.row_bytes + CRC_BYTES):
                with suppress(OSError, AttributeError):  # not every system has these calls
                    if shard.map is None:
                        os.posix_fadvise(shard.descriptor, start, end - start, os.POSIX_FADV_WILLNEED)
                    else:
                        first = start - start % mmap.PAGESIZE
                        shard.map.madvise(mmap.MADV_WILLNEED, first, end - first)

    def _located(self, array: RowArray, rows: np.ndarray) -> tuple[list[_Shard], np.ndarray, np.ndarray]:
        """The shards that hold `rows`, which of them each row is in (n,), and its offset there (n,)."""
        shard_of, slots = np.divmod(rows, self.shard_rows)
        numbers, which = np.unique(shard_of, return_inverse=True)
        opened = [self._open(array, number) for number in numbers.tolist()]
        offsets = np.empty(len(rows), np.int64)
        for number, shard in enumerate(opened):
            own = which == number
            offsets[own] = shard.offsets.at(slots[own])
        return opened, which, offsets

    def _open(self, array: RowArray, shard: int) -> _Shard:
        if os.getpid() != self._pid:
            self._after_fork()
        key = (array.name, shard)
        with self._lock:
            found = self.opened.pop(key, None)
            if found is None:
                while len(self.opened) >= self.max_open:
                    del self.opened[next(iter(self.opened))]
                ok = np.flatnonzero(self.states.of(shard) == layout.OK)
                found = _Shard(array, array.file(self.root, shard), self.shard_rows, ok, self.mapped)
            self.opened[key] = found
        return found

    def _read(
        self,
        array: RowArray,
        opened: list[_Shard],
        which: np.ndarray,
        offsets: np.ndarray,
        flat: np.ndarray,
        check: bool,
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `_copy_mapped`, by positioned reads in several threads."""
        stored = np.empty((len(flat), CRC_BYTES), np.uint8)
        computed = np.zeros(len(flat), np.uint32)

        def read(i: int) -> None:
            shard = opened[which[i]]
            got = os.preadv(shard.descriptor, [flat[i], stored[i]], int(offsets[i]))
            if got < array.row_bytes + CRC_BYTES:
                raise PipeError("this shard was cut short", where=self._file(array, opened, shard), fix=FIX_SHARD)
            if check:
                computed[i] = crc32c(flat[i])

        if self._pool is None:
            self._pool = ThreadPoolExecutor(READS_AT_ONCE, thread_name_prefix="cache")
        try:
            for _ in self._pool.map(read, range(len(flat))):
                pass
        except OSError as error:
            raise PipeError(f"cannot read the cache: {error.strerror}", where=self.root / array.name) from error
        return computed, stored.reshape(-1).view("<u4")

    def _file(self, array: RowArray, opened: list[_Shard], shard: _Shard) -> Path:
        number = next((n for (name, n), s in self.opened.items() if s is shard and name == array.name), None)
        return self.root / array.name if number is None else array.file(self.root, number)

    def _refuse_damaged(self, array: RowArray, damaged: np.ndarray) -> None:
        file = array.file(self.root, int(damaged[0]) // self.shard_rows)
        raise PipeError(f"damaged rows, checksums do not fit: {named_rows(damaged)}", where=file, fix=FIX_SHARD)


def _copy_mapped(
    opened: list[_Shard], which: np.ndarray, offsets: np.ndarray, flat: np.ndarray, check: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Copy rows into `flat` (n, bytes); with `check`: CRC-32C of the copies, and those stored, (n,) uint32 each.

    The checksum is taken of the copy, which is still in the CPU's cache.
    """
    count, size = flat.shape
    target, data = flat.reshape(-1).data, [shard.data for shard in opened]
    start = 0
    if not check:
        for number, offset in zip(which.tolist(), offsets.tolist(), strict=True):
            target[start : start + size] = data[number][offset : offset + size]
            start += size
        return np.zeros(0, np.uint32), np.zeros(0, np.uint32)
    computed = []
    for number, offset, row in zip(which.tolist(), offsets.tolist(), flat, strict=True):
        target[start : start + size] = data[number][offset : offset + size]
        computed.append(crc32c(row))
        start += size
    stored = np.empty((count, CRC_BYTES), np.uint8)
    for number, shard in enumerate(opened):
        own = which == number
        stored[own] = shard.bytes[(offsets[own] + size)[:, None] + np.arange(CRC_BYTES)]
    return np.array(computed, np.uint32), stored.reshape(-1).view("<u4")


def _runs(offsets: np.ndarray, length: int) -> Iterable[tuple[int, int]]:
    """Byte ranges that cover chunks of `length` at `offsets`, near ones merged."""
    ordered = np.sort(offsets)
    if not len(ordered):
        return
    breaks = np.flatnonzero(np.diff(ordered) > length + MERGED_GAP) + 1
    for run in np.split(ordered, breaks):
        yield int(run[0]), int(run[-1]) + length


def _default_open() -> int:
    open_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    most = 16384  # Linux allows 65,530 maps a process (vm.max_map_count)
    return most if open_files == resource.RLIM_INFINITY else min(most, max(64, open_files // 4))


def on_network_disk(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> bool:
    """Whether `path` lies on a file system that other machines serve; False where the system does not say."""
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return False
    found, kind = Path("/"), ""
    real = path.resolve()
    for line in lines:
        before, _, after = line.partition(" - ")
        where = Path(before.split()[4].replace("\\040", " "))
        if after and real.is_relative_to(where) and len(where.parts) >= len(found.parts):
            found, kind = where, after.split()[0]
    return kind.removeprefix("fuse.") in NETWORK_DISKS
