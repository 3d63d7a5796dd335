"""The file of a text projection, good and bad, and the model that carries one."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import CAPTIONS, SIZE, WIDTH_GLOBAL, build

from pipeline.errors import PipeError
from pipeline.models.dinorankclip import DinoRankCLIP, load, save
from pipeline.models.projection import TextProjection, read_projection

P = 5


def write(path, **tensors):
    save_file(tensors, path)
    return path


def test_a_linear_map_is_read_with_and_without_a_bias(tmp_path):
    weight, bias = torch.randn(P, WIDTH_GLOBAL), torch.randn(P)
    vectors = torch.randn(3, WIDTH_GLOBAL)
    found = read_projection(write(tmp_path / "a", weight=weight, bias=bias), WIDTH_GLOBAL)
    torch.testing.assert_close(found(vectors), vectors @ weight.T + bias)
    half = read_projection(write(tmp_path / "b", weight=weight.half()), WIDTH_GLOBAL)
    torch.testing.assert_close(half(vectors), vectors @ weight.half().float().T)
    assert not list(found.parameters())


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"kernel": torch.ones(P, WIDTH_GLOBAL)}, "the file holds kernel"),
        ({"weight": torch.ones(P, WIDTH_GLOBAL), "scale": torch.ones(1)}, "the file holds scale, weight"),
        ({"weight": torch.ones(WIDTH_GLOBAL + 1, P)}, "weight has the shape"),
        ({"weight": torch.ones(WIDTH_GLOBAL)}, "weight has the shape"),
        ({"weight": torch.ones(P, WIDTH_GLOBAL), "bias": torch.ones(P + 1)}, "bias has the shape"),
        ({"weight": torch.full((P, WIDTH_GLOBAL), torch.nan)}, "finite"),
        ({"weight": torch.ones(P, WIDTH_GLOBAL, dtype=torch.int32)}, "finite floats"),
        ({"weight": torch.zeros(P, WIDTH_GLOBAL)}, "zero"),
    ],
)
def test_a_file_that_is_no_such_map_is_one_line(tmp_path, tensors, said):
    with pytest.raises(PipeError, match=said) as error:
        read_projection(write(tmp_path / "bad", **tensors), WIDTH_GLOBAL)
    assert "\n" not in str(error.value)


def test_a_missing_or_broken_file_is_one_line(tmp_path):
    with pytest.raises(PipeError, match="no such file"):
        read_projection(tmp_path / "absent", WIDTH_GLOBAL)
    (tmp_path / "torn").write_bytes(b"not safetensors")
    with pytest.raises(PipeError, match="cannot be read") as error:
        read_projection(tmp_path / "torn", WIDTH_GLOBAL)
    assert "\n" not in str(error.value)


def test_images_and_texts_meet_in_the_projected_space_and_the_file_keeps_it(tmp_path):
    model = DinoRankCLIP(**(build().arguments | {"text_target_width": P})).eval()
    projection = TextProjection(WIDTH_GLOBAL, P)
    projection.weight.normal_()
    mean = torch.randn(P)
    grams = {name: torch.eye(grid**2) for name, grid in model.student["image"].grids.items()}
    model.start_at_baselines(global_mean=torch.ones(WIDTH_GLOBAL), gram_means=grams, text_mean=mean)
    model.text_projection.set_to(projection)
    images, tokens = torch.randn(len(CAPTIONS), 3, SIZE, SIZE), model.trunk.tokenizer(CAPTIONS)
    model.eval()
    with torch.no_grad():
        image, text = model.nodes(images, tokens)["student"]
        predicted = model(images, tokens).image_global
    expected = torch.nn.functional.normalize(predicted @ projection.weight.T, dim=1)
    torch.testing.assert_close(image, expected)
    torch.testing.assert_close(text, torch.nn.functional.normalize(mean, dim=0).expand_as(text))
    assert not any(name.startswith("text_projection") for name, _ in model.named_parameters())
    save(model, tmp_path / "model.safetensors", view="crop")
    again, _, _ = load(tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(again.nodes(images, tokens)["student"][0], image)
    assert "text_target_width" not in build().arguments
