"""How fast is a training step, against what it could be, and where does its time go?

    a  with the cache     the same run with constant targets held in memory: what reading the cache costs
    b  with the cache     the teacher in the loop (`teacher.online`), by teacher; beside it what the FLOPs say
    c  pipe train         `--method clip` against open_clip's own trainer (needs open_clip_torch[training])
    d  the step           a full step's time by part: the parts add up to the step

Every run is one of `pipe train`'s, in this process, on one set of tars: decoding, collating, logging and the tracker
are in its time. Runs take turns, some steps at a time; a ratio is of the rates within a round, its interval holds the
median of such ratios with 95 % (order statistics, whatever their distribution). A bar is met where the whole interval
of the wall's ratios lies at or above it, missed where it lies below, and undecided else. "CPU" is the same ratio of the
time that this process's threads had on a processor, which other jobs on the machine disturb less (without --workers it
is all of the work). With workers, ours are started in each round, as a run does once, and open_clip's stay: rounds must
be long then. Checkpoints and validation are left out.

Scenes are drawn, and networks have random weights; --data takes tars of photographs, --teacher a MobileNetV2's
weights. Trunk, student and sizes are those of configs/small.yaml. (b) has smaller batches, for its teachers are slow.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import open_clip_trainer
import torch
from common import Timing, interleave, load, machine, markdown, median_interval, parse, parser, report
from step_parts import PARTS, Stopwatch, watched, watching
from step_runs import Place, Run, place, with_constant_targets

CACHE_BAR, OPEN_CLIP_BAR = 0.97, 1.0
TEACHER_BATCH, TEACHER_ROWS = 32, 96


def _vit(name: str, pixels: int) -> dict[str, Any]:
    scales = [{"name": scale, "layer": layer, "grid": 7} for scale, layer in (("fine", -1), ("coarse", 8))]
    return {"name": name, "image_size": pixels, "scales": scales}


# name → the configuration's `teacher`; None: that of configs/small.yaml.
TEACHERS: dict[str, dict[str, Any] | None] = {
    "MobileNetV2 at 224": None,
    "ViT-S/16 at 112": _vit("vit_small_patch16_dinov3_qkvb", 112),
    "ViT-S/16 at 224": _vit("vit_small_patch16_dinov3_qkvb", 224),
    "ViT-B/16 at 224": _vit("vit_base_patch16_dinov3_qkvb", 224),
}
LARGE = "ViT-B/16 at 224"
COLUMNS = (
    "task",
    "ms a step",
    "pairs/s",
    "rate / other",
    "95 % interval",
    "CPU / other",
    "95 % interval",
    "FLOPs / other",
    "bar",
)


@dataclass
class Table:
    """Rows and figures in the making. pairs: a round's."""

    pairs: int
    steps: int
    cells: list[list[str]] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)

    def add(
        self, name: str, timing: Timing, other: Timing | None = None, *, bar: float | None = None, flops: str = ""
    ) -> None:
        """A task, and how its rate stands to another's."""
        key, seconds = name.replace(" ", "_"), timing.median()
        self.figures |= {f"{key}/milliseconds_per_step": 1e3 * seconds / self.steps}
        self.figures |= {f"{key}/pairs_per_second": self.pairs / seconds}
        shown = [f"{1e3 * seconds / self.steps:.1f}", f"{self.pairs / seconds:.1f}"]
        if other is None:
            self.cells.append([name, *shown, "1", "", "1", "", flops, ""])
            return
        intervals = []
        for clock, figure in (("wall", "rate"), ("cpu", "cpu_rate")):
            own, theirs = getattr(timing, clock), getattr(other, clock)
            low, high = median_interval([theirs[i] / own[i] for i in own if i in theirs])
            self.figures[f"{key}/ratio_of_{figure}"] = other.ratio(timing, clock)
            if low > -math.inf:
                self.figures |= {f"{key}/ratio_of_{figure}_low": low, f"{key}/ratio_of_{figure}_high": high}
            shown += [f"{other.ratio(timing, clock):.3f}", _interval(low, high)]
            intervals.append((low, high))
        low, high = intervals[0]
        verdict = (
            "" if bar is None else f"≥ {bar:g}: {'met' if low >= bar else 'missed' if high < bar else 'undecided'}"
        )
        self.cells.append([name, *shown, flops, verdict])

    def add_part(self, name: str, seconds: float, share: float, cpu_share: float) -> None:
        """A part of a step: its time, and its share in place of a ratio."""
        key = name.replace(" ", "_")
        self.figures |= {f"{key}/milliseconds_per_step": 1e3 * seconds, f"{key}/ratio_of_step": share}
        self.figures |= {f"{key}/ratio_of_cpu_of_step": cpu_share}
        self.cells.append([name, f"{1e3 * seconds:.2f}", "", f"{share:.3f}", "", f"{cpu_share:.3f}", "", "", ""])


def _interval(low: float, high: float) -> str:
    return f"{low:.3f} to {high:.3f}" if low > -math.inf else "too few rounds"


def with_the_cache(at: Place, steps: int, rounds: int, table: Table, arguments: argparse.Namespace) -> None:
    """(a)"""
    config = at.prepared(at.config("cached", weights=arguments.teacher))
    runs = {"a constant targets": with_constant_targets(Run(config, "constant")), "a cache": Run(config, "cache")}
    timings = interleave({name: _steps_of(run, steps) for name, run in runs.items()}, rounds)
    table.add("a constant targets", timings["a constant targets"])
    table.add("a cache", timings["a cache"], timings["a constant targets"], bar=CACHE_BAR)


def beside_teachers(at: Place, steps: int, rounds: int, table: Table, arguments: argparse.Namespace) -> None:
    """(b): the teacher's forward pass in each step against reading what it said once."""
    from pipeline.models.cost import flops_per_sample, teacher_flops

    at = replace(at, images=min(at.images, TEACHER_ROWS), batch=min(at.batch, TEACHER_BATCH))
    table = replace(table, pairs=at.batch * steps)
    chosen = {"tiny": None} if at.quick else TEACHERS
    for number, (name, teacher) in enumerate(chosen.items()):
        if name == LARGE and not arguments.large:
            continue
        weights = arguments.teacher if teacher is None else None
        config = at.prepared(at.config(f"teacher{number}", teacher, weights))
        cached, live = (
            Run(config, "cache"),
            Run(at.config(f"teacher{number}", teacher, weights, teacher__online=True), "live"),
        )
        own = flops_per_sample(cached.training.bare.model)
        more = teacher_flops(live.session.teacher.teacher)
        timings = interleave({key: _steps_of(run, steps) for key, run in (("live", live), ("cache", cached))}, rounds)
        table.add(f"b in the loop: {name}", timings["live"])
        table.add(f"b cache: {name}", timings["cache"], timings["live"], flops=f"{(own + more) / own:.2f}")
        table.figures[f"b_cache:_{name.replace(' ', '_')}/ratio_of_flops"] = (own + more) / own


def beside_open_clip(at: Place, steps: int, rounds: int, table: Table, arguments: argparse.Namespace) -> None:
    """(c): a round is an epoch of open_clip's, over all images."""
    if lacks := open_clip_trainer.missing():
        print(f"c is left out: no {lacks} (pip install open_clip_torch[training])\n")
        return
    config = at.prepared(at.config("clip", train__method="clip"))
    run = Run(config, "clip")
    whole = max(1, len(run.data.train_rows) // at.batch)
    theirs = open_clip_trainer.OpenClip(run, sorted(Path(at.source).glob("*.tar")), whole, at.folder / "open_clip")
    batch = run.session.datasets["train"][next(run.session.plan.steps())].to(run.training.accelerator.device)
    theirs.check(run, batch.images, batch.tokens)
    last = Run(at.config("clip", train__method="clip", train__channels_last=True), "last")
    tasks = {"open_clip": theirs, "clip": _steps_of(run, whole), "last": _steps_of(last, whole)}
    timings = interleave(tasks, rounds)
    table = replace(table, pairs=at.batch * whole, steps=whole)
    table.add("c open_clip_train", timings["open_clip"])
    table.add("c pipe train --method clip", timings["clip"], timings["open_clip"], bar=OPEN_CLIP_BAR)
    table.add("c the same, train.channels_last", timings["last"], timings["open_clip"])


def _steps_of(run: Run, steps: int) -> Callable[[int], None]:
    return lambda _: run.steps(steps)


def by_part(at: Place, steps: int, rounds: int, table: Table, arguments: argparse.Namespace) -> None:
    """(d), in the order of PARTS and with their sum."""
    run = Run(at.prepared(at.config("cached", weights=arguments.teacher)), "parts")
    run.steps(steps)
    watch = Stopwatch(run.training.accelerator.device)
    run.around = lambda stream: watched(watch, stream)
    with watching(watch, run.training):
        for _ in range(rounds):
            with watch.part(PARTS[-1]):
                run.steps(steps)
    whole, cpu = sum(watch.seconds.values()), sum(watch.cpu.values())
    for name in PARTS:
        seconds = watch.seconds[name]
        table.add_part(f"d {name}", seconds / (rounds * steps), seconds / whole, watch.cpu[name] / cpu)
    table.add_part("d the step", whole / (rounds * steps), 1.0, 1.0)


QUESTIONS = {"a": with_the_cache, "b": beside_teachers, "c": beside_open_clip, "d": by_part}


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--data", type=Path, help="tars of photographs in place of drawn scenes")
    command.add_argument("--workers", type=int, default=0, help="processes that read batches (default 0)")
    command.add_argument("--teacher", type=Path, help="weights of a mobilenetv2_100 with 1,001 classes")
    command.add_argument("--large", action="store_true", help="(b) with a ViT-B/16 too")
    command.add_argument("--only", default="abcd", help="which questions, for instance ad (default all)")
    counts = {
        "images": (512, 32, "rows of the cache"),
        "batch": (64, 8, "pairs a step"),
        "steps": (4, 1, "steps a round"),
        "rounds": (12, 1, "rounds"),
    }
    arguments, numbers = parse(command, counts)
    measure(arguments, *numbers)


def measure(arguments: argparse.Namespace, images: int, batch: int, steps: int, rounds: int) -> None:
    load_before, table = load(), Table(batch * steps, steps)
    with tempfile.TemporaryDirectory(prefix="train_step.") as name:
        at = place(
            Path(name),
            source=arguments.data,
            quick=arguments.quick,
            images=images,
            batch=batch,
            workers=arguments.workers,
        )
        for letter, work in QUESTIONS.items():
            if letter in arguments.only:
                work(at, steps, rounds, table, arguments)
    packages = ("numpy", "torch", "open_clip_torch", "timm", "pillow", "accelerate")
    threads = f"{torch.get_num_threads()} threads, {arguments.workers} workers, {batch} pairs a step"
    figures = table.figures | {"images": images, "rounds": rounds, "threads": torch.get_num_threads()}
    report(arguments, f"{machine(packages)}; {threads}", load_before, markdown(COLUMNS, table.cells), figures)


if __name__ == "__main__":
    main()
