"""`pipe train` on tiny real tars and a tiny teacher's cache: every method, variant and number of processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from train_runs import losses, run, spoil

from pipeline.cache.compress import Compression
from pipeline.cache.copy import copy_cache
from pipeline.config import load_config
from pipeline.errors import PipeError
from pipeline.run_folder import Workspace, read_json
from pipeline.training.tracking import read_metrics
from stages import train, train_data, train_setup
from stages.train import default_name


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


def test_how_the_cache_is_read_changes_nothing(folder):
    """Positioned reads, and workers that read ahead in another process: the same losses to the bit."""
    plain = run(folder, name="plain", sets=["data.shuffle=shards", "data.cache_access=map"])
    other = run(folder, name="other", sets=["data.shuffle=shards", "data.cache_access=read", "data.workers=1"])
    assert losses(plain) == losses(other)


def test_a_compressed_copy_elsewhere_trains_the_same(folder, tmp_path):
    plain = run(folder, name="plain")
    copy_cache(folder / "workspace" / "teacher.zarr", tmp_path / "small.zarr", compress=Compression("zstd"))
    shutil.rmtree(folder / "workspace" / "teacher.zarr")
    there = tmp_path / "small.zarr"
    assert losses(run(folder, name="a", sets=[f"data.cache={there}"])) == losses(plain)
    assert losses(run(folder, name="b", sets=[f"data.cache=file://{there}", "data.workers=1"])) == losses(plain)
    with pytest.raises(PipeError, match=r"there is no teacher cache.*nowhere\.zarr"):
        run(folder, name="c", sets=["data.cache=nowhere.zarr"])


def test_the_plan_is_the_configurations(folder):
    config = load_config(folder / "pipe.yaml", sets=["data.shuffle=shards", "data.shuffle_buffer=3"])
    data = train_data.open_data(Workspace(config.workspace), config)
    plan = train_setup._plan(config, data, 7)
    assert (plan.shuffle, plan.buffer_shards, plan.shard_rows) == ("shards", 3, data.cache.shard_rows)
    assert (plan.total_steps, plan.seed) == (7, config.train.seed)
    config = load_config(folder / "pipe.yaml", sets=["data.shuffle=shards", "model.fusion=none", "train.order=1"])
    without = train_data.open_data(Workspace(config.workspace), config)
    assert without.cache is None
    assert train_setup._plan(config, without, 7).shard_rows == 512


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
    """Two CPU processes under a launcher: the same batches and, up to rounding, the same losses, validation, counts;
    with rows a few at a time, blocks that run twice, and DDP told that the graph is always the same."""
    from pipeline.data.manifest import read_manifest
    from stages import index

    sets = ["data.val_fraction=0.4", "train.max_steps=4", "train.validate_every=4", "train.term_gradients_every=2"]
    sets += ["loss.contrastive=alip", "data.second_caption=another", "loss.simclr=0.5", "loss.simclr_hidden=8"]
    (folder / "workspace" / "manifest.parquet").unlink()
    index.run(load_config(folder / "pipe.yaml", sets=sets))
    manifest = read_manifest(folder / "workspace" / "manifest.parquet")
    spoil(folder, manifest, manifest.rows("train")[:3])  # fewer than one process reads of a batch
    one = run(folder, name="one", sets=sets)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    light = ["train.micro_batch_size=2", "train.grad_checkpointing=true", "train.ddp={static_graph: true}"]
    told = [x for each in (*sets, *light) for x in ("--set", each)]
    launch += ["-m", "stages.cli", "train", "--name", "two", *told]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(launch, cwd=folder, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-2000:]
    two = Workspace(folder / "workspace").run("two")
    assert json.loads(two.record.read_text())["world_size"] == 2
    assert losses(two) == pytest.approx(losses(one), rel=1e-3)
    for key in (
        "step",
        "samples",
        "epoch",
        "train/lr",
        "train/weight/simclr",
    ):  # schedules count samples, not processes
        found = [[line[key] for line in read_metrics(of.metrics) if "train/loss" in line] for of in (one, two)]
        assert found[1] == found[0], key
    assert two.skipped.read_bytes() == one.skipped.read_bytes() != b""
    val = [[line for line in read_metrics(of.metrics) if "val/loss" in line][-1] for of in (one, two)]
    for key in ("val/loss", "val/i2t_r1", "val/t2i_r1_trunk", "val/gram/fine", "val/rkd/global"):
        assert val[1][key] == pytest.approx(val[0][key], rel=1e-3), key
    assert val[1]["val/drift/slope"] == pytest.approx(val[0]["val/drift/slope"], rel=2e-2)  # a sum of many signs
    first = [next(line for line in read_metrics(of.metrics) if "train/loss" in line) for of in (one, two)]
    measured = [key for key in first[0] if "grad_norm" in key]
    assert {"train/term_grad_norm/simclr", "train/term_grad_norm/cross", "train/grad_norm/transitions"} <= {*measured}
    for key in measured:
        assert first[1][key] == pytest.approx(first[0][key], rel=2e-2, abs=1e-5), key
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
