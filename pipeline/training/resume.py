"""Whether and from where a run goes on: never over another run's folder, never with another configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.console import log
from pipeline.distributed import all_gather_sizes
from pipeline.errors import PipeError
from pipeline.run_folder import RunFolder
from pipeline.training.checkpoint import Found, clear_up, load_checkpoint, newest_whole
from pipeline.training.loop import LEFT_OUT, Training
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
        "zero_shot",
        "explosion",
        "grad_checkpointing",
        "compile",
        "ddp",
    )
}


def checkpoint_to_resume(
    folder: RunFolder,
    config: dict[str, Any],
    *,
    resume: bool,
    completed: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> Found | None:
    """The newest whole checkpoint of an unfinished run, None where it starts from the beginning.

    Args:
        config: the resolved configuration of now.
        resume: whether the user asked to go on.
        completed: gives a configuration of an earlier release the defaults of the keys that came since.

    Raises:
        PipeError: the run exists and `resume` is off, its configuration was another (the key is named), or all its
            checkpoints are damaged.
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
    found = newest_whole(folder.checkpoints)
    if found is None:
        log.info("run %s has no checkpoint: it starts from the beginning", folder.name)
        return None
    refuse_other_config(completed(found.state.config), config, folder)
    return found


def refuse_other_config(then: dict[str, Any], now: dict[str, Any], folder: RunFolder) -> None:
    """Refuse to go on where a key that shapes the result has changed."""
    for key, before, after in differences(then, now):
        if any(key == free or key.startswith(f"{free}.") for free in MAY_CHANGE):
            continue
        raise PipeError(
            f"{key} is {after!r} now and was {before!r} when the run began",
            where=folder.path,
            fix="go on with the same value, or choose another --name",
        )


def refuse_other_data(found: Found, now: dict[str, Any], folder: RunFolder) -> None:
    """Refuse to go on over other images, rows or targets: batches would silently be others."""
    for key, before, after in differences(found.state.data, now):
        raise PipeError(
            f"the data is not what the run began with: {key} is {_short(after)} now and was {_short(before)}",
            where=folder.path,
            fix="put manifest, teacher cache and model.init back, or choose another --name",
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


def begin(training: Training, found: Found | None) -> None:
    """Put weights, moments, scaler and counters back, and cut what the run has written back to the checkpoint; without
    one, make a clean start. Every process calls it.

    Raises:
        PipeError: the processes do not see the same checkpoint.
    """
    accelerator, folder = training.accelerator, training.folder
    seen = all_gather_sizes(-1 if found is None else found.state.step, accelerator.device)
    if len(set(seen)) > 1:
        steps = ", ".join("none" if step < 0 else f"step {step}" for step in seen)
        fix = "put the workspace on a disk that all machines share"
        raise PipeError(f"the processes see different checkpoints ({steps})", where=folder.checkpoints, fix=fix)
    if found is not None:
        _restore(training, found)
    if accelerator.is_main_process:
        clear_up(folder.checkpoints, () if found is None else found.damaged)
        for path in (folder.metrics, folder.skipped):
            cut_back(path, to_step=training.step if found is not None else -1)
    training.skipped.read()
    accelerator.wait_for_everyone()


def _restore(training: Training, found: Found) -> None:
    state, accelerator = found.state, training.accelerator
    load_checkpoint(found.path, training.bare, training.optimizer.optimizer, training.ema)
    if accelerator.scaler is not None and state.scaler:
        accelerator.scaler.load_state_dict(state.scaler)
        training.left_out = state.scaler.get(LEFT_OUT, 0)
    training.step, training.samples, training.seconds = state.step, state.samples, state.seconds
    training.saved = state.step
    training.watch.restore(state.losses, state.above)
    if not accelerator.is_main_process:
        return
    log.info("resuming %s at step %d", training.folder.name, state.step)
    if state.world_size != accelerator.num_processes:
        log.warning(
            "%d processes wrote this checkpoint, %d go on: the batches stay the same, sums are rounded differently",
            state.world_size,
            accelerator.num_processes,
        )
