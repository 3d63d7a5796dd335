"""An open_clip image tower's pooled features, before its projection into the joint space: where SLIP's head stands.

Legend: B images, P pooled width, D joint width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def pooled(visual: Any, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) → (B, P).

    ViT: the pooled token, which `visual.proj` projects. ResNet: the mean over the positions of the last map; its
    attention pool ends in the projection, and SimCLR's own ResNets are pooled so (our reading: SLIP has ViTs alone).
    timm: what the tower hands to open_clip's head, or to its own classifier where that is the projection.
    """
    if isinstance(visual, ModifiedResNet):
        x = visual.stem(images)
        for layer in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
            x = layer(x)
        return x.mean((2, 3))
    if isinstance(visual, TimmModel):
        if len(visual.head):
            x = visual.trunk(images)
            return x.mean((2, 3)) if x.ndim == 4 else x  # a map where open_clip's head pools with attention
        return visual.trunk.forward_head(visual.trunk.forward_features(images), pre_logits=True)
    return visual._pool(visual.transformer(visual._embeds(images)))[0]


def pooled_width(visual: Any) -> int:
    """P."""
    if isinstance(visual, ModifiedResNet):
        return int(visual.attnpool.c_proj.in_features)
    if isinstance(visual, TimmModel):
        return int(visual.trunk.num_features if len(visual.head) else visual.trunk.head_hidden_size)
    return int(visual.proj.shape[0])


@contextmanager
def statistics_kept(tower: nn.Module) -> Iterator[None]:
    """Batch norms inside normalise by the batch and leave their running statistics alone.

    Evaluation uses those, on images that nobody augments; SLIP's own towers have no batch norm.
    """
    norms = {module: module.momentum for module in tower.modules() if isinstance(module, _BatchNorm)}
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in norms.items():
            norm.momentum = momentum
