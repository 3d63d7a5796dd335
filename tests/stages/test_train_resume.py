"""A run that was cut off goes on as if it had not been, and never over anything else."""

from __future__ import annotations

import os
import shutil
import signal
import socket
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


def test_stopped_and_resumed_equals_undisturbed_also_from_the_checkpoint_before(folder, monkeypatch):
    """The newest checkpoint is damaged: the steps since the one before are done again."""
    whole = run(folder, name="whole")
    from pipeline.training.loop import Training

    original = Training._any_process
    monkeypatch.setattr(Training, "_any_process", lambda self, flag: original(self, flag or self.step == 4))
    with pytest.raises(Stopped, match="step 4 of 6"):
        run(folder, name="cut")
    monkeypatch.undo()
    newest = Workspace(folder / "workspace").run("cut").checkpoints / "step-00000004"
    (newest / "objective.safetensors").write_bytes(b"torn")
    cut = run(folder, name="cut", resume=True)
    assert losses(cut) == losses(whole)
    a, b = load_file(whole.weights), load_file(cut.weights)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert (newest.parent / "damaged-step-00000004").is_dir()


def _command(name, *settings):
    return [sys.executable, "-m", "stages.cli", "train", "--name", name, *(x for s in settings for x in ("--set", s))]


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_for(there, *processes):
    deadline = time.monotonic() + 120
    while not there() and all(p.poll() is None for p in processes) and time.monotonic() < deadline:
        time.sleep(0.01)


def test_killed_in_mid_run_and_resumed_equals_undisturbed_with_and_without_workers(folder):
    """SIGKILL of a real process, after its first checkpoint; the resumed one has workers, the undisturbed one none."""
    settings = ["train.max_steps=40", "train.checkpoint_every=5", "train.validate_every=40"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(_command("cut", *settings), cwd=folder, env=environment, stderr=subprocess.PIPE)
    cut = Workspace(folder / "workspace").run("cut")
    _wait_for(lambda: list(cut.checkpoints.glob("step-*")), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(cut.checkpoints.glob("step-*"))
    assert not cut.weights.exists()
    resumed = [*_command("cut", *settings, "data.workers=2"), "--resume"]
    for command in (resumed, _command("whole", *settings)):
        subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    whole = Workspace(folder / "workspace").run("whole")
    assert losses(cut) == losses(whole)
    a, b = (load_file(of.weights) for of in (cut, whole))
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_sigterm_to_one_of_two_processes_saves_and_ends_both_with_75(folder):
    """While it runs, nobody else may train the run; its state is JSON and safetensors alone."""
    port = _free_port()
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | place
    processes = [
        subprocess.Popen(
            _command("cut", "train.max_steps=100000", "data.workers=1"),
            cwd=folder,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    cut = Workspace(folder / "workspace").run("cut")
    try:
        _wait_for(lambda: len(read_metrics(cut.metrics)) >= 2, *processes)
        with pytest.raises(PipeError, match=f"run cut is being trained by process {processes[0].pid} on "):
            run(folder, name="cut", resume=True)
        processes[1].send_signal(signal.SIGTERM)
        errors = [process.communicate(timeout=60)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [75, 75], errors
    assert all("go on with --resume" in text and "Traceback" not in text for text in errors)
    saved = {path.suffix for path in cut.checkpoints.rglob("*") if path.is_file()}
    assert saved == {".json", ".safetensors"}


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
