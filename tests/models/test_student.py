from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import SCALES, SIZE, batch, build, shaken

from pipeline.errors import PipeError
from pipeline.models.stem import conv_stem
from pipeline.models.student import ImageStudent, TextStudent, area_pooled, native_grid, student_block

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def image_student(**change: Any) -> Any:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "name": "vit_tiny_patch16_224",
        "patch": 16,
        "depth": 3,
        "image_size": SIZE,
        "scales": SCALES,
        "global_width": 10,
        "mean": MEAN,
        "std": STD,
    }
    return ImageStudent(**(arguments | change)).eval()


@pytest.mark.parametrize(
    ("fraction", "depth", "block"),
    [(1.0, 12, 12), (9 / 12, 12, 9), (5 / 12, 4, 2), (0.01, 12, 1), (1.0, 1, 1), (0.625, 4, 3), (0.125, 4, 1)],
)
def test_student_block_has_the_teachers_relative_depth(fraction: float, depth: int, block: int) -> None:
    assert student_block(fraction, depth) == block


@pytest.mark.parametrize("fraction", [0.0, 1.2, -0.5])
def test_a_depth_fraction_outside_the_network_is_refused(fraction: float) -> None:
    with pytest.raises(PipeError, match="depth_fraction"):
        student_block(fraction, 4)


def test_tokens_are_the_named_blocks_normalised_then_pooled() -> None:
    student = image_student(depth=3)  # fine after block 3, coarse (0.5 · 3 rounds to 2) after block 2
    images = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        got = student(images)
        pixels = images * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
        x = (pixels - 0.5) / 0.5
        x = student.vit._pos_embed(student.vit.patch_embed(x))
        after = []
        for block in student.vit.blocks:
            x = block(x)
            after.append(x)
        fine = student.norms["fine"](after[2][:, 1:])
        maps = student.norms["coarse"](after[1][:, 1:]).transpose(1, 2).reshape(2, 192, 4, 4)
        coarse = torch.nn.functional.avg_pool2d(maps, 2).flatten(2).transpose(1, 2)
        pooled = student.vit.norm(x)[:, 0]
    assert torch.allclose(got.tokens["fine"], fine, atol=1e-5)
    assert torch.allclose(got.tokens["coarse"], coarse, atol=1e-5)
    assert torch.allclose(got.pooled, pooled, atol=1e-5)
    assert {name: tuple(t.shape) for name, t in student.distilled(got).items()} == {
        "fine": (2, 16, 128),
        "coarse": (2, 4, 128),
    }
    assert student.predict_global(got).shape == (2, 10)


def test_area_pooling_averages_each_cells_patches() -> None:
    tokens = torch.arange(36.0).reshape(1, 36, 1)
    cells = tokens.reshape(6, 6)
    expected = [cells[3 * i : 3 * i + 3, 3 * j : 3 * j + 3].mean().item() for i in range(2) for j in range(2)]
    assert area_pooled(tokens, 6, 2).flatten().tolist() == expected


@pytest.mark.parametrize(
    ("size", "patch", "grids", "fix"),
    [
        (112, 16, [14], "patch 8"),
        (224, 32, [14, 7], "patch 16"),
        (64, 16, [3], "multiple of 48"),
        (100, 16, [5], "patch 20"),
        (64, 16, [8, 4], "patch 8"),
    ],
)
def test_a_grid_that_does_not_fit_is_refused_naming_a_patch_that_does(
    size: int, patch: int, grids: list[int], fix: str
) -> None:
    with pytest.raises(PipeError, match=fix):
        native_grid(size, patch, grids)
    if fix.startswith("patch"):
        assert native_grid(size, int(fix.split()[1]), grids) % max(grids) == 0


def test_a_student_that_timm_lacks_or_that_is_no_transformer_is_refused() -> None:
    with pytest.raises(PipeError, match="did you mean vit_tiny"):
        image_student(name="vit_tinny_patch16_224")
    with pytest.raises(PipeError, match="ViT"):
        image_student(name="resnet18")


def test_text_branch_ignores_what_stands_at_padded_positions() -> None:
    torch.manual_seed(0)
    student = shaken(TextStudent(input_width=8, width=32, layers=2, global_width=5)).eval()
    features, valid = torch.randn(3, 9, 8), torch.arange(9) < torch.tensor([[3], [9], [1]])
    other = torch.where(valid.unsqueeze(-1), features, 100 * torch.randn(3, 9, 8))
    with torch.no_grad():
        a, b = student(features, valid), student(other, valid)
        alone = student(features[:1, :3], valid[:1, :3])
    assert torch.equal(a.pooled, b.pooled)
    assert torch.equal(a.tokens[valid], b.tokens[valid])
    assert torch.allclose(alone.pooled, a.pooled[:1], atol=1e-6)
    assert torch.allclose(a.pooled[0], a.tokens[0, :3].mean(0), atol=1e-6)


def test_student_globals_have_the_teachers_width_and_learn_from_it() -> None:
    model = build()
    out = model(*batch(model))
    (out.image_global.square().sum() + out.text_global.square().sum()).backward()
    assert model.student["image"].global_head.weight.grad.abs().sum() > 0
    assert model.student["image"].vit.patch_embed.proj.weight.grad.abs().sum() > 0
    assert model.trunk.clip.token_embedding.weight.grad.abs().sum() > 0  # the text branch reads the trunk's features


def test_a_conv_stem_gives_the_same_places_and_sees_what_they_hold():
    images = torch.randn(2, 3, 64, 64)
    made = image_student(stem="conv")
    branch = made(images)
    assert {name: x.shape for name, x in branch.tokens.items()} == {
        name: x.shape for name, x in image_student()(images).tokens.items()
    }
    stem = made.vit.patch_embed.proj.eval()
    with torch.no_grad():
        whole = stem(images)
        changed = images.clone()
        changed[:, :, 40:, 40:] += 1.0
        moved = (stem(changed) - whole).abs().amax(1)[0]
    assert whole.shape == (2, made.width, 4, 4)
    assert moved[3, 3] > 1e-3
    assert moved[0, 0] == 0.0  # a place hears of its surroundings, and of nothing beyond
    with pytest.raises(PipeError, match="use a patch of 16"):
        conv_stem(14, 192)


def test_avg_pools_the_patch_tokens_and_leaves_no_parameter_without_gradient():
    student = image_student(pool="avg")
    images = torch.randn(2, 3, SIZE, SIZE)
    branch = student(images)
    with torch.no_grad():
        pixels = images * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
        x = student.vit._pos_embed(student.vit.patch_embed((pixels - 0.5) / 0.5))
        for block in student.vit.blocks:
            x = block(x)
        expected = student.vit.fc_norm(x[:, 1:].mean(1))
    torch.testing.assert_close(branch.pooled, expected)
    (student.predict_global(branch).sum() + sum(x.sum() for x in student.distilled(branch).values())).backward()
    assert [name for name, p in student.named_parameters() if p.grad is None] == []
