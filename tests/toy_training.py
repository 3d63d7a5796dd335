"""A training loop around a toy model, for one process or several: what the loop itself does, in milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from pipeline.evaluation.datasets import open_classification
from pipeline.run_folder import RunFolder
from pipeline.training import loop
from pipeline.training.data import Batch
from pipeline.training.loop import LoopSettings, Training
from pipeline.training.sampler import BatchPlan
from pipeline.training.schedule import parameter_groups
from pipeline.training.zero_shot import ZeroShot

ROWS, STEPS, BATCH = 40, 12, 8


class Processes:
    """What the loop asks of Accelerate, on torch.distributed's default group."""

    scaler = None
    device = torch.device("cpu")

    def __init__(self) -> None:
        together = dist.is_initialized()
        self.process_index = dist.get_rank() if together else 0
        self.num_processes = dist.get_world_size() if together else 1
        self.is_main_process = self.process_index == 0

    def unwrap_model(self, module: nn.Module) -> nn.Module:
        return module

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip_grad_norm_(self, parameters: Any, limit: float) -> Tensor:
        parameters = list(parameters)
        for parameter in parameters:
            if self.num_processes > 1:
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.num_processes
        return nn.utils.clip_grad_norm_(parameters, limit)

    def wait_for_everyone(self) -> None:
        if self.num_processes > 1:
            dist.barrier()


class Optimizer(torch.optim.AdamW):
    @property
    def optimizer(self) -> torch.optim.AdamW:
        return self


class ToyModel(nn.Module):
    """Its weights are the same in every process."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.image, self.text = nn.Linear(12, 4), nn.Embedding(64, 4)

    def encode_image(self, images: Tensor) -> Tensor:
        return nn.functional.normalize(self.image(images.flatten(1)), dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        return nn.functional.normalize(self.text(tokens).mean(1), dim=-1)

    def text_nodes(self, tokens: Tensor) -> dict[str, Tensor]:
        return {"trunk": self.encode_text(tokens)}

    def forward(self, images: Tensor, tokens: Tensor) -> Any:
        z, t = self.encode_image(images), self.encode_text(tokens)
        return SimpleNamespace(v=z, w=t, z=z, t=t, image=None, text=None, logit_scale=torch.tensor(1.0))


class ToyObjective(nn.Module):
    """The mean squared distance of a pair. `spoil(progress, loss)` may change the loss."""

    log_details = keep_terms = False

    def __init__(self, spoil: Callable[[float, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.spoil = ToyModel(), spoil

    def forward(self, images: Tensor, tokens: Tensor, progress: float, **_: Any) -> tuple[Tensor, dict[str, Tensor]]:
        apart = self.model.encode_image(images) - self.model.encode_text(tokens)
        noise = 1 + 0.1 * torch.rand(())  # as dropout would, it must be a function of the step
        loss = self.spoil(progress, noise * apart.square().sum(1).mean())
        return loss, {"distance": loss.detach()}


def batch_of(step: int, epoch: int, rows: np.ndarray, *, unreadable: set[int] = frozenset()) -> Batch:  # type: ignore[assignment]
    """Pixels and words that are functions of the row."""
    there = [int(row) for row in rows if row not in unreadable]
    numbers = torch.tensor(there, dtype=torch.int64)
    images = torch.sin(numbers[:, None] * torch.arange(1, 13)).reshape(-1, 3, 2, 2)
    failed = [(int(row), "gone") for row in rows if row in unreadable]
    return Batch(step, epoch, numbers, images, numbers[:, None] % 64, None, failed)


def plan(total: int = STEPS) -> BatchPlan:
    return BatchPlan(np.arange(ROWS), BATCH, total, seed=1)


def make(
    folder: Path, *, spoil: Callable[[float, Tensor], Tensor] = lambda progress, loss: loss, **settings: Any
) -> Training:
    """A run in `folder`, ready to begin."""
    processes, objective = Processes(), ToyObjective(spoil)
    optimizer = Optimizer(parameter_groups(objective.named_parameters(), weight_decay=0.1), lr=0.01)
    asked = {
        "total_steps": STEPS,
        "steps_per_epoch": ROWS // BATCH,
        "batch_size": BATCH,
        "lr": 0.01,
        "warmup_steps": 0,
        "grad_clip": 1.0,
        "seed": 0,
        "log_every": 1,
        "term_gradients_every": None,
        "checkpoint_every": 5,
        "keep_checkpoints": 2,
        "validate_every": 4,
    }
    run = RunFolder(folder)
    if processes.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
    processes.wait_for_everyone()
    return Training(processes, objective, optimizer, LoopSettings(**asked | settings), run, {"a": 1}, {"rows": ROWS})


def batches(training: Training, *, unreadable: set[int] = frozenset()) -> Iterator[Batch]:  # type: ignore[assignment]
    """This process's, from where the run stands."""
    place = {"rank": training.together.rank, "world_size": training.together.world}
    for step in plan(training.settings.total_steps).steps(start=training.step, **place):
        yield batch_of(step.step, step.epoch, step.rows, unreadable=unreadable)


def outcome(training: Training, source: Iterator[Batch], validate: Callable[[], dict[str, float]] = dict) -> str:
    """How the run ends: `done`, or the name of what it raises and its words."""
    try:
        training.run(source, validate)
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"
    return "done"


@contextmanager
def stopping_when(wanted: Callable[[], bool]) -> Iterator[None]:
    """As if a signal had come to this process."""

    @contextmanager
    def stop() -> Iterator[Callable[[], bool]]:
        yield wanted

    before = loop.stop_on_signals
    loop.stop_on_signals = stop
    try:
        yield
    finally:
        loop.stop_on_signals = before


def labelled_images(root: Path) -> None:
    """test/CLASS/N.png: three classes, 13 pictures that say little of them, and a file that is none."""
    generator = np.random.default_rng(4)
    for number in range(13):
        folder = root / "test" / f"class {number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 255, (2, 2, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (root / "test" / "class 1" / "torn.png").write_bytes(b"not a picture")


def zero_shot_of(root: Path) -> ZeroShot:
    """Measured on `labelled_images`, with what `ToyModel` reads."""
    data = open_classification(root, ["test"], root / "cache")

    def tokens(texts: list[str]) -> Tensor:
        return torch.tensor([[len(text), sum(map(ord, text))] for text in texts]) % 64

    def pixels(image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 255 - 0.5

    split, templates = data.splits["test"], ("a {c}", "one {c} more")
    return ZeroShot("shapes", split, data.class_names, templates, pixels, tokens, batch_size=4, workers=1)
