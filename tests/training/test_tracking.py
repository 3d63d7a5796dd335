"""metrics.jsonl survives kills and holds no step twice."""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest

from pipeline.errors import PipeError
from pipeline.run_folder import RunFolder
from pipeline.training.tracking import Tracker, cut_back, read_metrics, refuse_without_wandb


def test_lines_are_json_and_non_finite_values_become_null(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with Tracker(folder) as tracker:
        tracker.write(step=1, samples=8, epoch=0.5, seconds=1.25, values={"train/loss": 2.0, "train/bad": float("nan")})
    line = json.loads(folder.metrics.read_text())
    assert line == {"step": 1, "samples": 8, "epoch": 0.5, "time": 1.25, "train/loss": 2.0, "train/bad": None}
    assert list(folder.tensorboard.iterdir())


def test_tensorboard_holds_the_same_figures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = RunFolder(tmp_path / "run")
    with Tracker(folder) as tracker:
        for step in (1, 2):
            tracker.write(step=step, samples=8, epoch=0.5, seconds=1, values={"train/loss": 0.5 * step})
    events = EventAccumulator(str(folder.tensorboard))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 0.5), (2, 1.0)]


def test_a_tracker_without_a_folder_writes_nothing(tmp_path):
    with Tracker(None) as tracker:
        tracker.write(step=1, samples=8, epoch=0.5, seconds=1, values={"a": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_cutting_back_drops_later_steps_and_a_torn_last_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s, "v": s}) + "\n" for s in (1, 2, 3, 4)) + '{"step": 5, "v')
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4]
    cut_back(path, to_step=2)
    assert path.read_text() == '{"step": 1, "v": 1}\n{"step": 2, "v": 2}\n'


def test_metrics_of_a_run_that_has_none_are_empty(tmp_path):
    assert read_metrics(tmp_path / "none.jsonl") == []


class StandInForWandb(ModuleType):
    """What the tracker asks of wandb, written down."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.started, self.logged, self.ended, self.refuse = [], [], [], False

    def init(self, **asked):
        if self.refuse:
            raise self.Error("No API key\nconfigured.")
        self.started.append(asked)
        return self

    def define_metric(self, *args, **kwargs):
        pass

    def log(self, values):
        self.logged.append(values)

    def finish(self, exit_code):
        self.ended.append(exit_code)


@pytest.fixture
def wandb(monkeypatch):
    stand_in = StandInForWandb()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    return stand_in


def test_wandb_gets_the_same_figures_and_a_resume_goes_on_in_the_same_run(tmp_path, wandb):
    folder = RunFolder(tmp_path / "run")
    for first in (True, False):
        with Tracker(folder, wandb="project", config={"seed": 1}, first=first) as tracker:
            tracker.write(step=1, samples=8, epoch=0.5, seconds=1, values={"train/loss": 2.0})
    assert [found["project"] for found in wandb.started] == ["project"] * 2
    assert wandb.started[0]["id"] == wandb.started[1]["id"]
    assert (wandb.started[0]["name"], wandb.started[0]["config"]) == ("run", {"seed": 1})
    assert wandb.logged == [{"step": 1, "samples": 8, "epoch": 0.5, "time": 1, "train/loss": 2.0}] * 2
    assert wandb.ended == [0, 0]


def test_a_run_that_begins_anew_is_another_run_of_wandb(tmp_path, wandb):
    for _ in range(2):
        with Tracker(RunFolder(tmp_path / "run"), wandb="project", first=True):
            pass
    assert wandb.started[0]["id"] != wandb.started[1]["id"]


def test_wandb_is_told_that_a_run_failed(tmp_path, wandb):
    with pytest.raises(RuntimeError), Tracker(RunFolder(tmp_path / "run"), wandb="project"):
        raise RuntimeError
    assert wandb.ended == [1]


def test_wandb_that_cannot_start_is_one_line(tmp_path, wandb):
    wandb.refuse = True
    with pytest.raises(PipeError, match=r"No API key configured\..*WANDB_MODE=offline"):
        Tracker(RunFolder(tmp_path / "run"), wandb="project")


def test_nothing_is_sent_where_no_project_is_named(tmp_path, wandb):
    with Tracker(RunFolder(tmp_path / "run")) as tracker:
        tracker.write(step=1, samples=8, epoch=0.5, seconds=1, values={"train/loss": 2.0})
    assert not wandb.started


def test_a_missing_wandb_is_said_before_anything_else(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refuse_without_wandb(None)
    with pytest.raises(PipeError, match="pip install wandb"):
        refuse_without_wandb("project")
