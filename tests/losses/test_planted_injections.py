"""What the gate learns of injections that are known to help or to hurt, with the real gate and γ at its real start."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from pipeline.losses.contrastive import info_nce
from pipeline.losses.gate import conflict, gate_l1, info_nce_gradients
from pipeline.losses.pairs import Pairs
from pipeline.models.fusion import Gate
from pipeline.models.geometry import inject, tangent

SCALE, PAIRS, WIDTH = torch.tensor(14.0), 128, 16
STEPS, RATE = 200, 3e-3


@dataclass
class Found:
    gates: Tensor  # (N,) mean gate of each pair
    gamma: float
    change: float  # InfoNCE at the output less that of the trunk


def trunk() -> tuple[Tensor, Tensor, Tensor]:
    """z, t (N, D) and the unit tangent direction (N, D) in which each z_i makes InfoNCE rise fastest."""
    generator = torch.Generator().manual_seed(0)
    t = torch.nn.functional.normalize(torch.randn(PAIRS, WIDTH, generator=generator), dim=1)
    noise = torch.randn(PAIRS, WIDTH, generator=generator) / WIDTH**0.5
    z = torch.nn.functional.normalize(t + noise, dim=1)
    gradient, _ = info_nce_gradients(Pairs.alone(z, t, SCALE))
    return z, t, torch.nn.functional.normalize(tangent(z, gradient), dim=1)


def train(signs: Tensor | float, *, gamma: float, learn_gamma: bool, l1: float = 0.01) -> Found:
    """Trains gate (and γ) on Δ = sign · (direction of harm), with trunk and Δ held, as the trainer does: Adam, ×10."""
    torch.manual_seed(1)
    z, t, harm = trunk()
    delta = torch.as_tensor(signs).reshape(-1, 1) * harm
    gradient, _ = info_nce_gradients(Pairs.alone(z, t, SCALE))
    gate, scalar = Gate(WIDTH, 32), torch.nn.Parameter(torch.tensor(gamma))
    groups = [{"params": [*gate.parameters()], "lr": RATE}, {"params": [scalar], "lr": 10 * RATE * learn_gamma}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
    for _ in range(STEPS):
        g = gate(z, delta)
        v = inject(z, tangent(z, g * delta), scalar)
        loss = info_nce(Pairs.alone(v, t, SCALE)).mean() + l1 * gate_l1([g], [scalar]).mean()
        loss = loss + conflict(z, gradient, delta, scalar, gate).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        g = gate(z, delta)
        v = inject(z, tangent(z, g * delta), scalar)
        change = info_nce(Pairs.alone(v, t, SCALE)).mean() - info_nce(Pairs.alone(z, t, SCALE)).mean()
    return Found(g.mean(1), float(scalar.detach()), float(change))


def test_a_helpful_injection_is_opened_and_a_conflicting_one_closed() -> None:
    helpful = train(-1.0, gamma=0.3, learn_gamma=False)
    harmful = train(1.0, gamma=0.3, learn_gamma=False)
    assert helpful.gates.mean() > 0.9
    assert helpful.change < 0
    assert harmful.gates.mean() < 0.02
    assert abs(harmful.change) < 1e-3


def test_from_gamma_zero_a_helpful_injection_is_taken_up() -> None:
    helpful = train(-1.0, gamma=0.0, learn_gamma=True)
    assert helpful.gamma > 0.2
    assert helpful.gates.mean() > 0.3
    assert helpful.change < -0.1


def test_the_gate_tells_pairs_that_gain_from_pairs_that_lose() -> None:
    z, _, _ = trunk()
    signs = torch.where(z[:, 0] > 0, 1.0, -1.0)  # harmful where the first channel of z is positive
    found = train(signs, gamma=0.3, learn_gamma=False)
    assert found.gates[signs < 0].mean() > 0.6
    assert found.gates[signs > 0].mean() < 0.1


@pytest.mark.parametrize("l1", [0.01, 1.0])
def test_while_gamma_is_zero_nothing_closes_the_gate(l1: float) -> None:
    """The penalty must not be the gate's only gradient: under Adam its weight would not matter."""
    asleep = train(-1.0, gamma=0.0, learn_gamma=False, l1=l1)
    torch.manual_seed(1)
    z, _, harm = trunk()
    with torch.no_grad():
        untrained = Gate(WIDTH, 32)(z, -harm).mean(1)
    torch.testing.assert_close(asleep.gates, untrained, rtol=0, atol=1e-6)
