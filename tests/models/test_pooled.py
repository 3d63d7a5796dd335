"""Trunk.pooled: the features in front of the joint projection, found again by each tower's own means."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import SIZE, TEXT, TRUNKS, VIT, shaken
from torch import Tensor

from pipeline.models.trunk import build_trunk


def timm_trunk(name: str, **vision: Any) -> dict[str, Any]:
    return {"embed_dim": 32, "vision_cfg": {"timm_model_name": name} | vision, "text_cfg": TEXT}


TIMM = {
    "map then linear": timm_trunk("test_resnet", timm_pool="avg", timm_proj="linear"),
    "token then linear": timm_trunk("test_vit", timm_pool="token", timm_proj="linear"),
    "mlp": timm_trunk("test_convnext", timm_pool="avg", timm_proj="mlp"),
    "own classifier": timm_trunk("test_efficientnet", timm_pool="avg", timm_proj=""),
    "classifier of a vit": timm_trunk("test_vit", timm_pool="avg", timm_proj=""),
    "no projection": timm_trunk("test_vit", timm_pool="token", timm_proj="none"),
    "attention pool": timm_trunk("resnet10t", timm_pool="rot_attn", timm_proj="linear"),
}


def made(config: dict[str, Any]) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    size = 160 if str(config["vision_cfg"].get("timm_model_name", "")).startswith("test_") else SIZE
    trunk = shaken(build_trunk(copy.deepcopy(config), size)).eval().double()
    return trunk, torch.randn(3, 3, size, size, dtype=torch.float64)


def into_projection(module: torch.nn.Module, run: Any, images: Tensor) -> Tensor:
    """What `module` is given while `run` works on the images."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        run(images)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize(
    "vision", [{}, {"pool_type": "avg"}, {"final_ln_after_pool": True, "pool_type": "avg"}, {"no_ln_pre": True}]
)
def test_a_vits_pooled_token_times_proj_is_open_clips_encoding(vision: dict[str, Any]) -> None:
    trunk, images = made(VIT | {"vision_cfg": VIT["vision_cfg"] | vision})
    with torch.no_grad():
        pooled = trunk.pooled(images)
        assert pooled.shape == (3, trunk.pooled_width) == (3, 32)
        assert torch.equal(pooled @ trunk.clip.visual.proj, trunk.clip.encode_image(images))


def test_a_custom_text_trunk_pools_alike() -> None:
    trunk, images = made(TRUNKS["custom"])
    with torch.no_grad():
        assert torch.equal(trunk.pooled(images) @ trunk.clip.visual.proj, trunk.clip.encode_image(images))


def test_a_resnets_features_are_the_mean_of_the_map_that_its_attention_pool_is_given() -> None:
    trunk, images = made(TRUNKS["resnet"])
    features = into_projection(trunk.clip.visual.attnpool, trunk.clip.encode_image, images)
    assert features.shape == (3, 256, 2, 2)
    with torch.no_grad():
        pooled = trunk.pooled(images)
    assert pooled.shape == (3, trunk.pooled_width)
    torch.testing.assert_close(pooled, features.flatten(2).sum(2) / 4, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", sorted(TIMM))
def test_a_timm_tower_pools_as_timm_does_before_any_projection(kind: str) -> None:
    trunk, images = made(TIMM[kind])
    visual = trunk.clip.visual
    with torch.no_grad():
        pooled = trunk.pooled(images)
    assert pooled.shape == (3, trunk.pooled_width)
    assert pooled.std() > 1e-3
    if kind == "no projection":
        with torch.no_grad():
            expected = trunk.clip.encode_image(images)
    elif len(visual.head):
        expected = into_projection(visual.head, trunk.clip.encode_image, images)
    else:
        expected = into_projection(visual.trunk.get_classifier(), trunk.clip.encode_image, images)
    if kind == "attention pool":
        expected = expected.mean((2, 3))
    torch.testing.assert_close(pooled, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_gradients_reach_the_tower_but_not_its_projection(kind: str) -> None:
    trunk, images = made(TRUNKS[kind])
    trunk.pooled(images).square().sum().backward()
    parameters = dict(trunk.clip.visual.named_parameters())
    projection = {name for name in parameters if name == "proj" or name.startswith("attnpool.")}
    assert projection
    assert {name for name, p in parameters.items() if p.grad is None} == projection
    assert trunk.clip.visual.conv1.weight.grad.abs().max() > 0


def test_training_on_augmented_views_leaves_the_running_statistics_to_the_view_that_everyone_sees() -> None:
    trunk, images = made(TRUNKS["resnet"])
    trunk.train()
    norms = [m for m in trunk.clip.visual.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms
    before = [(m.running_mean.clone(), m.running_var.clone(), m.momentum) for m in norms]
    batch_statistics = trunk.pooled(images)
    assert not torch.allclose(batch_statistics, copy.deepcopy(trunk).eval().pooled(images))
    for norm, (mean, variance, momentum) in zip(norms, before, strict=True):
        assert torch.equal(norm.running_mean, mean)
        assert torch.equal(norm.running_var, variance)
        assert norm.momentum == momentum
    trunk.encode_image(images)
    assert not any(torch.equal(norm.running_mean, mean) for norm, (mean, _, _) in zip(norms, before, strict=True))
