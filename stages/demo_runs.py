"""The demo's trainings: which runs, how many steps fit the time, and their processes side by side.

Each run is `pipe train` in a process of its own, as a user would start it. Runs are dealt to lanes: two on a CPU of two
or more cores (clip and rankclip in one, order 3 in the other), since one small network cannot use two cores well.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from pipeline.config import Config, load_config
from pipeline.console import log, progress
from pipeline.errors import PipeError, Stopped
from pipeline.run_folder import RunFolder, Workspace

START_SECONDS = 20.0  # of a training process: imports, model, record
EVALUATION_STEPS = 70  # the evaluation of all runs takes about as long as this many steps of the slowest (measured)
SIDE_BY_SIDE = 1.1  # what a step takes with a neighbour on the other core, against alone
TIMED_STEPS = 3
FEWEST_STEPS, MOST_STEPS = 40, 400
STOP_SECONDS = 60.0  # a run may take this long to save its checkpoint


@dataclass(frozen=True)
class PlannedRun:
    """One `pipe train`: the run's name, its options, and the seconds that one step takes."""

    name: str
    options: tuple[str, ...]
    seconds_per_step: float


RUNS = (  # with guesses, for when nothing is timed
    PlannedRun("clip", ("--method", "clip"), 0.5),
    PlannedRun("rankclip", ("--method", "rankclip"), 0.5),
    PlannedRun("dinorankclip-r3-full", ("--method", "dinorankclip", "--order", "3"), 0.9),
)


@dataclass(frozen=True)
class Plan:
    """One number of steps for all runs, and which runs follow each other in which lane."""

    steps: int
    lanes: tuple[tuple[PlannedRun, ...], ...]

    @property
    def runs(self) -> list[PlannedRun]:
        order = [run.name for run in RUNS]
        return sorted((run for lane in self.lanes for run in lane), key=lambda run: order.index(run.name))

    def describe(self, batch_size: int) -> str:
        each = ", ".join(f"{run.name} {self.steps * run.seconds_per_step:.0f} s" for run in self.runs)
        lanes = "one after the other" if len(self.lanes) == 1 else f"in {len(self.lanes)} lanes side by side"
        return f"plan: {self.steps} steps of batch {batch_size} for every method, {lanes}: about {each}"

    def to_json(self) -> dict[str, Any]:
        return {"steps": self.steps, "lanes": [[asdict(run) for run in lane] for lane in self.lanes]}


def kept_plan(state: Mapping[str, Any]) -> Plan | None:
    """The plan that an earlier call wrote down."""
    kept = state.get("plan")
    if kept is None:
        return None
    lanes = [
        [PlannedRun(run["name"], tuple(run["options"]), run["seconds_per_step"]) for run in lane]
        for lane in kept["lanes"]
    ]
    return Plan(kept["steps"], tuple(map(tuple, lanes)))


# ---- planning --------------------------------------------------------------------------------------------------------


def make_plan(config: Config, *, seconds: float, steps: int | None) -> Plan:
    """Time a few steps of each method and see how many fit.

    Args:
        seconds: what is left for trainings and evaluation.
        steps: a number fixed beforehand; None takes as many as fit.
    """
    import torch

    timed = steps is None
    threads = torch.get_num_threads()
    lanes = 1 if torch.cuda.is_available() or cores() < 2 else 2
    torch.set_num_threads(max(1, threads // lanes))
    try:
        planned = [replace(run, seconds_per_step=seconds_per_step(config, run)) for run in RUNS] if timed else RUNS
    finally:
        torch.set_num_threads(threads)
    dealt = deal(planned, lanes)
    if steps is None:
        evaluation = EVALUATION_STEPS * max(run.seconds_per_step for run in planned)
        slower = SIDE_BY_SIDE if lanes > 1 else 1.0
        steps = steps_that_fit(
            [[slower * run.seconds_per_step for run in lane] for lane in dealt], seconds - evaluation
        )
    return Plan(steps, dealt)


def deal(planned: Sequence[PlannedRun], lanes: int) -> tuple[tuple[PlannedRun, ...], ...]:
    """Runs to lanes, the slowest first and each to the lane with the least to do."""
    dealt: list[list[PlannedRun]] = [[] for _ in range(lanes)]
    for run in sorted(planned, key=lambda run: -run.seconds_per_step):
        min(dealt, key=lambda lane: (sum(r.seconds_per_step for r in lane), len(lane))).append(run)
    return tuple(tuple(lane) for lane in dealt if lane)


def steps_that_fit(lanes: Sequence[Sequence[float]], seconds: float) -> int:
    """The largest multiple of ten such that every lane ends in time: Σ_lane (start + steps · seconds a step) ≤ seconds.

    Args:
        lanes: seconds a step, of every run of every lane.

    Returns:
        at least FEWEST_STEPS (a demo of fewer shows nothing), at most MOST_STEPS.
    """
    fit = min((seconds - START_SECONDS * len(lane)) / max(sum(lane), 1e-9) for lane in lanes)
    return max(FEWEST_STEPS, min(MOST_STEPS, math.floor(fit / 10) * 10))


def seconds_per_step(config: Config, run: PlannedRun) -> float:
    """Forward, backward and update of one batch as training does them, and reading it: seconds, the best of a few."""
    import torch

    from pipeline.data.samples import SampleReader
    from pipeline.data.views import Preprocess, View
    from pipeline.training.data import PairDataset
    from pipeline.training.sampler import BatchPlan
    from stages import train_data, train_setup

    path = config.workspace / "pipe.yaml"
    options = dict(zip(run.options[::2], run.options[1::2], strict=True))
    flags = {
        "train.method": options["--method"],
        "train.order": int(options["--order"]) if "--order" in options else None,
    }
    own = load_config(path, flags=flags)
    data = train_data.open_data(Workspace(own.workspace), own)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    objective = train_setup.build_objective(own, data.cache).to(device)
    trunk = objective.model.trunk
    view = View(kind=own.data.view, size=own.model.image_size)
    dataset = PairDataset(
        SampleReader(data.manifest), Preprocess(view, trunk.mean, trunk.std), trunk.tokenizer, cache=data.cache
    )
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-4)
    taken = []
    for step in BatchPlan(data.train_rows, own.train.batch_size, TIMED_STEPS, 0).steps():
        started = time.perf_counter()
        batch = dataset[step].to(device)
        loss, _ = objective(batch.images, batch.tokens, batch.targets, 0.5)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        float(loss.detach())
        taken.append(time.perf_counter() - started)
    return min(taken)


# ---- running ---------------------------------------------------------------------------------------------------------


def train_all(config: Config, plan: Plan, out: Path) -> None:
    """Start every run that is not finished, lane by lane, and wait for all.

    Raises:
        PipeError: a run failed; the others are stopped.
        Stopped: Ctrl-C; the runs have saved their state.
    """
    import torch

    workspace = Workspace(config.workspace)
    waiting = [[run for run in lane if not workspace.run(run.name).finished] for lane in plan.lanes]
    finished = [run.name for run in plan.runs if workspace.run(run.name).finished]
    if finished:
        log.info("finished already: %s", ", ".join(finished))
    total = plan.steps * sum(map(len, waiting))
    if not total:
        return
    threads = max(1, min(torch.get_num_threads(), cores() // len(plan.lanes)))
    running: dict[int, Child] = {}
    with progress(f"training {', '.join(run.name for lane in waiting for run in lane)}", total, "steps") as bar:
        try:
            while any(waiting) or running:
                for lane, queue in enumerate(waiting):
                    if lane not in running and queue:
                        running[lane] = Child.start(workspace.run(queue.pop(0).name), plan, out, threads)
                time.sleep(0.5)
                for lane, child in list(running.items()):
                    bar.advance(child.new_steps())
                    if child.ended():
                        bar.advance(child.new_steps())
                        del running[lane]
                bar.note(", ".join(f"{child.folder.name} {child.step}/{plan.steps}" for child in running.values()))
        except KeyboardInterrupt:
            raise Stopped("the demo, while training") from None
        finally:
            stop(list(running.values()))


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class Child:
    """A training process and how far it is."""

    folder: RunFolder
    process: subprocess.Popen[bytes]
    log_file: Path
    stream: IO[bytes]
    step: int = 0

    @classmethod
    def start(cls, folder: RunFolder, plan: Plan, out: Path, threads: int) -> Child:
        """`pipe train` with the run's options; what it says goes to OUT/logs/RUN.log."""
        planned = next(run for run in plan.runs if run.name == folder.name)
        command = [sys.executable, "-m", "stages.cli", "train", "--config", str(out.absolute() / "pipe.yaml")]
        command += [*planned.options, "--name", folder.name]
        if folder.record.exists():
            command.append("--resume")
        log_file = out / "logs" / f"{folder.name}.log"
        log_file.parent.mkdir(parents=True, exist_ok=True)
        stream = open(log_file, "ab")  # noqa: SIM115 - closed when the process has ended
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        # A session of its own: Ctrl-C reaches the demo alone, which passes it on once.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env=environment, start_new_session=True
        )
        child = cls(folder, process, log_file, stream)
        child.step = child._last_step()
        return child

    def _last_step(self) -> int:
        try:
            lines = self.folder.metrics.read_bytes().splitlines()
        except FileNotFoundError:
            return 0
        for line in reversed(lines):
            try:
                return int(json.loads(line)["step"])
            except (ValueError, KeyError):
                continue  # the line is being written
        return 0

    def new_steps(self) -> int:
        """Steps done since the last call."""
        before, self.step = self.step, max(self.step, self._last_step())
        return self.step - before

    def ended(self) -> bool:
        """Whether the run is over.

        Raises:
            PipeError: it failed.
        """
        code = self.process.poll()
        if code is None:
            return False
        self.stream.close()
        if code or not self.folder.finished:
            lines = self.log_file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise PipeError(
                f"training {self.folder.name} ended with code {code} ({lines[-1] if lines else 'it said nothing'})",
                where=self.log_file,
                fix="the same command goes on from here",
            )
        return True


def stop(children: Sequence[Child]) -> None:
    """Ask the processes to save and end; kill those that do not."""
    alive = [child for child in children if child.process.poll() is None]
    for child in alive:
        child.process.terminate()
    for child in alive:
        try:
            child.process.wait(STOP_SECONDS)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            child.process.kill()
            child.process.wait()
    for child in children:
        child.stream.close()
