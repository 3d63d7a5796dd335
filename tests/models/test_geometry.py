from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.models.geometry import at_least_float32, inject, normalise, tangent


def rows(seed: int, n: int = 200, d: int = 64, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inject_at_gamma_zero_returns_the_same_bits(dtype: torch.dtype) -> None:
    z = normalise(rows(0, dtype=dtype))
    along = tangent(z, 50 * rows(1, dtype=dtype))
    assert torch.equal(inject(z, along, torch.zeros(())), z)
    # The tempting form would not do: it moves the last bit of many rows.
    assert not torch.equal(F.normalize(z + 0 * along, dim=-1), z)


@pytest.mark.parametrize("gamma", [-2.0, 1e-3, 0.3, 5.0])
def test_injected_vectors_have_unit_norm(gamma: float) -> None:
    z = normalise(rows(2))
    v = inject(z, tangent(z, 3 * rows(3)), torch.tensor(gamma))
    assert v.norm(dim=1).sub(1).abs().max() < 2e-6


def test_tangent_is_orthogonal_to_its_base_and_leaves_tangents_alone() -> None:
    z = normalise(rows(4, dtype=torch.float64))
    along = tangent(z, rows(5, dtype=torch.float64))
    assert (along * z).sum(1).abs().max() < 1e-14
    assert torch.allclose(tangent(z, along), along, atol=1e-14)
    assert tangent(z, 3 * z).abs().max() < 1e-14


def test_inject_turns_by_the_angle_whose_tangent_is_gamma_times_length() -> None:
    z = normalise(rows(6, dtype=torch.float64))
    along = tangent(z, rows(7, dtype=torch.float64))
    v = inject(z, along, torch.tensor(0.4, dtype=torch.float64))
    angle = torch.arccos((v * z).sum(1))
    assert np.allclose(angle.numpy(), np.arctan(0.4 * along.norm(dim=1).numpy()))


def test_the_slope_at_gamma_zero_is_the_tangent() -> None:
    z = normalise(rows(8, n=3, dtype=torch.float64))
    along = tangent(z, rows(9, n=3, dtype=torch.float64))
    gamma = torch.zeros((), dtype=torch.float64)
    slope = torch.autograd.functional.jacobian(lambda g: inject(z, along, g), gamma)
    assert torch.allclose(slope, along, atol=1e-14)


def test_geometry_ignores_autocast() -> None:
    x, y = rows(10), rows(11)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = normalise(x)
        v = inject(z, tangent(z, y), torch.tensor(0.5))
    assert v.dtype == torch.float32
    assert torch.equal(z, F.normalize(x, dim=-1))
    assert torch.equal(v, inject(z, tangent(z, y), torch.tensor(0.5)))


def test_half_precision_becomes_float32_and_double_stays() -> None:
    assert at_least_float32(torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.float32
    assert at_least_float32(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64
