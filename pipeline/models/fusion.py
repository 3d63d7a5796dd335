"""The injection of a student's tokens into a trunk embedding, one for each side, and the conflict-aware gate on it.

    tokens of each scale ─ 1-D spatial pyramid beside them ─ channel, then token attention ─ refiner, asked by z ─ u
    Δ = W u,   g = σ(MLP[z, Δ, z ⊙ Δ]),   Δ⊥ = tangent part of g ⊙ Δ at z,   v = (z + γ Δ⊥) / √(1 + γ² ‖Δ⊥‖²)

The chain of parts is known of arXiv 2605.06592 from summaries; pyramid levels, where norms stand, the tangent and γ's
place are our reading. Channel and spatial attention: CBAM (arXiv 1807.06521), over a sequence in place of a map.

Legend: B rows, T tokens of a scale, P pyramid bins, S the whole sequence, V a branch's width, M the fusion's, D joint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.models.blocks import Block, masked_mean
from pipeline.models.geometry import at_least_float32, inject, tangent

LEVELS = (1, 2, 4, 8)
CHANNEL_REDUCTION = 8
TOKEN_KERNEL = 7


@dataclass
class Side:
    """What one side injects, with gradients.

    Attributes:
        gate: g (B, D) in (0, 1); ones without a gate.
        delta: Δ = W u (B, D), before the gate.
        gamma: γ ().
        tangent: Δ⊥ (B, D), the tangent part of g ⊙ Δ.
    """

    gate: Tensor
    delta: Tensor
    gamma: Tensor
    tangent: Tensor


class Fusion(nn.Module):
    """One side's injection.

    Args:
        embed_dim: D. token_widths: scale → V. width: M. refiner_layers: 1 or 2 blocks.
        gate_hidden: width of the gate's MLP.
        pyramid, attention, refiner, gate: which parts exist. Without the refiner u is the mean of the sequence,
            without the gate g ≡ 1.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        token_widths: Mapping[str, int],
        width: int,
        refiner_layers: int,
        gate_hidden: int,
        pyramid: bool = True,
        attention: bool = True,
        refiner: bool = True,
        gate: bool = True,
    ) -> None:
        super().__init__()
        self.project = nn.ModuleDict({scale: nn.Linear(wide, width) for scale, wide in token_widths.items()})
        self.pyramid = nn.ModuleDict({scale: Pyramid(width) for scale in token_widths}) if pyramid else None
        self.norm = nn.LayerNorm(width)
        self.attention = SequenceAttention(width) if attention else None
        self.refiner = Refiner(embed_dim, width, refiner_layers) if refiner else None
        self.norm_out = nn.LayerNorm(width)
        self.inject = nn.Linear(width, embed_dim, bias=False)
        # Entries of u are about 1, so that ‖Δ‖ starts near 1 and γ is about the tangent of the angle z is turned by.
        nn.init.normal_(self.inject.weight, std=1 / math.sqrt(width * embed_dim))
        self.gate = Gate(embed_dim, gate_hidden) if gate else None
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, base: Tensor, tokens: Mapping[str, Tensor], keep: Tensor | None = None) -> tuple[Tensor, Side]:
        """base z (B, D) unit-norm, tokens: scale → (B, T, V), keep (B, T) bool where tokens are padded → v (B, D)."""
        delta = self.delta(base, tokens, keep)
        gate = self.gate_on(base, delta)
        along = tangent(base, gate * delta)
        return inject(base, along, self.gamma), Side(gate, delta, self.gamma, along)

    def delta(self, base: Tensor, tokens: Mapping[str, Tensor], keep: Tensor | None = None) -> Tensor:
        """Δ = W u: (B, D)."""
        x, keep = self._sequence(tokens, keep)
        # The refiner's first norm stands here, in front of the attention: behind it, it would undo a token's scaling.
        x = self.norm(x)
        if self.attention is not None:
            x = self.attention(x, keep)
        u = self.norm_out(masked_mean(x, keep) if self.refiner is None else self.refiner(base, x, keep))
        return at_least_float32(self.inject(u))

    def gate_on(self, base: Tensor, delta: Tensor) -> Tensor:
        """g: base z, delta Δ (B, D) → (B, D)."""
        return torch.ones_like(delta) if self.gate is None else at_least_float32(self.gate(base, delta))

    def opened(self, base: Tensor, delta: Tensor) -> Tensor:
        """The output with g ≡ 1 at the learned γ: (B, D) → (B, D)."""
        return inject(base, tangent(base, delta), self.gamma)

    def _sequence(self, tokens: Mapping[str, Tensor], keep: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Every scale's bins, then its tokens: (B, S, M), and which of them are real (B, S), None for all."""
        parts, kept = [], []
        for scale, project in self.project.items():
            x = project(tokens[scale])  # (B, T, M)
            if self.pyramid is not None:
                bins = self.pyramid[scale](x, keep)
                parts.append(bins)
                if keep is not None:
                    kept.append(keep.new_ones(bins.shape[:2]))
            parts.append(x)
            if keep is not None:
                kept.append(keep)
        return torch.cat(parts, 1), torch.cat(kept, 1) if kept else None


class Pyramid(nn.Module):
    """Adaptive averages of a token sequence at 1, 2, 4 and 8 bins, each bin with an embedding of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.place = nn.Parameter(0.02 * torch.randn(sum(LEVELS), width))

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """x (B, T, M), keep (B, T) bool, True for a leading run of tokens (None: all) → (B, P, M)."""
        if keep is None:
            lengths = torch.full((1,), x.shape[1], device=x.device)
        else:
            lengths = keep.sum(1)
        weights = pyramid_weights(lengths, x.shape[1]).to(x.dtype)  # (B or 1, P, T)
        pooled: Tensor = weights @ x
        return pooled + self.place


def pyramid_weights(lengths: Tensor, tokens: int) -> Tensor:
    """Averaging weights of each bin over the first n of `tokens` tokens.

    Bin i of k takes tokens ⌊i n / k⌋ to ⌈(i + 1) n / k⌉ − 1, as adaptive_avg_pool1d does: never none, however short
    the sequence; bins overlap where n < k.

    Args:
        lengths: n (B,) int64, at least 1.

    Returns:
        (B, P, tokens) float32, rows summing to 1.
    """
    place = torch.arange(tokens, device=lengths.device)
    rows = []
    for k in LEVELS:
        i = torch.arange(k, device=lengths.device)
        first = (i * lengths[:, None]) // k  # (B, k)
        last = ((i + 1) * lengths[:, None] + k - 1) // k
        inside = (place >= first[..., None]) & (place < last[..., None])  # (B, k, tokens)
        rows.append(inside / (last - first).clamp_min(1)[..., None])
    return torch.cat(rows, 1)


class SequenceAttention(nn.Module):
    """CBAM on a sequence: a weight for each channel from the sequence's mean and maximum, then one for each token.

    M_c = σ(MLP(mean_S x) + MLP(max_S x)),      M_t = σ(conv7([mean_M x', max_M x'])),  x' = M_c ⊙ x
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = max(width // CHANNEL_REDUCTION, 4)
        self.channel = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))
        self.token = nn.Conv1d(2, 1, TOKEN_KERNEL, padding=TOKEN_KERNEL // 2)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """x (B, S, M), keep (B, S) bool or None → (B, S, M)."""
        largest = x if keep is None else x.masked_fill(~keep.unsqueeze(-1), -torch.inf)
        x = x * torch.sigmoid(self.channel(masked_mean(x, keep)) + self.channel(largest.amax(1))).unsqueeze(1)
        seen = torch.stack([x.mean(-1), x.amax(-1)], 1)  # (B, 2, S)
        if keep is not None:
            seen = seen.masked_fill(~keep.unsqueeze(1), 0.0)  # padding looks as the end of a sequence does
        return x * torch.sigmoid(self.token(seen)).transpose(1, 2)


class Refiner(nn.Module):
    """Self-attention over a query made from the trunk embedding and the sequence, read at the query.

    The last block computes that row only: nobody reads the others. Its input is normalised by the caller.
    """

    def __init__(self, embed_dim: int, width: int, layers: int) -> None:
        super().__init__()
        self.query = nn.Sequential(nn.Linear(embed_dim, width), nn.LayerNorm(width))
        self.blocks = nn.ModuleList(Block(width, mlp_ratio=2.0, input_norm=number > 0) for number in range(layers))

    def forward(self, base: Tensor, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """base z (B, D), x (B, S, M), keep (B, S) bool or None → u (B, M)."""
        x = torch.cat([self.query(base).unsqueeze(1).to(x.dtype), x], 1)
        if keep is not None:
            keep = torch.cat([keep.new_ones(len(keep), 1), keep], 1)
        *refining, reading = self.blocks
        for block in refining:
            x = block(x, keep)
        u: Tensor = reading(x, keep, rows=1)[:, 0]
        return u


class Gate(nn.Module):
    """g = σ(MLP[z, Δ, z ⊙ Δ]), one number for each channel.

    Unit vectors have entries of about 1/√D; the constant factors bring all three inputs to about 1. They could be
    part of the first layer's weights.
    """

    def __init__(self, embed_dim: int, hidden: int) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.mlp = nn.Sequential(nn.Linear(3 * embed_dim, hidden), nn.GELU(), nn.Linear(hidden, embed_dim))

    def forward(self, base: Tensor, delta: Tensor) -> Tensor:
        """base z, delta Δ (B, D) → g (B, D) in (0, 1)."""
        root = math.sqrt(self.embed_dim)
        z, d = root * base, root * delta
        return torch.sigmoid(self.mlp(torch.cat([z, d, z * d], -1)))
