"""Steps under fp16's gradient scaler, which a CPU has too: what it scales, leaves out and counts; bf16 in chunks."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from pipeline.errors import PipeError
from pipeline.losses.chunks import in_chunks
from pipeline.run_folder import RunFolder
from pipeline.training import machine
from pipeline.training.data import Batch
from pipeline.training.ema import MovingAverage
from pipeline.training.loop import LoopSettings, Training
from pipeline.training.schedule import parameter_groups

sys.path.insert(0, str(Path(__file__).parent.parent / "losses"))

from test_objective_on_model import batch, make


def training(folder: Any, *, scaled: bool, rows: int | None, monkeypatch: pytest.MonkeyPatch) -> Training:
    """One in float32 on the CPU, clipped at a hundredth of its gradient, with or without the scaler."""
    accelerator = Accelerator(cpu=True)
    objective = make(order=1, student=False)
    objective.micro_batch_size = rows
    groups = parameter_groups(objective.named_parameters(), weight_decay=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if scaled else None
    optimizer = AcceleratedOptimizer(torch.optim.AdamW(groups, lr=1e-3), scaler=scaler)
    if scaled:  # Accelerate gives a scaler to GPUs alone
        monkeypatch.setattr(accelerator, "scaler", scaler)
        monkeypatch.setattr(accelerator, "native_amp", True)
        monkeypatch.setattr(Accelerator, "mixed_precision", property(lambda self: "fp16"))
        accelerator._optimizers.append(optimizer)
    settings = LoopSettings(10, 10, 4, 1e-3, 0, 0.05, 0, 1, None, 10, 1, None)
    average = MovingAverage(objective, 0.9)
    return Training(accelerator, objective, optimizer, settings, RunFolder(folder), {}, {}, ema=average)


def steps(run: Training, count: int = 1) -> list[dict[str, float]]:
    images, tokens, targets = batch()
    taken = Batch(0, 0, torch.arange(4), images, tokens, targets)
    return [{key: float(value) for key, value in run._step(taken).items()} for _ in range(count)]


@pytest.mark.parametrize("rows", [None, 3], ids=["whole", "in chunks"])
def test_scaled_and_clipped_steps_are_those_without_a_scaler(tmp_path: Any, monkeypatch: Any, rows: int | None) -> None:
    """A power of two is exact: the same weights to the bit, and the same norms before clipping."""
    plain = training(tmp_path / "plain", scaled=False, rows=rows, monkeypatch=monkeypatch)
    expected = steps(plain, 3)
    assert min(line["grad_norm"] for line in expected) > 0.5  # clipping had to do
    run = training(tmp_path / "scaled", scaled=True, rows=rows, monkeypatch=monkeypatch)
    for ours, theirs in zip(steps(run, 3), expected, strict=True):
        assert (ours.pop("loss_scale"), ours.pop("updates_left_out")) == (1024, 0)
        assert ours == theirs
    for (name, a), b in zip(run.bare.named_parameters(), plain.bare.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_an_update_that_is_left_out_is_counted_and_changes_nothing(tmp_path: Any, monkeypatch: Any) -> None:
    run = training(tmp_path, scaled=True, rows=3, monkeypatch=monkeypatch)
    steps(run)
    weights, average = copy.deepcopy(run.bare.state_dict()), copy.deepcopy(run.ema.state_dict())
    with monkeypatch.context() as patched:
        patched.setattr(
            run.accelerator, "backward", lambda loss: run.accelerator.scaler.scale(loss * torch.inf).backward()
        )
        (line,) = steps(run)
    assert line["updates_left_out"] == 1
    assert line["loss_scale"] == 512  # halved for the next
    assert all(torch.equal(value, weights[name]) for name, value in run.bare.state_dict().items())
    assert all(torch.equal(value, average[name]) for name, value in run.ema.state_dict().items())
    (line,) = steps(run)
    assert (line["updates_left_out"], line["loss_scale"]) == (1, 512)
    assert not torch.equal(
        run.bare.state_dict()["model.trunk.clip.logit_scale"], weights["model.trunk.clip.logit_scale"]
    )
    assert run.ema.updates == 2


def test_fp16_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(PipeError, match="fp16 needs a GPU"):
        machine.precision("fp16")
    assert machine.precision("bf16") == "bf16"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_chunks_under_autocast_add_their_gradients_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(8, 8, bias=False), torch.randn(24, 8)
    with torch.autocast("cpu", dtype=dtype):
        y = in_chunks(linear, (x,), 1, inside=linear)
    assert y.dtype == dtype
    weights = torch.randn(24, 8).to(dtype)
    y.backward(weights)
    each = [
        (g[:, None] * row[None].to(dtype)).float() for g, row in zip(weights, x, strict=True)
    ]  # as a product of dtype
    torch.testing.assert_close(linear.weight.grad, torch.stack(each).sum(0), rtol=1e-5, atol=1e-5)


def test_the_objective_in_chunks_under_bfloat16_is_close_to_the_whole() -> None:
    images, tokens, targets = batch()
    found = []
    for rows in (None, 2):
        tested = make(order=1)
        tested.micro_batch_size = rows
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, _ = tested(images, tokens, targets, 1.0)
        loss.backward()
        assert loss.dtype == torch.float32
        found.append(torch.cat([p.grad.flatten() for p in tested.parameters()]))
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 0.02
