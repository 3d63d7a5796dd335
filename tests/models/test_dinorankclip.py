from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import SCALES, SIZE, STUDENT, TRUNKS, VIT, WIDTH_GLOBAL, batch, build, shaken, with_gamma

from pipeline.errors import PipeError
from pipeline.models.dinorankclip import DinoRankCLIP, Forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", sorted(TRUNKS))
def test_at_gamma_zero_the_model_is_open_clip_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    model = shaken(build(kind)).to(dtype)
    images, tokens = batch(model, 6)
    images = images.to(dtype)
    with torch.no_grad():
        assert torch.equal(model.encode_image(images), model.trunk.clip.encode_image(images, normalize=True))
        assert torch.equal(model.encode_text(tokens), model.trunk.clip.encode_text(tokens, normalize=True))


def test_at_gamma_zero_the_model_is_the_trunk_under_autocast_too() -> None:
    model = shaken(build())
    images, tokens = batch(model)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(images, tokens)
    assert out.v.dtype == out.w.dtype == torch.float32
    assert torch.equal(out.v, out.z)
    assert torch.equal(out.w, out.t)
    assert out.v.norm(dim=1).sub(1).abs().max() < 1e-6


def test_in_training_mode_gamma_zero_is_the_trunk_as_well() -> None:
    model = shaken(build()).train()
    images, tokens = batch(model)
    out = model(images, tokens)
    assert torch.equal(out.v, out.z)
    assert not torch.equal(out.z, shaken(build())(images, tokens).z)  # batch statistics are in use


def test_without_student_there_is_nothing_but_the_trunk() -> None:
    model = build(student=False)
    images, tokens = batch(model)
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"trunk"}
    out = model(images, tokens)
    assert torch.equal(out.v, model.trunk.clip.encode_image(images, normalize=True))
    assert torch.equal(out.w, model.trunk.clip.encode_text(tokens, normalize=True))
    assert (out.image, out.text, out.student_tokens, out.image_global, out.text_global, out.text_pooled) == (None,) * 6
    assert set(model.nodes(images, tokens)) == {"trunk"}
    assert model.parameter_counts()["total"] == model.parameter_counts()["trunk"]


def test_the_trunk_starts_the_same_with_and_without_a_student() -> None:
    full, bare = build(seed=7), build(seed=7, student=False)
    for name, value in bare.trunk.state_dict().items():
        assert torch.equal(value, full.trunk.state_dict()[name]), name


def test_forward_fills_every_field_with_its_shape() -> None:
    model = with_gamma(shaken(build()), 0.5)
    returned = model(*batch(model, 4))
    assert isinstance(returned, Forward)
    out: Any = returned
    for vectors in (out.z, out.t, out.v, out.w):
        assert vectors.shape == (4, 32)
        assert vectors.norm(dim=1).sub(1).abs().max() < 1e-6
    assert out.logit_scale.shape == ()
    assert {name: tuple(t.shape) for name, t in out.student_tokens.items()} == {
        "fine": (4, 16, 128),
        "coarse": (4, 4, 128),
    }
    assert out.image_global.shape == out.text_global.shape == (4, WIDTH_GLOBAL)
    assert out.text_pooled.shape == (4, STUDENT["text_width"])
    for base, side in ((out.z, out.image), (out.t, out.text)):
        assert side.gate.shape == side.delta.shape == side.tangent.shape == (4, 32)
        assert (side.tangent * base).sum(1).abs().max() < 1e-5
    assert not torch.allclose(out.v, out.z, atol=1e-3)


def test_encoders_forward_and_nodes_agree_and_normalize_changes_nothing() -> None:
    model = with_gamma(shaken(build()), 0.5)
    images, tokens = batch(model)
    with torch.no_grad():
        out, nodes = model(images, tokens), model.nodes(images, tokens)
        assert torch.equal(model.encode_image(images), out.v)
        assert torch.equal(model.encode_text(tokens, normalize=True), out.w)
        assert torch.equal(model.encode_image(images, normalize=True), out.v)
        assert torch.equal(nodes["trunk"][0], out.z)
        assert torch.equal(nodes["gated"][1], out.w)
        student = (F.normalize(out.image_global, dim=1), F.normalize(out.text_global, dim=1))
        assert torch.allclose(nodes["student"][0], student[0], atol=1e-6)
        assert torch.allclose(nodes["student"][1], student[1], atol=1e-6)
        delta = out.image.delta
        along = delta - (delta * out.z).sum(1, keepdim=True) * out.z
        assert torch.allclose(nodes["fused"][0], F.normalize(out.z + 0.5 * along, dim=1), atol=1e-6)
    assert set(nodes) == {"trunk", "student", "fused", "gated"}
    for pair in nodes.values():
        assert all(side.norm(dim=1).sub(1).abs().max() < 1e-6 for side in pair)


def test_without_gate_fused_and_gated_are_one_point() -> None:
    model = with_gamma(shaken(build(gate=False)), 0.5)
    nodes = model.nodes(*batch(model))
    assert torch.equal(nodes["fused"][0], nodes["gated"][0])
    assert not torch.equal(nodes["fused"][0], nodes["trunk"][0])


def test_image_only_leaves_the_text_side_to_the_trunk() -> None:
    model = with_gamma(shaken(build(text_side=False)), 0.5)
    images, tokens = batch(model)
    out = model(images, tokens)
    assert (out.text, out.text_global, out.text_pooled) == (None, None, None)
    assert torch.equal(out.w, model.trunk.clip.encode_text(tokens, normalize=True))
    assert not torch.equal(out.v, out.z)
    assert not any(name.startswith(("fusion.text", "student.text")) for name, _ in model.named_parameters())
    nodes = model.nodes(images, tokens)
    assert set(nodes) == {"trunk", "fused", "gated"}
    assert torch.equal(nodes["gated"][1], out.t)
    assert "student" in model.image_nodes(images)


def test_what_stands_after_the_end_token_changes_no_output() -> None:
    model = with_gamma(shaken(build()), 0.5)
    images, tokens = batch(model)
    other = tokens.clone()
    padded = torch.arange(16) > tokens.argmax(1, keepdim=True)
    other[padded] = torch.randint(1, 40000, (int(padded.sum()),))
    assert not torch.equal(tokens, other)
    a, b = model(images, tokens), model(images, other)
    assert torch.equal(a.w, b.w)
    assert torch.equal(a.text_global, b.text_global)
    assert torch.equal(a.text_pooled, b.text_pooled)


def test_gate_on_is_the_gate_of_the_forward_pass_and_detached_inputs_reach_it_alone() -> None:
    model = with_gamma(shaken(build()), 0.5)
    out = model(*batch(model))
    for side, base, found in (("image", out.z, out.image), ("text", out.t, out.text)):
        model.zero_grad()
        gate = model.gate_on(side, base.detach(), found.delta.detach())
        assert torch.equal(gate, found.gate)
        gate.sum().backward()
        learning = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        assert learning
        assert all(name.startswith(f"fusion.{side}.gate.") for name in learning)


def test_gammas_have_the_names_that_the_optimiser_looks_for_and_start_at_zero() -> None:
    gammas = {name: p for name, p in build().named_parameters() if name.endswith("gamma")}
    assert set(gammas) == {"fusion.image.gamma", "fusion.text.gamma"}
    assert all(p.item() == 0 and p.shape == () for p in gammas.values())


def everything(out: Any) -> torch.Tensor:
    """A scalar that depends on every field of a Forward."""
    generator = torch.Generator().manual_seed(5)
    fields = [out.v, out.w, out.image_global, out.text_global, out.text_pooled, *out.student_tokens.values()]
    total = out.logit_scale
    for field in fields:
        total = total + (field * torch.randn(field.shape, generator=generator)).sum()
    return total


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_every_parameter_learns_once_gamma_has_left_zero(kind: str) -> None:
    model = with_gamma(shaken(build(kind)), 0.5)
    everything(model(*batch(model))).backward()
    still = {name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0}
    assert still == set()


def test_at_gamma_zero_the_fusion_waits_for_gamma_alone() -> None:
    model = shaken(build())
    everything(model(*batch(model))).backward()
    still = {name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0}
    fused = {name for name, _ in model.named_parameters() if name.startswith("fusion.")}
    assert still == fused - {"fusion.image.gamma", "fusion.text.gamma"}


def test_parameter_budgets_at_the_widths_of_a_resnet50_and_a_vit_base_teacher() -> None:
    trunk = copy.deepcopy(VIT) | {
        "embed_dim": 1024,
        "text_cfg": VIT["text_cfg"] | {"width": 512, "heads": 8, "layers": 1},
    }
    scales = [
        {"name": "fine", "grid": 14, "depth_fraction": 1.0},
        {"name": "mid", "grid": 7, "depth_fraction": 0.75},
        {"name": "coarse", "grid": 7, "depth_fraction": 5 / 12},
    ]
    for layers in (1, 2):
        model = DinoRankCLIP(
            trunk=trunk,
            image_size=224,
            student={},
            scales=scales,
            global_width=768,
            fusion={"refiner_layers": layers},
        )
        counts = model.parameter_counts()
        assert counts["student_image"] < 6_000_000
        assert counts["student_text"] < 4_000_000
        assert counts["fusion_image"] + counts["fusion_text"] < 4_000_000
        assert counts["total"] == sum(p.numel() for p in model.parameters())


def test_the_model_serves_code_written_for_open_clip() -> None:
    # What CLIP_benchmark's zero-shot and retrieval do: autocast or not, inference only, features normalised again.
    model = with_gamma(shaken(build()), 0.5)
    images, tokens = batch(model)
    with torch.inference_mode():
        image_features = F.normalize(model.encode_image(images), dim=-1)
        text_features = F.normalize(model.encode_text(tokens), dim=-1)
        logits = 100.0 * image_features @ text_features.T
        prompts = model.encode_text(model.trunk.tokenizer(["a photo of a dog.", "a drawing of a dog."]))
        prototype = F.normalize(F.normalize(prompts, dim=-1).mean(dim=0), dim=0)
    assert logits.shape == (4, 4)
    assert prototype.norm().item() == pytest.approx(1.0)
    assert torch.allclose(image_features, model.encode_image(images), atol=1e-6)


def test_each_row_is_encoded_by_itself_in_eval_mode() -> None:
    model = with_gamma(shaken(build()), 0.5)
    images, tokens = batch(model)
    with torch.no_grad():
        assert torch.allclose(model.encode_image(images)[1:2], model.encode_image(images[1:2]), atol=1e-5)
        assert torch.allclose(model.encode_text(tokens)[2:3], model.encode_text(tokens[2:3]), atol=1e-5)


def test_arguments_are_json_and_rebuild_the_same_network() -> None:
    model = build(attention=False)
    again = DinoRankCLIP(**json.loads(json.dumps(model.arguments)))
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert again.arguments == model.arguments


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"parts": {"gates": True}}, "gates"),
        ({"gate": {"width": 3}}, "hidden"),
        ({"fusion": {"layers": 3}}, "refiner_layers"),
        ({"student": {"patches": 3}}, "patch"),
        ({"scales": []}, "extract"),
        ({"global_width": None}, "extract"),
        ({"fusion": {"width": 100}}, "multiple of 16"),
        ({"image_size": 63}, "ResNet"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_in_one_line(change: dict, says: str) -> None:
    arguments: dict[str, Any] = {
        "trunk": TRUNKS["resnet"],
        "image_size": SIZE,
        "student": STUDENT,
        "scales": SCALES,
        "global_width": 8,
    }
    with pytest.raises(PipeError, match=says) as caught:
        DinoRankCLIP(**(arguments | change))
    assert "\n" not in str(caught.value)
