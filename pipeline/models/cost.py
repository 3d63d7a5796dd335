"""What a model costs to train, counted rather than estimated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.models.dinorankclip import DinoRankCLIP

BACKWARD = 2  # gradients of inputs and of weights: two products of the size of each forward one


def flops_per_sample(model: DinoRankCLIP) -> int:
    """FLOPs of training on one sample: the forward pass and twice that for the backward pass."""
    return (1 + BACKWARD) * forward_flops(model)["total"]


@torch.no_grad()
def forward_flops(model: DinoRankCLIP) -> dict[str, int]:
    """FLOPs (two for each multiply-add) of one sample's forward pass: trunk, student, fusion and their total.

    Matrix products, convolutions and attention count; norms, activations and the losses do not.
    """
    parameter = next(model.parameters())
    size = model.arguments["image_size"]
    images = torch.zeros(1, 3, size, size, dtype=parameter.dtype, device=parameter.device)
    tokens = model.trunk.tokenizer(["a photo"]).to(parameter.device)
    training = {module: module.training for module in model.modules()}
    model.eval()  # batch norm would refuse, or remember, the statistics of one sample
    try:
        total = _count(lambda: model(images, tokens))
        trunk = _count(lambda: (model.trunk.encode_image(images), model.trunk.encode_text(tokens)))
        student = 0
        if "image" in model.student:
            image: Any = model.student["image"]
            student += _count(lambda: [head(image(images)) for head in (image.distilled, image.predict_global)])
            student -= _count(lambda: image(images))
        if "text" in model.student:
            text: Any = model.student["text"]
            features, valid = model.trunk.text_features(tokens)[1:]
            student += _count(lambda: text.predict_global(text(features, valid)))
    finally:
        for module, mode in training.items():
            module.training = mode
    return {"trunk": trunk, "student": student, "fusion": total - trunk - student, "total": total}


def _count(work: Callable[[], object]) -> int:
    """FLOPs of `work`, with attention taken apart into products, which are counted on every device."""
    counter = FlopCounterMode(display=False)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # nn.MultiheadAttention's inference kernel would count as nothing
    try:
        with sdpa_kernel(SDPBackend.MATH), counter:
            work()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops())
