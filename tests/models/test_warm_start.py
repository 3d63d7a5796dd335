"""`model.init`: open_clip's checkpoints and models of ours, taken whole or refused by name."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from tiny_models import CUSTOM, RESNET, SIZE, VIT, batch, build, shaken, with_gamma
from torch import nn

from pipeline.errors import PipeError
from pipeline.models.dinorankclip import DinoRankCLIP, save
from pipeline.models.init_files import read_init
from pipeline.models.trunk import build_trunk
from pipeline.models.warm_start import settings, warm_start

OPENAI = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}


def fill(model: DinoRankCLIP, path: Path, view: str = "crop") -> str:
    return warm_start(model, read_init(path), view=view)


def their_clip(trunk: dict[str, Any] = VIT, size: int = SIZE) -> Any:
    """An open_clip model with weights of its own."""
    torch.manual_seed(7)
    return shaken(build_trunk(trunk, size).clip, seed=8).eval()


def as_trained(clip: nn.Module, path: Path) -> Path:
    """What open_clip's trainer saves under DistributedDataParallel."""
    state = {f"module.{name}": value for name, value in clip.state_dict().items()}
    optimizer = torch.optim.AdamW(clip.parameters()).state_dict()
    torch.save({"epoch": 3, "name": "theirs", "state_dict": state, "optimizer": optimizer}, path)
    return path


def as_folder(clip: nn.Module, folder: Path, trunk: dict[str, Any] = VIT, **preprocess: Any) -> Path:
    """What open_clip's push_to_hf_hub leaves in a local folder."""
    folder.mkdir()
    save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
    trunk = copy.deepcopy(trunk)
    trunk["vision_cfg"]["image_size"] = SIZE
    config = {"model_cfg": trunk, "preprocess_cfg": OPENAI | preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("trunk", ["vit", "resnet", "custom"])
def test_an_open_clip_checkpoint_gives_its_own_embeddings(tmp_path: Path, trunk: str) -> None:
    config = {"vit": VIT, "resnet": RESNET, "custom": CUSTOM}[trunk]
    theirs, model = their_clip(config), build(trunk)
    line = fill(model, as_trained(theirs, tmp_path / "epoch_3.pt"))
    images, tokens = batch(model)
    with torch.no_grad():
        assert torch.equal(model.trunk.encode_image(images), theirs.encode_image(images, normalize=True))
        assert torch.equal(model.trunk.encode_text(tokens), theirs.encode_text(tokens, normalize=True))
        assert torch.equal(model.encode_image(images), theirs.encode_image(images, normalize=True))  # γ = 0
    assert torch.equal(model.trunk.logit_scale, theirs.logit_scale)
    assert line.startswith("taken: trunk; starts fresh: student image, student text, fusion image, fusion text; a bare")


def test_an_open_clip_folder_gives_its_weights_and_says_nothing_is_assumed(tmp_path: Path) -> None:
    theirs, model = their_clip(), build("vit", student=False)
    assert fill(model, as_folder(theirs, tmp_path / "hub")) == "taken: trunk"
    assert all(torch.equal(x, theirs.state_dict()[name]) for name, x in model.trunk.clip.state_dict().items())


def test_an_old_checkpoint_fits_a_trunk_whose_text_tower_stands_apart(tmp_path: Path) -> None:
    theirs, model = their_clip(VIT), build("custom", student=False)
    fill(model, as_trained(theirs, tmp_path / "old.pt"))
    tokens = batch(model)[1]
    assert torch.allclose(model.encode_text(tokens), theirs.encode_text(tokens, normalize=True), atol=1e-6)


def test_a_vits_positions_follow_the_image_size_as_open_clips_own_loader_has_it(tmp_path: Path) -> None:
    file = as_trained(their_clip(size=96), tmp_path / "large.pt")
    model, reference = build("vit", student=False), build_trunk(VIT, SIZE).clip
    line = fill(model, file)
    open_clip.load_checkpoint(reference, str(file))
    own = model.trunk.clip.state_dict()
    assert all(torch.equal(own[name], x) for name, x in reference.state_dict().items())
    assert "positions of 36 patches resized to 16" in line


@pytest.mark.parametrize(
    ("trunk", "init", "size", "expected"),
    [
        ("resnet", RESNET, 96, r"visual\.attnpool\.positional_embedding \[10, 256\] for \[5, 256\].*model\.image_size"),
        ("vit", RESNET, SIZE, r"missing: .*visual\."),
        ("resnet", VIT, SIZE, r"missing: .*visual\."),
        ("vit", VIT | {"embed_dim": 16}, SIZE, r"visual\.proj \[32, 16\] for \[32, 32\]"),
        ("vit", VIT | {"text_cfg": VIT["text_cfg"] | {"context_length": 12}}, SIZE, r"positional_embedding \[12, 32\]"),
    ],
)
def test_another_trunk_is_refused_with_the_tensor(
    tmp_path: Path, trunk: str, init: dict[str, Any], size: int, expected: str
) -> None:
    file, model = as_trained(their_clip(init, size), tmp_path / "other.pt"), build(trunk)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(PipeError, match=rf"do not fit the trunk .*{expected}") as caught:
        fill(model, file)
    assert "\n" not in str(caught.value)
    assert f"model.init {file}" in str(caught.value)
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())  # nothing is half-taken


@pytest.mark.parametrize(
    ("trunk", "preprocess", "expected"),
    [
        (VIT, {"mean": [0.5, 0.5, 0.5]}, r"normalised with mean \[0\.5, 0\.5, 0\.5\]"),
        (VIT, {"std": [0.5, 0.5, 0.5]}, r"normalised with std"),
        (VIT, {"resize_mode": "squash"}, "seen as squash, and data.view is crop"),
        (VIT, {"resize_mode": "longest"}, "seen as longest"),
        (VIT | {"quick_gelu": True}, {}, "quick_gelu is True there and False"),
        (
            VIT | {"vision_cfg": VIT["vision_cfg"] | {"head_width": 32}},
            {},
            r"vision_cfg\.head_width is 32 there and 16",
        ),
    ],
)
def test_what_shapes_do_not_tell_is_compared(
    tmp_path: Path, trunk: dict[str, Any], preprocess: dict[str, Any], expected: str
) -> None:
    folder = as_folder(their_clip(), tmp_path / "hub", trunk, **preprocess)
    with pytest.raises(PipeError, match=expected):
        fill(build("vit", student=False), folder)


def test_files_that_are_no_weights_are_one_line_each(tmp_path: Path) -> None:
    (tmp_path / "noise.safetensors").write_bytes(b"no weights")
    (tmp_path / "noise.pt").write_bytes(b"no weights either")
    torch.save({"state_dict": {"a": Path("code")}}, tmp_path / "code.pt")
    torch.save({"epoch": 3}, tmp_path / "no_state.pt")
    (tmp_path / "empty").mkdir()
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "record.json").write_text("{}")
    for name, expected in {
        "noise.safetensors": "cannot be read",
        "noise.pt": "cannot read",
        "code.pt": "cannot read",
        "no_state.pt": "no state dict",
        "empty": "holds no model",
        "unfinished": "not finished",
        "nowhere": "no such file",
    }.items():
        with pytest.raises(PipeError, match=rf"{expected}.*model\.init .*{re.escape(name)}") as caught:
            read_init(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_model_of_ours_is_taken_whole(tmp_path: Path) -> None:
    theirs = with_gamma(shaken(build("resnet", seed=3)), 0.3)
    save(theirs, tmp_path / "model.safetensors", view="squash")
    model = build("resnet", seed=4)
    assert (
        fill(model, tmp_path, view="squash") == "taken: trunk, student image, student text, fusion image, fusion text"
    )
    assert all(torch.equal(x, theirs.state_dict()[name]) for name, x in model.state_dict().items())
    with pytest.raises(PipeError, match=r"seen as squash, and data\.view is crop"):
        fill(model, tmp_path)


def test_parts_are_taken_where_names_and_shapes_fit_and_named(tmp_path: Path) -> None:
    theirs, model = build("vit", seed=3), build("vit", seed=4, text_side=False, refiner=False)
    save(theirs, tmp_path / "model.safetensors", view="crop")
    assert fill(model, tmp_path) == ("taken: trunk, student image, fusion image; not used: fusion text, student text")
    bare, full = build("vit", student=False, seed=5), build("vit", seed=6)
    save(bare, tmp_path / "model.safetensors", view="crop")
    before = full.fusion.image.inject.weight.clone()
    line = fill(full, tmp_path / "model.safetensors")
    assert line == "taken: trunk; starts fresh: student image, student text, fusion image, fusion text"
    assert torch.equal(full.fusion.image.inject.weight, before)
    save(theirs, tmp_path / "model.safetensors", view="crop")
    other = build("vit", seed=6)
    other.fusion.image.inject = nn.Linear(96, 32, bias=False)
    before, count = other.fusion.image.inject.weight.clone(), len(other.fusion.image.state_dict())
    line = fill(other, tmp_path)
    assert (
        line == f"taken: trunk, student image, student text, fusion image {count - 1} of {count} tensors, fusion text"
    )
    assert torch.equal(other.fusion.image.inject.weight, before)
    assert torch.equal(other.fusion.image.norm.weight, theirs.fusion.image.norm.weight)


def test_a_named_trunk_equals_its_own_config_and_no_other() -> None:
    spelled_out = open_clip.get_model_config("ViT-B-32")
    spelled_out["vision_cfg"] |= {"head_width": 64, "image_size": 64}  # a default, and what shapes no layer
    assert settings(spelled_out) == settings("ViT-B-32")
    assert settings("ViT-B-32-quickgelu") != settings("ViT-B-32") != settings("ViT-B-16")


def test_a_frozen_trunk_has_no_gradient_and_its_batch_norms_stand_still() -> None:
    model = build("resnet").train()
    model.trunk.freeze()
    model.train()
    assert model.student.training
    before = {name: x.clone() for name, x in model.trunk.state_dict().items()}
    out = model(*batch(model))
    assert not out.z.requires_grad
    assert not out.logit_scale.requires_grad
    with_gamma(model, 0.5)
    loss = model(*batch(model)).v.sum() + model(*batch(model)).w.sum()
    loss.backward()
    assert all(p.grad is None for p in model.trunk.parameters())
    assert model.fusion.image.inject.weight.grad.abs().sum() > 0
    assert model.student.text.project.weight.grad.abs().sum() > 0
    assert all(torch.equal(before[name], x) for name, x in model.trunk.state_dict().items())
