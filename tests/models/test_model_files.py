from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import SIZE, batch, build, shaken, with_gamma

from pipeline.data.views import View
from pipeline.errors import PipeError
from pipeline.models.dinorankclip import load, save


def saved(folder: Path, model: Any = None) -> tuple[Any, Path]:
    model = model or with_gamma(shaken(build()), 0.3)
    path = folder / "model.safetensors"
    save(model, path, view="crop", extra={"run": "first"})
    return model, path


@pytest.mark.parametrize("parts", [{}, {"text_side": False}, {"gate": False, "pyramid": False}, {"student": False}])
def test_a_loaded_model_gives_the_same_bits(tmp_path: Path, parts: dict) -> None:
    model, _ = saved(tmp_path, with_gamma(shaken(build(**parts)), 0.3))
    loaded, _, tokenizer = load(tmp_path)
    images, tokens = batch(model)
    assert not loaded.training
    assert torch.equal(tokenizer(["two red cats on a mat"]), tokens[1:2])
    with torch.no_grad():
        assert torch.equal(loaded.encode_image(images), model.encode_image(images))
        assert torch.equal(loaded.encode_text(tokens), model.encode_text(tokens))
        for node, pair in model.nodes(images, tokens).items():
            assert torch.equal(loaded.nodes(images, tokens)[node][0], pair[0])


def test_load_takes_a_folder_or_the_file_and_needs_nothing_else(tmp_path: Path) -> None:
    _, path = saved(tmp_path / "run")
    alone = tmp_path / "exported.safetensors"
    path.rename(alone)
    assert load(str(alone))[0].arguments == load(alone)[0].arguments
    with pytest.raises(PipeError, match="no trained model"):
        load(tmp_path / "run")


def test_preprocess_is_the_view_the_model_was_trained_on(tmp_path: Path) -> None:
    model = build()
    save(model, tmp_path / "model.safetensors", view="squash")
    _, preprocess, _ = load(tmp_path)
    assert preprocess.view == View("squash", SIZE)
    assert (preprocess.mean, preprocess.std) == (model.trunk.mean, model.trunk.std)
    assert preprocess(Image.new("RGB", (90, 40))).shape == (3, SIZE, SIZE)


def test_loading_leaves_the_random_state_alone(tmp_path: Path) -> None:
    saved(tmp_path)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    load(tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_channels_last_weights_can_be_saved(tmp_path: Path) -> None:
    model, _ = saved(tmp_path, build().to(memory_format=torch.channels_last))
    loaded = load(tmp_path)[0]
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    model, path = saved(tmp_path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "dinorankclip"
    assert metadata["run"] == "first"
    assert json.loads(metadata["arguments"]) == model.arguments
    assert list(tmp_path.iterdir()) == [path]  # no temporary file stays behind


def test_reserved_metadata_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PipeError, match="reserved"):
        save(build(student=False), tmp_path / "m.safetensors", view="crop", extra={"version": "9"})


def rewritten(path: Path, **change: str) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata=metadata | change)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": "other"}, "not a model of ours"),
        ({"version": "99"}, "version 99, not 1"),
        ({"arguments": "{broken"}, "damaged"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, change: dict, says: str) -> None:
    _, path = saved(tmp_path, build(student=False))
    rewritten(path, **change)
    with pytest.raises(PipeError, match=says):
        load(path)


def test_a_foreign_safetensors_file_and_a_cut_one_are_refused(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.safetensors"
    save_file({"a": torch.zeros(2)}, foreign)
    with pytest.raises(PipeError, match="not a model of ours"):
        load(foreign)
    _, path = saved(tmp_path, build(student=False))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(PipeError, match="cannot be read"):
        load(path)


def test_weights_of_another_network_are_refused_in_one_line(tmp_path: Path) -> None:
    model, path = saved(tmp_path)
    rewritten(path, arguments=json.dumps(model.arguments | {"parts": model.parts | {"gate": False}}))
    with pytest.raises(PipeError, match="do not fit") as caught:
        load(path)
    assert "\n" not in str(caught.value)
