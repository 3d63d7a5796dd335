"""What a model costs to train, counted rather than estimated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.models.dinorankclip import DinoRankCLIP

if TYPE_CHECKING:
    from pipeline.teacher.teacher import Teacher

BACKWARD = 2  # gradients of inputs and of weights: two products of the size of each forward one


def flops_per_sample(
    model: DinoRankCLIP, *, texts: int = 1, simclr: nn.Module | None = None, teacher: Teacher | None = None
) -> int:
    """FLOPs of training on one sample: the forward pass and twice that for the backward pass.

    Args:
        texts: captions that are encoded of each image (ALIP: 2).
        simclr: the projection head of SLIP, which takes two more views of each image through the trunk.
        teacher: one in the loop, whose forward pass is all that it costs.
    """
    forward = forward_flops(model)["total"]
    with _at_rest(model, *([simclr] if simclr else [])), torch.no_grad():
        images, tokens = _one_sample(model)
        if texts > 1:
            forward += (texts - 1) * _count(lambda: model.encode_text(tokens))
        if simclr is not None:
            place = next(simclr.parameters()).device  # a run that ends takes the model alone off the GPU
            forward += 2 * _count(lambda: simclr(model.trunk.pooled(images).to(place)))
    return (1 + BACKWARD) * forward + (0 if teacher is None else teacher_flops(teacher))


@torch.no_grad()
def teacher_flops(teacher: Teacher) -> int:
    """FLOPs of a teacher's forward pass on one image."""
    blank = torch.zeros(1, 3, teacher.image_size, teacher.image_size, device=teacher.get_buffer("_mean").device)
    return _count(lambda: teacher(blank))


@torch.no_grad()
def forward_flops(model: DinoRankCLIP) -> dict[str, int]:
    """FLOPs (two for each multiply-add) of one sample's forward pass: trunk, student, fusion and their total.

    Matrix products, convolutions and attention count; norms, activations and the losses do not.
    """
    with _at_rest(model):
        images, tokens = _one_sample(model)
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
    return {"trunk": trunk, "student": student, "fusion": total - trunk - student, "total": total}


def _one_sample(model: DinoRankCLIP) -> tuple[Tensor, Tensor]:
    """images (1, 3, H, W), tokens (1, L)."""
    parameter = next(model.parameters())
    size = model.arguments["image_size"]
    images = torch.zeros(1, 3, size, size, dtype=parameter.dtype, device=parameter.device)
    return images, model.trunk.tokenizer(["a photo"]).to(parameter.device)


@contextmanager
def _at_rest(*modules: nn.Module) -> Iterator[None]:
    """Eval mode for a while: batch norm would refuse, or remember, the statistics of one sample."""
    training = {part: part.training for module in modules for part in module.modules()}
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, mode in training.items():
            part.training = mode


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
