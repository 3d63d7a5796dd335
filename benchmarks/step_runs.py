"""Training runs that several benchmarks time: made as `pipe train` makes them, driven some steps at a time.

Without tars of the reader's own, generated scenes are drawn; without a teacher's weights, random ones, which cost what
trained ones cost.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml

from pipeline.cache.layout import OK
from pipeline.cache.reader import open_cache
from pipeline.config import Config, load_config
from pipeline.config_files import shipped
from pipeline.data.index import build_manifest
from pipeline.data.scene_files import write_scenes
from pipeline.run_folder import Workspace

FOREVER = 10**6  # steps of a run that is never finished here
LOG_EVERY = 10
TAR_SIZE = 64
SCENES_SEED = 11

# Trunk, student and batch of configs/small.yaml; --quick: the least that every part takes.
TINY: dict[str, Any] = {
    "teacher": {
        "name": "vit_small_patch16_dinov3_qkvb",
        "model_args": {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2},
        "random_weights": True,
        "image_size": 32,
        "scales": [{"name": "fine", "layer": -1, "grid": 4}],
    },
    "model": {
        "trunk": {
            "embed_dim": 16,
            "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
            "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
        },
        "image_size": 32,
        "student": {"patch": 8, "depth": 1, "text_width": 16, "text_layers": 1},
    },
    "train": {"transition_depth": 4},
}


class RoundOver(BaseException):
    """A round's steps are done: ends a run's loop from its stream of batches. No error, so none is explained."""


@dataclass
class Place:
    """A folder with tars, and workspaces of several teachers beside them.

    Args:
        folder: where everything is written. source: the tars. quick: tiny networks.
        images: how many rows are extracted. batch: pairs a step. workers: processes that read batches.
    """

    folder: Path
    source: str
    quick: bool
    images: int
    batch: int
    workers: int

    def config(
        self, workspace: str, teacher: dict[str, Any] | None = None, weights: Path | None = None, **sets: Any
    ) -> Config:
        """The configuration of a workspace.

        Args:
            teacher: None: the base configuration's. weights: its file; None: random ones.
            sets: dotted keys with `__` for the dot.
        """
        base = copy.deepcopy(TINY if self.quick else shipped("", "small"))
        if teacher is not None:
            base["teacher"] = teacher
        base["workspace"] = workspace
        base["data"] = {"source": self.source, "workers": self.workers, "rows": "cached"}
        base["teacher"] |= {"calibration_rows": max(8, self.images // 4), "batch_size": 64}
        base["teacher"] |= {"random_weights": True} if weights is None else {"checkpoint": str(weights.resolve())}
        path = self.folder / f"{workspace}.yaml"
        path.write_text(yaml.safe_dump(base))
        lasting = {
            "train.batch_size": self.batch,
            "train.max_steps": FOREVER,
            "train.checkpoint_every": FOREVER,
            "train.validate_every": FOREVER,
            "train.term_gradients_every": FOREVER,
            "train.warmup_steps": 60,
            "train.log_every": LOG_EVERY,
        }
        flags = lasting | {key.replace("__", "."): value for key, value in sets.items()}
        return load_config(path, flags=flags)

    def prepared(self, config: Config) -> Config:
        """Index and extract, where that has not been done; the same configuration."""
        from pipeline.data.manifest import read_manifest
        from pipeline.teacher.extract import extract
        from stages.extract_teacher import load, settings_of

        workspace = Workspace(config.workspace)
        if not workspace.manifest.exists():
            config.workspace.mkdir(parents=True, exist_ok=True)
            build_manifest(str(config.data.source), workspace.manifest, val_fraction=0.01)
        if config.model.parts.student and not workspace.teacher.exists():
            manifest = read_manifest(workspace.manifest)
            extract(manifest, load(config), workspace.teacher, settings_of(config), limit=self.images)
        return config


def place(folder: Path, *, source: Path | None, quick: bool, images: int, batch: int, workers: int) -> Place:
    """Draw scenes where there are no tars."""
    if source is None:
        size = 32 if quick else 128
        write_scenes(folder / "tars", images, SCENES_SEED, size=size, tar_size=min(TAR_SIZE, max(8, images // 4)))
        source = folder / "tars"
    return Place(folder, str(source), quick, images, batch, workers)


@dataclass
class Run:
    """One run in progress, that goes on `steps` steps at a time; see `pipeline.training.loop`.

    Attributes:
        around: what its stream of batches goes through, for instance a stopwatch.
    """

    config: Config
    name: str
    around: Callable[[Iterator[Any]], Iterator[Any]] = iter
    session: Any = field(init=False)
    tracker: Any = None  # opened once, as in a run

    def __post_init__(self) -> None:
        from stages.train_data import open_data
        from stages.train_setup import prepare

        workspace = Workspace(self.config.workspace)
        self.data = open_data(workspace, self.config)
        self.session = prepare(self.config, self.data, workspace.run(self.name))

    @property
    def training(self) -> Any:
        return self.session.training

    def steps(self, count: int) -> None:
        """`count` steps of the loop, data and logging included; what reads the batches is started and ended here."""
        from pipeline.training import loop

        made, loop.Tracker = loop.Tracker, self._tracker  # type: ignore[assignment, misc]
        try:
            self.training.run(self._stream(count), dict)
        except RoundOver:
            return
        finally:
            loop.Tracker = made  # type: ignore[misc]

    def _tracker(self, *arguments: Any, **named: Any) -> AbstractContextManager[Any]:
        """The run's one tracker, which the end of a round leaves open."""
        from pipeline.training.tracking import Tracker

        if self.tracker is None:
            self.tracker = Tracker(*arguments, **named)
        return nullcontext(self.tracker)

    def _stream(self, count: int) -> Iterator[Any]:
        from pipeline.training.data import batches

        training, plan = self.session.training, self.session.plan
        steps = islice(plan.steps(start=training.step), count)
        pin = training.accelerator.device.type == "cuda"
        found = batches(self.session.datasets["train"], steps, workers=self.session.workers, pin_memory=pin)
        yield from self.around(self.session.with_targets(found))
        if training.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        raise RoundOver


def with_constant_targets(run: Run) -> Run:
    """The same run without a cache: every batch gets the same targets, which lie in memory on the device already."""
    dataset, cache = run.session.datasets["train"], run.data.cache
    assert cache is not None
    rows = run.data.train_rows[cache.state()[run.data.train_rows] == OK][: run.config.train.batch_size]
    device = run.training.accelerator.device
    held = {name: torch.from_numpy(values).to(device) for name, values in open_cache(cache.path).read_raw(rows).items()}
    dataset.cache = None

    def constant(stream: Iterator[Any]) -> Iterator[Any]:
        for batch in stream:
            yield replace(batch, targets={name: values[: len(batch.rows)] for name, values in held.items()})

    run.around = constant
    return run
