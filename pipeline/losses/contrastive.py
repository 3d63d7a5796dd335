"""InfoNCE, the contrastive loss of CLIP (Radford et al., arXiv 2103.00020)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.losses.pairs import Pairs


def info_nce(pairs: Pairs) -> Tensor:
    """Each own pair's contrastive loss over all gathered candidates, the mean of its two directions: (B,).

        ℓ_i = ½ [ log Σ_j exp(s ⟨v_i, w_j⟩) − s ⟨v_i, w_i⟩  +  log Σ_j exp(s ⟨w_i, v_j⟩) − s ⟨w_i, v_i⟩ ]

    v, w: `pairs`' image and text rows. The mean over all N pairs is CLIP's loss.
    """
    rows = len(pairs.image_rows)
    target = torch.arange(pairs.first, pairs.first + rows, device=pairs.image_rows.device)
    to_texts = F.cross_entropy(pairs.scale * pairs.image_rows @ pairs.text_all.T, target, reduction="none")
    to_images = F.cross_entropy(pairs.scale * pairs.text_rows @ pairs.image_all.T, target, reduction="none")
    return (to_texts + to_images) / 2
