"""Processes that train together: one that fails or is asked to stop takes all along, at the same step, in one line.

Part of `gloo_processes`. The loop is the real one, around a toy model.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from toy_training import (
    ROWS,
    STEPS,
    ToyModel,
    ToyObjective,
    batch_of,
    batches,
    labelled_images,
    make,
    outcome,
    stopping_when,
    zero_shot_of,
)

from pipeline.errors import PipeError
from pipeline.training import checkpoint
from pipeline.training.checkpoint import checkpoints, newest_whole
from pipeline.training.resume import begin
from pipeline.training.tracking import read_metrics
from pipeline.training.validation import even_batches, validate, validation_steps
from pipeline.training.validation_pairs import Captions


def as_one_of(number: int, world: int) -> dict[str, Any]:
    """One process's part: every case, what it ended with and where."""
    found: dict[str, Any] = {}
    shared = [tempfile.mkdtemp() if number == 0 else None]
    dist.broadcast_object_list(shared)
    folder = Path(str(shared[0]))
    for name, case in CASES.items():
        found |= {f"{name}/{key}": value for key, value in case(folder / name, number == world - 1).items()}
    if number == 0:
        labelled_images(folder / "shapes")
    dist.barrier()
    found |= zero_shot_of(folder / "shapes").measure(ToyModel(), torch.device("cpu"))
    return found | {f"validation/{key}": value for key, value in _validated(number, world).items()}


def _ends(training: Any, ended: str) -> dict[str, Any]:
    weights = torch.cat([p.detach().flatten() for p in training.objective.parameters()])
    saved = [path.name for path in checkpoints(training.folder.checkpoints)]
    return {"ended": ended, "step": training.step, "weights": weights, "saved": saved}


def _unreadable_share(folder: Path, last: bool) -> dict[str, Any]:
    training = make(folder)
    return _ends(training, outcome(training, batches(training, unreadable=set(range(ROWS)) if last else set())))


def _error_while_reading(folder: Path, last: bool) -> dict[str, Any]:
    training = make(folder)

    def source() -> Any:
        for batch in batches(training):
            if last and batch.step == 6:
                raise PipeError("row 3 has a checksum that is wrong", where="shard 0", fix="pipe cache verify")
            yield batch

    return _ends(training, outcome(training, source()))


def _loss_of_one_is_nan(folder: Path, last: bool) -> dict[str, Any]:
    training = make(folder, spoil=lambda progress, loss: loss * float("nan") if last and progress >= 0.5 else loss)
    return _ends(training, outcome(training, batches(training)))


def _pixels_of_one_are_nan(folder: Path, last: bool) -> dict[str, Any]:
    """Every process's loss would be nan where features are gathered; here the gradient's norm is."""
    training = make(folder)

    def source() -> Any:
        for batch in batches(training):
            if last and batch.step == 6:
                batch.images[1] = float("nan")
            yield batch

    return _ends(training, outcome(training, source()))


def _explodes(folder: Path, last: bool) -> dict[str, Any]:
    settings = {"total_steps": 60, "explosion_factor": 5.0, "explosion_steps": 3, "checkpoint_every": 31}
    training = make(folder, spoil=lambda progress, loss: 100 * loss if last and progress >= 0.5 else loss, **settings)
    return _ends(training, outcome(training, batches(training)))


def _disk_is_full(folder: Path, last: bool) -> dict[str, Any]:
    def full(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    training = make(folder)
    before, calls = checkpoint.save_file, []
    checkpoint.save_file = lambda *a: (calls.append(1), before(*a) if len(calls) <= 2 else full())
    try:
        return _ends(training, outcome(training, batches(training)))
    finally:
        checkpoint.save_file = before


def _stopped_and_resumed(folder: Path, last: bool) -> dict[str, Any]:
    """One process gets a signal at step 7; one row cannot be read."""
    gone = {20}
    whole = make(folder / "whole")
    assert outcome(whole, batches(whole, unreadable=gone)) == "done"
    cut = make(folder / "cut")
    with stopping_when(lambda: last and cut.step == 7):
        ended = outcome(cut, batches(cut, unreadable=gone))
    found = {"cut/" + key: value for key, value in _ends(cut, ended).items()}
    again = make(folder / "cut")
    begin(again, newest_whole(again.folder.checkpoints))
    assert outcome(again, batches(again, unreadable=gone)) == "done"
    files = {}
    for of, training in (("whole", whole), ("again", again)):
        for name, path in (("metrics", training.folder.metrics), ("skipped", training.folder.skipped)):
            lines = [{k: v for k, v in line.items() if k != "time"} for line in read_metrics(path)]
            files[f"{of}/{name}"] = str(lines)
    return found | _ends(again, "done") | {"whole": _ends(whole, "done")["weights"], **files}


CASES = {
    "unreadable": _unreadable_share,
    "reading": _error_while_reading,
    "nan": _loss_of_one_is_nan,
    "pixels": _pixels_of_one_are_nan,
    "explosion": _explodes,
    "disk": _disk_is_full,
    "resumed": _stopped_and_resumed,
}


def _validated(number: int, world: int) -> dict[str, float]:
    """Two captions an image, rows that share an image, one row that cannot be read; an uneven last batch."""
    rows, model = np.arange(23), ToyModel()
    objective = ToyObjective(lambda progress, loss: loss)
    tokenizer = lambda texts: torch.tensor([[int(x) for x in text.split()] for text in texts]).reshape(-1, 2)  # noqa: E731
    hashes = [str(row // 2) if row < 8 else str(row) for row in rows]
    captions = Captions.of(rows, hashes, lambda row: [f"{row} {row % 7}", f"{row % 5} 1"], tokenizer)
    steps = validation_steps(rows, batch_size=8, rank=number, world_size=world)
    read = (batch_of(step.step, 0, step.rows, unreadable={11}) for step in steps)
    return validate(objective, model, read, torch.device("cpu"), captions=captions, even=even_batches(len(rows), 8))


WORLDS = pytest.mark.parametrize("world", [2, 4])

STOPS = {
    "unreadable": (0, r"no image of a whole batch could be read at step 0 on process {w} of {w}, rows [\d, ]+.*gone"),
    "reading": (
        6,
        r"row 3 has a checksum that is wrong \(at step 6 on process {w} of {w}\), shard 0; pipe cache verify",
    ),
    "nan": (6, r"the loss is nan at step 6 on process {w} of {w}, rows [\d, ]+.*step-00000005"),
    "pixels": (6, r"is nan at step 6 on process {w} of {w}, rows \d+, whose values are not finite.*step-00000005"),
    "explosion": (
        32,
        r"above 5 times its median [\d.]+ for 3 steps in a row, at step 32 on process {w} of {w}.*checkpoint: none",
    ),
    "disk": (10, r"cannot save a checkpoint: .*No space left.*step-00000005"),
}


@WORLDS
@pytest.mark.parametrize("case", STOPS)
def test_what_one_process_meets_stops_all_before_the_update_with_one_line(gloo, world, case):
    found = gloo["test_training_distributed"][world]
    step, words = STOPS[case]
    ends = [of[f"{case}/ended"] for of in found]
    assert [of[f"{case}/step"] for of in found] == [step] * world
    assert all(torch.equal(of[f"{case}/weights"], found[0][f"{case}/weights"]) for of in found)
    assert ends[1:] == ["SystemExit: 1"] * (world - 1)  # they have nothing to add
    assert ends[0].startswith("Agreed: ")
    assert re.search(words.replace("{w}", str(world)), ends[0]), ends[0]
    assert torch.isfinite(found[0][f"{case}/weights"]).all()
    # At step 31 of the explosion one was due: what may be spoilt pushes out no good one.
    saved = {"unreadable": [], "explosion": []}.get(case, ["step-00000005"])
    assert [of[f"{case}/saved"] for of in found] == [saved] * world


@WORLDS
def test_a_signal_to_one_process_stops_all_and_the_resumed_run_equals_an_undisturbed_one(gloo, world):
    for of in gloo["test_training_distributed"][world]:
        assert of["resumed/cut/ended"] == f"Stopped: training at step 7 of {STEPS}; go on with --resume"
        assert of["resumed/cut/saved"] == ["step-00000005", "step-00000007"]
        assert torch.equal(of["resumed/weights"], of["resumed/whole"])
        assert of["resumed/again/metrics"] == of["resumed/whole/metrics"] != "[]"
        assert of["resumed/again/skipped"] == of["resumed/whole/skipped"] != "[]"


@WORLDS
def test_validation_of_several_processes_equals_that_of_one(gloo, world):
    alone = _validated(0, 1)
    assert {"distance", "i2t_r1", "t2i_r10", "t2i_median_rank"} <= set(alone)
    assert 0 < alone["t2i_r1"] < 1
    for of in gloo["test_training_distributed"][world]:
        shared = {key.removeprefix("validation/"): value for key, value in of.items() if key.startswith("validation/")}
        recall = {key: value for key, value in alone.items() if key != "distance"}
        assert {key: shared[key] for key in recall} == pytest.approx(recall)


@WORLDS
def test_zero_shot_of_several_processes_equals_that_of_one(gloo, tmp_path, world):
    labelled_images(tmp_path)
    alone = zero_shot_of(tmp_path).measure(ToyModel(), torch.device("cpu"))
    assert 0 < alone["zero_shot/shapes/top1"] < 1
    for of in gloo["test_training_distributed"][world]:
        assert of["zero_shot/shapes/top1"] == alone["zero_shot/shapes/top1"]
