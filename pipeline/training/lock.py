"""One process at a time writes to a run's folder: a lock on `RUN/.lock`, which ends with the process that holds it.

A POSIX lock belongs to a process and is not inherited, so that neither a kill nor a data worker that outlives its
trainer for a moment leaves it behind.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.console import log
from pipeline.errors import PipeError
from pipeline.run_folder import RunFolder

_BUSY = {errno.EAGAIN, errno.EACCES}
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}


@contextmanager
def holding(folder: RunFolder, *, main: bool) -> Iterator[None]:
    """Hold the run's folder, made where it is missing; a folder that no record was written to is removed again.

    Args:
        main: whether this is the one process of a training that writes; the others of it hold nothing.

    Raises:
        PipeError: another training of this run is alive; it is named.
    """
    if not main:
        yield
        return
    path = folder.path / ".lock"
    folder.path.mkdir(parents=True, exist_ok=True)
    handle = _taken(path, folder)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)
        if not folder.record.exists():
            with suppress(OSError):  # something else is in it
                folder.path.rmdir()


def _taken(path: Path, folder: RunFolder) -> int:
    """The open, locked file."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(handle)
            if error.errno not in _BUSY | _NO_LOCKS:
                raise
            if error.errno in _BUSY:
                raise PipeError(
                    f"run {folder.name} is being trained by {holder}",
                    where=folder.path,
                    fix="wait for it, stop it, or choose another --name",
                ) from error
            log.warning("this file system gives no locks: do not start run %s twice", folder.name)
            return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if _is_at(handle, path):  # and not one that its last holder has removed meanwhile
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            return handle
        os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False
