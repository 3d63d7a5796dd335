"""`pipe train` with what trades time for memory, with an average of the weights, and with what Accelerate is told."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from train_runs import losses, run

from pipeline.errors import Stopped
from pipeline.training.loop import Training
from pipeline.training.tracking import read_metrics

LIGHT = ["train.micro_batch_size=3", "train.grad_checkpointing=true", "train.ema=0.7"]
SHORT = ["train.order=1", "train.term_gradients_every=null"]


def test_a_light_run_with_an_average_is_the_plain_one_and_resumes_exactly(folder, monkeypatch):
    plain, whole = run(folder, name="plain", sets=SHORT), run(folder, name="whole", sets=LIGHT + SHORT)
    assert losses(whole)[0] == pytest.approx(losses(plain)[0], rel=1e-6)
    assert losses(whole) == pytest.approx(losses(plain), rel=1e-3)  # Adam makes more of rounding, step by step
    original = Training._any_process
    monkeypatch.setattr(Training, "_any_process", lambda self, flag: original(self, flag or self.step == 4))
    with pytest.raises(Stopped, match="step 4 of 6"):
        run(folder, name="cut", sets=LIGHT + SHORT)
    monkeypatch.undo()
    cut = run(folder, name="cut", sets=LIGHT + SHORT, resume=True)
    assert losses(cut) == losses(whole)
    a, b = load_file(whole.weights), load_file(cut.weights)
    assert all(torch.equal(a[n], b[n]) for n in a)
    figures = [
        [{k: v for k, v in line.items() if k != "time"} for line in read_metrics(r.metrics)] for r in (whole, cut)
    ]
    assert figures[0] == figures[1]  # validation's too


def test_the_average_is_what_validates_and_what_is_left(folder):
    from pipeline.training.checkpoint import checkpoints

    done = run(folder, sets=["train.ema=0.7"], **{"train.method": "clip"})
    last = checkpoints(done.checkpoints)[-1]
    averages, weights, left = (
        load_file(p) for p in (last / "ema.safetensors", last / "objective.safetensors", done.weights)
    )
    assert int(averages["updates"]) == 6
    assert all(torch.equal(value, averages[f"model.{name}"]) for name, value in left.items())
    assert not torch.equal(left["trunk.clip.text_projection"], weights["model.trunk.clip.text_projection"])
    with safe_open(done.weights, framework="pt") as file:
        assert file.metadata()["weights"] == "moving average, decay 0.7"
    plain = run(folder, name="plain", **{"train.method": "clip"})
    assert losses(done) == losses(plain)  # the run itself does not notice
    validated = [[line["val/loss"] for line in read_metrics(r.metrics) if "val/loss" in line] for r in (done, plain)]
    assert validated[0] != validated[1]
    with safe_open(plain.weights, framework="pt") as file:
        assert "weights" not in file.metadata()
