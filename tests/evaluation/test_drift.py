"""Drift against the closed-form gradient, against differences, and what γ = 0 means."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.evaluation.drift import Side, drift, info_nce


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
    np.testing.assert_allclose(image.moved(0.7).norm(dim=1), 1, atol=1e-12)


def test_an_open_gate_is_the_injection_without_gate():
    image = side(9, 0.3)
    opened = Side(image.base, torch.ones_like(image.gate), image.delta, 0.3)
    torch.testing.assert_close(image.moved(0.3, opened=True), opened.moved(0.3))
    assert not torch.allclose(image.moved(0.3, opened=True), image.moved(0.3))


def test_a_side_without_injection_adds_nothing_to_the_slope():
    image = side(10, 0.2)
    text = Side(side(11, 0.0).base, torch.zeros(12, 7).double(), torch.zeros(12, 7).double(), 0.0, injects=False)
    found = drift(image, text, 10.0)
    assert found["slope"] == pytest.approx(closed_form_slope(image, text, 10.0), rel=1e-12)
    assert found["gamma_text"] == 0.0


def test_info_nce_of_uniform_scores_is_log_n():
    same = torch.ones(16, 4, dtype=torch.float64) / 2
    assert float(info_nce(same, same, 50.0)) == pytest.approx(np.log(16))
