"""The moving average of the weights: against numpy in float64, through a checkpoint, and what it leaves alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import PipeError
from pipeline.training.checkpoint import State, load_checkpoint, save_checkpoint
from pipeline.training.ema import MovingAverage
from pipeline.training.schedule import parameter_groups


class Net(nn.Module):
    """Weights, running statistics, a counter, and a mask that no state dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.linear(x))
        return out


def steps(net: nn.Module, optimizer: Any, count: int, average: MovingAverage, seed: int) -> list[dict[str, np.ndarray]]:
    """Train and average; every step's weights and buffers."""
    generator, seen = torch.Generator().manual_seed(seed), []
    for _ in range(count):
        optimizer.zero_grad()
        net(torch.randn(8, 3, generator=generator)).square().sin().sum().backward()
        optimizer.step()
        average.update(net)
        seen.append({name: x.detach().double().numpy().copy() for name, x in net.state_dict().items()})
    return seen


def made(seed: int = 0) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    net = Net()
    return net, torch.optim.AdamW(parameter_groups(net.named_parameters(), weight_decay=0.1), lr=0.05)


def test_it_is_the_recursion_in_float64_for_weights_and_running_statistics() -> None:
    net, optimizer = made()
    expected = {name: x.detach().double().numpy().copy() for name, x in net.state_dict().items()}
    average = MovingAverage(net, 0.6)
    seen = steps(net, optimizer, 20, average, seed=1)
    for n, now in enumerate(seen):
        decay = min(0.6, (1 + n) / (10 + n))  # 0.6 from the 13th on
        expected = {name: decay * expected[name] + (1 - decay) * value for name, value in now.items()}
    expected["norm.num_batches_tracked"] = np.float64(20)
    found = average.module.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name].double().numpy(), value, rtol=1e-5, atol=1e-7, err_msg=name)
    assert not np.allclose(found["norm.running_var"].numpy(), seen[-1]["norm.running_var"])
    assert average.module.mask.tolist() == [0.0, -math.inf]
    assert not average.module.training
    assert not any(p.requires_grad for p in average.module.parameters())


def test_the_first_weights_are_soon_forgotten() -> None:
    net = nn.Linear(1, 1, bias=False).double()
    net.weight.data.fill_(1.0)
    average = MovingAverage(net, 0.9999)
    net.weight.data.zero_()
    for _ in range(50):
        average.update(net)
    share = math.factorial(50) * math.factorial(9) / math.factorial(59)
    assert float(average.module.weight) == pytest.approx(share, rel=1e-9)


def test_weights_of_half_precision_are_averaged_in_float32() -> None:
    net = nn.Linear(1, 1, bias=False).bfloat16()
    net.weight.data.fill_(1.0)
    average = MovingAverage(net, 0.999)
    average.updates = 10**6
    net.weight.data.fill_(2.0)
    for _ in range(3):
        average.update(net)
    assert float(average.module.weight) == pytest.approx(2 - 0.999**3, rel=1e-6)  # bfloat16 would stay at 1
    assert average.module.weight.dtype == torch.float32


def test_a_checkpoint_brings_it_back_to_the_bit(tmp_path: Any) -> None:
    net, optimizer = made()
    average = MovingAverage(net, 0.9)
    steps(net, optimizer, 3, average, seed=1)
    state = State(3, 24, 1.0, 1, {}, {}, {})
    saved = save_checkpoint(tmp_path, state, net, optimizer, keep=1, ema=average)
    other, other_optimizer = made(seed=5)
    restored = MovingAverage(other, 0.9)
    load_checkpoint(saved, other, other_optimizer, restored)
    assert restored.updates == 3
    for trained, moments, mean in ((net, optimizer, average), (other, other_optimizer, restored)):
        steps(trained, moments, 3, mean, seed=2)
    for name, value in average.module.state_dict().items():
        assert torch.equal(restored.module.state_dict()[name], value), name
    without = save_checkpoint(tmp_path / "without", state, net, optimizer, keep=1)
    assert not (without / "ema.safetensors").exists()
    with pytest.raises(PipeError, match=r"does not fit this model .No such file"):
        load_checkpoint(without, other, other_optimizer, restored)
