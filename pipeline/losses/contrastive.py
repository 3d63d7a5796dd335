"""Contrastive losses: CLIP's InfoNCE, and what the baselines CyCLIP, ALIP and SLIP add to it or make of it.

Each gives one value for every own pair; `Pairs.mean` of them is the published loss.

Legend: W processes, B own pairs, N = Σ B gathered pairs, D joint width, E width of a SimCLR embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.distributed import all_gather_sizes, gather_with_grad, mean_over_ranks, rank
from pipeline.losses.pairs import Pairs
from pipeline.models.geometry import at_least_float32, normalise


def info_nce(pairs: Pairs) -> Tensor:
    """CLIP (Radford et al., arXiv 2103.00020): each own pair's loss over all candidates, the mean of both ways: (B,).

        ℓ_i = ½ [ log Σ_j exp(s ⟨v_i, w_j⟩) − s ⟨v_i, w_i⟩  +  log Σ_j exp(s ⟨w_i, v_j⟩) − s ⟨w_i, v_i⟩ ]

    v, w: `pairs`' image and text rows. The mean over all N pairs is CLIP's loss.
    """
    rows = len(pairs.image_rows)
    target = torch.arange(pairs.first, pairs.first + rows, device=pairs.image_rows.device)
    to_texts = F.cross_entropy(pairs.scale * pairs.image_rows @ pairs.text_all.T, target, reduction="none")
    to_images = F.cross_entropy(pairs.scale * pairs.text_rows @ pairs.image_all.T, target, reduction="none")
    return (to_texts + to_images) / 2


def cyclic(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """CyCLIP's two consistencies (Goel et al., arXiv 2205.14459), in-modal and cross-modal: (B,) each.

        in_j    = Σ_k ( ⟨v_j, v_k⟩ − ⟨w_j, w_k⟩ )²        cross_j = Σ_k ( ⟨v_j, w_k⟩ − ⟨v_k, w_j⟩ )²

    The published code takes the mean over all N² squared differences of logits, divides by s² and multiplies by N:
    that is the mean of these over j. The temperature cancels, so s has no part in it.
    """
    v, w, v_all, w_all = pairs.image_rows, pairs.text_rows, pairs.image_all, pairs.text_all
    in_modal = (v @ v_all.T - w @ w_all.T).square().sum(1)
    cross_modal = (v @ w_all.T - w @ v_all.T).square().sum(1)
    return in_modal, cross_modal


@dataclass(frozen=True)
class Weights:
    """ALIP's weights of the own samples, without gradient: w_s, w_it and w_ic, (B,) each."""

    sample: Tensor
    image_text: Tensor
    image_caption: Tensor


class AdaptiveWeights(nn.Module):
    """ALIP's weights (Yang et al., arXiv 2308.08428), from similarities S and their running means H.

        S_tc = ⟨w, c⟩    S_it = ⟨v, w⟩    S_ic = ⟨v, c⟩           image v, its text w, its synthetic caption c
        H ← 0.99 H + 0.01 · mean of S over the N samples           one H for each S, 1 at the start
        e_tc = exp(2 (S_tc − H_tc))                                with the new H; e_it and e_ic alike
        w_s = min(1, e_tc)    w_it = e_it where e_tc < 1, else 1    w_ic = e_ic where e_tc < 1, else 1

    The means are those of all processes' samples, so that the buffers are the same everywhere.

    Attributes:
        text_caption, image_text, image_caption: H, () float32 (float64 in a float64 module); saved with the model.
    """

    DECAY = 0.99

    text_caption: Tensor
    image_text: Tensor
    image_caption: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("text_caption", "image_text", "image_caption"):
            self.register_buffer(name, torch.ones((), dtype=torch.float32))

    @torch.no_grad()
    def forward(self, image_text: Pairs, captions_rows: Tensor, *, update: bool) -> Weights:
        """The own samples' weights.

        Args:
            image_text: the images with their own texts.
            captions_rows: (B, D) unit-norm, the own images' synthetic captions.
            update: take this batch into the running means first, as training does; it must be the same on every
                process. Without, nothing is exchanged and nothing changes.
        """
        dtype = torch.promote_types(at_least_float32(captions_rows).dtype, at_least_float32(self.text_caption).dtype)
        v, w, c = (x.to(dtype) for x in (image_text.image_rows, image_text.text_rows, captions_rows))
        found = torch.stack([(w * c).sum(1), (v * w).sum(1), (v * c).sum(1)])  # (3, B)
        means = (self.text_caption, self.image_text, self.image_caption)
        if update:
            of_all = mean_over_ranks(torch.stack([image_text.mean(values) for values in found]))
            for mean, new in zip(means, of_all.unbind(), strict=True):
                mean.copy_(self.DECAY * mean + (1 - self.DECAY) * new)
        e_tc, e_it, e_ic = (2 * (found - torch.stack(means)[:, None].to(dtype))).exp().unbind()
        one = torch.ones_like(e_tc)
        return Weights(e_tc.clamp(max=1), torch.where(e_tc < 1, e_it, one), torch.where(e_tc < 1, e_ic, one))


def alip(image_text: Pairs, image_caption: Pairs, weights: Weights) -> Tensor:
    """ALIP's loss of each own image with its text and with its synthetic caption: w_s (w_it ℓ_it + w_ic ℓ_ic), (B,).

    ℓ: InfoNCE of the images with the texts, and of the same images with the captions.
    """
    of_texts, of_captions = info_nce(image_text), info_nce(image_caption)
    return weights.sample * (weights.image_text * of_texts + weights.image_caption * of_captions)


def simclr(
    first: Tensor,
    second: Tensor,
    *,
    temperature: float = 0.1,
    sizes: Sequence[int] | None = None,
    first_row: int | None = None,
) -> Tensor:
    """SimCLR's loss (Chen et al., arXiv 2002.05709) as SLIP uses it (Mu et al., arXiv 2112.12750), both ways: (B,).

        ℓ_i = ½ [ ℓ(a_i → b_i) + ℓ(b_i → a_i) ]
        ℓ(a_i → b_i) = log ( Σ_j exp(⟨a_i, b_j⟩/τ) + Σ_{j ≠ i} exp(⟨a_i, a_j⟩/τ) ) − ⟨a_i, b_i⟩/τ

    a, b: the two views' embeddings at unit length; j over the N images of all processes. The mean over N is the
    published value.

    Args:
        first, second: (B, E) embeddings of two views of the own images, of any length and dtype.
        temperature: τ > 0.
        sizes: every process's B; asked for when None.
        first_row: the number of the first own image among the N; counted from `sizes` when None.
    """
    with torch.autocast(first.device.type, enabled=False):
        a, b = normalise(first), normalise(second)
        if sizes is None:
            sizes = all_gather_sizes(len(a), a.device)
        start = sum(sizes[: rank()]) if first_row is None else first_row
        a_all, b_all = gather_with_grad(torch.stack([a, b], 1), sizes).unbind(1)  # one exchange
        target = torch.arange(start, start + len(a), device=a.device)
        itself = target[:, None] == torch.arange(len(a_all), device=a.device)  # (B, N)
        ways = []
        for own, own_all, other_all in ((a, a_all, b_all), (b, b_all, a_all)):
            same = (own @ own_all.T / temperature).masked_fill(itself, float("-inf"))
            logits = torch.cat([own @ other_all.T / temperature, same], 1)  # (B, 2N)
            ways.append(F.cross_entropy(logits, target, reduction="none"))
        return (ways[0] + ways[1]) / 2
