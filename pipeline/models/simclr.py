"""SLIP's projection head (Mu et al., arXiv 2112.12750), and the batch norm over all processes that it needs.

Legend: W processes, B own rows, N = Σ B rows, F features, P width of the pooled image features, E output width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.distributed import all_gather_sizes, gather_with_grad
from pipeline.errors import PipeError
from pipeline.models.geometry import at_least_float32, exact


class BatchNormAcross(nn.BatchNorm1d):
    """nn.BatchNorm1d on the N rows of all processes; its parameters, buffers and state dict are that one's.

        y = (x − μ) / √(σ² + ε) · weight + bias          μ = Σ_p (B_p/N) μ_p
                                                         σ² = Σ_p (B_p/N) (σ_p² + (μ_p − μ)²)

    p: processes, which may bring different numbers of rows, or none. One exchange of 2F numbers, whose gradients reach
    the rows of all processes. nn.SyncBatchNorm does the same, but not on CPUs.
    """

    def __init__(self, features: int, *, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(features, eps=eps, momentum=momentum)

    def forward(self, input: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        """input (B, F) → (B, F). Training takes the batch's statistics, evaluation the running ones.

        Args:
            sizes: every process's B; asked for when None.

        Raises:
            PipeError: a training batch of fewer than two rows, which has no variance.
        """
        if not self.training:
            return super().forward(input)
        if sizes is None:
            sizes = all_gather_sizes(len(input), input.device)
        total = sum(sizes)
        if total < 2:
            raise PipeError(f"a batch norm cannot train on {total} row(s)", fix="use a larger batch_size")
        mean, variance = self._statistics(input, sizes, total)
        self._remember(mean.detach(), variance.detach() * total / (total - 1))
        return (input - mean) * torch.rsqrt(variance + self.eps) * self.weight + self.bias

    def _statistics(self, x: Tensor, sizes: Sequence[int], total: int) -> tuple[Tensor, Tensor]:
        """μ and σ² (biased) of all N rows: (F,) each."""
        rows = max(len(x), 1)  # without rows everything here is 0, and so is its weight
        own_mean = x.sum(0) / rows
        own_variance = (x - own_mean).square().sum(0) / rows
        each = gather_with_grad(torch.stack([own_mean, own_variance])[None], [1] * len(sizes))  # (W, 2, F)
        means, variances = each.unbind(1)
        shares = each.new_tensor([size / total for size in sizes])[:, None]
        mean = (shares * means).sum(0)
        return mean, (shares * (variances + (means - mean).square())).sum(0)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        """Running statistics as nn.BatchNorm1d keeps them: `variance` is the unbiased one."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum or 0.0)
        self.running_var.lerp_(variance.to(self.running_var.dtype), self.momentum or 0.0)


class SimCLRHead(nn.Module):
    """SLIP's MLP on pooled image features: three linear layers, a batch norm and a ReLU after the first two.

    Args:
        width: P. hidden: of both hidden layers. out: E.
    """

    def __init__(self, width: int, hidden: int = 4096, out: int = 256) -> None:
        super().__init__()
        self.layer1, self.norm1 = nn.Linear(width, hidden), BatchNormAcross(hidden)
        self.layer2, self.norm2 = nn.Linear(hidden, hidden), BatchNormAcross(hidden)
        self.layer3 = nn.Linear(hidden, out)

    def forward(self, pooled: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        """pooled (B, P) of any dtype → (B, E) in float32 or better, not normalised; never under autocast.

        SLIP passes its two views one after the other, so that each is normalised by its own statistics.

        Args:
            sizes: every process's B; asked for when None.
        """
        with exact(pooled):
            x = at_least_float32(pooled)
            if self.training and sizes is None:
                sizes = all_gather_sizes(len(x), x.device)
            x = F.relu(self.norm1(self.layer1(x), sizes))
            x = F.relu(self.norm2(self.layer2(x), sizes))
            projected: Tensor = self.layer3(x)
            return projected
