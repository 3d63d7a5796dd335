"""Checkpoints are whole or absent, restore exactly, and say what is wrong with a damaged one."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
from torch import nn

from pipeline.errors import PipeError
from pipeline.training import checkpoint as subject
from pipeline.training.checkpoint import (
    State,
    checkpoints,
    clear_up,
    load_checkpoint,
    newest_whole,
    read_state,
    save_checkpoint,
)
from pipeline.training.schedule import parameter_groups


def make(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    groups = parameter_groups(model.named_parameters(), weight_decay=0.1)
    return model, torch.optim.AdamW(groups, lr=0.01)


def train(model, optimizer, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        loss = model(torch.randn(16, 4, generator=generator)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def state(step):
    return State(
        step=step,
        samples=16 * step,
        seconds=1.5,
        world_size=1,
        scaler={},
        config={"train": {"lr": 0.01}},
        data={"rows": 3},
    )


def test_a_restored_run_continues_bit_for_bit(tmp_path):
    model, optimizer = make()
    train(model, optimizer, 5, seed=1)
    saved = save_checkpoint(tmp_path, state(5), model, optimizer, keep=2)
    train(model, optimizer, 5, seed=2)
    other, other_optimizer = make(seed=9)
    load_checkpoint(saved, other, other_optimizer)
    train(other, other_optimizer, 5, seed=2)
    for (name, a), (_, b) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_the_state_comes_back_as_it_was(tmp_path):
    model, optimizer = make()
    train(model, optimizer, 1, seed=1)
    assert read_state(save_checkpoint(tmp_path, state(7), model, optimizer, keep=2)) == state(7)


def test_only_the_newest_are_kept(tmp_path):
    model, optimizer = make()
    train(model, optimizer, 1, seed=1)
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, state(step), model, optimizer, keep=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000002", "step-00000010"]


def test_a_kill_while_saving_leaves_the_last_good_one(tmp_path, monkeypatch):
    model, optimizer = make()
    train(model, optimizer, 1, seed=1)
    save_checkpoint(tmp_path, state(1), model, optimizer, keep=2)

    def killed(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(subject.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, state(2), model, optimizer, keep=2)
    monkeypatch.undo()
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000001"]
    save_checkpoint(tmp_path, state(2), model, optimizer, keep=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000001", "step-00000002"]


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    model, optimizer = make()
    train(model, optimizer, 1, seed=1)

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(subject, "save_file", full)
    with pytest.raises(PipeError, match=r"cannot save a checkpoint.*No space left"):
        save_checkpoint(tmp_path, state(1), model, optimizer, keep=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", ["objective.safetensors", "optimizer.safetensors"])
def test_a_flipped_bit_is_found_before_anything_is_loaded(tmp_path, file):
    model, optimizer = make()
    train(model, optimizer, 1, seed=1)
    saved = save_checkpoint(tmp_path, state(1), model, optimizer, keep=2)
    data = bytearray((saved / file).read_bytes())
    data[-3] ^= 4
    (saved / file).write_bytes(data)
    with pytest.raises(PipeError, match=f"{file} is damaged"):
        read_state(saved)


@pytest.mark.parametrize("text", ["{broken", "[]", '{"version": 1}', '{"version": 1, "sha256": {}, "step": 5}'])
def test_a_damaged_state_says_so_and_what_to_do(tmp_path, text):
    objective, optimizer = make()
    made = save_checkpoint(tmp_path, state(5), objective, optimizer, keep=2)
    (made / "state.json").write_text(text)
    with pytest.raises(PipeError, match=r"state\.json is damaged or missing"):
        read_state(made)


def test_another_version_is_refused(tmp_path):
    model, optimizer = make()
    train(model, optimizer, 1, seed=1)
    saved = save_checkpoint(tmp_path, state(1), model, optimizer, keep=2)
    body = json.loads((saved / "state.json").read_text()) | {"version": 99}
    (saved / "state.json").write_text(json.dumps(body))
    with pytest.raises(PipeError, match="another version"):
        read_state(saved)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    model, optimizer = make()
    train(model, optimizer, 1, seed=1)
    saved = save_checkpoint(tmp_path, state(1), model, optimizer, keep=2)
    other = nn.Linear(4, 8)
    with pytest.raises(PipeError, match="does not fit this model"):
        load_checkpoint(saved, other, torch.optim.AdamW(parameter_groups(other.named_parameters(), weight_decay=0)))


# ---- which one a run goes on from ------------------------------------------------------------------------------------


def spoil(checkpoint):
    data = bytearray((checkpoint / "optimizer.safetensors").read_bytes())
    data[-3] ^= 4
    (checkpoint / "optimizer.safetensors").write_bytes(data)


def test_a_damaged_newest_checkpoint_is_gone_back_from_and_set_aside(tmp_path):
    model, optimizer = make()
    train(model, optimizer, 1, seed=1)
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, state(step), model, optimizer, keep=3)
    spoil(tmp_path / "step-00000003")
    (tmp_path / "step-00000002" / "objective.safetensors").unlink()
    found = newest_whole(tmp_path)
    assert (found.path.name, found.state) == ("step-00000001", state(1))
    (tmp_path / ".step-00000004.tmp").mkdir()
    (tmp_path / ".step-00000001.old").mkdir()
    clear_up(tmp_path, found.damaged)
    left = ["damaged-step-00000002", "damaged-step-00000003", "step-00000001"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    assert newest_whole(tmp_path).damaged == ()


def test_where_every_checkpoint_is_damaged_nothing_is_thrown_away(tmp_path):
    model, optimizer = make()
    train(model, optimizer, 1, seed=1)
    assert newest_whole(tmp_path) is None
    for step in (1, 2):
        spoil(save_checkpoint(tmp_path, state(step), model, optimizer, keep=2))
    with pytest.raises(PipeError, match=r"all 2 checkpoints are damaged.*remove this folder"):
        newest_whole(tmp_path)
    assert len(checkpoints(tmp_path)) == 2


@pytest.mark.parametrize(("keep", "left"), [(1, [2, 5]), (2, [1, 2, 5])])
def test_pruning_never_takes_the_one_just_written(tmp_path, keep, left):
    """A later one may be there that nobody goes on from."""
    model, optimizer = make()
    train(model, optimizer, 1, seed=1)
    for step in (1, 5):
        save_checkpoint(tmp_path, state(step), model, optimizer, keep=9)
    save_checkpoint(tmp_path, state(2), model, optimizer, keep=keep)
    assert [path.name for path in checkpoints(tmp_path)] == [f"step-{step:08d}" for step in left]


@pytest.mark.parametrize("number", range(6))
def test_killed_at_any_rename_a_whole_checkpoint_is_left(tmp_path, monkeypatch, number):
    """Also where the same step was saved before, and where only one is kept."""
    model, optimizer = make()
    train(model, optimizer, 1, seed=1)
    for step in (1, 2):
        save_checkpoint(tmp_path, state(step), model, optimizer, keep=2)
    calls = []

    def counted(original):
        def call(*arguments, **named):
            calls.append(1)
            if len(calls) > number:
                raise KeyboardInterrupt
            return original(*arguments, **named)

        return call

    for name, module in (("replace", subject.os), ("rmtree", subject.shutil)):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    with contextlib.suppress(KeyboardInterrupt):
        save_checkpoint(tmp_path, state(2), model, optimizer, keep=1)
    monkeypatch.undo()
    assert newest_whole(tmp_path).state.step in (1, 2)


def test_a_state_without_the_fields_that_came_later_is_read(tmp_path):
    model, optimizer = make()
    train(model, optimizer, 1, seed=1)
    saved = save_checkpoint(tmp_path, state(1), model, optimizer, keep=2)
    body = json.loads((saved / "state.json").read_text())
    del body["losses"], body["above"]
    (saved / "state.json").write_text(json.dumps(body))
    assert read_state(saved) == state(1)
