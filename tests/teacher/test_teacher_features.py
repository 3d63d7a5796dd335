"""What a teacher gives: the right tokens of the right layers, against computations written out here."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from tiny_teacher import SCALES, SIZE, VIT, VIT_ARGS, randomise
from torch import Tensor

from pipeline.cache.layout import ScaleSpec
from pipeline.errors import PipeError
from pipeline.teacher.features import Backbone, allowed_grids, area_pool, resolve_layer
from pipeline.teacher.teacher import Teacher, load_teacher


def images(count: int = 3, size: int = SIZE, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


# ---- DINOv3, written out in float64 ----------------------------------------------------------------------------------


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def dinov3_by_hand(state: dict[str, Tensor], x: Tensor, *, depth: int, heads: int) -> list[Tensor]:
    """Every block's output after the final norm, all tokens: [(B, 1 + 4 + G², C)] (arXiv 2508.10104)."""
    w = {name: tensor.double() for name, tensor in state.items()}
    x = x.double()
    batch, _, size, _ = x.shape
    grid, channels = size // 16, w["cls_token"].shape[-1]
    patches = x.reshape(batch, 3, grid, 16, grid, 16).permute(0, 2, 4, 1, 3, 5).reshape(batch, grid**2, -1)
    tokens = patches @ w["patch_embed.proj.weight"].reshape(channels, -1).T + w["patch_embed.proj.bias"]
    tokens = torch.cat([w["cls_token"].expand(batch, -1, -1), w["reg_token"].expand(batch, -1, -1), tokens], 1)
    width = channels // heads
    sides = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid * 2 - 1
    periods = 100 ** (2 * torch.arange(width // 4, dtype=torch.float64) / (width // 2))
    places = torch.stack(torch.meshgrid(sides, sides, indexing="ij"), -1).reshape(-1, 2)  # (G², 2): y, x
    angles = (2 * math.pi * places[:, :, None] / periods).flatten(1).tile(2)  # (G², width)

    def rotated(q: Tensor) -> Tensor:
        prefix, rest = q[:, :, :5], q[:, :, 5:]
        halves = torch.cat([-rest[..., width // 2 :], rest[..., : width // 2]], -1)
        return torch.cat([prefix, rest * angles.cos() + halves * angles.sin()], 2)

    outputs = []
    for i in range(depth):
        p = f"blocks.{i}."
        y = layer_norm(tokens, w[p + "norm1.weight"], w[p + "norm1.bias"])
        zeros = torch.zeros(channels, dtype=torch.float64)
        bias = torch.cat([w[p + "attn.q_bias"], zeros, w[p + "attn.v_bias"]])
        q, k, v = (
            part.reshape(batch, -1, heads, width).transpose(1, 2)
            for part in (y @ w[p + "attn.qkv.weight"].T + bias).chunk(3, -1)
        )
        attention = (rotated(q) @ rotated(k).transpose(-1, -2) / width**0.5).softmax(-1)
        y = (attention @ v).transpose(1, 2).reshape(batch, -1, channels)
        tokens = tokens + w[p + "gamma_1"] * (y @ w[p + "attn.proj.weight"].T + w[p + "attn.proj.bias"])
        y = layer_norm(tokens, w[p + "norm2.weight"], w[p + "norm2.bias"])
        y = y @ w[p + "mlp.fc1.weight"].T + w[p + "mlp.fc1.bias"]
        y = 0.5 * y * (1 + torch.erf(y / 2**0.5))
        tokens = tokens + w[p + "gamma_2"] * (y @ w[p + "mlp.fc2.weight"].T + w[p + "mlp.fc2.bias"])
        outputs.append(layer_norm(tokens, w["norm.weight"], w["norm.bias"]))
    return outputs


def pooled_by_hand(tokens: Tensor, grid: int) -> Tensor:
    native = math.isqrt(tokens.shape[1])
    cell = native // grid
    square = tokens.reshape(len(tokens), native, native, -1)
    cells = [
        square[:, r * cell : (r + 1) * cell, c * cell : (c + 1) * cell].mean((1, 2))
        for r in range(grid)
        for c in range(grid)
    ]
    return torch.stack(cells, 1)


def test_a_dinov3_teacher_gives_normed_patch_tokens_without_the_prefix(vit: Teacher, vit_state: dict[str, Tensor]):
    x = images()
    blocks = dinov3_by_hand(vit_state, x, depth=4, heads=3)
    found = vit(x)
    for name, layer, grid in (("fine", 3, 4), ("mid", 1, 2), ("coarse", 2, 2)):
        expected = pooled_by_hand(blocks[layer][:, 5:], grid)
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-4, atol=1e-4)


def test_global_is_cls_after_the_final_norm(vit: Teacher, vit_state: dict[str, Tensor]):
    x = images()
    expected = dinov3_by_hand(vit_state, x, depth=4, heads=3)[-1][:, 0]
    torch.testing.assert_close(vit(x)["global"].double(), expected, rtol=1e-4, atol=1e-4)


def test_global_is_the_networks_cls_also_where_only_early_layers_are_asked_for(vit: Teacher, vit_checkpoint: Path):
    early = load_teacher(
        VIT, model_args=VIT_ARGS, checkpoint=vit_checkpoint, image_size=SIZE, scales=[ScaleSpec("early", 0, 4)]
    )
    torch.testing.assert_close(early(images())["global"], vit(images())["global"])


def test_scales_come_in_the_order_asked(vit: Teacher):
    assert list(vit(images())) == ["fine", "mid", "coarse", "global"]
    assert [scale.layer for scale in vit.scales] == [3, 1, 2]


def test_two_scales_may_share_a_layer(vit_checkpoint: Path):
    twice = [ScaleSpec("large", 2, 4), ScaleSpec("small", -2, 2)]
    teacher = load_teacher(VIT, model_args=VIT_ARGS, checkpoint=vit_checkpoint, image_size=SIZE, scales=twice)
    found = teacher(images())
    torch.testing.assert_close(found["small"], pooled_by_hand(found["large"], 2))


@pytest.mark.parametrize(("native", "grid"), [(6, 6), (6, 3), (6, 2), (6, 1), (4, 2)])
def test_area_pooling_is_the_mean_of_whole_cells(native: int, grid: int):
    tokens = torch.randn(2, native**2, 5, generator=torch.Generator().manual_seed(native + grid))
    torch.testing.assert_close(area_pool(tokens, grid), pooled_by_hand(tokens, grid))


@pytest.mark.parametrize(("tokens", "grid"), [(36, 4), (35, 5), (16, 3)])
def test_area_pooling_refuses_broken_cells(tokens: int, grid: int):
    with pytest.raises(ValueError, match="averaged"):
        area_pool(torch.zeros(1, tokens, 2), grid)


def test_allowed_grids_are_the_divisors():
    assert allowed_grids(14) == [1, 2, 7, 14]


def test_layers_may_be_counted_from_the_end():
    assert [resolve_layer(layer, 4) for layer in (0, 3, -1, -4)] == [0, 3, 3, 0]


# ---- other networks --------------------------------------------------------------------------------------------------


def random_teacher(name: str, scales: list[ScaleSpec], size: int = SIZE, **model_args: object) -> Teacher:
    teacher = load_teacher(name, model_args=model_args, random_weights=True, image_size=size, scales=scales)
    randomise(teacher.backbone.model)
    return teacher


def test_without_a_cls_token_global_is_the_mean_of_the_deepest_layer_listed():
    scales = [ScaleSpec("deep", 2, 2), ScaleSpec("early", 0, 4)]
    teacher = random_teacher("vit_base_patch16_siglip_224", scales, **VIT_ARGS)
    model, x = teacher.backbone.model, images()
    with torch.no_grad():
        tokens = model.norm_pre(model._pos_embed(model.patch_embed(x)))
        for block in model.blocks[:3]:
            tokens = block(tokens)
        expected = model.norm(tokens)
    torch.testing.assert_close(teacher(x)["global"], expected.mean(1))
    torch.testing.assert_close(teacher(x)["deep"], pooled_by_hand(expected, 2))


@pytest.mark.parametrize(("name", "runs"), [("vit_base_patch16_siglip_224", 2), (VIT, 4)])
def test_only_the_blocks_needed_are_run(name: str, runs: int):
    teacher = random_teacher(name, [ScaleSpec("only", 1, 4)], **VIT_ARGS)
    seen = []
    for block in teacher.backbone.model.blocks:
        block.register_forward_hook(lambda *_: seen.append(1))
    teacher(images(1))
    assert len(seen) == runs  # CLS needs them all


def test_the_final_norm_is_found_where_timm_moves_it_for_average_pooling():
    teacher = random_teacher(
        "vit_small_patch16_224", [ScaleSpec("last", -1, 4)], global_pool="avg", class_token=False, **VIT_ARGS
    )
    assert teacher.describe()["norm"] == "fc_norm"
    tokens = teacher(images())["last"]
    weight, bias = teacher.backbone.model.fc_norm.weight, teacher.backbone.model.fc_norm.bias
    plain = (tokens - bias) / weight
    torch.testing.assert_close(plain.mean(-1), torch.zeros(3, 16), atol=1e-4, rtol=0)
    torch.testing.assert_close(plain.var(-1, unbiased=False), torch.ones(3, 16), atol=1e-3, rtol=0)


def test_a_cnn_gives_its_maps_as_tokens_without_any_norm():
    scales = [ScaleSpec("deep", 4, 2), ScaleSpec("shallow", 2, 4)]
    teacher = random_teacher("mobilenetv2_050", scales, num_classes=0)
    x, found = images(), teacher(images())
    assert teacher.describe()["norm"] == "none"
    with torch.no_grad():
        shallow, deep = teacher.backbone.model.forward_intermediates(x, indices=[2, 4], intermediates_only=True)
    for row in range(2):
        for column in range(2):
            torch.testing.assert_close(found["deep"][:, 2 * row + column], deep[:, :, row, column])
    torch.testing.assert_close(found["shallow"], pooled_by_hand(shallow.flatten(2).transpose(1, 2), 4))
    torch.testing.assert_close(found["global"], deep.mean((2, 3)))
    assert teacher.widths == {"deep": 160, "shallow": 16}


def test_channels_last_is_the_same_function():
    model = randomise(timm.create_model("mobilenetv2_050", pretrained=False)).eval().double()
    x = images().double()  # in float32 the order of sums shows, in a network as ill-conditioned as this one
    with torch.no_grad():
        expected = model.forward_intermediates(x, indices=[3, 4], intermediates_only=True)
        tokens, _ = Backbone(model)(x, [3, 4])
    for layer, feature_map in zip((3, 4), expected, strict=True):
        torch.testing.assert_close(tokens[layer], feature_map.flatten(2).mT.float(), check_stride=False)


def test_a_convnext_is_a_teacher():
    teacher = random_teacher("convnext_atto", [ScaleSpec("deep", -1, 2), ScaleSpec("early", 0, 8)])
    assert {name: tuple(value.shape) for name, value in teacher(images()).items()} == {
        "deep": (3, 4, 320),
        "early": (3, 64, 40),
        "global": (3, 320),
    }


# ---- frozen ----------------------------------------------------------------------------------------------------------


def test_a_teacher_stays_in_eval_mode_under_a_training_parent(vit: Teacher):
    parent = torch.nn.Sequential(vit)
    before = vit(images())
    parent.train()
    assert not any(module.training for module in vit.modules())
    torch.testing.assert_close(vit(images()), before, rtol=0, atol=0)


def test_no_gradient_reaches_a_teacher(vit: Teacher):
    x = images().requires_grad_()
    assert not any(parameter.requires_grad for parameter in vit.parameters())
    assert not any(value.requires_grad for value in vit(x).values())


def test_images_of_another_size_are_refused(vit: Teacher):
    with pytest.raises(ValueError, match="expected"):
        vit(images(1, 80))


def test_normalisation_is_the_one_of_views(vit: Teacher):
    from PIL import Image

    from pipeline.data.views import to_tensor

    pixels = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)
    expected = torch.stack([to_tensor(Image.fromarray(picture), vit.mean, vit.std) for picture in pixels])
    assert torch.equal(vit.normalise(torch.from_numpy(pixels)), expected)


def test_the_fingerprint_resolves_layers_and_knows_their_relative_depth(vit: Teacher):
    scales = vit.describe()["scales"]
    assert [(s["name"], s["layer"], s["grid"], s["width"], s["depth_fraction"]) for s in scales] == [
        ("fine", 3, 4, 48, 1.0),
        ("mid", 1, 2, 48, 0.5),
        ("coarse", 2, 2, 48, 0.75),
    ]
    assert SCALES[0].layer == -1


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 72}, r"72 pixels is not divided by the patch of 16.*use 64 or 80"),
        ({"scales": [ScaleSpec("a", -1, 3)]}, r"scale a: the native grid of layer 3 is 4 x 4.*grid of 1, 2, 4"),
        ({"scales": [ScaleSpec("a", 4, 2)]}, r"there is no layer 4.*0 to 3"),
        ({"scales": [ScaleSpec("a", -5, 2)]}, r"there is no layer -5"),
        ({"scales": []}, r"no scale"),
        ({"name": "vit_smal_patch16_dinov3_qkvb"}, r"no model 'vit_smal.*did you mean vit_small_patch16_dinov3_qkvb"),
        ({"model_args": {"depht": 3}}, r"cannot make this model.*depht"),
        ({"random_weights": False}, r"cannot get the weights.*teacher.checkpoint.*teacher.random_weights"),
        ({"random_weights": False, "name": "vit_tiny_patch16_dinov3"}, r"no model|no pretrained weights"),
        ({"mean": [0.5]}, r"no mean for R, G, B"),
    ],
)  # fmt: skip
def test_what_a_teacher_cannot_be_is_refused_in_one_line(
    change: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    arguments = {
        "name": VIT,
        "model_args": {} if change.get("random_weights") is False else VIT_ARGS,
        "random_weights": True,
        "image_size": SIZE,
        "scales": SCALES,
    }
    with pytest.raises(PipeError, match=message):
        load_teacher(**(arguments | change))  # type: ignore[arg-type]


def test_a_size_that_a_cnns_stride_does_not_divide_is_refused():
    with pytest.raises(PipeError, match="patch of 32"):
        random_teacher("mobilenetv2_050", [ScaleSpec("deep", 4, 1)], size=80)


def test_a_network_without_intermediate_features_is_refused():
    with pytest.raises(PipeError, match="intermediate"):
        Backbone(torch.nn.Linear(2, 2))
