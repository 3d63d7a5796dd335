"""Transition terms: what the items just ranked say about the next one (orders 2 and above).

At position k of a list (counted from 1) the utility of candidate j is

    u_k(j) = s · ( x_j + Σ_{r=2..R} β_r · a_r(j | p_1 … p_{r−1}) ),          p_m = π_{k−m}, the m-th last item ranked

    a_2(j | p_1)           = ⟨q̂_{2,1}(h_{p_1}), k̂(h_j)⟩
    a_r(j | p_1 … p_{r−1}) = Σ_m α_m ⟨q̂_{r,m}(h_{p_m}), k̂(h_j)⟩               r ≥ 3
    α = softmax_m( ⟨A_r h_{p_1}, B_r h_{p_m} + e_{r,m}⟩ / √d )                 e: lag embedding; the newest item asks

h are the candidates' embeddings, q̂ and k̂ linear maps to d dimensions whose outputs are unit-normalised, so that every
a_r lies in [−1, 1] and β_r counts in cosines. One q̂ per order and lag, one k̂ for all orders. The order-r term needs
r − 1 ranked items: it is zero at positions k < r, so k = r is the first to have it. β starts at 0, the maps do not.

Because k̂ is shared, a position's terms are one query against the candidates' keys (a single d-vector, whatever R):

    q_k = Σ_r β_r Σ_m α_m q̂_{r,m}(h_{p_m})            u_k(j) = s · ( x_j + ⟨q_k, k̂_j⟩ )

The paper (arXiv 2605.06592) has pairwise terms β_{a,d} and tuple-wise terms γ_{a,b,d}; their form here is our reading.

Legend: b lists, N candidates, D embedding width, d transition width, T positions, R order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Tables:
    """Everything a `Transitions` says of N candidates, ready to be looked up by index.

    Attributes:
        keys: k̂ (N, d), unit rows.
        queries: q̂_r (N, r − 1, d) for r = 2 … R, unit rows; lag m stands at [:, m − 1].
        asks, answers: A_r h, B_r h (N, d) for r = 3 … R.
        lags: e_r (r − 1, d) for r = 3 … R.
        betas: (R − 1,), β_r at [r − 2].
    """

    keys: Tensor
    queries: list[Tensor]
    asks: list[Tensor]
    answers: list[Tensor]
    lags: list[Tensor]
    betas: Tensor

    def tensors(self) -> list[Tensor]:
        """All of them, in the order that `replaced` takes."""
        return [self.keys, *self.queries, *self.asks, *self.answers, *self.lags, self.betas]

    def replaced(self, tensors: list[Tensor]) -> Tables:
        """The same tables made of other tensors (detached leaves, gradients)."""
        keys, *rest, betas = tensors
        r, t = len(self.queries), len(self.asks)
        cut = [r, r + t, r + 2 * t]
        return Tables(keys, rest[: cut[0]], rest[cut[0] : cut[1]], rest[cut[1] : cut[2]], rest[cut[2] :], betas)


class Transitions(nn.Module):
    """The maps and βs of one candidate modality.

    Parameters: k̂ D·d; order 2 adds D·d + 1; order r ≥ 3 adds (r − 1)·D·d + 2·D·d + (r − 1)·d + 1.

    Args:
        embed_dim: D.
        order: R ≥ 2.
        dim: d.
    """

    def __init__(self, embed_dim: int, order: int, dim: int = 64) -> None:
        super().__init__()
        if order < 2:
            raise ValueError(f"order {order} has no transitions")
        self.order, self.dim = order, dim
        tuples = range(3, order + 1)
        self.key = nn.Linear(embed_dim, dim, bias=False)
        self.query = nn.ModuleList(nn.Linear(embed_dim, (r - 1) * dim, bias=False) for r in range(2, order + 1))
        self.ask = nn.ModuleList(nn.Linear(embed_dim, dim, bias=False) for _ in tuples)
        self.answer = nn.ModuleList(nn.Linear(embed_dim, dim, bias=False) for _ in tuples)
        self.lag = nn.ParameterList(nn.Parameter(torch.randn(r - 1, dim) / math.sqrt(dim)) for r in tuples)
        self.betas = nn.Parameter(torch.zeros(order - 1))

    def forward(self, candidates: Tensor) -> Tables:
        """candidates: h (N, D) → their tables, with gradient for h and all parameters."""

        def unit(x: Tensor) -> Tensor:
            return F.normalize(x.unflatten(1, (-1, self.dim)), dim=-1)

        return Tables(
            keys=unit(self.key(candidates)).squeeze(1),
            queries=[unit(query(candidates)) for query in self.query],
            asks=[ask(candidates) for ask in self.ask],
            answers=[answer(candidates) for answer in self.answer],
            lags=list(self.lag),
            betas=self.betas,
        )


def position_queries(tables: Tables, ranking: Tensor) -> Tensor:
    """q_k of the first T positions of each list.

    Args:
        ranking: (b, T) int64, the first T items of each list, best first.

    Returns:
        (b, T, d); zero at the first position, which has no predecessor.
    """
    b, depth = ranking.shape
    d = tables.keys.shape[1]
    total = tables.keys.new_zeros(b, depth, d)
    for index, queries in enumerate(tables.queries):
        r = index + 2
        if depth < r:
            break
        # The positions k = r … T have whole tuples; the item at lag m of position k stands at ranking[:, k − m − 1].
        lagged = torch.stack([ranking[:, r - 1 - m : depth - m] for m in range(1, r)], dim=2)  # (b, T − r + 1, r − 1)
        values = queries[lagged, torch.arange(r - 1, device=ranking.device)]  # (b, T − r + 1, r − 1, d)
        if r == 2:
            mixed = values.squeeze(2)
        else:
            asks = tables.asks[r - 3][lagged[:, :, :1]]  # (b, T − r + 1, 1, d)
            answers = tables.answers[r - 3][lagged] + tables.lags[r - 3]
            alpha = ((asks * answers).sum(-1, keepdim=True) / math.sqrt(d)).softmax(dim=2)
            mixed = (alpha * values).sum(2)
        total = total + F.pad(tables.betas[index] * mixed, (0, 0, r - 1, 0))
    return total


def transition_scores(tables: Tables, ranking: Tensor, scale: Tensor | float) -> Tensor:
    """What the transitions add to the utilities: s ⟨q_k, k̂_j⟩ (b, T, N), the `transitions` of `plackett_luce_nll`.

    Memory b·T·N: for references and small batches; training looks the queries up chunk by chunk.
    """
    return scale * position_queries(tables, ranking) @ tables.keys.T
