"""What each part of a model has and costs, and whether the student's branches keep to their budgets.

FLOPs are those of models.cost: two for each multiply-add, of one image-text pair.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from pipeline.models.cost import BACKWARD, flops_by_part, flops_per_sample, training_flops
from pipeline.models.dinorankclip import DinoRankCLIP

BUDGETS = {"image branch": 6_000_000, "text branch": 4_000_000, "fusion": 4_000_000}  # parameters, each below
COUNTED_WITH: dict[str, tuple[str, ...]] = {
    "image branch": ("student_image",),
    "text branch": ("student_text",),
    "fusion": ("fusion_image", "fusion_text", "gate"),  # both sides together: the strictest reading
}


@dataclass(frozen=True)
class Part:
    """Parameters, and FLOPs a pair of the forward pass and of a whole training step."""

    parameters: int
    forward: int
    training: int


def parts(model: DinoRankCLIP) -> dict[str, Part]:
    """Part → what it has and costs, in the order of the forward pass; parameters add up to the model's.

    Args:
        model: on any device, meta too.
    """
    has = parameters_by_part(model)
    forward = flops_by_part(model)
    training = training_flops(model, forward)
    return {part: Part(count, forward.get(part, 0), training.get(part, 0)) for part, count in has.items()}


def parameters_by_part(model: DinoRankCLIP) -> dict[str, int]:
    """trunk_image, trunk_text, logit_scale, student_*, fusion_* (without the gate), gate (of both sides)."""
    image, scale = count(model.trunk.clip.visual), model.trunk.logit_scale.numel()  # type: ignore[arg-type]
    found = {"trunk_image": image, "trunk_text": count(model.trunk) - image - scale, "logit_scale": scale}
    found |= {f"student_{side}": count(branch) for side, branch in model.student.items()}
    gates = {side: 0 if fusion.gate is None else count(fusion.gate) for side, fusion in model.fusion.items()}  # type: ignore[arg-type]
    found |= {f"fusion_{side}": count(fusion) - gates[side] for side, fusion in model.fusion.items()}
    return found | ({"gate": sum(gates.values())} if sum(gates.values()) else {})


def budgets(has: dict[str, Part]) -> dict[str, tuple[int, int]]:
    """Name → (parameters, how many there may be, exclusive) of the branches that the model has."""
    found = {}
    for name, most in BUDGETS.items():
        own = [has[part].parameters for part in COUNTED_WITH[name] if part in has]
        if own:
            found[name] = (sum(own), most)
    return found


def head(module: nn.Module) -> Part:
    """A head of linear maps, each of one vector a pair (transitions): multiply-adds are their matrices' entries."""
    forward = sum(2 * m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
    return Part(count(module), forward, (1 + BACKWARD) * forward)


def extra(model: DinoRankCLIP, *, texts: int = 1, simclr: nn.Module | None = None) -> Part:
    """What a method adds to a pair: a second caption (texts=2), or SLIP's head with the two views it takes."""
    training = flops_per_sample(model, texts=texts, simclr=simclr) - flops_per_sample(model)
    return Part(count(simclr) if simclr is not None else 0, training // (1 + BACKWARD), training)


def count(module: nn.Module) -> int:
    """Its parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def on_meta(arguments: dict[str, object]) -> DinoRankCLIP:
    """A model of these constructor arguments without memory for its weights: for counting alone."""
    with torch.device("meta"):
        return DinoRankCLIP(**arguments)  # type: ignore[arg-type]
