"""Negative log-likelihoods of a chunk of lists, with their gradients in closed form and no autograd.

With e_k(j) = exp(u_k(j)) and S_k = Σ_{j ∉ π_<k} e_k(j), a position's loss and its gradient are

    nll_k = log S_k − u_k(π_k)            ∂nll_k / ∂u_k(j) = e_k(j) / S_k − [j = π_k]        for j ∉ π_<k

`first_order` serves positions without transitions (u_k = u). Sorted worst first, every S_k is one running sum, and

    Σ_k ω_k ∂nll_k / ∂u(j) = e(j) · Σ_{k ≤ position of j} ω_k / S_k − ω_{position of j}

is another: O(N log N) a list. The sums are float64 and shifted by the list's maximum; no epsilon is added. At s = 100
cosines span 200 nats: float32 underflows there, float64 does so beyond 700.
`with_transitions` serves the head positions, where each has its own utilities u_k(j) = u(j) + s ⟨q_k, k̂_j⟩:
an attention-like log-sum-exp over the candidates that are left, in blocks of `cells` scores.

Both return sums over the chunk's lists for each position, and gradients of Σ_lists Σ_k ω_k nll_k.

Legend: b lists, N candidates, P listed positions, T head positions, d transition width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Ranked:
    """What a chunk of lists gives.

    Attributes:
        nll: (positions,) float64, Σ over lists of nll_k, best position first.
        utilities: (b, N) gradient for u, None where not asked for.
        queries: (b, T, d) gradient for q (`with_transitions` alone).
        keys: (N, d) gradient for k̂ (likewise).
        scale: () float64, the gradient for s through the transitions (likewise).
    """

    nll: Tensor
    utilities: Tensor | None = None
    queries: Tensor | None = None
    keys: Tensor | None = None
    scale: Tensor | None = None


def first_order(utilities: Tensor, worst_first: Tensor, weights: Tensor, *, skip: int = 0, gradient: bool) -> Ranked:
    """Positions skip + 1 … P of each list, first order.

    Args:
        utilities: u (b, N); −inf leaves a candidate out, which must then stand first in `worst_first`.
        worst_first: (b, N) int64, each list's candidates from the worst to the best.
        weights: ω (P,) float64, best position first; unlisted candidates (P < N) stay in the denominators.
        skip: leading positions that are scored elsewhere; their items are gone from the denominators.
    """
    candidates = utilities.shape[1]
    order = worst_first[:, : candidates - skip]
    unlisted = candidates - len(weights)
    omega = weights[skip:].flip(0)  # worst first, as everything below
    u = utilities.gather(1, order).double()
    u -= u.amax(1, keepdim=True)
    own = u[:, unlisted:].sum(0)
    e = u.exp_()
    total = e.cumsum(1)  # S_k of the item at each place: everything up to it is left
    left = total[:, unlisted:]
    nll = (left.log().sum(0) - own).flip(0)
    if not gradient:
        return Ranked(nll)
    # Σ_{k ≤ position} ω_k / S_k runs from the best item down.
    share = (omega / left).flip(1).cumsum(1).flip(1)
    e[:, unlisted:] *= share
    e[:, :unlisted] *= share[:, :1]
    e[:, unlisted:] -= omega
    gradients = torch.zeros_like(utilities).scatter_(1, order, e.to(utilities.dtype))
    return Ranked(nll, utilities=gradients)


def with_transitions(
    utilities: Tensor,
    queries: Tensor,
    keys: Tensor,
    ranking: Tensor,
    scale: Tensor,
    weights: Tensor,
    *,
    gradient: bool,
    cells: int,
) -> Ranked:
    """The first T positions of each list with transitions: u_k(j) = u(j) + s ⟨q_k, k̂_j⟩.

    Args:
        utilities: u (b, N); −inf leaves a candidate out.
        queries, keys: q (b, T, d), k̂ (N, d).
        ranking: (b, T) int64, the items at those positions, best first.
        scale: s, ().
        weights: ω (T,) float64.
        cells: scores held at once, about.
    """
    lists, depth = ranking.shape
    block = max(1, cells // (depth * len(keys)))
    nll = torch.zeros(depth, dtype=torch.float64, device=utilities.device)
    of_utilities, of_queries, of_keys = torch.empty_like(utilities), torch.empty_like(queries), torch.zeros_like(keys)
    of_scale = torch.zeros_like(nll[0])
    # taken[k, m]: the item at position m is gone by position k.
    taken = torch.ones(depth, depth, dtype=torch.bool, device=ranking.device).tril(-1)
    for start in range(0, lists, block):
        rows = slice(start, min(start + block, lists))
        q = queries[rows].flatten(0, 1)  # (n·T, d), n lists in this block
        top = ranking[rows, None, :].expand(-1, depth, -1)  # (n, T, T)
        scores = (scale * q @ keys.T).unflatten(0, (-1, depth))  # (n, T, N)
        scores += utilities[rows, None, :]
        of_listed = scores.gather(2, top).masked_fill_(taken, -torch.inf)
        own = of_listed.diagonal(dim1=1, dim2=2)  # (n, T): u_k(π_k)
        scores.scatter_(2, top, of_listed)
        highest = scores.amax(2, keepdim=True)
        e = scores.sub_(highest).exp_()
        total = e.sum(2)
        nll += (total.log() + highest.squeeze(2) - own).double().sum(0)
        if not gradient:
            continue
        omega = weights.to(e.dtype)
        g = e.mul_((omega / total).unsqueeze(2))  # ω_k times the softmax over what is left
        position = ranking[rows, :, None]
        g.scatter_add_(2, position, (-omega).expand(len(position), depth).unsqueeze(2))
        of_utilities[rows] = g.sum(1)
        flat = g.flatten(0, 1)
        mean_key = flat @ keys
        of_keys.addmm_(flat.T, scale * q)
        of_scale += (mean_key * q).sum(dtype=torch.float64)
        of_queries[rows] = (scale * mean_key).unflatten(0, (-1, depth))
    return Ranked(nll, of_utilities, of_queries, of_keys, of_scale) if gradient else Ranked(nll)
