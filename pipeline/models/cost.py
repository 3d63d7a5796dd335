"""What a model costs to train, counted rather than estimated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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
    """FLOPs of training on one sample: the forward pass and twice that for the backward pass, which a frozen trunk
    does not have.

    Args:
        texts: captions that are encoded of each image (ALIP: 2).
        simclr: the projection head of SLIP, which takes two more views of each image through the trunk.
        teacher: one in the loop, whose forward pass is all that it costs.
    """
    by_part = flops_by_part(model)
    total = sum(training_flops(model, by_part).values())
    with _at_rest(model, *([simclr] if simclr else [])), torch.no_grad():
        images, tokens = _one_sample(model)
        if texts > 1:
            text = _count(lambda: model.encode_text(tokens))
            kept = BACKWARD * by_part["trunk_text"] if model.trunk.frozen else 0
            total += (texts - 1) * ((1 + BACKWARD) * text - kept)
        if simclr is not None:
            place = next(simclr.parameters()).device  # a run that ends takes the model alone off the GPU
            pooled = model.trunk.pooled(images).to(place)
            of_trunk = _count(lambda: model.trunk.pooled(images))
            head = _count(lambda: simclr(pooled))
            total += 2 * ((1 if model.trunk.frozen else 1 + BACKWARD) * of_trunk + (1 + BACKWARD) * head)
    return total + (0 if teacher is None else teacher_flops(teacher))


def training_flops(model: DinoRankCLIP, forward: Mapping[str, int]) -> dict[str, int]:
    """Part → FLOPs of training on one sample, from those of its forward pass; a frozen trunk has no backward pass."""
    still = {part for part in forward if model.trunk.frozen and part.startswith("trunk")}
    return {part: count * (1 if part in still else 1 + BACKWARD) for part, count in forward.items()}


def forward_flops(model: DinoRankCLIP) -> dict[str, int]:
    """FLOPs of one sample's forward pass in training: trunk, student, fusion (with its gates) and their total."""
    found = {"trunk": 0, "student": 0, "fusion": 0}
    for part, count in flops_by_part(model).items():
        kind = part.split("_")[0]
        found["fusion" if kind == "gate" else kind] += count
    return found | {"total": sum(found.values())}


@torch.no_grad()
def teacher_flops(teacher: Teacher) -> int:
    """FLOPs of a teacher's forward pass on one image."""
    blank = torch.zeros(1, 3, teacher.image_size, teacher.image_size, device=teacher.get_buffer("_mean").device)
    return _count(lambda: teacher(blank))


@torch.no_grad()
def flops_by_part(model: DinoRankCLIP) -> dict[str, int]:
    """FLOPs (two for each multiply-add) of one sample's forward pass in training, part by part.

    Matrix products, convolutions and attention count; norms, activations and the losses do not (nor the second look
    that the conflict loss takes through the gate). A model on the meta device is counted as well as any.

    Returns:
        trunk_image, trunk_text, and where they exist student_image, student_text (with the heads that are distilled),
        fusion_image, fusion_text (without the gate), gate (of both sides).
    """
    with _at_rest(model):
        images, tokens = _one_sample(model)
        trunk, student = model.trunk, model.student
        found = {
            "trunk_image": _count(lambda: trunk.encode_image(images)),
            "trunk_text": _count(lambda: trunk.encode_text(tokens)),
        }
        gate = 0
        if "image" in student:
            image: Any = student["image"]
            seen = image(images)
            found["student_image"] = _count(lambda: image(images))
            found["student_image"] += _count(lambda: (image.distilled(seen), image.predict_global(seen)))
            z = trunk.encode_image(images)
            found["fusion_image"], gate = _injection(model.fusion["image"], z, seen.tokens, None)
        if "text" in student:
            text: Any = student["text"]
            t, features, valid = trunk.text_features(tokens)
            read = text(features, valid)
            found["student_text"] = _count(lambda: text.predict_global(text(features, valid)))
            found["fusion_text"], of_text = _injection(model.fusion["text"], t, {"text": read.tokens}, read.valid)
            gate += of_text
        return found | ({"gate": gate} if gate else {})


def _injection(fusion: Any, base: Tensor, tokens: Mapping[str, Tensor], keep: Tensor | None) -> tuple[int, int]:
    """FLOPs of one side's fusion without its gate, and of the gate."""
    both = _count(lambda: fusion(base, tokens, keep))
    delta = fusion.delta(base, tokens, keep)
    gate = _count(lambda: fusion.gate_on(base, delta))
    return both - gate, gate


def inference_flops(model: DinoRankCLIP) -> dict[str, int]:
    """FLOPs of encoding one image and one text; the distilled heads have no part in it."""
    with _at_rest(model), torch.no_grad():
        images, tokens = _one_sample(model)
        return {
            "image": _count(lambda: model.encode_image(images)),
            "text": _count(lambda: model.encode_text(tokens)),
        }


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
