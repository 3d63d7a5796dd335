"""What a run writes while it trains: metrics.jsonl (the record); TensorBoard and, where a project is named, Weights &
Biases (the same figures, to look at)."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.errors import PipeError
from pipeline.run_folder import RunFolder, write_bytes


class Tracker:
    """Appends one JSON object a line. Non-finite values are written as null: JSON has no NaN.

    Only the main process tracks; elsewhere construct it with `folder=None` and every call does nothing.

    Args:
        wandb: the project of Weights & Biases; None sends nothing anywhere. The run there has this run's name, and a
            resumed run goes on in it.
        config: shown there. first: whether the run starts now, which never goes on in one that is there already.
    """

    def __init__(
        self,
        folder: RunFolder | None,
        *,
        wandb: str | None = None,
        config: Mapping[str, Any] | None = None,
        first: bool = True,
    ) -> None:
        self.folder = folder
        self._file: Any = None
        self._board: Any = None
        self._wandb: Any = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            folder.path.mkdir(parents=True, exist_ok=True)
            if wandb is not None:  # first, as it is the one that may fail
                self._wandb = _start_wandb(folder, wandb, config or {}, first)
            self._file = folder.metrics.open("a", encoding="utf-8")
            self._board = SummaryWriter(str(folder.tensorboard))

    def write(self, *, step: int, samples: int, epoch: float, seconds: float, values: dict[str, float]) -> None:
        """One line; `values` keys carry their own prefix (train/, val/)."""
        if self.folder is None:
            return
        line: dict[str, Any] = {"step": step, "samples": samples, "epoch": round(epoch, 4), "time": round(seconds, 3)}
        line |= {key: value if math.isfinite(value) else None for key, value in values.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for key, value in values.items():
            self._board.add_scalar(key, value, step)
        if self._wandb is not None:
            # A resumed run repeats steps; wandb's own counter could not go back, so `step` is a figure like the others.
            self._wandb.log({"step": step, "samples": samples, "epoch": epoch, "time": seconds, **values})

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.folder is not None:
            self._file.close()
            self._board.close()
            if self._wandb is not None:
                self._wandb.finish(exit_code=0 if kind is None else 1)


def refuse_without_wandb(project: str | None) -> None:
    """Say at once, before anything is read or built, that the package is missing."""
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise PipeError(
            "wandb is not installed", where="train.wandb", fix="run: pip install wandb (or leave train.wandb out)"
        )


def _start_wandb(folder: RunFolder, project: str, config: Mapping[str, Any], first: bool) -> Any:
    """A run of Weights & Biases, under an id that the run's folder keeps, so that a resume finds it."""
    refuse_without_wandb(project)
    import wandb

    kept = folder.path / "wandb.json"
    if first or not kept.exists():
        write_bytes(kept, json.dumps({"id": secrets.token_hex(4)}).encode())
    try:
        started = wandb.init(
            project=project,
            name=folder.name,
            id=json.loads(kept.read_bytes())["id"],
            resume="allow",
            dir=str(folder.path),
            config=dict(config),
        )
    except (wandb.Error, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        fix = "run: wandb login, or set WANDB_MODE=offline, or leave train.wandb out"
        raise PipeError(f"Weights & Biases cannot be reached ({reason})", where=project, fix=fix) from error
    started.define_metric("step", hidden=True)
    started.define_metric("*", step_metric="step")
    return started


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").split("\n"):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def make_durable(path: Path) -> None:
    """See that what was written to `path` survives a power cut, as the checkpoint that goes with it does."""
    if path.exists():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def cut_back(path: Path, *, to_step: int) -> None:
    """Drop lines beyond `to_step`, so that a resumed run's metrics have no step twice."""
    kept = [line for line in read_metrics(path) if line["step"] <= to_step]
    if path.exists():
        write_bytes(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
