"""Teachers of the transformers library give what timm's give for the same weights, every parameter random.

Both compute in float32; the sums are taken in other orders (q, k and v in one product or in three), so values around 1
to 6 may differ in the last bits. Seen: up to 2.2e-6 over the 12 blocks of a ViT-S, 0 for ConvNeXt and DINOv2.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_models import (
    MEAN,
    STD,
    dinov2,
    dinov3_convnext,
    dinov3_vit,
    save,
    saved,
    timm_convnext,
    timm_dinov2,
    timm_dinov3_vit,
)
from tiny_teacher import SCALES, SIZE, VIT, VIT_ARGS
from torch import Tensor

from pipeline.cache.layout import ScaleSpec
from pipeline.errors import PipeError
from pipeline.teacher.features import Backbone
from pipeline.teacher.huggingface_layers import HuggingFaceConvNeXt, HuggingFaceViT
from pipeline.teacher.teacher import Teacher, load_teacher

TOLERANCE = 1e-5
VIT_S = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6}


def images(count: int, size: int) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(size))


def twin(name: str, state: dict[str, Tensor], **model_args: Any) -> Backbone:
    model = timm.create_model(name, pretrained=False, **model_args).eval()
    model.load_state_dict(state, strict=True)
    return Backbone(model)


def assert_same(found: Any, expected: Any, x: Tensor, layers: list[int]) -> None:
    with torch.inference_mode():
        (tokens, cls), (wanted, wanted_cls) = found(x, layers), expected(x, layers)
    assert list(tokens) == list(dict.fromkeys(layers))
    for layer in layers:
        assert wanted[layer].std() > 0.1  # a block that does nothing, or a constant, would compare nothing
        torch.testing.assert_close(tokens[layer], wanted[layer], rtol=0, atol=TOLERANCE, check_stride=False)
    if wanted_cls is None:
        assert cls is None
    else:
        torch.testing.assert_close(cls, wanted_cls, rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module")
def vit_s() -> tuple[HuggingFaceViT, Backbone]:
    model = dinov3_vit(**VIT_S)
    return HuggingFaceViT(model), twin("vit_small_patch16_dinov3_qkvb", timm_dinov3_vit(model))


def test_randomised_means_every_parameter():
    initial = {**dict(timm.create_model(VIT, pretrained=False, **VIT_ARGS).named_parameters())}
    state = timm_dinov3_vit(dinov3_vit())
    assert state.keys() == initial.keys()
    assert all((state[name] != initial[name]).float().mean() > 0.99 for name in initial)
    assert state["blocks.2.gamma_1"].abs().mean() > 0.1


@pytest.mark.parametrize(("size", "layers"), [(224, list(range(12))), (256, [11, 5]), (512, [3, 11])])
def test_dinov3_vit_s_is_timms_at_every_block_and_size(vit_s: Any, size: int, layers: list[int]):
    assert_same(*vit_s, images(1, size), layers)


@pytest.mark.parametrize("layers", [[3, 1, 2], [0, 3, 0], [2], [3]])
def test_layers_come_back_as_asked(layers: list[int]):
    model = dinov3_vit()
    assert_same(HuggingFaceViT(model), twin(VIT, timm_dinov3_vit(model), **VIT_ARGS), images(3, SIZE), layers)


@pytest.mark.parametrize("registers", [0, 1, 4])
def test_exactly_the_cls_token_and_the_registers_are_dropped(registers: int):
    model = dinov3_vit(num_register_tokens=registers)
    other = twin(VIT, timm_dinov3_vit(model), num_reg_tokens=registers, **VIT_ARGS)
    assert_same(HuggingFaceViT(model), other, images(2, SIZE), [1, 3])


def test_a_gated_mlp():
    model = dinov3_vit(use_gated_mlp=True, hidden_act="silu", intermediate_size=128)
    args = VIT_ARGS | {"mlp_ratio": 128 / 48}
    assert_same(
        HuggingFaceViT(model),
        twin("vit_small_plus_patch16_dinov3_qkvb", timm_dinov3_vit(model), **args),
        images(2, SIZE),
        [2, 3],
    )


@pytest.mark.parametrize(("registers", "name"), [(0, "vit_small_patch14_dinov2"), (4, "vit_small_patch14_reg4_dinov2")])
def test_dinov2_is_timms(registers: int, name: str):
    model = dinov2(registers, 56)
    other = twin(name, timm_dinov2(model), img_size=56, **VIT_ARGS)
    assert HuggingFaceViT(model).norm_name == "layernorm"
    assert_same(HuggingFaceViT(model), other, images(2, 56), [3, 0])


def test_dinov3_convnext_tiny_is_timms_at_every_stage():
    model = dinov3_convnext()  # the real one's sizes
    found, other = HuggingFaceConvNeXt(model), twin("convnext_tiny.dinov3_lvd1689m", timm_convnext(model))
    assert [found.stride(layer) for layer in range(4)] == [other.stride(layer) for layer in range(4)]
    assert_same(found, other, images(1, 224), [3, 0, 2, 1])


def test_a_convnext_runs_only_the_stages_needed():
    backbone = HuggingFaceConvNeXt(dinov3_convnext(hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1]))
    seen = []
    for index, stage in enumerate(backbone.stages):
        stage.register_forward_hook(lambda *_, index=index: seen.append(index))
    backbone(images(1, 64), [1, 0])
    assert seen == [0, 1]


# ---- as a teacher ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(dinov3_vit(), tmp_path_factory.mktemp("models") / "tiny-dinov3")


def teacher(folder: Path, **changes: Any) -> Teacher:
    return load_teacher(f"hf:{folder}", **({"image_size": SIZE, "scales": SCALES} | changes))


def test_a_teacher_from_a_folder_is_timms_from_a_converted_checkpoint(folder: Path, tmp_path: Path):
    weights = saved(timm_dinov3_vit(dinov3_vit()), tmp_path / "timm.safetensors")
    other = load_teacher(VIT, model_args=VIT_ARGS, checkpoint=weights, image_size=SIZE, scales=SCALES)
    found = teacher(folder)
    x = images(3, SIZE)
    assert list(found(x)) == ["fine", "mid", "coarse", "global"]
    for name, value in other(x).items():
        torch.testing.assert_close(found(x)[name], value, rtol=0, atol=TOLERANCE)
    different = {"name", "weights", "weights_sha256", "model_args"}
    mine, theirs = found.describe(), other.describe()
    assert {key for key in mine if mine[key] != theirs[key]} == different
    assert (mine["norm"], mine["global"], mine["layers"]) == ("norm", "cls", 4)


def test_a_convnext_teacher_has_no_norm_and_a_mean_for_global(tmp_path: Path):
    model = dinov3_convnext(hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 2, 1])
    scales = [ScaleSpec("deep", 2, 4), ScaleSpec("early", 0, 4)]
    found = teacher(save(model, tmp_path / "convnext"), scales=scales)
    x = images(2, SIZE)
    assert (found.describe()["norm"], found.describe()["global"]) == ("none", "mean")
    assert found.native_grids == {"deep": 4, "early": 16}
    torch.testing.assert_close(found(x)["global"], found(x)["deep"].mean(1))
    with torch.inference_mode():
        deep = model(x, output_hidden_states=True).hidden_states[3]  # entry 0 is the image
    torch.testing.assert_close(found(x)["deep"], deep.flatten(2).mT, rtol=0, atol=TOLERANCE, check_stride=False)


def test_it_stays_in_eval_mode_under_a_training_parent(folder: Path):
    found, x = teacher(folder), images(2, SIZE)
    before = found(x)
    torch.nn.Sequential(found).train()
    assert not any(module.training for module in found.modules())
    for name, value in found(x).items():
        assert torch.equal(value, before[name])
    found.backbone.model.train()  # what it is kept from: coordinates are rescaled at random
    assert (found(x)["fine"] - before["fine"]).abs().max() > 0.01


def test_its_parameters_are_frozen_and_float32(folder: Path, tmp_path: Path):
    half = save(dinov3_vit().half(), tmp_path / "half")
    for found in (teacher(folder), teacher(half)):
        assert not any(parameter.requires_grad for parameter in found.parameters())
        assert {parameter.dtype for parameter in found.parameters()} == {torch.float32}
    rounded = dinov3_vit().half().float()
    assert teacher(half).weights_sha256 == teacher(save(rounded, tmp_path / "rounded")).weights_sha256


@pytest.mark.parametrize("size", [72, 65, 79])
def test_a_size_that_the_patch_does_not_divide_is_refused(folder: Path, size: int):
    with pytest.raises(PipeError, match=rf"{size} pixels is not divided by the patch of 16.*use 64 or 80"):
        teacher(folder, image_size=size)


def test_a_size_that_a_convnexts_stride_does_not_divide_is_refused(tmp_path: Path):
    folder = save(dinov3_convnext(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1]), tmp_path / "convnext")
    with pytest.raises(PipeError, match="patch of 32"):
        teacher(folder, image_size=80, scales=[ScaleSpec("deep", -1, 1)])
    assert teacher(folder, image_size=80, scales=[ScaleSpec("early", 2, 5)]).native_grids == {"early": 5}


def test_a_release_that_counts_otherwise_is_noticed():
    backbone = HuggingFaceViT(dinov3_vit())
    backbone.layers, backbone.prefix = 3, 5
    with pytest.raises(PipeError, match="5 hidden states where"):
        backbone(images(1, SIZE), [1])
    backbone.layers, backbone.prefix = 4, 1
    with pytest.raises(PipeError, match=r"21 tokens.*where 1 \+ 16"):
        backbone(images(1, SIZE), [3])


def test_mean_and_std_are_the_folders_unless_given(folder: Path, tmp_path: Path):
    assert (list(teacher(folder).mean), list(teacher(folder).std)) == (MEAN, STD)
    assert teacher(folder, mean=(0.5, 0.4, 0.3)).mean == (0.5, 0.4, 0.3)
    silent = save(dinov3_vit(), tmp_path / "silent", normalisation=False)
    with pytest.raises(PipeError, match=r"no mean for R, G, B.*teacher\.mean"):
        teacher(silent)
    (silent / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False, "image_mean": MEAN}))
    with pytest.raises(PipeError, match=r"no mean for R, G, B.*teacher\.mean"):
        teacher(silent)
    assert teacher(silent, mean=MEAN, std=STD).weights_sha256 == teacher(folder).weights_sha256


def test_under_autocast_features_are_float32_and_near(folder: Path):
    found, x = teacher(folder), images(2, SIZE)
    with torch.autocast("cpu", torch.bfloat16):
        half = found(x)
    for name, value in found(x).items():
        assert half[name].dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(half[name], value, dim=-1).min() > 0.995
