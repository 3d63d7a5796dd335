"""`pipe demo`: all of it on generated scenes, in the order in which a user of CC3M types it.

1. draw scenes into tars   2. train a small teacher on scenes of its own   3. pipe index   4. pipe extract-teacher
5. time a few steps, fix one number of steps for all methods   6. pipe train, a process a run: clip, rankclip, order 3
7. pipe evaluate, and say where the page is.

OUT is a workspace with a pipe.yaml of its own, so that every other command can be tried on it. A second call reuses
what is finished.
"""

from __future__ import annotations

import contextlib
import io
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from pipeline.config import Config, load_config, merge, shipped
from pipeline.console import log
from pipeline.data.scene_files import ATTRIBUTES, write_probe_set, write_scenes
from pipeline.errors import PipeError
from pipeline.run_folder import Workspace, read_json, write_bytes, write_json
from pipeline.teacher.scene_teacher import Recipe, card_path, train_scene_teacher
from stages import demo_runs as runs

STATE = "demo.json"  # marks a folder as a demo's and keeps what was decided
SECONDS = 268.0  # for everything: five minutes, less the start of Python and what the timing may miss


@dataclass(frozen=True)
class Size:
    """How much of everything: numbers of scenes, the teacher's recipe, and changes of the preset."""

    train: int = 2400
    val: int = 256
    test: int = 400
    probe_train: int = 300
    probe_test: int = 300
    recipe: Recipe = field(default_factory=Recipe)
    steps: int | None = None  # None: as many as fit
    changes: str = "{}"  # YAML over configs/demo.yaml


FULL = Size()
QUICK = Size(
    train=200,
    val=32,
    test=32,
    probe_train=48,
    probe_test=32,
    recipe=replace(Recipe(), steps=10, scenes=40, held_out=16),
    steps=6,
    changes="{teacher: {model_args: {patch_size: 8, embed_dim: 48, depth: 2, num_heads: 2, init_values: 1.0, "
    "num_classes: 0}}, train: {batch_size: 32}}",
)
# Series of scenes: each set has one of its own, and the teacher others (Recipe.seed). Sketches show the test's scenes.
SERIES = {"train": 1, "val": 2, "test": 3, "probe_train": 4, "probe_test": 5}


def run(out: Path, *, quick: bool = False) -> None:
    """Make `out` a finished demo.

    Args:
        out: a new folder, or that of an earlier demo.
        quick: a few steps only: does everything run?

    Raises:
        PipeError: `out` holds something else, or a step fails.
        Stopped: a signal arrived; the same command goes on.
    """
    started = time.monotonic()
    size = QUICK if quick else FULL
    with _sigterm_is_ctrl_c():
        claim(out, quick=quick)
        fastest_threads()
        draw_scenes(out, size, runs.cores())
        config = settle(out, size)
        card = teach(config, size)
        stage_one(config)
        plan, config = decide(out, config, size, started)
        runs.train_all(config, plan, out)
        evaluate_all(config, plan, card)
    log.info("the demo took %.0f s; open %s", time.monotonic() - started, Workspace(config.workspace).report)


@contextlib.contextmanager
def _sigterm_is_ctrl_c() -> Iterator[None]:
    """SIGTERM takes Ctrl-C's way: children are stopped, exit code 75."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def fastest_threads() -> int:
    """As many threads as there are cores, or one, whichever is faster now.

    A team of threads waits for its slowest member at every operation: on a machine that is busy with something else,
    two threads can be ten times slower than one.
    """
    import torch
    from torch.nn import functional as F

    a, b = torch.ones(2048, 128), torch.ones(128, 512)

    def seconds(threads: int) -> float:
        torch.set_num_threads(threads)
        taken = []
        for _ in range(5):
            started = time.perf_counter()
            for _ in range(10):
                F.gelu(a @ b)
            taken.append(time.perf_counter() - started)
        return sorted(taken)[2]

    most = min(torch.get_num_threads(), runs.cores())
    best = min({most, 1}, key=seconds)
    torch.set_num_threads(best)
    return best


def claim(out: Path, *, quick: bool) -> None:
    """Make `out` a demo's folder, or find that it is one.

    Raises:
        PipeError: there is something else, or a demo of the other length.
    """
    if out.exists() and not out.is_dir():
        raise PipeError("this is a file", where=out, fix="choose a new folder with --out")
    state = out / STATE
    if state.exists():
        if read_json(state).get("quick") != quick:
            fix = f"run it {'without' if quick else 'with'} --quick, or choose another --out"
            raise PipeError(f"this demo was made {'without' if quick else 'with'} --quick", where=out, fix=fix)
        log.info("%s is a demo already: what is finished is reused", out)
        return
    if out.is_dir() and any(out.iterdir()):
        raise PipeError("this folder is not a demo's", where=out, fix="choose a new folder with --out")
    write_json(state, {"quick": quick})


def _remember(out: Path, **values: Any) -> None:
    write_json(out / STATE, read_json(out / STATE) | values)


# ---- the data --------------------------------------------------------------------------------------------------------


def draw_scenes(out: Path, size: Size, workers: int) -> None:
    """OUT/data: train, val, test and test-sketch as image-text tars; shape, colour and texture as labelled sets."""
    if read_json(out / STATE).get("scenes"):
        log.info("scenes: there already")
        return
    data = out / "data"
    for name, n in (("train", size.train), ("val", size.val), ("test", size.test)):
        write_scenes(data / name, n, SERIES[name], workers=workers)
    write_scenes(data / "test-sketch", size.test, SERIES["test"], style="sketch", workers=workers)
    for attribute in ATTRIBUTES:
        splits = {
            "train": (size.probe_train, SERIES["probe_train"], "plain"),
            "test": (size.probe_test, SERIES["probe_test"], "plain"),
            "sketch": (size.probe_test, SERIES["probe_test"], "sketch"),
        }
        write_probe_set(data / attribute, attribute, splits, workers=workers)  # type: ignore[arg-type]
    _remember(out, scenes=True)


def settle(out: Path, size: Size, plan: runs.Plan | None = None) -> Config:
    """Write OUT/pipe.yaml, if it is not there or there is a new plan, and read it: it is the user's from then on."""
    path = out / "pipe.yaml"
    if plan is not None or not path.exists():
        body = merge(shipped("", "demo"), yaml.safe_load(size.changes))
        if plan is not None:
            train = {"max_steps": plan.steps, "warmup_steps": plan.steps // 4}
            train |= {"validate_every": max(10, plan.steps // 4), "checkpoint_every": max(10, plan.steps // 2)}
            body = merge(body, {"train": train})
        header = "# Written by `pipe demo` from the preset of this name. Paths are relative to this file's folder.\n"
        write_bytes(path, (header + yaml.safe_dump(body, sort_keys=False, allow_unicode=True, width=120)).encode())
    return load_config(path.absolute())


# ---- teacher and stage one -------------------------------------------------------------------------------------------


def teach(config: Config, size: Size) -> dict[str, Any]:
    """Train the teacher, if it is not there; returns its card."""
    teacher = config.teacher
    assert teacher.checkpoint is not None  # the preset names it
    if teacher.checkpoint.exists() and card_path(teacher.checkpoint).exists():
        log.info("teacher: there already")
        card: dict[str, Any] = read_json(card_path(teacher.checkpoint))
        return card
    return train_scene_teacher(
        teacher.checkpoint,
        name=teacher.name,
        model_args=teacher.model_args,
        image_size=teacher.image_size,
        recipe=size.recipe,
    )


def stage_one(config: Config) -> None:
    """`pipe index` and `pipe extract-teacher`, as they are."""
    from stages import extract_teacher, index

    if Workspace(config.workspace).manifest.exists():
        log.info("manifest: there already")
    else:
        index.run(config)
    with contextlib.redirect_stdout(io.StringIO()) as report:
        extract_teacher.run(config, limit=None)
    log.info("%s", report.getvalue().rstrip())


# ---- plan and evaluation ---------------------------------------------------------------------------------------------


def decide(out: Path, config: Config, size: Size, started: float) -> tuple[runs.Plan, Config]:
    """One number of steps for all methods, and the configuration with it.

    It is the one kept from an earlier call, or as many steps as fit the time that is left.
    """
    plan = runs.kept_plan(read_json(out / STATE))
    if plan is None:
        left = SECONDS - (time.monotonic() - started)
        plan = runs.make_plan(config, seconds=left, steps=size.steps)
        config = settle(out, size, plan)
        _remember(out, plan=plan.to_json())
    log.info("%s", plan.describe(config.train.batch_size))
    return plan, config


def evaluate_all(config: Config, plan: runs.Plan, card: dict[str, Any]) -> None:
    """`pipe evaluate` on the demo's runs; the headline table goes to stdout."""
    from stages import evaluate

    with contextlib.redirect_stdout(io.StringIO()):
        names = [run.name for run in plan.runs]
        evaluate.run(config, names, False, title="DINORANKCLIP on generated scenes", notes=notes(config, plan, card))
    headline = Workspace(config.workspace).report / "tables" / "headline.md"
    if headline.exists():
        print(headline.read_text(encoding="utf-8").rstrip())
        print("\nOne run of each method, with one seed: only large differences mean anything.")


def notes(config: Config, plan: runs.Plan, card: dict[str, Any]) -> list[str]:
    """What the page must say above its numbers."""
    held_out = card["held_out"]
    accuracy = ", ".join(
        f"{name} {held_out[name]['accuracy']:.0%} (commonest class: {held_out[name]['commonest_class']:.0%})"
        for name in ATTRIBUTES
    )
    recipe = card["recipe"]
    return [
        "The images are generated: one to four shapes with a colour, a size and a texture each, and captions that "
        "mention some of it. The sketch sets show the same kind of scene in a style that no training image has. "
        "Nothing here is evidence about photographs.",
        f"The teacher: {card['what']} It has {card['parameters']:,} parameters and was trained for {recipe['steps']} "
        f"steps of {recipe['batch_size']} ({card['seconds']:.0f} s), on {recipe['scenes']:,} scenes of its own, none "
        f"of which is used below. Of the object patches in scenes it had not seen, it names right: {accuracy}.",
        f"Every method was trained once, with one seed, on {plan.steps * config.train.batch_size:,} pairs "
        f"({plan.steps} steps of {config.train.batch_size}). Intervals are over test images and do not cover the seed: "
        "a difference of a few points between methods says nothing here; only large effects can be read from it.",
    ]
