"""How fast is a training step, against what it could be, and where does its time go?

    a  with the cache     the same run with constant targets held in memory: what reading the cache costs
    d  the step           a full step's time by part: the parts add up to the step

Every run is one of `pipe train`'s, in this process, on one set of tars: decoding, collating, logging and the tracker
are in its time. Runs take turns, some steps at a time; a ratio is of the rates within a round, its interval holds the
median of such ratios with 95 % (order statistics, whatever their distribution). A bar is met where the whole interval
lies at or above it, missed where it lies below, and undecided else. Checkpoints and validation are left out.

Scenes are drawn, and networks have random weights; --data takes tars of photographs. Trunk, student and sizes are
those of configs/small.yaml.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from common import Timing, interleave, load, machine, markdown, median_interval, parse, parser, report
from step_parts import PARTS, Stopwatch, watched, watching
from step_runs import Place, Run, place, with_constant_targets

CACHE_BAR = 0.97
COLUMNS = ("task", "ms a step", "pairs/s", "rate / other", "95 % interval", "CPU / other", "FLOPs / other", "verdict")


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
            self.cells.append([name, *shown, "1", "", "1", flops, ""])
            return
        ratios = [other.wall[i] / timing.wall[i] for i in timing.wall if i in other.wall]
        ratio, (low, high), cpu = other.ratio(timing), median_interval(ratios), timing.ratio(other, "cpu")
        self.figures |= {f"{key}/ratio_of_rate": ratio, f"{key}/ratio_of_cpu_time": cpu}
        if known := low > -math.inf:
            self.figures |= {f"{key}/ratio_of_rate_low": low, f"{key}/ratio_of_rate_high": high}
        interval = f"{low:.3f} to {high:.3f}" if known else "too few rounds"
        verdict = (
            "" if bar is None else f"≥ {bar:g}: {'met' if low >= bar else 'missed' if high < bar else 'undecided'}"
        )
        self.cells.append([name, *shown, f"{ratio:.3f}", interval, f"{cpu:.3f}", flops, verdict])

    def add_part(self, name: str, seconds: float, share: float) -> None:
        """A part of a step: its time, and its share in place of a ratio."""
        self.figures |= {f"{name.replace(' ', '_')}/milliseconds_per_step": 1e3 * seconds}
        self.figures |= {f"{name.replace(' ', '_')}/ratio_of_step": share}
        self.cells.append([name, f"{1e3 * seconds:.2f}", "", f"{share:.3f}", "", "", "", ""])


def with_the_cache(at: Place, steps: int, rounds: int, table: Table) -> None:
    """(a)"""
    config = at.prepared(at.config("cached"))
    runs = {"a constant targets": with_constant_targets(Run(config, "constant")), "a cache": Run(config, "cache")}
    timings = interleave({name: lambda _, run=run: run.steps(steps) for name, run in runs.items()}, rounds)
    table.add("a constant targets", timings["a constant targets"])
    table.add("a cache", timings["a cache"], timings["a constant targets"], bar=CACHE_BAR)


def by_part(at: Place, steps: int, rounds: int, table: Table) -> None:
    """(d), in the order of PARTS and with their sum."""
    run = Run(at.prepared(at.config("cached")), "parts")
    run.steps(steps)
    watch = Stopwatch(run.training.accelerator.device)
    run.around = lambda stream: watched(watch, stream)
    with watching(watch, run.training):
        for _ in range(rounds):
            with watch.part(PARTS[-1]):
                run.steps(steps)
    whole = sum(watch.seconds.values())
    for name in PARTS:
        table.add_part(f"d {name}", watch.seconds[name] / (rounds * steps), watch.seconds[name] / whole)
    table.add_part("d the step", whole / (rounds * steps), 1.0)


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--data", type=Path, help="tars of photographs in place of drawn scenes")
    command.add_argument("--workers", type=int, default=0, help="processes that read batches (default 0)")
    command.add_argument("--only", default="ad", help="which questions, for instance ad (default all)")
    counts = {
        "images": (512, 32, "rows of the cache"),
        "batch": (64, 8, "pairs a step"),
        "steps": (4, 1, "steps a round"),
        "rounds": (12, 2, "rounds"),
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
        for letter, work in {"a": with_the_cache, "d": by_part}.items():
            if letter in arguments.only:
                work(at, steps, rounds, table)
    packages = ("numpy", "torch", "open_clip_torch", "timm", "pillow", "accelerate")
    threads = f"{torch.get_num_threads()} threads, {arguments.workers} workers, {batch} pairs a step"
    figures = table.figures | {"images": images, "rounds": rounds, "threads": torch.get_num_threads()}
    report(arguments, f"{machine(packages)}; {threads}", load_before, markdown(COLUMNS, table.cells), figures)


if __name__ == "__main__":
    main()
