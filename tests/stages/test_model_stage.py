"""`pipe model`: of a configuration with and without a cache, of a run and of an exported file."""

from __future__ import annotations

import json
import shutil

import pytest
from train_runs import run
from typer.testing import CliRunner

from pipeline.run_folder import read_json
from stages.cli import app


def asked(*words: str) -> dict:
    done = CliRunner().invoke(app, ["model", *words, "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_the_model_of_a_configuration_is_the_one_that_trains(folder, tmp_path):
    """With the cache, without it, as a run by name, and as a file: the same numbers."""
    config = ["--config", str(folder / "pipe.yaml")]
    cached = asked(*config)
    done = run(folder, sets=["train.max_steps=1"])
    record = read_json(done.record)
    total, kinds = cached["total"], record["parameters"]
    assert (
        total["parameters"]
        == kinds["total"] + record["transition_parameters"] + cached["parts"]["residuals"]["parameters"]
    )
    beside = sum(cached["parts"][name]["training"] for name in ("transitions", "residuals"))
    assert total["training"] - beside == record["flops_per_sample"]
    of_trunk = sum(cached["parts"][name]["parameters"] for name in ("trunk_image", "trunk_text", "logit_scale"))
    assert of_trunk == kinds["trunk"]
    assert "of the teacher cache" in cached["notes"][0]
    trained = asked("run", *config)
    assert trained["parts"] == cached["parts"]
    exported = shutil.copy(done.weights, tmp_path / "exported.safetensors")
    alone = asked(str(exported))
    assert alone["parts"] == {k: v for k, v in cached["parts"].items() if k not in ("transitions", "residuals")}
    shutil.rmtree(folder / "workspace" / "teacher.zarr")
    bare = asked(*config)
    assert bare["parts"] == cached["parts"]
    assert "of the architecture of vit_small_patch16_dinov3_qkvb" in bare["notes"][0]
    assert bare["budgets"]["fusion"]["kept"] is True
    plain = CliRunner().invoke(app, ["model", *config, "--method", "clip"])
    assert "trunk image" in plain.stdout
    assert "student" not in plain.stdout
    assert "transitions" not in plain.stdout


@pytest.mark.parametrize("word", ["nowhere", "./nowhere.safetensors"])
def test_what_is_no_model_is_one_line(folder, word):
    done = CliRunner().invoke(app, ["model", word, "--config", str(folder / "pipe.yaml")])
    assert done.exit_code == 1
    assert done.output.count("\n") == 1
    assert "error: " in done.output
