"""The training loop, one step readable top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pipeline.console import Progress, log, progress
from pipeline.errors import PipeError, Stopped
from pipeline.run_folder import RunFolder
from pipeline.signals import stop_on_signals
from pipeline.training.checkpoint import State, checkpoints, save_checkpoint
from pipeline.training.data import Batch
from pipeline.training.ema import MovingAverage
from pipeline.training.gradients import part_norms, term_norms
from pipeline.training.schedule import learning_rate
from pipeline.training.tracking import Tracker


@dataclass(frozen=True)
class LoopSettings:
    """What the loop needs to know besides model and data; one field per key of the config's `train`."""

    total_steps: int
    steps_per_epoch: int
    batch_size: int
    lr: float
    warmup_steps: int
    grad_clip: float
    seed: int
    log_every: int
    term_gradients_every: int | None
    checkpoint_every: int
    keep_checkpoints: int
    validate_every: int | None


@dataclass
class Training:
    """One run in progress. `objective` and `optimizer` are Accelerate's prepared ones."""

    accelerator: Accelerator
    objective: nn.Module
    optimizer: Any
    settings: LoopSettings
    folder: RunFolder
    config: dict[str, Any]
    data: dict[str, Any]  # what batches and targets are read from
    wandb: str | None = None  # a project to send the figures to
    ema: MovingAverage | None = None  # of the bare objective, on its device
    step: int = 0
    samples: int = 0  # of all processes, less the images that could not be read: exact whenever it is written
    seconds: float = 0.0
    unread: int = 0  # images of this process since `samples` was last settled

    @property
    def bare(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.objective)

    def judged(self) -> tuple[nn.Module, Any]:
        """What validation looks at and the run leaves: the weights' average where there is one; objective, model."""
        if self.ema is None:
            return self.objective, self.bare.model
        self.ema.share()
        return self.ema.module, self.ema.module.model

    def run(self, batches: Iterator[Batch], validate: Callable[[], dict[str, float]]) -> None:
        """Train from `self.step` to the end; on a signal, save and raise `Stopped`.

        Args:
            batches: this process's batches, from step `self.step` on.
            validate: called by every process; its figures are logged under val/.
        """
        total, shown = self.settings.total_steps, self.accelerator.is_main_process
        log_to = Tracker(self.folder if shown else None, wandb=self.wandb, config=self.config, first=self.step == 0)
        pairs = total * self.settings.batch_size
        with log_to as tracker, stop_on_signals() as stop, _bar(pairs, self.samples, shown) as bar:
            clock = _Clock(self.seconds)
            while self.step < total:
                batch = next(batches)
                logs = self._step(batch)
                self.seconds = clock.now()
                bar.advance(self.settings.batch_size)
                self._after_step(batch, logs, tracker, bar)
                if self._due(self.settings.validate_every):
                    figures = validate()
                    clock.started += clock.now() - self.seconds  # validation is not training time
                    self._write(tracker, {f"val/{key}": value for key, value in figures.items()})
                stopping = self._any_process(stop())
                if stopping or self._due(self.settings.checkpoint_every):
                    self.save()
                if stopping:
                    raise Stopped(f"training at step {self.step:,} of {total:,}", "go on with --resume")

    def _step(self, batch: Batch) -> dict[str, Tensor]:
        """Forward, backward, clip, update: the whole of it."""
        settings, detailed = self.settings, self._logs_at(self.step + 1)
        measured = self._measures_at(self.step + 1)
        if not len(batch.rows):
            raise PipeError(
                "no image of a whole batch could be read", where=f"step {self.step}", fix="run pipe index again"
            )
        # Any random choice inside the model (dropout) is a function of the step, which makes a resume exact.
        torch.manual_seed(hash((settings.seed, self.step, self.accelerator.process_index)) & 0x7FFFFFFF)
        self.bare.log_details, self.bare.keep_terms = detailed, measured  # type: ignore[assignment]
        rate = learning_rate(
            self.step, total_steps=settings.total_steps, warmup_steps=settings.warmup_steps, peak=settings.lr
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        batch = batch.to(self.accelerator.device)
        loss, logs = self.objective(**batch.inputs, progress=self.step / settings.total_steps)
        if measured:
            logs |= self._term_gradients()
        self.accelerator.backward(loss)
        limit = settings.grad_clip if settings.grad_clip > 0 else math.inf
        norm = self.accelerator.clip_grad_norm_(self.objective.parameters(), limit)
        self._refuse_nan(loss, norm, batch)
        if detailed:
            logs |= self._part_gradients(norm, limit)
        self.optimizer.step()
        if self.ema is not None and not self.optimizer.step_was_skipped:
            self.ema.update(self.bare)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.samples += settings.batch_size
        return {"loss": loss.detach(), "grad_norm": torch.as_tensor(norm).detach(), "lr": torch.tensor(rate), **logs}

    def _term_gradients(self) -> dict[str, Tensor]:
        """The norm of each weighted term's gradient, over all parameters."""
        learning = [p for p in self.bare.parameters() if p.requires_grad]
        norms = term_norms(self.bare.terms, learning, self.accelerator.scaler)  # type: ignore[arg-type]
        self.bare.terms = {}  # type: ignore[assignment]  # they hold the step's graph
        return {f"term_grad_norm/{name}": norm for name, norm in norms.items()}

    def _part_gradients(self, norm: Any, limit: float) -> dict[str, Tensor]:
        """The norm of the gradient by part of the model, as it was before clipping: (norm, limit) undo that."""
        clipped = max(1.0, (float(norm) + 1e-6) / limit)
        return {
            f"grad_norm/{part}": clipped * found for part, found in part_norms(self.bare.named_parameters()).items()
        }

    def _after_step(self, batch: Batch, logs: dict[str, Tensor], tracker: Tracker, bar: Progress) -> None:
        for row, reason in batch.failed:
            self.unread += 1
            log.warning("skipped row %d: %s", row, reason)
        if self._logs_at(self.step):
            values = {f"train/{key}": float(value) for key, value in logs.items()}
            bar.note(f"loss {values['train/loss']:.3f}")
            self._write(tracker, values)

    def _settle(self) -> None:
        """Take the images that no process could read out of `samples`; every process calls it at the same steps."""
        self.samples -= self._over_processes(self.unread)
        self.unread = 0

    def _write(self, tracker: Tracker, values: dict[str, float]) -> None:
        self._settle()
        epoch = self.step / self.settings.steps_per_epoch
        tracker.write(step=self.step, samples=self.samples, epoch=epoch, seconds=self.seconds, values=values)

    def _logs_at(self, step: int) -> bool:
        due = step % self.settings.log_every == 0 or step == 1 or step == self.settings.total_steps
        return due or self._measures_at(step)

    def _measures_at(self, step: int) -> bool:
        every = self.settings.term_gradients_every
        return every is not None and (step % every == 0 or step == 1)

    def _due(self, every: int | None) -> bool:
        return self.step == self.settings.total_steps or (every is not None and self.step % every == 0)

    def _refuse_nan(self, loss: Tensor, norm: Any, batch: Batch) -> None:
        """Stop before the update: clipping makes nan of an infinite gradient. fp16's scaler leaves such steps out."""
        what, value = "loss", float(loss.detach())
        if math.isfinite(value) and self.accelerator.scaler is None:
            what, value = "gradient's norm", float(norm)
        if math.isfinite(value):
            return
        last = checkpoints(self.folder.checkpoints)
        rows = ", ".join(str(row) for row in batch.rows[:8].tolist())
        raise PipeError(
            f"the {what} is {value} at step {self.step}",
            where=f"rows {rows}, …",
            fix=f"last good checkpoint: {last[-1] if last else 'none'}; lower train.lr or use train.precision=no",
        )

    def _any_process(self, flag: bool) -> bool:
        """Whether any process was asked to stop: all must save together."""
        return self._over_processes(int(flag)) > 0

    def _over_processes(self, count: int) -> int:
        """The sum of every process's `count`."""
        if self.accelerator.num_processes == 1:
            return count
        own = torch.tensor([count], device=self.accelerator.device)
        return int(self.accelerator.reduce(own, reduction="sum").item())

    def save(self) -> None:
        """Checkpoint from the main process; the others wait."""
        self._settle()
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {}
            world_size = self.accelerator.num_processes
            state = State(self.step, self.samples, self.seconds, world_size, scaler, self.config, self.data)
            keep, where = self.settings.keep_checkpoints, self.folder.checkpoints
            save_checkpoint(where, state, self.bare, self.optimizer.optimizer, keep=keep, ema=self.ema)
        self.accelerator.wait_for_everyone()


class _Clock:
    """Seconds spent, counted on from an earlier session."""

    def __init__(self, already: float) -> None:
        self.started = time.monotonic() - already

    def now(self) -> float:
        return time.monotonic() - self.started


@contextmanager
def _bar(total: int, done: int, shown: bool) -> Iterator[Progress]:
    if not shown:
        yield Progress("training", total, "pairs")
        return
    with progress("training", total=total - done, unit="pairs") as bar:
        yield bar
