"""`pipe teacher check`, on the real ViT-S/16's architecture with random weights; we have none of the published ones.

Expected values are made here, from the libraries' own models and torchvision's transforms.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from huggingface_models import dinov3_vit, save, saved, timm_dinov3_vit
from PIL import Image
from torchvision.transforms import v2
from typer.testing import CliRunner

from pipeline.cache.layout import ScaleSpec
from pipeline.errors import PipeError
from pipeline.teacher.golden import NETWORKS, PUBLISHED, Comparison, picture, published, read_golden, which_network
from pipeline.teacher.teacher import load_teacher
from stages.cli import app

VIT_S = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6}
QKVB = "vit_small_patch16_dinov3_qkvb"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/ (transformers), timm.safetensors (its twin) and golden/ (the image, and what the model makes of it)."""
    folder = tmp_path_factory.mktemp("golden")
    (folder / "golden").mkdir()
    coarse = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((320, 240), Image.Resampling.BICUBIC).save(folder / "golden" / "image.png")
    model = dinov3_vit(**VIT_S)
    save(model, folder / "model")
    saved(timm_dinov3_vit(model), folder / "timm.safetensors")
    with torch.inference_mode():
        tokens = model(by_torchvision(folder / "golden" / "image.png")).last_hidden_state[0]
    write_values(folder / "golden", tokens[0, :5].tolist(), tokens[5, :5].tolist())
    return folder


def by_torchvision(path: Path) -> torch.Tensor:
    steps = [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Resize((224, 224), v2.InterpolationMode.BILINEAR, antialias=True),
        v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
    return v2.Compose(steps)(Image.open(path).convert("RGB"))[None]


def write_values(folder: Path, cls: list[float], patch: list[float], **changes: Any) -> None:
    values = {
        "image": "image.png (made for a test)",
        "tolerance": 1e-4,
        "vits_cls_first5": cls,
        "vits_patch0_first5": patch,
    }
    (folder / "expected_dinov3.json").write_text(json.dumps(values | changes))


def check(place: Path, teacher: dict[str, Any], *options: str) -> Any:
    config = place / "pipe.yaml"
    config.write_text(yaml.safe_dump({"workspace": "w", "data": {"source": "tars"}, "teacher": teacher}))
    return CliRunner().invoke(app, ["teacher", "check", "--config", str(config), *options])


TEACHERS = {"transformers": {"name": "hf:./model"}, "timm": {"name": QKVB, "checkpoint": "timm.safetensors"}}


@pytest.mark.parametrize("library", TEACHERS)
def test_it_passes_on_values_made_from_the_same_weights(place: Path, library: str):
    done = check(place, TEACHERS[library], "--golden", str(place / "golden"), "--json")
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout)
    assert figures["passed"]
    assert max(figures["differences"].values()) < 1e-5
    assert figures["network"] == "DINOv3 ViT-S/16"


def test_it_says_by_how_much_the_values_differ(place: Path, tmp_path: Path):
    stated = json.loads((place / "golden" / "expected_dinov3.json").read_text())
    stated["vits_patch0_first5"][3] += 3e-4
    (tmp_path / "image.png").write_bytes((place / "golden" / "image.png").read_bytes())
    (tmp_path / "expected_dinov3.json").write_text(json.dumps(stated))
    done = check(place, TEACHERS["transformers"], "--golden", str(tmp_path))
    assert done.exit_code == 1
    assert "cls by up to" in done.stderr
    assert "patch0 by up to 0.0003 (tolerance 0.0001), hf:model; so close" in done.stderr
    assert "they differ" in done.stdout
    (tmp_path / "expected_dinov3.json").write_text(json.dumps(stated | {"tolerance": 5e-4}))
    assert check(place, TEACHERS["transformers"], "--golden", str(tmp_path)).exit_code == 0


def test_random_weights_are_not_the_published_ones(place: Path):
    image = str(place / "golden" / "image.png")
    done = check(place, {"name": QKVB, "random_weights": True}, "--image", image)
    assert done.exit_code == 1
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: the features differ from those of DINOv3 ViT-S/16: cls by up to ")
    assert "these are random weights" in error
    other = check(place, TEACHERS["timm"], "--image", image)
    assert other.exit_code == 1
    assert "these are not the published weights" in other.stderr.splitlines()[-1]


def test_it_says_all_that_is_missing_and_where_to_get_it(place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = NETWORKS["vits"].repository
    absent = [
        {"name": f"hf:{repository}"},
        {"name": "hf:./absent"},
        {"name": f"{QKVB}.lvd1689m"},
        {"name": QKVB, "checkpoint": "absent.safetensors"},
    ]
    for teacher in absent:
        done = check(place, teacher)
        assert done.exit_code == 1
        line = done.stderr.splitlines()[-1]
        for part in ("for want of the image: number 39769 of COCO val2017", "of the weights: ", repository, "--image"):
            assert part in line
    gone = check(place, TEACHERS["transformers"], "--image", str(tmp_path / "gone.jpg"))
    assert gone.exit_code == 1
    assert "for want of the image: no file" in gone.stderr
    assert "the weights:" not in gone.stderr


@pytest.mark.parametrize(
    ("teacher", "options", "message"),
    [
        ({"name": "mobilenetv2_050", "random_weights": True}, ["--golden", "golden"], "no values are published"),
        ({"name": "vit_small_patch16_224", "random_weights": True}, ["--golden", "golden"], "no values are published"),
        ({"name": "hf:./model"}, ["--golden", "nowhere"], "cannot read golden values"),
        ({"name": "hf:./model"}, ["--image", "timm.safetensors"], "cannot decode this image"),
        ({"name": "hf:./model"}, ["--image", "golden/image.png", "--golden", "golden"], "exclude each other"),
        ({"name": "vit_base_patch16_dinov3", "random_weights": True}, ["--golden", "golden"], "no values for DINOv3"),
    ],
)  # fmt: skip
def test_what_cannot_be_checked_is_one_line(
    place: Path, teacher: dict[str, Any], options: list[str], message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(place)
    done = check(place, teacher, *options)
    assert done.exit_code == 1
    assert message in done.stderr.splitlines()[-1]


def test_the_picture_is_torchvisions(place: Path, tmp_path: Path):
    path = place / "golden" / "image.png"
    torch.testing.assert_close(picture(path), by_torchvision(path), rtol=0, atol=5e-6)
    Image.open(path).convert("L").save(tmp_path / "grey.jpg")
    torch.testing.assert_close(picture(tmp_path / "grey.jpg"), by_torchvision(tmp_path / "grey.jpg"), rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [(QKVB, "vits"), ("vit_small_patch16_dinov3", "vits"), ("vit_small_plus_patch16_dinov3_qkvb", None)],
)
def test_the_network_is_told_by_its_size(name: str, expected: str | None):
    teacher = load_teacher(name, random_weights=True, image_size=32, scales=[ScaleSpec("last", -1, 1)])
    if expected is None:
        with pytest.raises(PipeError, match="only DINOv3 ViT-S/16 and DINOv3 ViT-B/16"):
            which_network(teacher)
    else:
        assert which_network(teacher) == expected


def test_a_number_that_is_not_finite_never_agrees():
    five = {"cls": (1.0,) * 5, "patch0": (2.0,) * 5}
    assert Comparison("vits", 1e-4, five, five).passed
    broken = five | {"patch0": (2.0, math.nan, 2.0, 2.0, 2.0)}
    assert not Comparison("vits", 1e-4, five, broken).passed
    assert Comparison("vits", 1e-4, five, broken).difference("patch0") == math.inf


@pytest.mark.parametrize(
    "changes",
    [
        {"image": None},
        {"image": ""},
        {"tolerance": "small"},
        {"vits_cls_first5": [1, "x"]},
        {"vits_cls_first5": []},
        {"vitb_cls_first5": [1.0]},
    ],
)
def test_a_file_that_holds_something_else_is_refused(tmp_path: Path, changes: dict[str, Any]):
    write_values(tmp_path, [1.0], [2.0])
    golden = read_golden(tmp_path)
    assert golden.image == tmp_path / "image.png"
    assert golden.values == {"vits": {"cls": (1.0,), "patch0": (2.0,)}}
    write_values(tmp_path, [1.0], [2.0], **changes)
    with pytest.raises(PipeError, match="cannot read golden values"):
        read_golden(tmp_path)


def test_five_numbers_a_token_are_published():
    assert all(len(numbers) == 5 for of in PUBLISHED.values() for numbers in of.values())
    assert published(Path("x.jpg")).tolerance == 1e-4


@pytest.mark.parametrize(
    "change",
    [{"vits_cls_first5": [0.1] * 300}, {"vits_cls_first5": []}, {"vits_patch0_first5": [float("nan")]}]
    + [{"tolerance": value} for value in (float("inf"), float("nan"), -1)],
)
def test_values_that_could_not_decide_anything_are_refused(tmp_path, change):
    stated = {"image": "x.png", "tolerance": 1e-4, "vits_cls_first5": [0.5], "vits_patch0_first5": [0.25]}
    (tmp_path / "expected_dinov3.json").write_text(json.dumps(stated))
    assert read_golden(tmp_path).values["vits"]["cls"] == (0.5,)
    (tmp_path / "expected_dinov3.json").write_text(json.dumps(stated | change))
    with pytest.raises(PipeError, match="cannot read golden values"):
        read_golden(tmp_path)
