"""The Plackett-Luce likelihood of a ranking: the plain form, and what it shares with the fused one.

A ranking π (best first) of N candidates is drawn item by item, each from those that are left:

    P(π) = ∏_k exp(u_k(π_k)) / Σ_{j ∉ π_<k} exp(u_k(j))

Order 1 has u_k(j) = u(j) (ListMLE, Xia et al. 2008; RankCLIP, arXiv 2404.09387); higher orders add to candidate j at
position k what the items before it say (pipeline/losses/transitions.py). As u_k depends on π_<k alone, the
probabilities of all N! rankings sum to 1 whatever the order.

Legend: B lists, N candidates, K listed positions, K' positions with transitions.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Positions = Literal["head_tail", "uniform"]


def plackett_luce_nll(utilities: Tensor, ranking: Tensor, transitions: Tensor | None = None) -> Tensor:
    """−log P of the first K positions of each list, through autograd; training uses `pipeline.losses.lists` instead.

        −log P = Σ_{k=1..K} [ log Σ_{j ∉ π_<k} exp(u(j) + a_k(j)) − u(π_k) − a_k(π_k) ],     a_k = 0 for k > K'

    Denominators are log-sum-exps over what is left (taken items masked, never subtracted: they can hold nearly all of
    the mass). float64 stays float64; anything else is computed in float32.

    Args:
        utilities: u (B, N).
        ranking: π (B, K) int64, best first, K ≤ N distinct candidates; the others stay in every denominator.
        transitions: a (B, K', N), K' ≤ K.

    Returns:
        (B,).

    Raises:
        ValueError: shapes that do not fit.
    """
    lists, candidates = utilities.shape
    depth = ranking.shape[1]
    head = 0 if transitions is None else transitions.shape[1]
    if ranking.shape[0] != lists or depth > candidates:
        raise ValueError(f"ranking {tuple(ranking.shape)} does not fit utilities {tuple(utilities.shape)}")
    if transitions is not None and (transitions.shape != (lists, head, candidates) or head > depth):
        raise ValueError(f"transitions {tuple(transitions.shape)} do not fit {(lists, depth, candidates)}")
    u = at_least_float32(utilities)
    nll = u.new_zeros(lists)
    if transitions is not None and head:
        scores = u[:, None, :] + at_least_float32(transitions)  # (B, K', N)
        taken = rank_of(ranking, candidates)[:, None, :] < torch.arange(head, device=u.device)[None, :, None]
        chosen = scores.gather(2, ranking[:, :head, None]).squeeze(2)
        nll = nll + (scores.masked_fill(taken, -torch.inf).logsumexp(2) - chosen).sum(1)
    if depth > head:
        left = u.gather(1, ranking[:, head:]).flip(1)  # worst first
        if depth < candidates:
            named = rank_of(ranking, candidates) < depth
            rest = u.masked_fill(named, -torch.inf).logsumexp(1, keepdim=True)
            nll = nll + (torch.cat([rest, left], 1).logcumsumexp(1)[:, 1:] - left).sum(1)
        else:
            nll = nll + (left.logcumsumexp(1) - left).sum(1)
    return nll


def rank_of(ranking: Tensor, candidates: int) -> Tensor:
    """ranking (B, K) → (B, N) int64: each candidate's position from 0, K for those that it does not name."""
    lists, depth = ranking.shape
    ranks = torch.full((lists, candidates), depth, dtype=torch.int64, device=ranking.device)
    positions = torch.arange(depth, device=ranking.device).expand(lists, depth)
    return ranks.scatter_(1, ranking, positions)


def worst_first(reference: Tensor) -> Tensor:
    """The order of each row of `reference`, its smallest value first; of equal values the smaller index is the better.

    Args:
        reference: (b, N) float32 or float64, without NaN; −0 equals 0.

    Returns:
        (b, N) int64; flipped it is the ranking, best first.
    """
    candidates = reference.shape[1]
    if reference.dtype != torch.float32 or candidates >= 1 << 31:
        return (reference + 0.0).sort(dim=1, descending=True, stable=True).indices.flip(1)
    # One int64 key holds both: the float's bits, made to order as integers, above the index (reversed, as of two equal
    # values the larger index is worse). Keys are distinct, so an unstable sort of the keys alone will do, in place.
    bits = (reference + 0.0).view(torch.int32)
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)
    keys <<= 32
    keys += torch.arange(candidates - 1, -1, -1, device=reference.device)
    if keys.device.type == "cpu":
        keys.numpy().sort(axis=1)  # numpy sorts int64 with vector instructions
    else:
        keys = keys.sort(dim=1).values
    keys &= 0xFFFFFFFF
    return keys.neg_().add_(candidates - 1)


def position_weights(
    depth: int, head: int, *, positions: Positions, head_share: float, device: torch.device | str = "cpu"
) -> Tensor:
    """ω (K,) float64, best position first: a list's loss is Σ_k ω_k nll_k.

        head_tail   head_share / T for k ≤ T, (1 − head_share) / (K − T) beyond; 1 / K where the tail is empty
        uniform     1 / K

    The same for every order, since orders would tie by construction were the T positions that differ T/K of the loss.

    Args:
        depth: K ≥ 1.
        head: T, at most K.
    """
    tail = depth - head
    weights = torch.full((depth,), 1.0 / depth, dtype=torch.float64, device=device)
    if positions == "head_tail" and head and tail:
        weights[:head] = head_share / head
        weights[head:] = (1.0 - head_share) / tail
    return weights


def at_least_float32(x: Tensor) -> Tensor:
    """float64 as it is, everything else as float32."""
    return x if x.dtype == torch.float64 else x.float()
