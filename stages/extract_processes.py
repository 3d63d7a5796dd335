"""`pipe extract-teacher --processes N`: one process a GPU on this machine, each with its part of the shards."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from pipeline.config import Config
from pipeline.errors import PipeError, Stopped
from pipeline.processes import STOPPED, send, signals_to, start


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
        with signals_to(parts) as asked:
            parts.extend(_start(resolved, index, processes, limit) for index in range(processes))
            relays = [threading.Thread(target=_relay, args=(part, i, processes)) for i, part in enumerate(parts)]
            for relay in relays:
                relay.start()
            if asked:  # while they were being started
                send(parts, signal.SIGTERM)
            codes = _wait(parts)
        for relay in relays:
            relay.join()
    failed = [index for index, code in enumerate(codes) if code not in (0, *STOPPED)]
    if failed:
        named = ", ".join(f"{index + 1} of {processes} (exit code {codes[index]})" for index in failed)
        raise PipeError(f"part {named} failed; the lines above say why", where="extract-teacher", fix="run it again")
    if any(code in STOPPED for code in codes):
        raise Stopped("extraction; every finished shard is stored")


def _start(config: Path, index: int, processes: int, limit: int | None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "stages.cli", "extract-teacher", "--config", str(config)]
    command += ["--part", f"{index + 1}/{processes}", *([] if limit is None else ["--limit", str(limit)])]
    place = {"LOCAL_RANK": str(index)}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return start(command, place, processes=processes, **pipes)


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
                send(parts, signal.SIGTERM)
    return [codes[index] for index in range(len(parts))]
