"""Whether and from where a run goes on: never over another run's folder, never with another configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.console import log
from pipeline.errors import PipeError
from pipeline.run_folder import RunFolder
from pipeline.training.checkpoint import checkpoints, load_checkpoint, read_state
from pipeline.training.loop import Training
from pipeline.training.tracking import cut_back

MAY_CHANGE = {"workspace", "evaluate", "caption", "data.workers", "loss.head"} | {
    f"train.{key}"
    for key in (
        "checkpoint_every",
        "keep_checkpoints",
        "validate_every",
        "log_every",
        "term_gradients_every",
        "wandb",
    )
}


def checkpoint_to_resume(
    folder: RunFolder,
    config: dict[str, Any],
    *,
    resume: bool,
    completed: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> Path | None:
    """The newest whole checkpoint of an unfinished run, None where it starts from the beginning.

    Args:
        config: the resolved configuration of now.
        resume: whether the user asked to go on.
        completed: gives a configuration of an earlier release the defaults of the keys that came since.

    Raises:
        PipeError: the run exists and `resume` is off, or its configuration was another (the key is named).
    """
    if not folder.record.exists():
        return None
    if not resume:
        state = "finished" if folder.finished else "unfinished"
        raise PipeError(
            f"run {folder.name} exists already ({state})",
            where=folder.path,
            fix="go on with --resume, choose another --name, or remove the folder",
        )
    found = checkpoints(folder.checkpoints)
    if not found:
        log.info("run %s has no checkpoint: it starts from the beginning", folder.name)
        folder.metrics.unlink(missing_ok=True)
        return None
    refuse_other_config(completed(read_state(found[-1]).config), config, folder)
    return found[-1]


def refuse_other_config(then: dict[str, Any], now: dict[str, Any], folder: RunFolder) -> None:
    """Refuse to go on where a key that shapes the result has changed."""
    for key, before, after in differences(then, now):
        if key in MAY_CHANGE or key.split(".")[0] in MAY_CHANGE:
            continue
        raise PipeError(
            f"{key} is {after!r} now and was {before!r} when the run began",
            where=folder.path,
            fix="go on with the same value, or choose another --name",
        )


def refuse_other_data(checkpoint: Path, now: dict[str, Any], folder: RunFolder) -> None:
    """Refuse to go on over other images, rows or targets: batches would silently be others."""
    for key, before, after in differences(read_state(checkpoint).data, now):
        raise PipeError(
            f"the data is not what the run began with: {key} is {_short(after)} now and was {_short(before)}",
            where=folder.path,
            fix="put manifest and teacher cache back, or choose another --name",
        )


def _short(value: Any) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 16 else f"{value!r}"


def differences(then: Any, now: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, value then, value now) wherever two configurations differ."""
    if isinstance(then, dict) and isinstance(now, dict):
        return [
            found
            for name in sorted(set(then) | set(now))
            for found in differences(then.get(name), now.get(name), f"{key}.{name}" if key else name)
        ]
    return [] if then == now else [(key, then, now)]


def restore(training: Training, checkpoint: Path) -> None:
    """Put weights, moments, scaler and counters back, and cut the metrics back to the checkpoint."""
    state, accelerator = read_state(checkpoint), training.accelerator
    load_checkpoint(checkpoint, training.bare, training.optimizer.optimizer, training.ema)
    if accelerator.scaler is not None and state.scaler:
        accelerator.scaler.load_state_dict(state.scaler)
    training.step, training.samples, training.seconds = state.step, state.samples, state.seconds
    if accelerator.is_main_process:
        cut_back(training.folder.metrics, to_step=state.step)
        log.info("resuming %s at step %d", training.folder.name, state.step)
        if state.world_size != accelerator.num_processes:
            log.warning(
                "%d processes wrote this checkpoint, %d go on: the batches stay the same, sums are rounded differently",
                state.world_size,
                accelerator.num_processes,
            )
    accelerator.wait_for_everyone()
