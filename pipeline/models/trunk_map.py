"""The spatial maps of an open_clip image tower, to be compared with the teacher's as the student's are.

Legend: B images, h, w a map's sides, g a grid's, P channels.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from torch import Tensor


def trunk_maps(visual: Any, images: Tensor) -> list[Tensor]:
    """Images (B, 3, H, W) normalised → maps (B, P, h, w), shallow to deep: a ResNet's four stages, else the last one.

    A ViT's tokens pass its final norm, without the class token, as a ViT teacher's do.
    """
    if isinstance(visual, ModifiedResNet):
        found, x = [], visual.stem(images)
        for layer in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
            x = layer(x)
            found.append(x)
        return found
    if isinstance(visual, TimmModel):
        x = visual.trunk.forward_features(images)
        if x.ndim == 4:
            last = x.shape[1] != getattr(visual.trunk, "num_features", x.shape[1])  # channels last, as Swin has them
            return [x.permute(0, 3, 1, 2) if last else x]
        return [_square(x[:, getattr(visual.trunk, "num_prefix_tokens", 0) :])]
    tokens = visual.ln_post(visual.transformer(visual._embeds(images)))
    return [_square(tokens[:, 1:])]


def at_grid(maps: list[Tensor], grid: int) -> Tensor:
    """The deepest map whose sides are whole multiples of `grid`, its areas averaged: (B, g², P).

    Where there is none, the deepest that is at least as fine, or the finest; its areas then overlap.
    """
    whole = [x for x in maps if all(side % grid == 0 for side in x.shape[2:])]
    fine = [x for x in maps if min(x.shape[2:]) >= grid]
    chosen = whole[-1] if whole else fine[-1] if fine else max(maps, key=lambda x: x.shape[2])
    return F.adaptive_avg_pool2d(chosen, grid).flatten(2).transpose(1, 2)


def _square(tokens: Tensor) -> Tensor:
    """(B, h · h, P) → (B, P, h, h)."""
    side = round(tokens.shape[1] ** 0.5)
    return tokens.transpose(1, 2).unflatten(2, (side, side))
