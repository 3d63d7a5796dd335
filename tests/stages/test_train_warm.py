"""`pipe train` from another model's weights (`model.init`), and with a trunk that stays (`model.freeze_trunk`)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train_runs import losses, run

from pipeline.errors import PipeError, Stopped
from pipeline.run_folder import read_json, sha256_file
from pipeline.training.tracking import read_metrics

FROZEN = ["model.freeze_trunk=true", "train.lr=1e-2"]


def stop_at(monkeypatch, step):
    from pipeline.training.loop import Training

    original = Training._any_process
    monkeypatch.setattr(Training, "_any_process", lambda self, flag: original(self, flag or self.step == step))


@pytest.fixture(scope="module")
def folder(tiny_stage_one, tmp_path_factory):
    """One for all tests here, which give their runs names of their own."""
    return Path(shutil.copytree(tiny_stage_one, tmp_path_factory.mktemp("warm") / "copy"))


@pytest.fixture(scope="module")
def trained(folder):
    """A run of clip to start from."""
    return run(folder, name="first", sets=["train.lr=3e-3"], **{"train.method": "clip"})


@pytest.fixture(scope="module")
def frozen(folder, trained):
    """An injection into its trunk, from a copy of its folder."""
    init = shutil.copytree(trained.path, folder / "init")
    return run(folder, name="frozen", sets=[f"model.init={init}", *FROZEN])


def test_an_injection_into_a_frozen_trunk_leaves_it_as_it_is(folder, trained, frozen):
    done = frozen
    before, after = load_file(trained.weights), load_file(done.weights)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {name.split(".")[0] for name in after if name not in before} == {"student", "fusion"}
    assert float(after["fusion.image.gamma"]) != 0
    lines = read_metrics(done.metrics)
    assert not [key for line in lines for key in line if key == "train/grad_norm/trunk"]
    assert len({line["train/logit_scale"] for line in lines if "train/logit_scale" in line}) == 1
    record = read_json(done.record)
    assert record["init"] == {"path": str(folder / "init"), "sha256": sha256_file(trained.weights)}
    assert record["data"]["init_sha256"] == record["init"]["sha256"]
    assert read_json(trained.record)["init"] is None


def test_a_warm_run_begins_where_the_other_ended_and_its_trunk_learns(folder, trained):
    """At γ = 0 the validation loss of step 0 is the first run's last."""
    sets = [f"model.init={trained.weights}", "train.max_steps=1", "train.lr=1e-9", "train.validate_every=1"]
    done = run(folder, name="second", sets=sets, **{"train.method": "clip"})
    last, first = ([line for line in read_metrics(of.metrics) if "val/loss" in line][-1] for of in (trained, done))
    assert first["val/info_nce"] == pytest.approx(last["val/info_nce"], abs=1e-5)
    moved = run(folder, name="third", sets=[f"model.init={trained.weights}"])
    before, after = load_file(trained.weights), load_file(moved.weights)
    assert not torch.equal(before["trunk.clip.visual.proj"], after["trunk.clip.visual.proj"])


def test_a_resumed_run_needs_the_init_no_more_but_refuses_another(folder, trained, frozen, monkeypatch):
    init, whole = folder / "init", frozen
    sets = [f"model.init={init}", *FROZEN]
    stop_at(monkeypatch, 4)
    with pytest.raises(Stopped):
        run(folder, name="cut", sets=sets)
    monkeypatch.undo()
    shutil.copy(whole.weights, init / "model.safetensors")
    with pytest.raises(PipeError, match=r"not what the run began with: init_sha256 is .* now and was"):
        run(folder, name="cut", resume=True, sets=sets)
    with pytest.raises(PipeError, match=r"model\.init is .* now and was"):
        run(folder, name="cut", resume=True, sets=[f"model.init={trained.path}", *FROZEN])
    shutil.rmtree(init)
    cut = run(folder, name="cut", resume=True, sets=sets)
    assert losses(cut) == losses(whole)
    a, b = load_file(whole.weights), load_file(cut.weights)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert read_json(cut.record)["init"] == read_json(whole.record)["init"]


def test_what_cannot_start_a_run_is_refused_before_its_folder_begins(folder, trained):
    with pytest.raises(PipeError, match=r"no such file or folder, model\.init .*nowhere"):
        run(folder, name="a", sets=["model.init=nowhere"])
    with pytest.raises(PipeError, match=r"seen as crop, and data\.view is squash"):
        run(folder, name="a", sets=[f"model.init={trained.path}", "data.view=squash"], **{"train.method": "clip"})
    sets = [f"model.init={trained.path}", "model.trunk.text_cfg.heads=1"]
    with pytest.raises(PipeError, match=r"text_cfg\.heads is 2 there and 1 in model\.trunk"):
        run(folder, name="a", sets=sets, **{"train.method": "clip"})
    with pytest.raises(PipeError, match="freeze_trunk with fusion none leaves nothing"):
        run(folder, name="a", sets=["model.freeze_trunk=true"], **{"train.method": "clip"})
    assert not (folder / "workspace" / "runs" / "a").exists()
    assert json.loads(trained.record.read_text())["finished"]
