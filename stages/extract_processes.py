"""`pipe extract-teacher --processes N`: one process a GPU on this machine, each with its part of the shards."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from pipeline.config import Config
from pipeline.console import log
from pipeline.errors import PipeError, Stopped

RESUMABLE = 75
_PR_SET_PDEATHSIG = 1


def run(config: Config, processes: int, limit: int | None) -> None:
    """Start the parts, pass on what they say and the signals that this process gets, and wait for all of them.

    Raises:
        PipeError: a part failed; the others were stopped after their shard at hand. What is finished is kept.
        Stopped: a signal arrived.
    """
    with tempfile.TemporaryDirectory(prefix="pipe-extract-") as folder:
        resolved = Path(folder) / "pipe.yaml"
        resolved.write_text(config.to_yaml(), encoding="utf-8")
        parts: list[subprocess.Popen[str]] = []
        with _signals_to(parts) as asked:
            parts.extend(_start(resolved, index, processes, limit) for index in range(processes))
            relays = [threading.Thread(target=_relay, args=(part, i, processes)) for i, part in enumerate(parts)]
            for relay in relays:
                relay.start()
            if asked:  # while they were being started
                _send(parts, signal.SIGTERM)
            codes = _wait(parts)
        for relay in relays:
            relay.join()
    stopped = (RESUMABLE, -signal.SIGTERM)  # the latter: before it could say so itself
    failed = [index for index, code in enumerate(codes) if code not in (0, *stopped)]
    if failed:
        named = ", ".join(f"{index + 1} of {processes} (exit code {codes[index]})" for index in failed)
        raise PipeError(f"part {named} failed; the lines above say why", where="extract-teacher", fix="run it again")
    if any(code in stopped for code in codes):
        raise Stopped("extraction; every finished shard is stored")


def _start(config: Path, index: int, processes: int, limit: int | None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "stages.cli", "extract-teacher", "--config", str(config)]
    command += ["--part", f"{index + 1}/{processes}", *([] if limit is None else ["--limit", str(limit)])]
    environment = os.environ | {"LOCAL_RANK": str(index)}
    if "OMP_NUM_THREADS" not in environment:  # else each would take every core for itself
        environment["OMP_NUM_THREADS"] = str(max(1, len(_cores()) // processes))
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_end_with_parent if sys.platform == "linux" else None,
    )


def _end_with_parent() -> None:
    """In the child: SIGTERM when the parent is gone, however it went, so that no part holds a GPU on its own."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _cores() -> Any:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)


def _relay(part: subprocess.Popen[str], index: int, processes: int) -> None:
    assert part.stderr is not None
    for line in part.stderr:
        print(f"[{index + 1}/{processes}] {line}", end="", file=sys.stderr, flush=True)


def _wait(parts: list[subprocess.Popen[str]]) -> list[int]:
    """Every part's exit code, once all have ended; the first that fails takes the others along."""
    codes: dict[int, int] = {}
    while len(codes) < len(parts):
        for index, part in enumerate(parts):
            if index in codes:
                continue
            try:
                codes[index] = part.wait(timeout=0.1)
            except subprocess.TimeoutExpired:
                continue
            if codes[index] != 0:
                _send(parts, signal.SIGTERM)
    return [codes[index] for index in range(len(parts))]


def _send(parts: list[subprocess.Popen[str]], number: int) -> None:
    for part in parts:
        if part.poll() is None:
            part.send_signal(number)


@contextmanager
def _signals_to(parts: list[subprocess.Popen[str]]) -> Iterator[list[int]]:
    """SIGTERM and SIGINT go to every part, which stops after its batch at hand; so do we, when all have. Gives the
    signals that have come."""
    asked: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        log.warning("stopping %d processes (signal %d)", len(parts), number)
        _send(parts, signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before: dict[int, Any] = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
