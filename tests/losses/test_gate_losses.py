from __future__ import annotations

import pytest
import torch
from loss_inputs import unit_pairs
from torch import nn

from pipeline.evaluation import drift as evaluated
from pipeline.losses.contrastive import info_nce
from pipeline.losses.gate import conflict, drift, gate_l1, info_nce_gradients, injected
from pipeline.losses.pairs import Pairs

S = torch.tensor(12.0, dtype=torch.float64)


def tangents(base: torch.Tensor, seed: int) -> torch.Tensor:
    x = torch.randn(base.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x - (x * base).sum(1, keepdim=True) * base


@pytest.mark.parametrize("scale", [1.0, 30.0, 100.0])
def test_closed_form_gradient_is_autograds(scale: float) -> None:
    z, t = (x.clone().requires_grad_() for x in unit_pairs(8, seed=1))
    pairs = Pairs.alone(z, t, torch.tensor(scale, dtype=torch.float64))
    expected = torch.autograd.grad(info_nce(pairs).mean(), (z, t))
    for ours, theirs in zip(info_nce_gradients(pairs), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        assert not ours.requires_grad


def test_conflict_reaches_only_the_gate() -> None:
    z, t = (x.clone().requires_grad_() for x in unit_pairs(6, seed=2))
    delta = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    gamma = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    s = S.clone().requires_grad_()
    gate = nn.Linear(10, 5).double()
    gradient, _ = info_nce_gradients(Pairs.alone(z, t, s))
    loss = conflict(z, gradient, delta, gamma, lambda a, b: gate(torch.cat([a, b], 1)).sigmoid()).mean()
    assert loss > 0
    found = torch.autograd.grad(loss, [z, t, delta, gamma, s, *gate.parameters()], allow_unused=True)
    assert all(g is None for g in found[:5])
    assert all(g is not None and g.abs().max() > 0 for g in found[5:])


def test_conflict_is_the_positive_part_of_the_first_order_change() -> None:
    z, t = unit_pairs(6, seed=3)
    delta = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    gate = torch.rand(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    gradient, _ = info_nce_gradients(Pairs.alone(z, t, S))
    gamma = torch.tensor(-0.3, dtype=torch.float64)
    found = conflict(z, gradient, delta, gamma, lambda a, b: gate)
    for i in range(6):
        pushed = gate[i] * delta[i]
        tangent = pushed - (pushed @ z[i]) * z[i]
        direction = gradient[i] - (gradient[i] @ z[i]) * z[i]
        expected = max(0.0, float(gamma * (direction / direction.norm()) @ tangent))
        assert float(found[i]) == pytest.approx(expected, abs=1e-12)
    assert (found > 0).any()
    assert (found == 0).any()


def test_descending_the_conflict_closes_the_gate_where_it_hurts() -> None:
    z, t = unit_pairs(6, seed=6)
    delta = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    logits = torch.zeros(6, 5, dtype=torch.float64, requires_grad=True)
    gradient, _ = info_nce_gradients(Pairs.alone(z, t, S))
    gamma = torch.tensor(0.3, dtype=torch.float64)

    def harm() -> torch.Tensor:
        return conflict(z, gradient, delta, gamma, lambda a, b: logits.sigmoid()).sum()

    before = float(harm().detach())
    for _ in range(200):
        (step,) = torch.autograd.grad(harm(), logits)
        with torch.no_grad():
            logits -= 5.0 * step
    assert float(harm().detach()) < 0.2 * before


def test_gate_l1_is_each_sides_mean_opening_times_its_detached_gamma() -> None:
    a, b = torch.rand(3, 4), torch.rand(3, 4)
    gamma, other = torch.tensor(-0.3, requires_grad=True), torch.tensor(0.2)
    found = gate_l1([a, b], [gamma, other])
    torch.testing.assert_close(found, (0.3 * a.mean(1) + 0.2 * b.mean(1)) / 2)
    assert not found.requires_grad


def test_drift_is_the_direct_change_and_its_slope_the_finite_difference() -> None:
    z, t = unit_pairs(9, seed=7)
    a, b = tangents(z, 1), tangents(t, 2)
    found = drift(z, t, a, b, 0.02, -0.03, float(S))
    moved = Pairs.alone(injected(z, a, 0.02), injected(t, b, -0.03), S)
    direct = info_nce(moved).mean() - info_nce(Pairs.alone(z, t, S)).mean()
    assert found.change == pytest.approx(float(direct), rel=1e-9)
    assert found.finite_difference == pytest.approx(found.slope, rel=1e-3)
    g, h = info_nce_gradients(Pairs.alone(z, t, S))
    first_order = float(0.02 * (g * a).sum() - 0.03 * (h * b).sum())
    assert found.remainder == pytest.approx(found.change - first_order)


def test_remainder_falls_with_the_square_of_gamma() -> None:
    z, t = unit_pairs(9, seed=8)
    a, b = tangents(z, 3), tangents(t, 4)
    large, small = (drift(z, t, a, b, gamma, gamma, float(S)).remainder for gamma in (2e-3, 1e-3))
    assert large / small == pytest.approx(4.0, rel=0.1)


def test_drift_agrees_with_the_evaluation_of_models() -> None:
    z, t = unit_pairs(9, seed=9)
    a, b = tangents(z, 5), tangents(t, 6)
    ones = torch.ones_like(z)
    theirs = evaluated.drift(evaluated.Side(z, ones, a, 0.1), evaluated.Side(t, ones, b, 0.2), float(S))
    ours = drift(z, t, a, b, 0.1, 0.2, float(S))
    assert ours.slope == pytest.approx(theirs["slope"], rel=1e-9)
    assert ours.change == pytest.approx(theirs["change"], rel=1e-9)
    assert ours.remainder == pytest.approx(theirs["remainder"], rel=1e-6)


def test_injected_vectors_are_unit_and_zero_gamma_is_the_trunk_bit_for_bit() -> None:
    z = unit_pairs(9, 16)[0].float()
    a = tangents(z.double(), 1).float()
    torch.testing.assert_close(injected(z, a, 0.7).norm(dim=1), torch.ones(9))
    assert torch.equal(injected(z, a, 0.0), z)
