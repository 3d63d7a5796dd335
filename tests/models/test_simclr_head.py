"""SLIP's head, and a batch norm that equals nn.BatchNorm1d; across processes: tests/test_baselines_distributed.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import PipeError
from pipeline.models.simclr import BatchNormAcross, SimCLRHead


def rows(n: int, features: int, *, seed: int = 0, offset: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, features, generator=generator, dtype=torch.float64)
    return x * torch.linspace(0.1, 3.0, features, dtype=torch.float64) + offset


def shaken(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype), alpha=0.3)
    return module


@pytest.mark.parametrize(("n", "offset"), [(2, 0.0), (7, 1.0), (32, 1000.0)])
def test_alone_the_batch_norm_is_torchs_in_value_gradient_and_running_statistics(n: int, offset: float) -> None:
    ours, theirs = shaken(BatchNormAcross(5).double()), nn.BatchNorm1d(5).double()
    theirs.load_state_dict(ours.state_dict())
    for step in range(3):
        x = rows(n, 5, seed=step, offset=offset).requires_grad_()
        y = x.detach().clone().requires_grad_()
        found, expected = ours(x), theirs(y)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        weights = rows(n, 5, seed=100 + step)
        (found * weights).sum().backward()
        (expected * weights).sum().backward()
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-8, atol=1e-9)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-12, atol=1e-12)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-12, atol=1e-12)


def test_a_variance_beside_a_large_mean_is_not_lost_in_float32() -> None:
    x = rows(64, 5, offset=1e4).float()
    found = BatchNormAcross(5)(x)
    expected = nn.BatchNorm1d(5).double()(x.double())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.02)  # x itself has a step of 0.001


def test_a_single_row_cannot_train_and_says_so_but_can_be_evaluated() -> None:
    norm = BatchNormAcross(3)
    with pytest.raises(PipeError, match=r"1 row.*batch_size"):
        norm(torch.zeros(1, 3))
    assert norm.num_batches_tracked == 0
    assert norm.eval()(torch.zeros(1, 3)).shape == (1, 3)


def reference(head: SimCLRHead, width: int, hidden: int, out: int) -> nn.Sequential:
    """The published head in torch's own layers, with the same parameters."""
    layers = nn.Sequential(
        *(nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU()),
        *(nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.ReLU()),
        nn.Linear(hidden, out),
    ).double()
    layers.load_state_dict(dict(zip(layers.state_dict(), head.state_dict().values(), strict=True)))
    return layers


def test_the_head_is_slips_mlp() -> None:
    head = shaken(SimCLRHead(6, hidden=10, out=4).double())
    assert isinstance(head, SimCLRHead)
    theirs = reference(head, 6, 10, 4)
    for view in range(2):
        x = rows(8, 6, seed=view)
        torch.testing.assert_close(head(x), theirs(x), rtol=1e-11, atol=1e-12)
    x = rows(3, 6, seed=7)
    torch.testing.assert_close(head.eval()(x), theirs.eval()(x), rtol=1e-11, atol=1e-12)


def test_the_heads_published_size() -> None:
    with torch.device("meta"):
        head = SimCLRHead(768)
    shapes = [tuple(p.shape) for p in head.parameters() if p.ndim == 2]
    assert shapes == [(4096, 768), (4096, 4096), (256, 4096)]
    assert sum(p.numel() for p in head.parameters()) == 768 * 4096 + 4096**2 + 4096 * 256 + 3 * 2 * 4096 + 256


def test_the_head_does_not_run_in_bfloat16() -> None:
    head = SimCLRHead(6, hidden=32, out=4)
    x = rows(16, 6).bfloat16()
    expected = head(x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = head(x)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
