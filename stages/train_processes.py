"""`pipe train` where several GPUs are visible and no launcher has shared them out: one process a GPU."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from pipeline.console import log
from pipeline.errors import PipeError, Stopped
from pipeline.processes import RESUMABLE, STOPPED, send, signals_to, start

PATIENCE_SECONDS = 60.0  # for the others after one has failed: they end by themselves, see pipeline.training.together


def run(processes: int, arguments: Sequence[str]) -> None:
    """Run `pipe ARGUMENTS` in `processes` processes that find each other, and pass on signals and how they end.

    Raises:
        PipeError: one has failed; the others have ended too.
        Stopped: a signal arrived; the state is saved.
    """
    log.info("starting %d processes, one a GPU", processes)
    copies: list[subprocess.Popen[str]] = []
    with signals_to(copies) as asked:
        port = str(_free_port())
        for rank in range(processes):
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
            place |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes)}
            copies.append(start([sys.executable, "-m", "stages.cli", *arguments], place, processes=processes))
        if asked:  # while they were being started
            send(copies, signal.SIGTERM)
        first, codes = _wait(copies)
    failed = [code for code in (first, *codes) if code not in (0, *STOPPED)]
    if failed:
        raise PipeError(f"a training process ended with code {failed[0]}", fix="its message stands above")
    if RESUMABLE in codes or asked:
        raise Stopped("training", "go on with --resume")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(copies: Sequence[subprocess.Popen[str]]) -> tuple[int, list[int]]:
    """The exit code of the first that failed (0: none), and every one's. Those that hang after a failure are killed."""
    first, since = 0, 0.0
    while any(copy.poll() is None for copy in copies):
        time.sleep(0.1)
        if not first:
            first = next((copy.returncode for copy in copies if copy.poll() not in (None, 0, RESUMABLE)), 0)
            since = time.monotonic()
        elif time.monotonic() - since > PATIENCE_SECONDS:
            send(copies, signal.SIGKILL)
    return first, [copy.returncode for copy in copies]
