"""A process's image-text pairs beside everyone's: what the contrastive and the ranking losses look at.

Legend: W processes, B own pairs, N = Σ B gathered pairs, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.distributed import all_gather_sizes, gather_with_grad, rank, world_size


@dataclass(frozen=True)
class Pairs:
    """Own rows and gathered candidates.

    Attributes:
        image_rows, text_rows: (B, D) unit-norm, float32 or float64.
        image_all, text_all: (N, D), the processes' rows by rank, with gradient.
        scale: s, ().
        first: the number of the first own pair among the N.
        share: W / N, the weight of one own row.
        sizes: every process's B, by rank.
    """

    image_rows: Tensor
    text_rows: Tensor
    image_all: Tensor
    text_all: Tensor
    scale: Tensor
    first: int
    share: float
    sizes: tuple[int, ...]

    @classmethod
    def alone(cls, images: Tensor, texts: Tensor, scale: Tensor) -> Pairs:
        """The pairs of a single process."""
        return cls(images, texts, images, texts, scale, 0, 1 / len(images), (len(images),))

    @classmethod
    def gathered(cls, images: Tensor, texts: Tensor, scale: Tensor, sizes: Sequence[int] | None = None) -> Pairs:
        """This process's pairs with those of all processes; `sizes`: every process's B, asked for when None."""
        if world_size() == 1:
            return cls.alone(images, texts, scale)
        if sizes is None:
            sizes = all_gather_sizes(len(images), images.device)
        image_all, text_all = gather_with_grad(torch.stack([images, texts], 1), sizes).unbind(1)  # one exchange
        first, share = sum(sizes[: rank()]), world_size() / sum(sizes)
        return cls(images, texts, image_all, text_all, scale, first, share, tuple(sizes))

    def mean(self, values: Tensor) -> Tensor:
        """(W / N) Σ over own rows: values (B,) → (). Its average over processes is the mean over all N."""
        return self.share * values.sum()
