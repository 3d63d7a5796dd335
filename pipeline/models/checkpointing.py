"""Gradient checkpointing: every block keeps its input alone, and runs again in the backward pass.

open_clip's transformers and timm's networks bring it along; open_clip's ResNets do not and get it here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from open_clip.modified_resnet import Bottleneck, ModifiedResNet
from open_clip.timm_model import TimmModel
from torch import Tensor, nn

from pipeline.errors import PipeError
from pipeline.models.blocks import Block
from pipeline.models.recompute import recomputed

if TYPE_CHECKING:
    from pipeline.models.dinorankclip import DinoRankCLIP


class RecomputedBottleneck(Bottleneck):
    """open_clip's, whose activations are not kept; weights, names and state dict are that one's."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            out: Tensor = super().forward(x)
            return out
        again: Tensor = recomputed(super().forward, x, inside=self)
        return again


def checkpoint_blocks(model: DinoRankCLIP) -> None:
    """Switch it on in trunk, student and fusion. Outputs, gradients and state dict stay what they are.

    Raises:
        PipeError: the trunk is a network of timm's that cannot do it.
    """
    clip = model.trunk.clip
    clip.set_grad_checkpointing(True)  # type: ignore[operator]
    _check_timm(clip.visual)
    for module in model.modules():
        if isinstance(module, ModifiedResNet):
            for block in module.modules():
                if type(block) is Bottleneck:
                    block.__class__ = RecomputedBottleneck
        if isinstance(module, Block):
            module.grad_checkpointing = True
    if "image" in model.student:
        model.student["image"].vit.set_grad_checkpointing(True)  # type: ignore[union-attr, operator]


def _check_timm(visual: nn.Module | Tensor) -> None:
    """open_clip writes a line and goes on where timm refuses."""
    if not isinstance(visual, TimmModel):
        return
    try:
        visual.trunk.set_grad_checkpointing(True)
    except (AssertionError, AttributeError, NotImplementedError) as error:
        fix = "leave it out; train.micro_batch_size saves memory with any trunk"
        what, where = "timm has no gradient checkpointing for this trunk", "train.grad_checkpointing"
        raise PipeError(what, where=where, fix=fix) from error
