"""`pipe model`: numbers against independent counts: sums of numel, torch's counter over the whole, layers by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import SIZE, batch, build
from torch.utils.flop_counter import FlopCounterMode

from pipeline.cache.layout import ScaleSpec
from pipeline.config import load_config
from pipeline.errors import PipeError
from pipeline.losses.transitions import Transitions
from pipeline.models.cost import flops_by_part, flops_per_sample, forward_flops, inference_flops
from pipeline.models.parts import Part, budgets, head, on_meta, parameters_by_part, parts
from pipeline.models.simclr import SimCLRHead
from pipeline.teacher.shape import teacher_shape
from pipeline.teacher.teacher import load_teacher
from pipeline.teacher.weights import WeightsUnavailable
from stages.train_setup import model_arguments

VARIANTS: list[dict[str, Any]] = [{}, {"text_side": False}, {"gate": False}, {"refiner": False}, {"student": False}]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_parameters_by_part_are_all_parameters_once(variant: dict[str, Any]) -> None:
    model = build("resnet", **variant)
    found = parameters_by_part(model)
    assert sum(found.values()) == sum(p.numel() for p in model.parameters())
    named = {
        "trunk_image": "trunk.clip.visual.",
        "logit_scale": "trunk.clip.logit_scale",
        "student_text": "student.text.",
        "gate": "fusion.image.gate.",
    }
    for part in found.keys() & named.keys() - {"gate"}:
        assert found[part] == sum(p.numel() for name, p in model.named_parameters() if name.startswith(named[part]))
    gates = sum(p.numel() for name, p in model.named_parameters() if ".gate." in name)
    assert found.get("gate", 0) == gates


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_flops_by_part_add_up_to_torchs_count_of_the_whole(variant: dict[str, Any]) -> None:
    model = build("vit", **variant)
    counter = FlopCounterMode(display=False)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), counter, torch.no_grad():
            model(*batch(model, 1))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert sum(flops_by_part(model).values()) == counter.get_total_flops() == forward_flops(model)["total"]


def test_the_gates_flops_are_a_hand_count() -> None:
    gate = 2 * 2 * (3 * 32 * 16 + 16 * 32)  # two sides, two a multiply-add: 96 → 16 → 32
    assert flops_by_part(build("vit"))["gate"] == gate
    assert "gate" not in flops_by_part(build("vit", gate=False))


def test_a_model_without_values_counts_as_one_with_them() -> None:
    model = build("resnet")
    light = on_meta(model.arguments)
    assert all(p.is_meta for p in light.parameters())
    assert parts(light) == parts(model)
    assert inference_flops(light) == inference_flops(model)
    assert inference_flops(model)["image"] < sum(flops_by_part(model).values())


def test_a_frozen_trunk_is_trained_by_no_backward_pass() -> None:
    model = build("vit")
    free, forward = flops_per_sample(model, texts=2), flops_by_part(model)
    model.trunk.freeze()
    assert free - flops_per_sample(model, texts=2) == 2 * (forward["trunk_image"] + 2 * forward["trunk_text"])
    assert parts(model)["trunk_image"].training == forward["trunk_image"]
    assert parts(model)["student_image"].training == 3 * forward["student_image"]
    with torch.device("meta"):
        slip = SimCLRHead(model.trunk.pooled_width, 8, 4)
    assert flops_per_sample(on_meta(model.arguments), simclr=slip) > 0


def test_transitions_are_counted_by_hand() -> None:
    """Order 3, D = 32, d = 4: a key, queries of one and two lags, an ask and an answer; lags and β multiply nothing."""
    maps = 32 * 4 * (1 + 1 + 2 + 1 + 1)
    assert head(Transitions(32, 3, 4)) == Part(maps + 2 * 4 + 2, 2 * maps, 6 * maps)


def test_budgets_are_below_and_name_what_is_over() -> None:
    has = {"student_image": Part(6_000_000, 0, 0), "fusion_image": Part(1, 0, 0), "gate": Part(2, 0, 0)}
    assert budgets(has) == {"image branch": (6_000_000, 6_000_000), "fusion": (3, 4_000_000)}
    assert not budgets(parts(build("vit", student=False)))


@pytest.mark.parametrize("preset", ["cc3m", "small", "demo"])
def test_the_shipped_presets_keep_their_budgets(preset: str) -> None:
    config = load_config(None, preset=preset)
    specs = [ScaleSpec(s.name, s.layer, s.grid) for s in config.teacher.scales]
    teacher = config.teacher
    shape = teacher_shape(teacher.name, model_args=teacher.model_args, image_size=teacher.image_size, scales=specs)
    found = parameters_by_part(on_meta(model_arguments(config, shape.scales, shape.global_width)))
    kept = budgets({name: Part(count, 0, 0) for name, count in found.items()})
    assert set(kept) == {"image branch", "text branch", "fusion"}
    assert all(has < most for has, most in kept.values())


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3_qkvb", "mobilenetv2_050"])
def test_a_teachers_shape_is_that_of_the_teacher(name: str) -> None:
    arguments = {"embed_dim": 48, "depth": 4, "num_heads": 3} if "vit" in name else {}
    specs = [ScaleSpec("fine", -1, 2), ScaleSpec("mid", 1, 2)]
    real = load_teacher(name, model_args=arguments, random_weights=True, image_size=SIZE, scales=specs)
    shape = teacher_shape(name, model_args=arguments, image_size=SIZE, scales=specs)
    told = real.describe()["scales"]
    assert shape.global_width == real.global_width
    assert shape.scales == [{key: s[key] for key in ("name", "grid", "depth_fraction")} for s in told]


def test_a_teacher_whose_architecture_is_nowhere_is_one_line() -> None:
    with pytest.raises(WeightsUnavailable, match=r"config\.json is not on this machine.*hf:NOBODY/none"):
        teacher_shape("hf:NOBODY/none", image_size=SIZE, scales=[ScaleSpec("fine", -1, 4)])
    with pytest.raises(PipeError, match="no whole multiple of grid 3"):
        teacher_shape("vit_tiny_patch16_224", image_size=SIZE, scales=[ScaleSpec("fine", -1, 3)])
