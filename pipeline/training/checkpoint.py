"""A run's state on disk: our own JSON beside safetensors, published whole or not at all.

    checkpoints/step-00000500/{state.json, objective.safetensors, optimizer.safetensors}, ema.safetensors with train.ema

There is no random state in it: every random choice of a run is a function of (seed, epoch, step).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

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
    """

    step: int
    samples: int
    seconds: float
    world_size: int
    scaler: dict[str, Any]
    config: dict[str, Any]
    data: dict[str, Any]


def save_checkpoint(
    folder: Path,
    state: State,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    keep: int,
    ema: MovingAverage | None = None,
) -> Path:
    """Write checkpoints/step-N beside the others, make it durable, then prune the oldest beyond `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{state.step:08d}"
    temporary = folder / f".step-{state.step:08d}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        save_file(_on_cpu(objective.state_dict()), temporary / "objective.safetensors")
        save_file(optimizer_tensors(optimizer), temporary / "optimizer.safetensors")
        if ema is not None:
            save_file(_on_cpu(ema.state_dict()), temporary / EMA)
        body = asdict(state) | {
            "version": VERSION,
            "sha256": {path.name: sha256_file(path) for path in sorted(temporary.glob("*.safetensors"))},
        }
        (temporary / "state.json").write_text(json.dumps(body, indent=2), encoding="utf-8")
        for path in temporary.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        sync_folder(temporary)
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
        sync_folder(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise PipeError(
            f"cannot save a checkpoint: {error}", where=folder, fix="free some space, then go on with --resume"
        ) from error
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step-*") if (p / "state.json").exists()) if folder.is_dir() else []


def read_state(checkpoint: Path) -> State:
    """The state of a checkpoint whose files are whole."""
    try:
        body = read_json(checkpoint / "state.json")
    except PipeError as error:
        raise _damaged("state.json", checkpoint) from error
    if not isinstance(body, dict) or not isinstance(body.get("sha256"), dict):
        raise _damaged("state.json", checkpoint)
    if body.pop("version", None) != VERSION:
        raise PipeError("this checkpoint was written by another version", where=checkpoint, fix="train anew")
    for name, digest in body.pop("sha256").items():
        if not (checkpoint / name).exists() or sha256_file(checkpoint / name) != digest:
            raise _damaged(name, checkpoint)
    if set(body) != {field.name for field in fields(State)}:
        raise _damaged("state.json", checkpoint)
    return State(**body)


def _damaged(name: str, checkpoint: Path) -> PipeError:
    fix = "remove this folder; --resume takes the one before"
    return PipeError(f"{name} is damaged or missing", where=checkpoint, fix=fix)


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
