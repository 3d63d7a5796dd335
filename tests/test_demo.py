"""`pipe demo`: its folder, its plan, its processes, and all of it once in small."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipeline.config import load_config, shipped
from pipeline.errors import PipeError, Stopped
from pipeline.evaluation.registry import parse_suite
from pipeline.run_folder import RunFolder, Workspace, read_json
from stages import demo, demo_runs
from stages.demo_runs import RUNS, Child, Plan, PlannedRun, deal, kept_plan, steps_that_fit

PLAN = Plan(70, deal(RUNS, 2))


# ---- the folder ------------------------------------------------------------------------------------------------------


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(PipeError, match="not a demo's"):
        demo.run(tmp_path, quick=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(PipeError, match="this is a file"):
        demo.run(tmp_path / "out", quick=True)


def test_a_demo_of_the_other_length_is_refused(tmp_path: Path) -> None:
    demo.claim(tmp_path / "out", quick=True)
    demo.claim(tmp_path / "out", quick=True)
    with pytest.raises(PipeError, match="made with --quick"):
        demo.claim(tmp_path / "out", quick=False)


def test_its_pipe_yaml_keeps_everything_inside_the_folder_wherever_that_lies(tmp_path: Path) -> None:
    out = tmp_path / "here"
    demo.claim(out, quick=False)
    demo.settle(out, demo.FULL)
    shutil.move(out, tmp_path / "there")
    config = load_config(tmp_path / "there" / "pipe.yaml")
    inside = [config.workspace, config.data.source, config.data.val_source, config.teacher.checkpoint]
    for path in [*inside, config.evaluate.datasets]:
        assert Path(str(path)).resolve().is_relative_to((tmp_path / "there").resolve())


def test_the_plan_is_written_into_pipe_yaml_which_then_belongs_to_the_user(tmp_path: Path) -> None:
    demo.claim(tmp_path, quick=False)
    demo.settle(tmp_path, demo.FULL)
    assert demo.settle(tmp_path, demo.FULL, PLAN).train.max_steps == 70
    path = tmp_path / "pipe.yaml"
    assert yaml.safe_load(path.read_text())["train"]["warmup_steps"] == 17
    path.write_text(path.read_text().replace("lr: 0.001", "lr: 0.002"))
    demo._remember(tmp_path, plan=PLAN.to_json())
    config = demo.settle(tmp_path, demo.FULL)
    plan, config = demo.decide(tmp_path, config, demo.FULL, started=0.0)
    assert plan == PLAN
    assert (config.train.max_steps, config.train.lr) == (70, 0.002)


def test_a_plan_comes_back_from_its_json() -> None:
    assert kept_plan({"plan": PLAN.to_json()}) == PLAN
    assert kept_plan({"quick": True}) is None


def test_the_suite_is_valid_and_reads_only_what_the_demo_draws() -> None:
    entries = parse_suite(shipped("suites", "demo"), "demo")
    drawn = {"test", "test-sketch", *demo.ATTRIBUTES}
    assert {entry.path for entry in entries} <= drawn
    assert {entry.kind for entry in entries} == {"retrieval", "zero_shot", "probe"}
    assert any(entry.split == "sketch" for entry in entries)


def test_no_two_sets_share_their_scenes() -> None:
    recipe = demo.FULL.recipe
    series = [*demo.SERIES.values(), recipe.seed, recipe.seed + 1]
    assert len(set(series)) == len(series)


# ---- the plan --------------------------------------------------------------------------------------------------------


def test_steps_are_the_most_that_fit_every_lane() -> None:
    start = demo_runs.START_SECONDS
    assert steps_that_fit([[0.5, 0.5], [0.9]], 2 * start + 100) == 100  # the first lane takes 2 * start + 100 * 1.0
    assert steps_that_fit([[0.5, 0.5], [1.4]], 2 * start + 100) == 80  # now the second: start + 80 * 1.4 < 40 + 100


@pytest.mark.parametrize("seconds", [150.0, 213.7, 350.0])
def test_one_more_step_of_ten_would_not_fit(seconds: float) -> None:
    lanes = [[0.31, 0.52], [0.77]]
    steps = steps_that_fit(lanes, seconds)
    needed = [max(demo_runs.START_SECONDS * len(lane) + n * sum(lane) for lane in lanes) for n in (steps, steps + 10)]
    assert needed[0] <= seconds < needed[1]


def test_steps_stay_within_bounds() -> None:
    assert steps_that_fit([[5.0]], 60) == demo_runs.FEWEST_STEPS
    assert steps_that_fit([[1e-4]], 1000) == demo_runs.MOST_STEPS


def test_lanes_are_as_even_as_they_can_be() -> None:
    for seconds in itertools.product((0.4, 0.5, 0.8), repeat=3):
        planned = [PlannedRun(str(k), (), s) for k, s in enumerate(seconds)]
        lanes = deal(planned, 2)
        assert sorted(run.name for lane in lanes for run in lane) == ["0", "1", "2"]
        longest = max(sum(run.seconds_per_step for run in lane) for lane in lanes)
        best = min(max(sum(part), sum(seconds) - sum(part)) for part in itertools.combinations(seconds, 2))
        assert longest == pytest.approx(best)
    assert len(deal(RUNS, 1)) == 1


def test_the_plan_says_how_long_each_takes() -> None:
    text = PLAN.describe(128)
    assert "70 steps of batch 128 for every method" in text
    assert f"clip {70 * RUNS[0].seconds_per_step:.0f} s" in text


def test_the_page_says_what_the_teacher_is_and_claims_nothing_for_one_seed() -> None:
    config = load_config(None, preset="demo")
    held_out = {name: {"accuracy": 0.5, "commonest_class": 0.25} for name in demo.ATTRIBUTES}
    recipe = {"steps": 600, "batch_size": 32, "scenes": 3000}
    card = {"what": "It is not DINOv3.", "parameters": 1, "seconds": 60.0, "recipe": recipe, "held_out": held_out}
    text = " ".join(demo.notes(config, PLAN, card))
    assert "It is not DINOv3." in text
    assert "colour 50% (commonest class: 25%)" in text
    assert "one seed" in text
    assert "generated" in text
    assert f"{70 * config.train.batch_size:,} pairs" in text


def test_the_number_of_threads_is_one_or_all() -> None:
    before = torch.get_num_threads()
    try:
        found = demo.fastest_threads()
        assert found in {1, min(before, demo_runs.cores())}
        assert torch.get_num_threads() == found
    finally:
        torch.set_num_threads(before)


# ---- its processes ---------------------------------------------------------------------------------------------------


def child(folder: Path, code: str) -> Child:
    log_file = folder / "run.log"
    stream = open(log_file, "ab")  # noqa: SIM115 - the child closes it
    process = subprocess.Popen([sys.executable, "-c", code], stdout=stream, stderr=stream, start_new_session=True)
    return Child(RunFolder(folder / "run"), process, log_file, stream)


def test_a_failed_training_is_one_line_with_its_last_word(tmp_path: Path) -> None:
    started = child(tmp_path, "print('error: the loss is nan'); raise SystemExit(1)")
    started.process.wait()
    with pytest.raises(PipeError, match=r"ended with code 1 \(error: the loss is nan\), .*run\.log"):
        started.ended()


def test_a_training_that_left_no_model_has_failed_whatever_its_code(tmp_path: Path) -> None:
    started = child(tmp_path, "pass")
    started.process.wait()
    with pytest.raises(PipeError, match="ended with code 0"):
        started.ended()


def test_progress_is_read_from_the_metrics_even_while_a_line_is_written(tmp_path: Path) -> None:
    started = child(tmp_path, "pass")
    started.folder.path.mkdir()
    assert started.new_steps() == 0
    started.folder.metrics.write_text('{"step": 5, "x": 1}\n{"step": 10}\n{"ste')
    assert started.new_steps() == 10
    assert started.new_steps() == 0
    demo_runs.stop([started])


def test_ctrl_c_stops_the_trainings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Child] = []

    def start(*_: Any) -> Child:
        started.append(child(tmp_path, "import time; time.sleep(60)"))
        return started[-1]

    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Child, "start", start)
    monkeypatch.setattr(demo_runs.time, "sleep", interrupted)
    with pytest.raises(Stopped):
        demo_runs.train_all(load_config(None, preset="demo", sets=[f"workspace={tmp_path}"]), PLAN, tmp_path)
    assert len(started) == 2
    assert all(each.process.poll() is not None for each in started)


# ---- all of it -------------------------------------------------------------------------------------------------------


def test_the_quick_demo_runs_from_images_to_a_page_and_reuses_what_it_finds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    two = (RUNS[0], RUNS[2])  # a process takes as long to start as it trains here
    monkeypatch.setattr(demo_runs, "RUNS", two)
    out = tmp_path / "demo"
    demo.run(out, quick=True)
    workspace = Workspace(out)
    assert [run.name for run in workspace.all_runs() if run.finished] == sorted(run.name for run in two)
    assert {read_json(run.record)["samples_seen"] for run in workspace.all_runs()} == {demo.QUICK.steps * 32}  # type: ignore[operator]
    page = (workspace.report / "index.html").read_text()
    assert "not DINOv3" in page
    assert "one seed" in page
    assert "dinorankclip" in capsys.readouterr().out

    # Nothing is made twice: a second call that tried to draw, teach, index or train would fail here.
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("made again")

    evaluated: list[list[str]] = []
    monkeypatch.setattr(demo, "evaluate_all", lambda _, plan, __: evaluated.append([run.name for run in plan.runs]))
    for module, name in ((demo, "write_scenes"), (demo, "train_scene_teacher"), (Child, "start")):
        monkeypatch.setattr(module, name, never)
    demo.run(out, quick=True)
    assert evaluated == [[run.name for run in two]]
