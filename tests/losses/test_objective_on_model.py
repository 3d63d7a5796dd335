"""The objective on the real model: every parameter of every variant is trained, and γ = 0 is order R's clip."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.losses.objective import Objective, TargetInfo
from pipeline.losses.weights import LossWeights
from pipeline.models.dinorankclip import DinoRankCLIP

TRUNK = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 1, "width": 16, "head_width": 8, "patch_size": 16, "image_size": 32},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
STUDENT = {"name": "vit_tiny_patch16_224", "patch": 16, "depth": 2, "text_width": 16, "text_layers": 1}
SCALES = [{"name": "fine", "grid": 2, "depth_fraction": 1.0}, {"name": "coarse", "grid": 1, "depth_fraction": 0.5}]
BASELINES = {"gram": {"fine": 0.1, "coarse": 0.1}, "rkd": {"fine": 0.1, "coarse": 0.1, "global": 0.1}, "global": 0.5}


def make(order: int = 3, *, student: bool = True, parts: dict[str, bool] | None = None, **weights: Any) -> Objective:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"trunk": TRUNK, "image_size": 32}
    targets = None
    if student:
        arguments |= {"student": STUDENT, "parts": parts, "scales": SCALES, "global_width": 6}
        targets = TargetInfo(("fine", "coarse"), {"fine": torch.ones(5), "coarse": None}, BASELINES)
    return Objective(
        DinoRankCLIP(**arguments),
        order=order,
        transition_depth=2,
        transition_dim=4,
        weights=LossWeights(**weights),
        targets=targets,
    )


def batch(n: int = 4) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    targets = {
        "fine": torch.randint(-9, 9, (n, 4, 5), generator=generator, dtype=torch.int8),
        "coarse": torch.randn(n, 1, 3, generator=generator).half(),
        "global": torch.randn(n, 6, generator=generator).half(),
    }
    tokens = torch.randint(1, 400, (n, 8), generator=generator)
    tokens[:, 5], tokens[:, 6:] = 49407, 0
    return torch.randn(n, 3, 32, 32, generator=generator), tokens, targets


NO_DISTILLATION = {"gram": 0.0, "rkd": 0.0, "global_": 0.0}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"order": 0, "student": False},
        {"order": 2, "student": False},
        {"parts": {"pyramid": False}},
        {"parts": {"attention": False}},
        {"parts": {"refiner": False}},
        {"parts": {"text_side": False}},
        {"parts": {"gate": False}, "gate_l1": 0.0, "conflict": 0.0},
        NO_DISTILLATION,
        {"cross": 0.0, "in_modal": 0.0},
    ],
    ids=[
        "full",
        "clip",
        "none-2",
        "no-pyramid",
        "no-attention",
        "no-refiner",
        "image-only",
        "no-gate",
        "no-distill",
        "w0",
    ],
)
@pytest.mark.parametrize("progress", [0.0, 1.0])
def test_every_parameter_of_every_variant_gets_a_gradient(options: dict[str, Any], progress: float) -> None:
    tested = make(**options)
    loss, logs = tested(*batch(), progress)
    loss.backward()
    assert loss.isfinite()
    assert all(value.isfinite() for value in logs.values())
    assert [name for name, p in tested.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("options", [{}, {"parts": {"text_side": False}}, {"order": 0, **NO_DISTILLATION}], ids=str)
def test_beside_a_frozen_trunk_every_parameter_gets_a_gradient_and_the_trunk_none(options: dict[str, Any]) -> None:
    """What DistributedDataParallel asks for: no parameter that learns is left out of a step."""
    tested = make(**options).train()
    tested.model.trunk.freeze()
    for fusion in tested.model.fusion.values():
        fusion.gamma.data.fill_(0.1)
    loss, logs = tested(*batch(), 0.5)
    loss.backward()
    with_gradient = {name for name, p in tested.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, _ in tested.named_parameters() if not name.startswith("model.trunk.")}
    assert not logs["logit_scale"].requires_grad
    still = make(**options)
    for fusion in still.model.fusion.values():
        fusion.gamma.data.fill_(0.1)
    reference, _ = still(*batch(), 0.5)
    reference.backward()
    gradients = dict(still.named_parameters())
    for name, p in tested.named_parameters():
        if name in with_gradient:  # and it is the one that it has beside a trunk that learns
            torch.testing.assert_close(p.grad, gradients[name].grad, rtol=1e-3, atol=1e-6)


def test_a_few_steps_lower_the_loss() -> None:
    tested = make(ramp=0.0)
    optimizer = torch.optim.AdamW(tested.parameters(), lr=3e-3)
    values = []
    for _ in range(12):
        loss, logs = tested(*batch(), 1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append((float(loss.detach()), float(logs["gram/fine"])))
    assert values[-1][0] < values[0][0]
    assert values[-1][1] < values[0][1]


def test_trunk_and_ranking_start_alike_with_and_without_injection() -> None:
    # γ = 0 and β = 0 at the start: the full model's contrastive and ranking terms are those of order 1 on the trunk.
    _, full = make(3)(*batch(), 1.0)
    _, bare = make(1, student=False)(*batch(), 1.0)
    for key in ("info_nce", "cross", "in_modal"):
        torch.testing.assert_close(full[key], bare[key], rtol=1e-5, atol=1e-6)
