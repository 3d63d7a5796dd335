"""Processes that train together: rank, barrier, and a gather that lets gradients through.

Plain torch.distributed, on the default group that Accelerate initialises; every function is a no-op in a single
process. `Accelerator.gather` has no gradient, which a contrastive loss over all processes' pairs needs.

Legend: W processes, B this process's rows, N = Σ B.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number, 0 to W − 1."""
    return dist.get_rank() if _active() else 0


def world_size() -> int:
    """W, 1 without torch.distributed."""
    return dist.get_world_size() if _active() else 1


def barrier() -> None:
    """Wait for every process."""
    if world_size() > 1:
        dist.barrier()


def all_gather_sizes(size: int, device: torch.device | str = "cpu") -> list[int]:
    """Every process's `size`, by rank. `device`: where the group's backend can exchange it (NCCL: the GPU)."""
    if world_size() == 1:
        return [size]
    own = torch.tensor([size], dtype=torch.int64, device=device)
    gathered = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(gathered, own)
    return torch.cat(gathered).tolist()


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of a tensor that has one shape on all processes; no gradient."""
    if world_size() == 1:
        return x.detach()
    total = x.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


def copy_from_first(x: Tensor) -> None:
    """Overwrite x by that of process 0."""
    if world_size() > 1:
        dist.broadcast(x, src=0)


def gather_with_grad(x: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
    """All processes' rows, by rank: x (B, ...) → (N, ...).

    The backward sums the gradients of all processes and hands each its own rows' part: with a loss of (W/N) Σ over own
    rows on each process, and gradients averaged over processes (DDP), the sum is that of one process on all N rows.
    Processes may bring different numbers of rows; the padding that the exchange needs is dropped here.

    Args:
        x: (B, ...), the same trailing shape and dtype on every process.
        sizes: every process's B (`all_gather_sizes`); asked for here when None.
    """
    if world_size() == 1:
        return x
    if sizes is None:
        sizes = all_gather_sizes(len(x), x.device)
    gathered: Tensor = _Gather.apply(x, tuple(sizes))
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        ctx.sizes = sizes
        longest = max(sizes)
        own = x.new_zeros((longest, *x.shape[1:]))
        own[: len(x)] = x
        gathered = [torch.empty_like(own) for _ in sizes]
        dist.all_gather(gathered, own)
        return torch.cat([rows[:size] for rows, size in zip(gathered, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        first = sum(ctx.sizes[: rank()])
        return total[first : first + ctx.sizes[rank()]], None
