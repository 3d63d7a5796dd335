"""Drift against the closed-form gradient, against differences, and what γ = 0 means."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.evaluation.drift import Side, drift


def side(seed: int, gamma: float, n: int = 12, d: int = 7, size: float = 0.5) -> Side:
    g = torch.Generator().manual_seed(seed)
    base = torch.nn.functional.normalize(torch.randn(n, d, generator=g, dtype=torch.float64), dim=1)
    delta = size * torch.randn(n, d, generator=g, dtype=torch.float64)
    return Side(base, torch.rand(n, d, generator=g, dtype=torch.float64), delta, gamma)


def closed_form_slope(image: Side, text: Side, s: float) -> float:
    """The gradient in numpy: (s / 2N) [Σ_j (p_ij + q_ij) t_j − 2 t_i], and the text's, times the tangent injection."""
    z, t = image.base.numpy(), text.base.numpy()
    n = len(z)
    logits = s * z @ t.T
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    q = np.exp(logits) / np.exp(logits).sum(0, keepdims=True)
    total = 0.0
    for this, grad in ((image, (p + q) @ t - 2 * t), (text, (p + q).T @ z - 2 * z)):
        base = this.base.numpy()
        pushed = this.gate.numpy() * this.delta.numpy()
        tangent = pushed - (pushed * base).sum(1, keepdims=True) * base
        total += float((s / (2 * n) * grad * tangent).sum())
    return total


def test_slope_equals_the_closed_form_gradient():
    image, text = side(0, 0.1), side(1, 0.2)
    assert drift(image, text, 14.3)["slope"] == pytest.approx(closed_form_slope(image, text, 14.3), rel=1e-12)


def test_slope_equals_the_finite_difference():
    found = drift(side(2, 0.1), side(3, 0.1), 20.0)
    assert found["finite_difference"] == pytest.approx(found["slope"], rel=1e-2)


def test_remainder_shrinks_with_the_square_of_gamma():
    large = drift(side(4, 1e-3), side(5, 1e-3), 10.0)["remainder"]
    small = drift(side(4, 1e-4), side(5, 1e-4), 10.0)["remainder"]
    assert large / small == pytest.approx(100, rel=0.05)


def test_at_gamma_zero_nothing_moves():
    found = drift(side(6, 0.0), side(7, 0.0), 30.0)
    assert found["change"] == found["remainder"] == 0.0
    assert found["loss_trunk"] == found["loss_gated"] == found["loss_fused"]


def test_moved_vectors_stay_on_the_sphere():
    image = side(8, 0.7, size=5.0)
    np.testing.assert_allclose(image.moved().norm(dim=1), 1, atol=1e-12)


def test_an_open_gate_is_the_injection_without_gate():
    image = side(9, 0.3)
    opened = Side(image.base, torch.ones_like(image.gate), image.delta, 0.3)
    torch.testing.assert_close(image.moved(opened=True), opened.moved())
    assert not torch.allclose(image.moved(opened=True), image.moved())


def test_a_side_without_injection_adds_nothing_to_the_slope():
    image = side(10, 0.2)
    text = Side(side(11, 0.0).base, torch.zeros(12, 7).double(), torch.zeros(12, 7).double(), 0.0, injects=False)
    found = drift(image, text, 10.0)
    assert found["slope"] == pytest.approx(closed_form_slope(image, text, 10.0), rel=1e-12)
    assert found["gamma_text"] == 0.0


def test_losses_are_the_mean_of_two_cross_entropies():
    """Identical vectors: every candidate is as likely, so the loss is log N whatever the scale."""
    same = Side(torch.ones(16, 4).double() / 2, torch.ones(16, 4).double(), torch.zeros(16, 4).double(), 0.1)
    assert drift(same, same, 50.0)["loss_trunk"] == pytest.approx(np.log(16))
    image, text = side(12, 0.2), side(13, 0.1)
    logits = 9.0 * image.moved(opened=True) @ text.moved(opened=True).T
    want = -(logits.log_softmax(1).diagonal().mean() + logits.log_softmax(0).diagonal().mean()) / 2
    assert drift(image, text, 9.0)["loss_fused"] == pytest.approx(float(want))
