"""`pipe train` on tiny real tars and a tiny teacher's cache: every method and variant, resume, refusals."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from pipeline.cache.reader import open_cache
from pipeline.cache.shards import index_bytes
from pipeline.config import load_config
from pipeline.console import log
from pipeline.errors import PipeError, Stopped
from pipeline.run_folder import Workspace, read_json
from pipeline.training.tracking import read_metrics
from stages import train, train_setup
from stages.train import default_name

OTHER_LAYER = "teacher.scales=[{name: fine, layer: 0, grid: 4}, {name: mid, layer: 1, grid: 2}]"
FUSIONS = ["full", "no-pyramid", "no-attention", "no-refiner", "image-only", "no-gate", "no-distill", "shuffled-cache"]


@pytest.fixture
def folder(tiny_stage_one, tmp_path):
    return Path(shutil.copytree(tiny_stage_one, tmp_path / "copy"))


def run(folder, *, name="run", resume=False, sets=(), **flags):
    config = load_config(folder / "pipe.yaml", flags=flags, sets=list(sets))
    train.run(config, name=name, resume=resume)
    return Workspace(config.workspace).run(name)


def losses(run_folder):
    return [line["train/loss"] for line in read_metrics(run_folder.metrics) if "train/loss" in line]


@pytest.mark.parametrize(
    "flags",
    [{"train.method": "clip"}, {"train.method": "rankclip"}]
    + [{"train.order": order} for order in (0, 2, 4)]
    + [{"model.fusion": "none", "train.order": 3}],
    ids=str,
)
def test_every_method_and_order_trains_and_loads(folder, flags):
    from pipeline.models.dinorankclip import load

    done = run(folder, **flags)
    record = read_json(done.record)
    assert record["finished"]
    assert record["samples_seen"] == 48
    assert all(np.isfinite(losses(done)))
    assert len(losses(done)) == 6
    model, preprocess, tokenizer = load(done.path)
    text = model.encode_text(tokenizer(["a red square"]))
    assert torch.allclose(text.norm(dim=-1), torch.ones(1), atol=1e-5)
    assert preprocess.view.size == 32


@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_fusion_variant_trains_and_loads(folder, fusion):
    from pipeline.models.dinorankclip import load

    done = run(folder, **{"model.fusion": fusion})
    model, _, _ = load(done.path)
    assert read_json(done.record)["fusion"] == fusion
    assert read_json(done.record)["parameters"] == model.parameter_counts()
    assert read_json(done.record)["cache"]


def test_methods_without_a_student_open_no_cache(folder):
    shutil.rmtree(folder / "workspace" / "teacher.zarr")
    done = run(folder, **{"train.method": "clip"})
    assert read_json(done.record)["cache"] is None
    with pytest.raises(PipeError, match="pipe extract-teacher"):
        run(folder, name="other")


def test_one_seed_gives_every_method_the_same_trunk_and_the_same_batches(folder):
    a = run(folder, name="a", sets=["train.max_steps=1", "train.lr=1e-12"], **{"train.method": "clip"})
    b = run(folder, name="b", sets=["train.max_steps=1", "train.lr=1e-12"])
    first, second = load_file(a.weights), load_file(b.weights)
    trunk = [name for name in first if name.startswith("trunk.")]
    assert trunk
    assert all(torch.allclose(first[n], second[n], atol=1e-6) for n in trunk if first[n].is_floating_point())
    logs = [read_metrics(x.metrics)[0] for x in (a, b)]
    assert logs[0]["train/info_nce"] == pytest.approx(logs[1]["train/info_nce"], abs=1e-5)


def test_the_same_seed_gives_the_same_weights_and_another_does_not(folder):
    a, b = run(folder, name="a"), run(folder, name="b")
    c = run(folder, name="c", sets=["train.seed=1"])
    x, y, z = (load_file(r.weights) for r in (a, b, c))
    assert all(torch.equal(x[n], y[n]) for n in x)
    assert any(not torch.equal(x[n], z[n]) for n in x)


def test_training_learns_what_tiny_images_show(folder):
    done = run(
        folder, sets=["train.max_steps=60", "train.lr=3e-3", "train.validate_every=60", "train.checkpoint_every=60"]
    )
    values = [line["train/info_nce"] for line in read_metrics(done.metrics) if "train/info_nce" in line]
    assert np.mean(values[-5:]) < 0.8 * np.mean(values[:5])


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


@pytest.mark.parametrize("workers", [0, 1])
def test_a_problem_with_the_data_is_one_line_whoever_reads_it(folder, workers):
    """torch would pass on a worker's error with its traceback for a message; a flipped bit is found as it is read."""
    root = folder / "workspace" / "teacher.zarr"
    (shard,) = (root / "fine" / "c").rglob("0/0/0")
    data = bytearray(shard.read_bytes())
    for at in range(64, len(data) - index_bytes(open_cache(root).shard_rows), 97):  # of rows, not of the index
        data[at] ^= 1
    shard.write_bytes(data)
    with pytest.raises(PipeError) as caught:
        run(folder, sets=[f"data.workers={workers}"])
    line = str(caught.value)
    assert "Traceback" not in line
    assert "checksum" in line or "CRC" in line
    assert str(shard) in line
    assert caught.value.fix


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


def test_a_cache_of_other_images_is_refused(folder):
    from stages import index

    (folder / "workspace" / "manifest.parquet").unlink()
    (folder / "tars" / "00001.tar").unlink()
    index.run(load_config(folder / "pipe.yaml"))
    with pytest.raises(PipeError, match="manifest_fingerprint"):
        run(folder)


@pytest.mark.parametrize(
    ("setting", "field"),
    [
        ("data.view=squash", "view"),
        ("teacher.image_size=64", "image_size"),
        ("teacher.name=vit_tiny_patch16_224", "name"),
        ("teacher.scales=[{name: fine, layer: -1, grid: 2}]", "scales"),
        (OTHER_LAYER, r"scales.*layer"),
        ("teacher.model_args.depth=2", r"model_args\.depth"),
        ("teacher.mean=[0.4,0.4,0.4]", "mean"),
        ("teacher.std=[0.4,0.4,0.4]", "std"),
        ("teacher.random_weights=false", r"weights\.origin"),
        ("teacher.pca=7", r"settings\.pca"),
        ("teacher.dtype=float16", r"settings\.dtype"),
        ("teacher.seed=5", r"settings\.seed"),
        ("teacher.calibration_rows=9", r"settings\.calibration_rows"),
    ],
)
def test_a_cache_of_another_teacher_is_refused_with_the_field(folder, setting, field):
    with pytest.raises(PipeError, match=f"does not match: .*{field}"):
        run(folder, sets=[setting])
    assert not (folder / "workspace" / "runs").exists() or not any((folder / "workspace" / "runs").iterdir())


def test_a_scale_counted_from_the_end_is_the_one_the_cache_counts_from_the_start(folder):
    config = load_config(folder / "pipe.yaml")
    cache = open_cache(Workspace(config.workspace).teacher)
    scales = [f"{{name: {s.name}, layer: {s.layer}, grid: {s.grid}}}" for s in cache.scales]
    assert any(scale.layer < 0 for scale in config.teacher.scales)
    run(folder, sets=[f"teacher.scales=[{', '.join(scales)}]"])


def test_the_teachers_weights_are_compared_where_their_file_is_at_hand(folder, tmp_path, monkeypatch):
    (tmp_path / "other.safetensors").write_bytes(b"other weights")
    asked = load_config(folder / "pipe.yaml", sets=["teacher.random_weights=false"])
    asked.teacher.checkpoint = tmp_path / "other.safetensors"
    found = train_setup.asked_teacher(asked, 4)["weights"]
    assert found == {"origin": "checkpoint", "file_sha256": hashlib.sha256(b"other weights").hexdigest()}
    said: list[str] = []
    monkeypatch.setattr(train_setup.log, "info", lambda text, *values: said.append(text % values))
    asked.teacher.checkpoint = tmp_path / "absent.safetensors"
    assert train_setup.asked_teacher(asked, 4)["weights"] == {"origin": "checkpoint"}
    assert "not on this machine" in said[0]


def test_absent_rows_are_refused_unless_the_config_allows_them(folder):
    from stages import extract_teacher

    config = load_config(folder / "pipe.yaml")
    shutil.rmtree(folder / "workspace" / "teacher.zarr")
    extract_teacher.run(config, limit=30)
    with pytest.raises(PipeError, match=r"rows are not in the teacher cache.*pipe extract-teacher"):
        run(folder)
    done = run(folder, sets=["data.rows=cached"])
    assert read_json(done.record)["finished"]


def test_validation_logs_every_distillation_term_as_a_ratio(folder):
    done = run(folder)
    last = [line for line in read_metrics(done.metrics) if "val/loss" in line][-1]
    for key in ("gram/fine", "gram/mid", "rkd/fine", "rkd/mid", "rkd/global", "global/image", "global/text", "i2t_r1"):
        assert last[f"val/{key}"] is not None
        assert last[f"val/{key}"] >= 0


def test_the_resolved_config_is_saved_and_trains_the_same_again(folder):
    done = run(folder)
    saved = yaml.safe_load(done.config.read_text())
    assert saved["train"]["order"] == 3
    again = load_config(done.config)
    train.run(again, name="again", resume=False)
    other = Workspace(again.workspace).run("again")
    a, b = load_file(done.weights), load_file(other.weights)
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_a_loss_that_is_not_finite_stops_with_rows_and_checkpoint(folder, monkeypatch):
    from pipeline.losses.objective import Objective

    original = Objective.forward

    def broken(self, images, tokens, targets, progress):
        loss, logs = original(self, images, tokens, targets, progress)
        return (loss * float("nan") if progress > 0.6 else loss), logs

    monkeypatch.setattr(Objective, "forward", broken)
    with pytest.raises(PipeError, match=r"the loss is nan at step 4, rows .*step-00000003"):
        run(folder)


def spoil(folder, manifest, rows):
    """Make images undecodable where they lie."""
    for row in rows:
        record = manifest.record(row)
        tar = folder / "tars" / record.source
        data = bytearray(tar.read_bytes())
        data[record.image_offset : record.image_offset + 60] = bytes(60)
        tar.write_bytes(data)


def test_an_image_that_went_bad_after_indexing_is_skipped_and_named(folder):
    from pipeline.data.manifest import read_manifest
    from stages import index

    index.run(load_config(folder / "pipe.yaml"))  # the copied manifest still points at the originals
    manifest = read_manifest(folder / "workspace" / "manifest.parquet")
    bad = [int(row) for row in manifest.rows("train")[:8]]  # more than an epoch's uneven rest
    spoil(folder, manifest, bad)
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    try:
        done = run(folder, **{"train.method": "clip"})
    finally:
        log.removeHandler(handler)
    skipped = [int(found[1]) for line in lines if (found := re.match(r"skipped row (\d+)", line))]
    assert skipped
    assert set(skipped) <= set(bad)
    assert read_json(done.record)["samples_seen"] == 48 - len(skipped)


@pytest.mark.parametrize(
    ("flags", "sets", "name"),
    [
        ({"train.method": "clip"}, [], "clip"),
        ({}, [], "dinorankclip-r3-full"),
        ({"train.order": 1, "model.fusion": "none"}, ["train.seed=2"], "dinorankclip-r1-none-s2"),
    ],
)
def test_default_names_tell_runs_apart(tmp_path, flags, sets, name):
    (tmp_path / "pipe.yaml").write_text("{}")
    assert default_name(load_config(tmp_path / "pipe.yaml", flags=flags, sets=sets)) == name


def test_two_processes_train_like_one(folder):
    """Two CPU processes under a launcher: the same batches and, up to rounding, the same losses, validation, counts."""
    from pipeline.data.manifest import read_manifest
    from stages import index

    sets = ["data.val_fraction=0.4", "train.max_steps=4", "train.validate_every=4"]
    (folder / "workspace" / "manifest.parquet").unlink()
    index.run(load_config(folder / "pipe.yaml", sets=sets))
    manifest = read_manifest(folder / "workspace" / "manifest.parquet")
    spoil(folder, manifest, manifest.rows("train")[:3])  # fewer than one process reads of a batch
    one = run(folder, name="one", sets=sets)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launch += ["-m", "stages.cli", "train", "--name", "two", *(x for each in sets for x in ("--set", each))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(launch, cwd=folder, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-2000:]
    two = Workspace(folder / "workspace").run("two")
    assert json.loads(two.record.read_text())["world_size"] == 2
    assert losses(two) == pytest.approx(losses(one), rel=1e-3)
    val = [[line for line in read_metrics(of.metrics) if "val/loss" in line][-1] for of in (one, two)]
    for key in ("val/loss", "val/i2t_r1", "val/t2i_r1", "val/gram/fine", "val/rkd/global"):
        assert val[1][key] == pytest.approx(val[0][key], rel=1e-3), key
    assert val[1]["samples"] == val[0]["samples"] < 32
    assert read_json(two.record)["samples_seen"] == read_json(one.record)["samples_seen"]


def test_the_shuffled_cache_is_another_target(folder):
    """Same model, same batches: only the distillation differs."""
    whole, shuffled = (run(folder, name=f, **{"model.fusion": f}) for f in ("full", "shuffled-cache"))
    first = [next(line for line in read_metrics(of.metrics) if "train/loss" in line) for of in (whole, shuffled)]
    assert first[0]["train/info_nce"] == first[1]["train/info_nce"]
    assert first[0]["train/gram/fine"] != first[1]["train/gram/fine"]


def test_gamma_and_beta_learn_at_ten_times_the_rate(folder):
    """AdamW's first update is the rate, whatever the gradient."""
    done = run(folder, sets=["train.max_steps=1", "train.lr=1e-4", "loss.ramp=0"])
    values = load_file(done.weights)
    gammas = [abs(float(values[f"fusion.{side}.gamma"])) for side in ("image", "text")]
    assert gammas == pytest.approx([1e-3, 1e-3], rel=0.05)
