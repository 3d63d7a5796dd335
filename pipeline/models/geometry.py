"""Geometry on the unit sphere, always in float32 or better and outside autocast: bfloat16 keeps 8 bits of a direction.

Legend: B rows, D width.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor


def exact(x: Tensor) -> AbstractContextManager[object]:
    """No autocast on x's device; a tensor without values (meta, to count what a model would cost) knows none."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def at_least_float32(x: Tensor) -> Tensor:
    """float64 as it is, everything else as float32."""
    return x if x.dtype == torch.float64 else x.float()


def normalise(x: Tensor) -> Tensor:
    """x / ‖x‖: (B, D) → (B, D); in float32 and float64 to the bit what open_clip's `normalize=True` does."""
    with exact(x):
        return F.normalize(at_least_float32(x), dim=-1)


def tangent(base: Tensor, move: Tensor) -> Tensor:
    """Δ⊥ = Δ' − ⟨Δ', z⟩ z, the part of a move that keeps to the sphere at z. base z, move Δ': (B, D) → (B, D)."""
    with exact(base):
        base, move = at_least_float32(base), at_least_float32(move)
        return move - (move * base).sum(-1, keepdim=True) * base


def inject(base: Tensor, along: Tensor, gamma: Tensor) -> Tensor:
    """v = (z + γ Δ⊥) / √(1 + γ² ‖Δ⊥‖²): base z (B, D) unit-norm, along Δ⊥ (B, D), gamma γ () → (B, D) unit-norm.

    At γ = 0 this is z, bit for bit; normalising z + γ Δ⊥ instead would change the last bit of a third of the rows.
    """
    with exact(base):
        base, along, gamma = at_least_float32(base), at_least_float32(along), at_least_float32(gamma)
        length = torch.sqrt(1 + gamma.square() * along.square().sum(-1, keepdim=True))
        return (base + gamma * along) / length
