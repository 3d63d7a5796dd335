"""What `pipe train` does with a cache that does not fit, images that went bad, and a loss that is not finite."""

from __future__ import annotations

import hashlib
import logging
import re
import shutil

import pytest
from train_runs import run, spoil

from pipeline.cache.reader import open_cache
from pipeline.cache.shards import index_bytes
from pipeline.config import load_config
from pipeline.console import log
from pipeline.errors import PipeError
from pipeline.run_folder import Workspace, read_json
from pipeline.training.tracking import read_metrics
from stages import train_data

OTHER_LAYER = "teacher.scales=[{name: fine, layer: 0, grid: 4}, {name: mid, layer: 1, grid: 2}]"


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
    found = train_data.asked_teacher(asked, 4)["weights"]
    assert found == {"origin": "checkpoint", "file_sha256": hashlib.sha256(b"other weights").hexdigest()}
    said: list[str] = []
    monkeypatch.setattr(train_data.log, "info", lambda text, *values: said.append(text % values))
    asked.teacher.checkpoint = tmp_path / "absent.safetensors"
    assert train_data.asked_teacher(asked, 4)["weights"] == {"origin": "checkpoint"}
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


def test_rows_that_came_after_the_cache_are_absent_rows(folder):
    """A grown manifest begins as the cache's: what is missing is named, and the rest can be trained on."""
    from stages import extract_teacher, index

    shutil.copy(folder / "tars" / "00001.tar", folder / "tars" / "00002.tar")
    config = load_config(folder / "pipe.yaml")
    index.run(config)
    with pytest.raises(PipeError, match=r"of \d+ rows are not in the teacher cache.*pipe extract-teacher"):
        run(folder)
    done = run(folder, sets=["data.rows=cached"])
    assert read_json(done.record)["finished"]
    before = open_cache(folder / "workspace" / "teacher.zarr").rows
    extract_teacher.run(config)
    assert open_cache(folder / "workspace" / "teacher.zarr").rows > before
    run(folder, name="all")


def test_a_cache_without_a_single_row_is_one_line(folder):
    shutil.rmtree(folder / "workspace" / "teacher.zarr" / "state" / "c")
    with pytest.raises(PipeError, match="0 training rows do not fill one batch"):
        run(folder, sets=["data.rows=cached"])


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
    written = [line for line in read_metrics(done.skipped) if line["split"] == "train"]
    named = [int(found[1]) for line in lines if (found := re.match(r"skipped row (\d+): cannot decode", line))]
    assert len(written) > len(named)  # once in the log, whatever the epochs
    assert set(named) == {line["row"] for line in written}
    assert set(named) <= set(bad)
    record = read_json(done.record)
    assert record["samples_seen"] == 6 * 8 - len(written)
    assert record["skipped"]["train"] == {"rows": len(named), "times": len(written)}


def test_validation_images_that_are_all_gone_do_not_end_the_run(folder):
    from pipeline.data.manifest import read_manifest
    from stages import index

    index.run(load_config(folder / "pipe.yaml"))  # the copied manifest still points at the originals
    manifest = read_manifest(folder / "workspace" / "manifest.parquet")
    spoil(folder, manifest, [int(row) for row in manifest.rows("val")])
    done = run(folder, **{"train.method": "clip"})
    lines = read_metrics(done.metrics)
    assert any("train/loss" in line for line in lines)
    assert not any("val/loss" in line for line in lines)


@pytest.mark.parametrize(("factor", "what"), [("nan", "loss is nan"), ("inf", "gradient's norm is (inf|nan)")])
def test_what_is_not_finite_stops_with_rows_and_checkpoint(folder, monkeypatch, factor, what):
    """A finite loss may have a gradient that is not: the checkpoint after it would hold nothing but nan."""
    from pipeline.losses.objective import Objective

    original = Objective.forward

    def broken(self, *, progress, **inputs):
        loss, logs = original(self, progress=progress, **inputs)
        if progress > 0.6 and factor == "nan":
            loss = loss * float("nan")
        elif progress > 0.6 and loss.requires_grad:
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss, logs

    monkeypatch.setattr(Objective, "forward", broken)
    with pytest.raises(PipeError, match=rf"the {what} at step 4, rows .*step-00000003"):
        run(folder)
