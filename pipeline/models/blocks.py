"""The transformer block that the text branch and the fusion's refiner are made of.

Legend: B sequences, T tokens, R rows of them that are wanted, W width, H heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import PipeError
from pipeline.models.recompute import recomputed

HEAD_WIDTHS = (64, 48, 32, 16)


class Block(nn.Module):
    """Self-attention and MLP with residuals, each behind its norm.

    Args:
        width: W. mlp_ratio: the MLP's width over W.
        input_norm: False where the input was normalised before and its lengths now carry meaning.

    Attributes:
        grad_checkpointing: keep the input alone and run again in the backward pass; see models.checkpointing.
    """

    grad_checkpointing = False

    def __init__(self, width: int, *, mlp_ratio: float = 4.0, input_norm: bool = True) -> None:
        super().__init__()
        self.heads = width // head_width(width)
        self.norm_attention = nn.LayerNorm(width) if input_norm else nn.Identity()
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.project = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        hidden = round(width * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor, keep: Tensor | None = None, *, rows: int | None = None) -> Tensor:
        """x (B, T, W), keep (B, T) bool (None: all are attended to) → (B, R, W), the first `rows` tokens (None: all).

        Rows nobody reads are not computed; those that are come out as they would among all.
        """
        if self.grad_checkpointing and torch.is_grad_enabled():
            again: Tensor = recomputed(self._run, x, keep, rows, inside=None)
            return again
        return self._run(x, keep, rows)

    def _run(self, x: Tensor, keep: Tensor | None, rows: int | None) -> Tensor:
        normed = self.norm_attention(x)
        asking = normed if rows is None else normed[:, :rows]
        key, value = self.key_value(normed).chunk(2, dim=-1)
        mask = None if keep is None else keep[:, None, None, :]  # (B, 1, 1, T)
        attended = F.scaled_dot_product_attention(
            self._split(self.query(asking)), self._split(key), self._split(value), attn_mask=mask
        )
        x = (x if rows is None else x[:, :rows]) + self.project(attended.transpose(1, 2).flatten(2))
        out: Tensor = x + self.mlp(self.norm_mlp(x))
        return out

    def _split(self, x: Tensor) -> Tensor:
        """(B, T, W) → (B, H, T, W / H)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def head_width(width: int) -> int:
    """The widest usual head that divides `width`."""
    for candidate in HEAD_WIDTHS:
        if width % candidate == 0:
            return candidate
    raise PipeError(f"attention heads do not divide the width {width}", fix="use a multiple of 16")


def masked_mean(x: Tensor, keep: Tensor | None) -> Tensor:
    """Mean of the kept tokens: x (B, T, W), keep (B, T) bool or None for all → (B, W)."""
    if keep is None:
        return x.mean(1)
    kept = keep.unsqueeze(-1)
    total = torch.where(kept, x, 0.0).sum(1)
    return total / kept.sum(1).clamp_min(1)
