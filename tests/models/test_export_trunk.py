"""The trunk as an open_clip checkpoint: what open_clip then computes is what our trunk computes, pixel and bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from tiny_models import CAPTIONS, SIZE, TEXT, TRUNKS, batch, build, shaken, with_gamma

from pipeline.data.views import Preprocess, View
from pipeline.models.dinorankclip import DinoRankCLIP
from pipeline.models.export_trunk import export_trunk, open_clip_config

TIMM: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"timm_model_name": "test_resnet", "timm_model_pretrained": True, "timm_proj": "linear"},
    "text_cfg": TEXT,
}
OTHER: dict[str, Any] = TRUNKS["vit"] | {"quick_gelu": True, "init_logit_scale": 1.5}
TOKENS: dict[str, Any] = {"output_tokens": True}  # open_clip would give pairs; the trunk is built without
PAIRS = TRUNKS["vit"] | {"vision_cfg": TRUNKS["vit"]["vision_cfg"] | TOKENS, "text_cfg": TEXT | TOKENS}
ALL = TRUNKS | {"timm": TIMM, "quick": OTHER, "tokens": PAIRS}


def preprocess_of(model: Any, kind: Any = "crop") -> Preprocess:
    return Preprocess(View(kind, SIZE), model.trunk.mean, model.trunk.std)


@pytest.mark.parametrize("trunk", sorted(ALL))
def test_open_clip_computes_what_our_trunk_computes(trunk: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = shaken(DinoRankCLIP(trunk=ALL[trunk], image_size=SIZE).eval())
    export_trunk(model, preprocess_of(model), tmp_path)
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    theirs.eval()
    images, tokens = batch(model)
    assert torch.equal(open_clip.get_tokenizer(f"local-dir:{tmp_path}")(CAPTIONS), tokens)
    with torch.no_grad():
        assert torch.equal(theirs.encode_image(images, normalize=True), model.trunk.encode_image(images))
        assert torch.equal(theirs.encode_text(tokens, normalize=True), model.trunk.encode_text(tokens))
    assert torch.equal(theirs.logit_scale, model.trunk.logit_scale)


def test_of_a_model_with_an_injection_the_trunk_is_its_trunk_node(tmp_path: Path) -> None:
    model = with_gamma(shaken(build()), 0.4)
    export_trunk(model, preprocess_of(model), tmp_path)
    theirs = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    images, tokens = batch(model)
    with torch.no_grad():
        image, text = model.nodes(images, tokens)["trunk"]
        assert torch.equal(theirs.encode_image(images, normalize=True), image)
        assert torch.equal(theirs.encode_text(tokens, normalize=True), text)
        assert not torch.allclose(image, model.encode_image(images), atol=1e-3)


@pytest.mark.parametrize("kind", ["crop", "squash"])
@pytest.mark.parametrize("size", [(100, 75), (60, 131), (64, 64), (40, 30)])
def test_its_transform_gives_the_pixels_of_our_view(kind: Any, size: tuple[int, int], tmp_path: Path) -> None:
    model = build("vit", student=False)
    ours = preprocess_of(model, kind)
    export_trunk(model, ours, tmp_path)
    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    pixels = np.random.default_rng(size[0]).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    assert torch.equal(transform(image), ours(image))
    assert torch.equal(transform(image.convert("L")), ours(image.convert("L")))


def test_half_precision_is_storage(tmp_path: Path) -> None:
    model = shaken(build(student=False))
    path = export_trunk(model, preprocess_of(model), tmp_path, "bfloat16")
    theirs = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    images, _ = batch(model)
    with torch.no_grad():
        cosine = (theirs.encode_image(images, normalize=True) * model.trunk.encode_image(images)).sum(-1)
    assert cosine.min() > 0.999
    assert path.stat().st_size < 0.6 * sum(4 * p.numel() for p in model.parameters())


def test_a_named_trunk_is_written_out_with_the_size_it_was_trained_at() -> None:
    config = open_clip_config("RN50", Preprocess(View("squash", 160), (0.1, 0.2, 0.3), (0.5, 0.5, 0.5)))
    assert config["model_cfg"] == open_clip.get_model_config("RN50") | {
        "vision_cfg": open_clip.get_model_config("RN50")["vision_cfg"] | {"image_size": 160}
    }
    assert config["preprocess_cfg"]["resize_mode"] == "squash"
    assert config["preprocess_cfg"]["mean"] == [0.1, 0.2, 0.3]
    json.dumps(config)
