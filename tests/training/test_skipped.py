"""Rows that could not be read: named once, written down each time, counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.training import skipped as subject
from pipeline.training.skipped import Skip, Skipped
from pipeline.training.tracking import cut_back, read_metrics


def test_a_row_is_named_once_whatever_the_epochs_sessions_and_splits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(subject.log, "warning", lambda text, *values: said.append(text % values))
    path = tmp_path / "skipped.jsonl"
    of = Skipped(path)
    of.add([Skip(3, 0, "train", 8, "gone"), Skip(2, 0, "train", 5, "gone"), Skip(3, 0, "val", 8, "torn")])
    of.add([Skip(9, 1, "train", 5, "gone")])
    assert said == ["skipped row 5: gone", "skipped row 8: gone", "skipped val row 8: torn"]
    cut_back(path, to_step=3)
    again = Skipped(path)
    again.read()
    again.add([Skip(9, 1, "train", 5, "gone")])
    assert len(said) == 3
    assert [(line["step"], line["row"]) for line in read_metrics(path)] == [(2, 5), (3, 8), (3, 8), (9, 5)]
    assert again.summary() == {"train": {"rows": 2, "times": 3}, "val": {"rows": 1, "times": 1}} == of.summary()


def test_a_sick_disk_does_not_fill_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(subject.log, "warning", lambda text, *values: said.append(text % values))
    monkeypatch.setattr(subject, "NAMED_IN_LOG", 3)
    of = Skipped(tmp_path / "skipped.jsonl")
    of.add(Skip(1, 0, "train", row, "gone") for row in range(6))
    assert said[:3] == [f"skipped row {row}: gone" for row in range(3)]
    assert said[3].startswith("further rows")
    assert len(said) == 4
    assert of.summary() == {"train": {"rows": 6, "times": 6}}


def test_processes_that_do_not_write_do_nothing() -> None:
    of = Skipped(None)
    of.read()
    of.add([Skip(1, 0, "train", 1, "gone")])
    assert of.summary() == {}
