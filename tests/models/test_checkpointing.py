"""Gradient checkpointing: the same outputs, gradients and buffers to the bit, and every block runs twice."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from open_clip.modified_resnet import Bottleneck
from open_clip.transformer import ResidualAttentionBlock
from tiny_models import batch, build, shaken, with_gamma
from torch import nn

from pipeline.errors import PipeError
from pipeline.models.blocks import Block
from pipeline.models.checkpointing import checkpoint_blocks


def step(model: Any) -> tuple[dict[str, torch.Tensor], Counter[str]]:
    """Gradients and buffers of one step, and how often each block's inner layer has run."""
    runs: Counter[str] = Counter()
    for name, module in model.named_modules():
        inner = {Bottleneck: "conv3", ResidualAttentionBlock: "ln_2", Block: "norm_mlp"}
        kinds = [leaf for kind, leaf in inner.items() if isinstance(module, kind)]
        if type(module).__module__ == "timm.models.vision_transformer" and type(module).__name__ == "Block":
            kinds = ["norm2"]
        for leaf in kinds:
            getattr(module, leaf).register_forward_hook(lambda *_, n=name: runs.update([n]))
    out = model.train()(*batch(model))
    parts = [out.v, out.w, out.image_global, out.text_global, *out.student_tokens.values()]
    sum((x * x.detach().cos()).sum() for x in parts).backward()
    found = {f"grad {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | dict(model.named_buffers()) | {"v": out.v.detach(), "w": out.w.detach()}, runs


@pytest.mark.parametrize("trunk", ["resnet", "vit", "custom"])
def test_nothing_changes_but_that_blocks_run_twice(trunk: str) -> None:
    plain = with_gamma(shaken(build(trunk)), 0.3)
    light = copy.deepcopy(plain)
    checkpoint_blocks(light)
    assert light.state_dict().keys() == plain.state_dict().keys()
    (expected, once), (found, twice) = step(plain), step(copy.deepcopy(light))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert set(once.values()) == {1}
    assert twice == dict.fromkeys(once, 2)
    assert len(once) == {"resnet": 4, "vit": 2, "custom": 2}[trunk] + 2 + 2 + 1 + 2  # and text, student, fusion
    with torch.no_grad():
        light.eval().encode_image(batch(light)[0])


def test_a_trunk_that_cannot_is_refused() -> None:
    model: Any = build("vit", student=False)
    from open_clip.timm_model import TimmModel

    class Without(nn.Module):
        def set_grad_checkpointing(self, enable: bool = True) -> None:
            assert not enable, "gradient checkpointing not supported"

    visual = TimmModel.__new__(TimmModel)
    nn.Module.__init__(visual)
    visual.trunk = Without()
    model.trunk.clip.visual = visual
    with pytest.raises(PipeError, match=r"timm has no gradient checkpointing.*train\.micro_batch_size"):
        checkpoint_blocks(model)
