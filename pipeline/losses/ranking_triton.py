"""The head positions with transitions as Triton kernels: `ranking.with_transitions` on a GPU, scores never stored.

For a list and position k the scores over candidates j are

    u_k(j) = u(j) + s ⟨q_k, k̂_j⟩,   −∞ where j is taken, that is, where its rank is below k

Three kernels, each of which computes the scores it needs anew, a tile of positions × a block of candidates at a time:

    _log_sums        lse_k = log Σ_j exp(u_k(j)): running maximum and sum over the blocks (as in FlashAttention)
    _mean_keys       Σ_j G_kj k̂_j for each position, G_kj = ω_k (exp(u_k(j) − lse_k) − [rank of j = k]); it gives the
                     gradients for q and s
    _of_candidates   Σ_k G_kj for each list and candidate, the gradient for u, and, summed over a share of the lists,
                     Σ_k G_kj q_k, the gradient for k̂

A program owns what it writes, so there are no atomics and a result is the same every time. Everything is float32,
products in full precision.

Legend: b lists, N candidates, T positions, d transition width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.losses.plackett_luce import rank_of
from pipeline.losses.ranking import Ranked

POSITIONS, CANDIDATES = 32, 64  # a tile
WARPS = 8  # of a program: with 4 its registers spill, by kilobytes on an A100
WIDEST = 256  # d: a tile's keys and queries lie in shared memory
SHARES = 16  # of a chunk's lists that `_of_candidates` sums apart


def with_transitions(
    utilities: Tensor,
    queries: Tensor,
    keys: Tensor,
    ranking: Tensor,
    scale: Tensor,
    weights: Tensor,
    *,
    gradient: bool,
    cells: int = 0,
) -> Ranked:
    """As `ranking.with_transitions`, all tensors float32 on one device (weights float64); `cells` plays no part."""
    lists, depth = ranking.shape
    candidates, width = keys.shape
    u, q, k = utilities.contiguous(), (scale * queries).contiguous(), keys.contiguous()
    ranks = rank_of(ranking, candidates).to(torch.int32)
    omega = weights.to(torch.float32).contiguous()
    lse = torch.empty(lists, depth, device=u.device, dtype=torch.float32)
    sizes = {"T": depth, "N": candidates, "D": width}
    tile = {"BT": POSITIONS, "BN": CANDIDATES, "BD": padded(width), "num_warps": WARPS}
    tiles = triton.cdiv(depth, POSITIONS)
    _log_sums[(lists, tiles)](u, q, k, ranks, lse, **sizes, **tile)
    own = u.gather(1, ranking) + (q * k[ranking]).sum(2)
    nll = (lse - own).sum(0, dtype=torch.float64)
    if not gradient:
        return Ranked(nll)
    mean_keys = torch.empty_like(q)
    _mean_keys[(lists, tiles)](u, q, k, ranks, lse, omega, mean_keys, **sizes, **tile)
    shares = min(SHARES, lists)
    of_utilities = torch.empty_like(u)
    of_keys = torch.empty(shares, candidates, width, device=u.device, dtype=torch.float32)
    blocks = triton.cdiv(candidates, CANDIDATES)
    _of_candidates[(blocks, shares)](
        u, q, k, ranks, lse, omega, of_utilities, of_keys, lists, **sizes, **tile, SHARES=shares
    )
    of_scale = (mean_keys * queries).sum(dtype=torch.float64)
    return Ranked(nll, of_utilities, scale * mean_keys, of_keys.sum(0), of_scale)


def padded(width: int) -> int:
    """d as the kernels hold it, a power of 2: what they are compiled for."""
    return max(16, triton.next_power_of_2(width))


@triton.jit
def _scores(u_row, rank_row, q, keys, position, first, N, D, BN: tl.constexpr, BD: tl.constexpr):
    """u_k(j) (BT, BN) of one list, −∞ where taken or beyond the candidates; the keys (BN, BD) and the ranks (BN,)."""
    j = first + tl.arange(0, BN)
    d = tl.arange(0, BD)
    there = j < N
    k = tl.load(keys + j[:, None] * D + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0)
    u = tl.load(u_row + j, mask=there, other=float("-inf"))
    rank = tl.load(rank_row + j, mask=there, other=-1)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") + u[None, :]
    return tl.where(rank[None, :] < position[:, None], float("-inf"), scores), k, rank


@triton.jit
def _queries(q, row, position, T, D, BD: tl.constexpr):
    """q (BT, BD) of one list's tile of positions, 0 beyond."""
    d = tl.arange(0, BD)
    there = (position < T)[:, None] & (d < D)[None, :]
    return tl.load(q + (row * T + position[:, None]) * D + d[None, :], mask=there, other=0.0)


@triton.jit
def _log_sums(u, q, keys, ranks, lse, T, N, D, BT: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    row = tl.program_id(0)
    position = tl.program_id(1) * BT + tl.arange(0, BT)
    tile = _queries(q, row, position, T, D, BD)
    highest = tl.full((BT,), float("-inf"), tl.float32)
    total = tl.zeros((BT,), tl.float32)
    for first in range(0, N, BN):
        scores, _, _ = _scores(u + row * N, ranks + row * N, tile, keys, position, first, N, D, BN, BD)
        now = tl.maximum(highest, tl.max(scores, 1))
        shift = tl.where(now == float("-inf"), 0.0, now)  # a block may hold nothing that is left
        total = total * tl.exp(highest - shift) + tl.sum(tl.exp(scores - shift[:, None]), 1)
        highest = now
    total = tl.where(position < T, total, 1.0)  # beyond the head everything may be taken
    tl.store(lse + row * T + position, highest + tl.log(total), mask=position < T)


@triton.jit
def _mean_keys(u, q, keys, ranks, lse, omega, out, T, N, D, BT: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    row = tl.program_id(0)
    position = tl.program_id(1) * BT + tl.arange(0, BT)
    tile = _queries(q, row, position, T, D, BD)
    sums = tl.load(lse + row * T + position, mask=position < T, other=float("inf"))  # all exp(u − lse) are 0 beyond
    weight = tl.load(omega + position, mask=position < T, other=0.0)
    mean = tl.zeros((BT, BD), tl.float32)
    for first in range(0, N, BN):
        scores, k, rank = _scores(u + row * N, ranks + row * N, tile, keys, position, first, N, D, BN, BD)
        share = tl.exp(scores - sums[:, None]) - tl.where(rank[None, :] == position[:, None], 1.0, 0.0)
        mean += tl.dot(weight[:, None] * share, k, input_precision="ieee")
    d = tl.arange(0, BD)
    there = (position < T)[:, None] & (d < D)[None, :]
    tl.store(out + (row * T + position[:, None]) * D + d[None, :], mean, mask=there)


@triton.jit
def _of_candidates(
    u,
    q,
    keys,
    ranks,
    lse,
    omega,
    of_u,
    of_keys,
    lists,
    T,
    N,
    D,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    SHARES: tl.constexpr,
):
    first = tl.program_id(0) * BN
    share = tl.program_id(1)
    j = first + tl.arange(0, BN)
    d = tl.arange(0, BD)
    of_block = tl.zeros((BN, BD), tl.float32)
    for row in range(share, lists, SHARES):
        of_list = tl.zeros((BN,), tl.float32)
        for start in range(0, T, BT):
            position = start + tl.arange(0, BT)
            tile = _queries(q, row, position, T, D, BD)
            # Position T may have candidates left; with lse = 0 there exp(u) could be ∞, and ∞ · 0 is not a number.
            sums = tl.load(lse + row * T + position, mask=position < T, other=float("inf"))
            weight = tl.load(omega + position, mask=position < T, other=0.0)
            scores, _, rank = _scores(u + row * N, ranks + row * N, tile, keys, position, first, N, D, BN, BD)
            g = tl.exp(scores - sums[:, None]) - tl.where(rank[None, :] == position[:, None], 1.0, 0.0)
            g = weight[:, None] * g
            of_list += tl.sum(g, 0)
            of_block += tl.dot(tl.trans(g), tile, input_precision="ieee")
        tl.store(of_u + row * N + j, of_list, mask=j < N)
    there = (j < N)[:, None] & (d < D)[None, :]
    tl.store(of_keys + (share * N + j[:, None]) * D + d[None, :], of_block, mask=there)
