"""What a model costs to train, counted rather than estimated."""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.models.dinorankclip import DinoRankCLIP

BACKWARD = 2  # gradients of inputs and of weights: two products of the size of each forward one


def forward_flops(model: DinoRankCLIP) -> dict[str, int]:
    """FLOPs (two for each multiply-add) of one sample's forward pass: trunk, student, fusion and their total.

    Matrix products, convolutions and attention count; norms, activations and the losses do not.
    """
    parameter = next(model.parameters())
    side = model.arguments["image_size"]
    images = torch.zeros(1, 3, side, side, dtype=parameter.dtype, device=parameter.device)
    tokens = model.trunk.tokenizer(["a photo"]).to(parameter.device)
    counter = FlopCounterMode(display=False)
    was_training = model.training
    model.eval()  # batch statistics of one sample would be refused, or remembered
    try:
        # The mathematical kernel is made of products that the counter knows on every device.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            model(images, tokens)
    finally:
        model.train(was_training)
    counts = counter.get_flop_counts()
    parts = {part: sum(counts.get(f"{type(model).__name__}.{part}", {}).values()) for part in PARTS}
    return parts | {"total": int(counter.get_total_flops())}


PARTS = ("trunk", "student", "fusion")


def flops_per_sample(model: DinoRankCLIP) -> int:
    """FLOPs of training on one sample: the forward pass and twice that for the backward pass."""
    return (1 + BACKWARD) * forward_flops(model)["total"]
