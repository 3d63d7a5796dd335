"""Who writes what: one lock on a store's metadata, one on each shard, held in a single file and ended with the process.

Byte 0 of `.lock` stands for the metadata: exclusive while a cache is set up, grown or repaired, shared by everyone who
writes shards. Byte 1 + i stands for shard i. The bytes need not exist. Locks belong to the open file (OFD locks of
Linux, also over NFS) and vanish with it, however the process ends; elsewhere they are POSIX locks, which tell
processes apart but not threads.

The file's text names the processes that have opened it, a line each, for error messages only.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from collections.abc import Iterable
from pathlib import Path

from pipeline.cache import layout
from pipeline.errors import PipeError

_FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux: type, whence, start, length, pid
_BUSY = {errno.EAGAIN, errno.EACCES}
METADATA = range(1)


class StoreLock:
    """An open `.lock`. Locks are taken without waiting.

    Args:
        path: the store's folder.
        name: how this process is called in others' error messages, e.g. "part 2 of 8".
    """

    def __init__(self, path: Path, name: str = "") -> None:
        self.path = path
        try:
            self._handle = os.open(path / layout.LOCK, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise PipeError(f"cannot write here: {error.strerror}", where=path, fix="fix the permissions") from error
        self._who = f"process {os.getpid()} on {socket.gethostname()}" + (f", {name}" if name else "")

    def close(self) -> None:
        """Let go of everything."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def in_place(self) -> bool:
        """Whether the file is still the one at its place, and not removed by whoever held it before."""
        try:
            return os.path.samestat(os.fstat(self._handle), os.stat(self.path / layout.LOCK))
        except FileNotFoundError:
            return False

    def exclusive(self) -> bool:
        """Take the metadata for this process alone; False where others hold it."""
        if not self._set(fcntl.F_WRLCK, METADATA):
            return False
        os.ftruncate(self._handle, 0)  # nobody else is here: what it says is of the past
        self._sign()
        return True

    def shared(self) -> bool:
        """Take the metadata as one of several writers of shards (or step down from `exclusive`); False where one
        process holds it alone."""
        if not self._set(fcntl.F_RDLCK, METADATA):
            return False
        self._sign()
        return True

    def claim(self, shards: Iterable[int]) -> int | None:
        """Take all `shards`; returns the first that another process holds (then none of those after it is taken)."""
        for run in _runs(shards):
            if not self._set(fcntl.F_WRLCK, range(run.start + 1, run.stop + 1)):
                return self._first_held(run)
        return None

    def holders(self) -> str:
        """Who has opened this file lately: `process 12 on node3, part 2 of 8; ...`."""
        lines = [line for line in os.pread(self._handle, 4096, 0).decode(errors="replace").split("\n") if line]
        others = [line for line in dict.fromkeys(lines) if line != self._who] or lines
        return "; ".join(others[:8]) or "unknown process"

    def _sign(self) -> None:
        if self._who not in os.pread(self._handle, 2**20, 0).decode(errors="replace").split("\n"):
            os.write(self._handle, f"{self._who}\n".encode())

    def _first_held(self, shards: range) -> int:
        for shard in shards:
            if not self._set(fcntl.F_WRLCK, range(shard + 1, shard + 2)):
                return shard
        return shards.start  # let go of in this moment

    def _set(self, kind: int, span: range) -> bool:
        try:
            if hasattr(fcntl, "F_OFD_SETLK"):
                flock = struct.pack(_FLOCK, kind, os.SEEK_SET, span.start, len(span), 0)
                fcntl.fcntl(self._handle, fcntl.F_OFD_SETLK, flock)
            else:
                how = fcntl.LOCK_EX if kind == fcntl.F_WRLCK else fcntl.LOCK_SH
                fcntl.lockf(self._handle, how | fcntl.LOCK_NB, len(span), span.start)
        except OSError as error:
            if error.errno in _BUSY:
                return False
            raise PipeError(
                f"this file system gives no locks ({error.strerror}), and two writers would damage a cache",
                where=self.path,
                fix="mount it with locks (Lustre: -o flock), or extract to a local disk and copy the folder",
            ) from error
        return True


def _runs(shards: Iterable[int]) -> Iterable[range]:
    """Ascending runs of neighbours: 0, 1, 2, 5 → range(0, 3), range(5, 6)."""
    start = stop = -1
    for shard in sorted(shards):
        if shard != stop:
            if stop > start:
                yield range(start, stop)
            start = shard
        stop = shard + 1
    if stop > start:
        yield range(start, stop)
