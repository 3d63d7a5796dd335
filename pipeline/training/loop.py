"""The training loop, one step readable top to bottom."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pipeline.console import Progress
from pipeline.errors import PipeError, Stopped
from pipeline.run_folder import RunFolder
from pipeline.signals import stop_on_signals
from pipeline.training.checkpoint import State, save_checkpoint
from pipeline.training.clock import Clock, bar_of
from pipeline.training.compiled import Towers
from pipeline.training.data import Batch
from pipeline.training.divergence import Watch
from pipeline.training.ema import MovingAverage
from pipeline.training.failures import explained, nothing_readable
from pipeline.training.gradients import part_norms, term_norms
from pipeline.training.machine import seed_generators
from pipeline.training.schedule import learning_rate
from pipeline.training.skipped import Skip, Skipped
from pipeline.training.together import Together
from pipeline.training.tracking import Tracker, make_durable

LEFT_OUT = "updates_left_out"  # beside the scaler's own state


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
    explosion_factor: float | None = None  # see `divergence`
    explosion_steps: int = 20


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
    towers: Towers = field(default_factory=Towers)  # what of the model is compiled
    step: int = 0
    samples: int = 0  # of all processes, less the images that could not be read: exact whenever it is written
    seconds: float = 0.0
    left_out: int = 0  # updates, by fp16's scaler
    saved: int = -1  # the step of the newest checkpoint
    overdue: bool = False  # whether a checkpoint is to be written as soon as the loss is what it was
    unread: list[Skip] = field(default_factory=list)  # of this process, since `samples` was last settled
    at_hand: list[int] = field(default_factory=list)  # rows of this process's batch, for messages

    def __post_init__(self) -> None:
        self.together = Together(self.accelerator)
        factor, steps = self.settings.explosion_factor, self.settings.explosion_steps
        scaled = self.accelerator.scaler is not None
        self.watch = Watch(self.together, self.folder.checkpoints, factor=factor, steps=steps, scaled=scaled)
        self.skipped = Skipped(self.folder.skipped if self.accelerator.is_main_process else None)

    @cached_property  # looked for among all modules: a quarter of a millisecond, several times a step
    def bare(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.objective)

    def judged(self) -> tuple[nn.Module, Any]:
        """What validation looks at and the run leaves: the weights' average where there is one; objective, model."""
        return (self.objective, self.bare.model) if self.ema is None else (self.ema.module, self.ema.module.model)

    def run(self, batches: Iterator[Batch], validate: Callable[[], dict[str, float]]) -> None:
        """Train from `self.step` to the end; on a signal, save and raise `Stopped`.

        Args:
            batches: this process's batches, from step `self.step` on.
            validate: called by every process; its figures are logged under val/.

        Raises:
            PipeError: something is wrong, on whichever process: all stop. The last checkpoint is named.
        """
        total, shown = self.settings.total_steps, self.accelerator.is_main_process
        log_to = Tracker(self.folder if shown else None, wandb=self.wandb, config=self.config, first=self.step == 0)
        pairs = total * self.settings.batch_size
        with log_to as tracker, stop_on_signals() as stop, bar_of(pairs, self.samples, shown) as bar, self.towers:
            clock = Clock(self.seconds)
            while self.step < total:
                batch = self._read(batches, stop)
                logs = self._step(batch)
                self.seconds = clock.now()
                bar.advance(self.settings.batch_size)
                self._after_step(batch, logs, tracker, bar)
                if self._due(self.settings.validate_every):
                    self.towers.expect(whole=False)
                    figures = validate()
                    clock.started += clock.now() - self.seconds  # validation is not training time
                    self._write(tracker, {f"val/{key}": value for key, value in figures.items()})
                self.overdue |= self._due(self.settings.checkpoint_every)
                # What may be the beginning of an explosion is not to push out the last good checkpoint.
                if self.overdue and (not self.watch.above or self.step == total):
                    self.save()

    def ending_together(self) -> AbstractContextManager[None]:
        """Errors that leave this block come in our words, and take the other processes along; see `together`."""
        return self.together.guard(self._explained)

    def _read(self, batches: Iterator[Batch], stop: Callable[[], bool]) -> Batch:
        """The next batch, where every process has one and none was asked to stop.

        One exchange a step serves both questions; a stop goes first, as a signal may have hit the data workers too.
        """
        batch, problem = None, None
        try:
            batch = next(batches)
        except Exception as error:
            problem = self._explained(error) or PipeError(f"{error}", where=f"step {self.step}{self.together.name}")
        if batch is not None:
            self.at_hand = batch.rows.tolist()
            if not self.at_hand:
                where = f"step {self.step}{self.together.name}"
                problem = nothing_readable(batch.failed, where=where, folder=self.folder.checkpoints)
        if self._any_process(stop() or problem is not None):
            if not self.together.total([stop()])[0] and self.together.total([problem is not None])[0]:
                self.together.stop_for(problem)
            self.save()
            where = f"training at step {self.step:,} of {self.settings.total_steps:,}"
            self.together.stop(Stopped(where, "go on with --resume"))
        assert batch is not None
        return batch

    def _step(self, batch: Batch) -> dict[str, Tensor]:
        """Forward, backward, clip, update: the whole of it."""
        settings, detailed = self.settings, self._logs_at(self.step + 1)
        measured = self._measures_at(self.step + 1)
        # Any random choice inside the model (dropout) is a function of the step, which makes a resume exact.
        chosen = hash((settings.seed, self.step, self.accelerator.process_index)) & 0x7FFFFFFF
        seed_generators(chosen, self.accelerator.device)
        self.bare.log_details, self.bare.keep_terms = detailed, measured  # type: ignore[assignment]
        rate = learning_rate(
            self.step, total_steps=settings.total_steps, warmup_steps=settings.warmup_steps, peak=settings.lr
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        batch = batch.to(self.accelerator.device)
        self.towers.expect(whole=not batch.failed)
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
        if self.accelerator.scaler is not None:
            logs |= self._scaling()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.samples += settings.batch_size
        return {"loss": loss.detach(), "grad_norm": torch.as_tensor(norm).detach(), "lr": torch.tensor(rate), **logs}

    def _scaling(self) -> dict[str, Tensor]:
        """fp16: the factor on the loss, and how many updates have been left out because a gradient was not finite."""
        self.left_out += bool(self.optimizer.step_was_skipped)
        scale = torch.tensor(self.accelerator.scaler.get_scale())
        return {"loss_scale": scale, LEFT_OUT: torch.tensor(self.left_out)}

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
        self.note_failed(batch, "train")
        if self.accelerator.scaler is not None:
            self.watch.after_update(skipped=self.optimizer.step_was_skipped, step=self.step)
        if self._logs_at(self.step):
            values = {f"train/{key}": float(value) for key, value in logs.items()}
            bar.note(f"loss {values['train/loss']:.3f}")
            self._write(tracker, values)

    def note_failed(self, batch: Batch, split: str) -> None:
        """Remember what of a batch could not be read, until `_settle`."""
        self.unread += [Skip(self.step, batch.epoch, split, row, reason) for row, reason in batch.failed]

    def _settle(self) -> None:
        """Take the images that no process could read out of `samples`, and name them; every process calls it at the
        same steps."""
        missing, others = (sum((skip.split == "train") is trained for skip in self.unread) for trained in (True, False))
        all_missing, all_others = self.together.total([missing, others])
        self.samples -= int(all_missing)
        if all_missing or all_others:
            self.skipped.add(skip for of in self.together.everyones(self.unread) for skip in of)
        self.unread = []

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
        self.watch.check(loss, norm, batch, self.bare.model, step=self.step)

    def _explained(self, error: Exception) -> PipeError | None:
        return explained(
            error, step=self.step, process=self.together.name, rows=self.at_hand, folder=self.folder.checkpoints
        )

    def _any_process(self, flag: bool) -> bool:
        """Whether any process raises its flag: all must leave the loop together."""
        return self.together.total([flag])[0] > 0

    def save(self) -> None:
        """Checkpoint from the main process; the others wait, and hear if it failed. A step is saved once."""
        if self.saved == self.step:
            return
        self._settle()
        problem = None
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {}
            scaler |= {LEFT_OUT: self.left_out} if scaler else {}
            state = State(
                step=self.step,
                samples=self.samples,
                seconds=self.seconds,
                world_size=self.accelerator.num_processes,
                scaler=scaler,
                config=self.config,
                data=self.data,
                losses=list(self.watch.losses),
                above=self.watch.above,
            )
            keep = self.settings.keep_checkpoints + (self.watch.above > 0)
            where = self.folder.checkpoints
            try:
                make_durable(self.folder.metrics)
                save_checkpoint(where, state, self.bare, self.optimizer.optimizer, keep=keep, ema=self.ema)
            except (PipeError, OSError) as error:
                problem = self._explained(error) or PipeError(f"cannot save: {error}", where=self.folder.path)
        self.together.agree(problem)
        self.saved, self.overdue = self.step, False
