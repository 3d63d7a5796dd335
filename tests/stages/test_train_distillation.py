"""`pipe train` with the options of distillation: KD, CRD and a projected text target."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from train_runs import run

from pipeline.config import load_config
from pipeline.errors import PipeError
from pipeline.training.tracking import read_metrics

OPTIONS = ("loss.kd=0.5", "loss.crd=0.5", "loss.text_target=projected", "train.max_steps=4", "train.validate_every=4")


def projected(folder, width):
    path = folder / "projection.safetensors"
    save_file({"weight": torch.randn(5, width, generator=torch.Generator().manual_seed(0))}, path)
    return path


def width_of(folder):
    from pipeline.cache.reader import open_cache

    return open_cache(folder / "workspace" / "teacher.zarr").global_width


def test_a_run_with_every_option_logs_its_terms_and_exports_none_of_their_heads(folder):
    from pipeline.models.dinorankclip import load

    path = projected(folder, width_of(folder))
    sets = (*OPTIONS, f"loss.text_projection={path}")
    done = run(folder, sets=sets)
    lines = read_metrics(done.metrics)
    first = next(line for line in lines if "train/kd/fine" in line)
    assert first["train/kd/fine"] == pytest.approx(1.0, abs=0.2)  # the predictor that ignores the image, on other rows
    last = next(line for line in reversed(lines) if "val/kd/fine" in line)
    assert {"val/crd/image", "val/crd/text", "val/global/text", "val/rkd/global"} <= set(last)
    assert "train/grad_norm/heads" in first
    # The student beside its own start (which no step has changed) and the trunk.
    assert last["val/gram_init/fine"] != last["val/gram/fine"]
    assert {"val/gram_trunk/fine", "val/gram_trunk/mid"} <= set(last)
    stored = load_file(done.weights)
    assert not any("heads.kd" in name or "heads.crd" in name for name in stored)
    assert torch.equal(stored["text_projection.weight"], load_file(path)["weight"])
    model, _, tokenizer = load(done.path)
    assert model.text_nodes(tokenizer(["a red square"]))["student"].shape == (1, 5)


def test_another_projection_is_other_data_to_a_resumed_run(folder):
    path = projected(folder, width_of(folder))
    sets = (*OPTIONS, f"loss.text_projection={path}", "train.checkpoint_every=2", "train.max_steps=2")
    done = run(folder, sets=sets)
    done.weights.unlink()
    record = done.record.read_text().replace('"finished": true', '"finished": false')
    done.record.write_text(record)
    save_file({"weight": torch.ones(5, width_of(folder))}, path)
    with pytest.raises(PipeError, match="text_projection"):
        run(folder, sets=sets, resume=True)


def test_target_and_file_come_together(folder):
    with pytest.raises(PipeError, match="set text_projection"):
        load_config(folder / "pipe.yaml", sets=["loss.text_target=projected"])
    with pytest.raises(PipeError, match="text_target projected alone"):
        load_config(folder / "pipe.yaml", sets=["loss.text_projection=p.safetensors"])
    with pytest.raises(PipeError, match="no such file"):
        run(folder, sets=[*OPTIONS, "loss.text_projection=absent.safetensors"])
