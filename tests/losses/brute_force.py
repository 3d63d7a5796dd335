"""The ranking losses by their definitions: Python loops over lists, positions and candidates, in float64.

Written from the formulas alone and differentiated by autograd; nothing here is shared with the code under test.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.losses.transitions import Transitions


def unit(x: Tensor) -> Tensor:
    return x / x.norm()


class Terms:
    """a_r(j | p_1 … p_{r−1}) of one candidate modality, one scalar at a time."""

    def __init__(self, maps: Transitions, h: Tensor) -> None:
        d, self.maps = maps.dim, maps
        self.k = [unit(maps.key.weight @ row) for row in h]
        self.q: dict[tuple[int, int, int], Tensor] = {}
        self.ask: dict[tuple[int, int], Tensor] = {}
        self.answer: dict[tuple[int, int], Tensor] = {}
        for r in range(2, maps.order + 1):
            for p, row in enumerate(h):
                for m in range(1, r):
                    self.q[r, m, p] = unit(maps.query[r - 2].weight[(m - 1) * d : m * d] @ row)
                if r > 2:
                    self.ask[r, p] = maps.ask[r - 3].weight @ row
                    self.answer[r, p] = maps.answer[r - 3].weight @ row

    def added(self, j: int, before: Sequence[int]) -> Tensor:
        """Σ_r β_r a_r for candidate j after the items `before` (best first)."""
        total = self.k[0].new_zeros(())
        k = len(before) + 1
        for r in range(2, self.maps.order + 1):
            if k < r:
                continue
            p = {m: before[-m] for m in range(1, r)}
            if r == 2:
                a = self.q[2, 1, p[1]] @ self.k[j]
            else:
                lag = self.maps.lag[r - 3]
                logits = [self.ask[r, p[1]] @ (self.answer[r, p[m]] + lag[m - 1]) for m in range(1, r)]
                alpha = torch.stack(logits).div(math.sqrt(self.maps.dim)).softmax(0)
                a = sum(alpha[m - 1] * (self.q[r, m, p[m]] @ self.k[j]) for m in range(1, r))
            total = total + self.maps.betas[r - 2] * a
        return total


def list_nll(
    x: Tensor, ranking: Sequence[int], candidates: Sequence[int], s: Tensor, terms: Terms | None, head: int
) -> list[Tensor]:
    """nll_k of the listed positions of one list; x (N,); transitions at the first `head` positions."""
    found = []
    for position, chosen in enumerate(ranking):
        before = ranking[:position]
        left = [j for j in candidates if j not in before]
        with_terms = terms is not None and position < head
        u = {j: s * (x[j] + terms.added(j, before)) if with_terms else s * x[j] for j in left}
        found.append(torch.stack(list(u.values())).logsumexp(0) - u[chosen])
    return found


def ranked(reference: Tensor, candidates: Sequence[int]) -> list[int]:
    """Best first; of equal values the smaller index first."""
    return sorted(candidates, key=lambda j: (-float(reference[j]), j))


def ranking_loss(
    v: Tensor,
    w: Tensor,
    s: Tensor,
    maps: dict[str, Transitions] | None,
    *,
    group: str,
    transition_depth: int,
    positions: str = "head_tail",
    head_share: float = 0.5,
    list_depth: int | None = None,
    include_self: bool = False,
) -> Tensor:
    """L_cross or L_in on all N lists of both directions."""
    n = len(v)
    rows = {"image": v, "text": w}
    other = {"image": "text", "text": "image"}
    families = [("image", "text"), ("text", "image")] if group == "cross" else [("image", "image"), ("text", "text")]
    terms = {name: Terms(maps[name], rows[name]) for name in rows} if maps else {}
    total = v.new_zeros(())
    for modality, of in families:
        for i in range(n):
            candidates = [j for j in range(n) if group == "cross" or include_self or j != i]
            x = torch.stack([rows[modality][i] @ rows[of][j] for j in range(n)])
            # The same products as the library's, so that near-ties fall alike; only their order is used.
            reference = (rows[other[modality]] @ rows[other[of]].T)[i].detach()
            order = ranked(reference, candidates)[: list_depth or n]
            nll = list_nll(x, order, candidates, s, terms.get(of), transition_depth)
            head, tail = nll[:transition_depth], nll[transition_depth:]
            if positions == "uniform" or not tail:
                of_list = sum(nll) / len(nll)
            else:
                of_list = head_share * sum(head) / len(head) + (1 - head_share) * sum(tail) / len(tail)
            total = total + of_list / n
    return total


def published_list_mle(predicted: Tensor, true: Tensor) -> Tensor:
    """ListMLE as RankCLIP's public code defines it: mean over rows of Σ_positions [log(Σ exp + 1e-10) − score]."""
    total = predicted.new_zeros(())
    for scores, relevance in zip(predicted, true, strict=True):
        order = torch.sort(relevance, descending=True).indices
        sorted_scores = scores[order] - scores.max()
        for k in range(len(order)):
            total = total + torch.log(torch.exp(sorted_scores[k:]).sum() + 1e-10) - sorted_scores[k]
    return total / len(predicted)
