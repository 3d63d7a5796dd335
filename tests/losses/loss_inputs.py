"""What the losses' tests are fed: unit embeddings, transition heads whose βs are not 0."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.losses.transitions import Transitions


def unit_pairs(n: int, d: int = 5, *, seed: int = 0, noise: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    """(2, n, d): images and texts that share a part, unit rows."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(n, d, generator=generator, dtype=torch.float64)
    pairs = shared + noise * torch.randn(2, n, d, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(pairs, dim=-1).to(dtype)


def tied_pairs(n: int, *, seed: int = 0) -> Tensor:
    """(2, n, 4) unit rows of ±½: their products are exact in any order of summation, and most of them tie."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (2, n, 4), generator=generator).double() - 0.5


def heads(order: int, d: int = 5, *, dim: int = 3, seed: int = 0, beta: float = 1.0) -> dict[str, Transitions]:
    """Transition heads in float64 with random βs of size `beta`."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in ("image", "text"):
        maps = Transitions(d, order, dim).double()
        with torch.no_grad():
            for parameter in maps.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            maps.betas.mul_(beta)
        found[name] = maps
    return found
