"""A run that was cut off goes on as if it had not been, and never over anything else."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from train_runs import losses, run

from pipeline.config import load_config
from pipeline.errors import PipeError, Stopped
from pipeline.run_folder import Workspace
from pipeline.training.tracking import read_metrics


def test_stopped_and_resumed_equals_undisturbed(folder, monkeypatch):
    whole = run(folder, name="whole")
    from pipeline.training.loop import Training

    original = Training._any_process
    monkeypatch.setattr(Training, "_any_process", lambda self, flag: original(self, flag or self.step == 4))
    with pytest.raises(Stopped, match="step 4 of 6"):
        run(folder, name="cut")
    monkeypatch.undo()
    cut = run(folder, name="cut", resume=True)
    assert losses(cut) == losses(whole)
    a, b = load_file(whole.weights), load_file(cut.weights)
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_killed_in_mid_run_and_resumed_equals_undisturbed(folder):
    """SIGKILL of a real process, after its first checkpoint."""
    settings = ["--set", "train.max_steps=40", "--set", "train.checkpoint_every=5", "--set", "train.validate_every=40"]
    command = [sys.executable, "-m", "stages.cli", "train", *settings, "--name"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, "cut"], cwd=folder, env=environment, stderr=subprocess.PIPE)
    checkpoints = folder / "workspace" / "runs" / "cut" / "checkpoints"
    deadline = time.monotonic() + 90
    while not list(checkpoints.glob("step-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(checkpoints.glob("step-*"))
    assert not (folder / "workspace" / "runs" / "cut" / "model.safetensors").exists()
    for name, extra in (("cut", ["--resume"]), ("whole", [])):
        subprocess.run([*command, name, *extra], cwd=folder, env=environment, check=True, capture_output=True)
    runs = Workspace(folder / "workspace")
    assert losses(runs.run("cut")) == losses(runs.run("whole"))
    a, b = (load_file(runs.run(name).weights) for name in ("cut", "whole"))
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_sigterm_saves_and_exits_with_75(folder):
    command = [sys.executable, "-m", "stages.cli", "train", "--set", "train.max_steps=100000", "--name", "cut"]
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)
    metrics = folder / "workspace" / "runs" / "cut" / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while len(read_metrics(metrics)) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "go on with --resume" in errors
    assert "Traceback" not in errors
    assert list((metrics.parent / "checkpoints").glob("step-*"))


def test_an_existing_run_is_never_overwritten(folder):
    done = run(folder)
    before = done.weights.read_bytes()
    with pytest.raises(PipeError, match=r"exists already.*--resume"):
        run(folder)
    run(folder, resume=True)
    assert done.weights.read_bytes() == before


def test_a_resume_with_another_configuration_names_the_key(folder):
    run(folder)
    (folder / "workspace" / "runs" / "run" / "model.safetensors").unlink()
    with pytest.raises(PipeError, match=r"train\.lr is 0\.5 now and was 0\.001"):
        run(folder, resume=True, sets=["train.lr=0.5"])


def test_a_run_does_not_go_on_over_other_data(folder, monkeypatch):
    """A manifest that has grown meanwhile, as indexing allows, would make other batches."""
    from pipeline.training.loop import Training
    from stages import index

    config = load_config(folder / "pipe.yaml")
    index.run(config)
    original = Training._any_process
    monkeypatch.setattr(Training, "_any_process", lambda self, flag: original(self, flag or self.step == 4))
    with pytest.raises(Stopped):
        run(folder, name="cut", **{"train.method": "clip"})
    monkeypatch.undo()
    shutil.copy(folder / "tars" / "00000.tar", folder / "tars" / "00002.tar")
    index.run(config)
    before = (folder / "workspace" / "runs" / "cut" / "record.json").read_bytes()
    with pytest.raises(PipeError, match=r"not what the run began with: manifest_fingerprint is .* now and was"):
        run(folder, name="cut", resume=True, **{"train.method": "clip"})
    assert (folder / "workspace" / "runs" / "cut" / "record.json").read_bytes() == before
