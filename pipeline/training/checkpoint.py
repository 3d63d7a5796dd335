"""A run's state on disk: our own JSON beside safetensors, published whole or not at all.

    checkpoints/step-00000500/{state.json, objective.safetensors, optimizer.safetensors}, ema.safetensors with train.ema

There is no random state in it: every random choice of a run is a function of (seed, epoch, step).

A name that begins with a full stop is work in progress: a kill leaves it behind, and the next session clears it away.
`damaged-step-…` is a checkpoint whose checksum was wrong when a run was resumed; it is kept for whoever wants to look.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.console import log
from pipeline.errors import PipeError
from pipeline.run_folder import read_json, sha256_file, sync_folder
from pipeline.training.ema import MovingAverage

VERSION = 1
EMA = "ema.safetensors"


@dataclass(frozen=True)
class State:
    """Where a run stands.

    Args:
        step: updates done.
        samples: pairs seen by all processes.
        seconds: wall time spent training, over all sessions.
        world_size: processes that wrote it (a resume with another number says so).
        scaler: fp16 loss scaler's state, {} without one.
        config: the resolved configuration it was trained with.
        data: what its batches and targets were read from: hashes of manifest, training rows and cache.
        losses: of the last steps, as `divergence.Watch` compares the next ones with.
        above: steps in a row, up to this one, whose loss was too large.
    """

    step: int
    samples: int
    seconds: float
    world_size: int
    scaler: dict[str, Any]
    config: dict[str, Any]
    data: dict[str, Any]
    losses: list[float] = field(default_factory=list)
    above: int = 0


class Damaged(PipeError):
    """A checkpoint that is not what was written: one before it may be whole."""


@dataclass(frozen=True)
class Found:
    """The checkpoint to go on from, its state, and the newer ones that are damaged."""

    path: Path
    state: State
    damaged: tuple[Path, ...] = ()


def save_checkpoint(
    folder: Path,
    state: State,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    keep: int,
    ema: MovingAverage | None = None,
) -> Path:
    """Write checkpoints/step-N beside the others, make it durable, then prune the oldest beyond `keep`.

    A kill at any moment leaves the checkpoints before it whole, or this one.

    Raises:
        PipeError: the disk is full or refuses; nothing of this checkpoint is left behind, and no other is touched.
    """
    final = folder / f"step-{state.step:08d}"
    temporary = folder / f".step-{state.step:08d}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        _write(temporary, state, objective, optimizer, ema)
        _retire(final)
        os.replace(temporary, final)
        sync_folder(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise PipeError(
            f"cannot save a checkpoint: {error}", where=folder, fix="free some space, then go on with --resume"
        ) from error
    # By age, but never the one just written: after a return to an earlier step, others may be ahead of it.
    for old in [path for path in checkpoints(folder) if path < final][: -(keep - 1) or None]:
        _retire(old)
    return final


def _write(
    temporary: Path,
    state: State,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: MovingAverage | None,
) -> None:
    """All files of a checkpoint, durable."""
    save_file(_on_cpu(objective.state_dict()), temporary / "objective.safetensors")
    save_file(optimizer_tensors(optimizer), temporary / "optimizer.safetensors")
    if ema is not None:
        save_file(_on_cpu(ema.state_dict()), temporary / EMA)
    digests = {path.name: sha256_file(path) for path in sorted(temporary.glob("*.safetensors"))}
    body = asdict(state) | {"version": VERSION, "sha256": digests}
    (temporary / "state.json").write_text(json.dumps(body, indent=2), encoding="utf-8")
    for path in temporary.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    sync_folder(temporary)


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}


def _retire(checkpoint: Path) -> None:
    """Remove a checkpoint so that it is whole or gone by name at every moment."""
    if not checkpoint.exists():
        return
    old = checkpoint.with_name(f".{checkpoint.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(checkpoint, old)
    shutil.rmtree(old, ignore_errors=True)


def clear_up(folder: Path, damaged: Sequence[Path] = ()) -> None:
    """Remove what a kill left unfinished, and set `damaged` aside; by the one process that writes, before it does."""
    for left in folder.glob(".step-*"):
        shutil.rmtree(left, ignore_errors=True)
    for path in damaged:
        aside = path.with_name(f"damaged-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)
        log.warning("set aside as %s", aside)


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step-*") if (p / "state.json").exists()) if folder.is_dir() else []


def newest_whole(folder: Path) -> Found | None:
    """The newest checkpoint whose checksums are right; None where there is none at all.

    A run that goes on from an earlier step repeats what it did, so going back is safe: it costs time, and nothing else.

    Raises:
        PipeError: there are checkpoints, and every one is damaged.
    """
    damaged: list[Path] = []
    for path in reversed(checkpoints(folder)):
        try:
            state = read_state(path)
        except Damaged as problem:
            log.warning("%s; going back to the one before", problem)
            damaged.append(path)
            continue
        return Found(path, state, tuple(damaged))
    if damaged:
        raise PipeError(
            f"all {len(damaged)} checkpoints are damaged",
            where=folder,
            fix="remove this folder to train from the beginning, or put a copy of it back",
        )
    return None


def read_state(checkpoint: Path) -> State:
    """The state of a checkpoint whose files are whole.

    Raises:
        Damaged: a file is missing or is not what was written.
        PipeError: another version of this program wrote it.
    """
    try:
        body = read_json(checkpoint / "state.json")
    except PipeError as error:
        raise _damaged("state.json", checkpoint) from error
    if not isinstance(body, dict) or not isinstance(body.get("sha256"), dict):
        raise _damaged("state.json", checkpoint)
    if body.pop("version", None) != VERSION:
        raise PipeError("this checkpoint was written by another version", where=checkpoint, fix="train anew")
    for name, digest in body.pop("sha256").items():
        if _digest(checkpoint / name) != digest:
            raise _damaged(name, checkpoint)
    known = {of.name for of in fields(State)}
    required = {of.name for of in fields(State) if of.default is MISSING and of.default_factory is MISSING}
    if not required <= set(body) <= known:
        raise _damaged("state.json", checkpoint)
    return State(**body)


def _digest(path: Path) -> str | None:
    """None where the file is missing or the disk cannot give it back."""
    try:
        return sha256_file(path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EIO):
            return None
        raise


def _damaged(name: str, checkpoint: Path) -> Damaged:
    return Damaged(f"{name} is damaged or missing", where=checkpoint)


def load_checkpoint(
    checkpoint: Path, objective: nn.Module, optimizer: torch.optim.Optimizer, ema: MovingAverage | None = None
) -> None:
    """Restore weights, optimiser moments and the weights' average in place, strictly."""
    try:
        objective.load_state_dict(load_file(checkpoint / "objective.safetensors"), strict=True)
        restore_optimizer(optimizer, load_file(checkpoint / "optimizer.safetensors"))
        if ema is not None:
            ema.load_state_dict(load_file(checkpoint / EMA))
    except (RuntimeError, KeyError, FileNotFoundError, SafetensorError) as error:
        first = str(error).strip().splitlines()[-1].strip()
        raise PipeError(
            f"the checkpoint does not fit this model ({first})", where=checkpoint, fix="train anew"
        ) from error


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state as `parameter name|moment` → tensor; names come from the groups' `names`."""
    out = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key, value in optimizer.state.get(parameter, {}).items():
                out[f"{name}|{key}"] = torch.as_tensor(value).detach().cpu().contiguous().clone()
    return out


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`."""
    used = set()
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            own = {key.rpartition("|")[2]: key for key in tensors if key.rpartition("|")[0] == name}
            # AdamW keeps its step counter on the CPU and its moments beside the parameter.
            optimizer.state[parameter] = {
                short: tensors[key].clone() if short == "step" else tensors[key].to(parameter.device, parameter.dtype)
                for short, key in own.items()
            }
            used |= set(own.values())
    if left := sorted(set(tensors) - used):
        raise KeyError(f"unknown parameter {left[0]}")
