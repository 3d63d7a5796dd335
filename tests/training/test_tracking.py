"""metrics.jsonl survives kills and holds no step twice."""

from __future__ import annotations

import json

from pipeline.run_folder import RunFolder
from pipeline.training.tracking import Tracker, cut_back, read_metrics


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
