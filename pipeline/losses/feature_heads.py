"""The maps that only the optional terms of distillation have: feature cosines per token (KD), and CRD's two embeddings.

They serve training alone, stand in the module that DDP wraps and take part in every step; an exported model has none.

Legend: B pairs, T tokens, V the image branch's width, W the text branch's, K components of a scale, C width of the
teacher's vector, d width of CRD's embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.losses.measured import Measured

if TYPE_CHECKING:
    from pipeline.losses.weights import LossWeights


class TokenHead(nn.Module):
    """A scale's tokens to the teacher's coefficients: a linear map, and a vector for each place.

    It starts as the predictor that ignores the image: the map at 0, the places at the teacher's mean tokens.

    Args:
        width: V. means: (T, K).
    """

    def __init__(self, width: int, means: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(width, means.shape[1], bias=False)
        nn.init.zeros_(self.linear.weight)
        self.places = nn.Parameter(means.clone())

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T, V) → (B, T, K)."""
        out: Tensor = self.linear(tokens) + self.places
        return out


class ContrastHeads(nn.Module):
    """A branch's and the teacher's vectors into one space of unit vectors; both maps learn.

    The teacher's map starts with the mean vector at the origin: vectors that are nearly alike would all be one.

    Args:
        width: V or W. mean: (C,) the teacher's mean unit vector. dim: d.
    """

    def __init__(self, width: int, mean: Tensor, dim: int) -> None:
        super().__init__()
        self.student = nn.Linear(width, dim)
        self.teacher = nn.Linear(len(mean), dim)
        with torch.no_grad():
            self.teacher.bias.copy_(-self.teacher.weight @ mean)

    def forward(self, pooled: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """(B, V) and (B, C) → unit vectors (B, d) each."""
        theirs = self.teacher(F.normalize(teacher.detach().to(pooled.dtype), dim=1))
        return F.normalize(self.student(pooled), dim=1), F.normalize(theirs, dim=1)


class FeatureHeads(nn.Module):
    """What the weights ask for, of both kinds.

    Args:
        widths: branch → V or W: "image", and "text" where there is one.
        measured: of the cache. weights: loss.kd and loss.crd decide what there is.

    Attributes:
        kd: scale → TokenHead; crd: branch → ContrastHeads; empty at a weight of 0.
    """

    def __init__(self, widths: Mapping[str, int], measured: Measured, weights: LossWeights) -> None:
        super().__init__()
        means = measured.token_means if weights.kd else {}
        self.kd = nn.ModuleDict({name: TokenHead(widths["image"], mean) for name, mean in means.items()})
        of_branch = {"image": measured.global_mean, "text": measured.text_mean}
        branches = widths if weights.crd else {}
        self.crd = nn.ModuleDict(
            {name: ContrastHeads(width, of_branch[name], weights.crd_dim) for name, width in branches.items()}
        )
