"""The loop in one process, around a toy model: signals at awkward moments, other numbers of processes, what is read."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from toy_training import STEPS, batches, make, outcome

from pipeline.errors import PipeError
from pipeline.training import checkpoint, resume
from pipeline.training.checkpoint import checkpoints, newest_whole
from pipeline.training.loop import Training
from pipeline.training.tracking import read_metrics


def lines(training: Training) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if k != "time"} for line in read_metrics(training.folder.metrics)]


def resumed(folder: Path) -> Training:
    training = make(folder)
    resume.begin(training, newest_whole(training.folder.checkpoints))
    return training


def same(a: Training, b: Training) -> bool:
    pairs = zip(a.objective.parameters(), b.objective.parameters(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs) and lines(a) == lines(b)


def ask_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("moment", ["validation", "saving"])
def test_a_signal_at_an_awkward_moment_waits_for_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    figures, asked = {"loss": 2.0}, iter([True])
    whole = make(tmp_path / "whole")
    assert outcome(whole, batches(whole), lambda: dict(figures)) == "done"
    cut = make(tmp_path / "cut")

    def validate() -> dict[str, float]:
        if moment == "validation" and next(asked, False):
            ask_to_stop()
        return dict(figures)

    original = checkpoint.save_file

    def save_file(*arguments: object) -> None:
        if moment == "saving" and next(asked, False):
            ask_to_stop()
        original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    step = {"validation": 4, "saving": 5}[moment]
    assert outcome(cut, batches(cut), validate) == f"Stopped: training at step {step} of {STEPS}; go on with --resume"
    assert [path.name for path in checkpoints(cut.folder.checkpoints)] == [f"step-{step:08d}"]
    again = resumed(tmp_path / "cut")
    assert outcome(again, batches(again), validate) == "done"
    assert same(again, whole)


def test_a_signal_before_the_first_step_after_a_resume_loses_nothing(tmp_path: Path) -> None:
    """The step is saved already; writing it again could only lose it."""
    cut = make(tmp_path / "cut", total_steps=5)
    outcome(cut, batches(cut))
    (kept,) = checkpoints(cut.folder.checkpoints)
    before = kept.stat().st_ino
    again = resumed(tmp_path / "cut")

    def source() -> object:
        ask_to_stop()
        yield from batches(again)

    assert "Stopped: training at step 5" in outcome(again, source())  # type: ignore[arg-type]
    assert kept.stat().st_ino == before  # the very files


def test_another_number_of_processes_goes_on_and_says_what_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make(tmp_path, total_steps=5)
    outcome(first, batches(first))
    (saved,) = checkpoints(first.folder.checkpoints)
    body = json.loads((saved / "state.json").read_text()) | {"world_size": 2}
    (saved / "state.json").write_text(json.dumps(body))
    said: list[str] = []
    monkeypatch.setattr(resume.log, "warning", lambda text, *values: said.append(text % values))
    again = resumed(tmp_path)
    assert said == [
        "2 processes wrote this checkpoint, 1 go on: the batches stay the same, sums are rounded differently"
    ]
    assert outcome(again, batches(again)) == "done"


def test_processes_that_see_different_checkpoints_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = make(tmp_path)
    monkeypatch.setattr(resume, "all_gather_sizes", lambda own, device: [own, 500])
    with pytest.raises(PipeError, match=r"different checkpoints \(none, step 500\).*all machines share"):
        resume.begin(training, None)


def test_a_run_without_a_checkpoint_begins_with_empty_files(tmp_path: Path) -> None:
    first = make(tmp_path, total_steps=3, checkpoint_every=99)
    first.save = lambda: None  # type: ignore[method-assign]
    outcome(first, batches(first, unreadable={1, 2}))
    assert lines(first)
    again = resumed(tmp_path)
    assert outcome(again, batches(again)) == "done"
    assert read_metrics(again.folder.skipped) == []
    steps = [line["step"] for line in lines(again) if "train/loss" in line]
    assert steps == list(range(1, STEPS + 1))


def test_a_stop_goes_before_an_error_of_the_data_workers(tmp_path: Path) -> None:
    """A signal to all processes of a job may have hit them too; what is trained is whole and is saved."""
    training = make(tmp_path)

    def source() -> object:
        yield from list(batches(training))[:3]
        ask_to_stop()
        raise PipeError("a process that reads batches was killed")

    assert "Stopped: training at step 3" in outcome(training, source())  # type: ignore[arg-type]
    assert [path.name for path in checkpoints(training.folder.checkpoints)] == ["step-00000003"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory_names_step_rows_and_checkpoint(tmp_path: Path, error: Exception) -> None:
    def spoil(progress: float, loss: torch.Tensor) -> torch.Tensor:
        if progress >= 0.5:
            raise error
        return loss

    training = make(tmp_path, spoil=spoil)
    with (
        pytest.raises(PipeError, match=r"out of memory at step 6, rows [\d, ]+; lower train\.batch.*step-00000005"),
        training.ending_together(),
    ):
        training.run(batches(training), dict)
