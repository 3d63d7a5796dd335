"""Errors that a long training meets sooner or later, in one line each: memory, data workers, a full disk."""

from __future__ import annotations

import errno
from pathlib import Path

import torch

from pipeline.errors import PipeError
from pipeline.training.checkpoint import checkpoints

_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")
SHOWN = 8  # rows that a line names


def named_rows(rows: list[int]) -> str:
    """`rows 3, 8, 11`; of many the first few."""
    listed = ", ".join(str(row) for row in rows[:SHOWN])
    return f"rows {listed}" + (", …" if len(rows) > SHOWN else "")


def last_good(folder: Path) -> str:
    """`last good checkpoint: …/step-00000500`."""
    found = checkpoints(folder)
    return f"last good checkpoint: {found[-1] if found else 'none'}"


def nothing_readable(failed: list[tuple[int, str]], *, where: str, folder: Path) -> PipeError:
    """Of all rows of a process's share not one could be read.

    Args:
        failed: (row, why) of each. where: the step and the process. folder: of the checkpoints.
    """
    reason = failed[0][1] if failed else "none was asked for"
    return PipeError(
        f"no image of a whole batch could be read at {where}",
        where=f"{named_rows([row for row, _ in failed])} ({reason})",
        fix=f"see that the images are there, or run pipe index again; {last_good(folder)}",
    )


def explained(error: Exception, *, step: int, process: str, rows: list[int], folder: Path) -> PipeError | None:
    """`error` as a line with the step, the process and the rows at hand; None where all there is to say is the error.

    Args:
        step: updates done.
        process: ` on process 2 of 8`, or nothing.
        folder: of the checkpoints.
    """
    at, good = f"at step {step}{process}", last_good(folder)
    if isinstance(error, PipeError):
        return PipeError(f"{error.what} ({at})", where=error.where, fix=f"{error.fix or 'see above'}; {good}")
    text = " ".join(str(error).split())
    memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in text.lower() for word in _MEMORY)
    if memory and isinstance(error, (MemoryError, RuntimeError)):
        fix = f"lower train.batch_size (or train.micro_batch_size), then go on with --resume; {good}"
        return PipeError(f"out of memory {at}", where=named_rows(rows), fix=fix)
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker"):
        fix = f"where memory ran out, lower data.workers; then go on with --resume; {good}"
        return PipeError(f"a process that reads batches was killed {at} ({text})", fix=fix)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        where = error.filename or folder.parent
        fix = f"free some space, then go on with --resume; {good}"
        return PipeError(f"cannot write {at}: {error.strerror}", where=where, fix=fix)
    if isinstance(error, OSError):
        return None
    fix = f"please report it with the output of --debug; {good}"
    return PipeError(f"unexpected {type(error).__name__} {at}: {text}", where=named_rows(rows), fix=fix)
