from __future__ import annotations

import copy
import pickle
from typing import Any

import open_clip
import pytest
import torch
from tiny_models import CAPTIONS, RESNET, SIZE, TEXT, TRUNKS, VIT, batch, build, shaken

from pipeline.errors import PipeError
from pipeline.models.trunk import build_trunk as build_typed_trunk


def build_trunk(trunk: Any, image_size: int) -> Any:
    return build_typed_trunk(trunk, image_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", sorted(TRUNKS))
def test_trunk_embeddings_are_those_of_open_clip_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    trunk = shaken(build_trunk(TRUNKS[kind], SIZE)).eval().to(dtype)
    images, tokens = torch.randn(5, 3, SIZE, SIZE, dtype=dtype), trunk.tokenizer(CAPTIONS)
    with torch.no_grad():
        assert torch.equal(trunk.encode_image(images), trunk.clip.encode_image(images, normalize=True))
        reference = trunk.clip.encode_text(tokens, normalize=True)
        assert torch.equal(trunk.encode_text(tokens), reference)
        assert torch.equal(trunk.text_features(tokens)[0], reference)
        assert torch.equal(trunk.encode_text(tokens, normalize=False), trunk.clip.encode_text(tokens))


def test_a_named_trunk_is_the_model_open_clip_makes_of_that_name() -> None:
    trunk = build_trunk("ViT-S-32-alt", 224)
    reference = open_clip.create_model("ViT-S-32-alt", pretrained=None)
    reference.load_state_dict(trunk.clip.state_dict())
    images, tokens = torch.randn(1, 3, 224, 224), open_clip.get_tokenizer("ViT-S-32-alt")(["a dog"])
    assert torch.equal(trunk.tokenizer(["a dog"]), tokens)
    with torch.no_grad():
        trunk.eval()
        reference.eval()
        assert torch.equal(trunk.encode_image(images), reference.encode_image(images, normalize=True))
        assert torch.equal(trunk.encode_text(tokens), reference.encode_text(tokens, normalize=True))


def test_resnet50_by_name_is_open_clips() -> None:
    with torch.device("meta"):  # shapes only: the weights are 400 MB
        trunk = build_trunk("RN50", 224)
        reference = open_clip.create_model("RN50", pretrained=None, device="meta")
    assert {n: p.shape for n, p in trunk.clip.named_parameters()} == {
        n: p.shape for n, p in reference.named_parameters()
    }
    assert (trunk.embed_dim, trunk.text_width, trunk.context_length) == (1024, 512, 77)
    assert trunk.clip.visual.attnpool.num_heads == 32


def test_text_features_are_the_final_layer_and_valid_ends_with_the_end_token() -> None:
    trunk = build(student=False).trunk
    tokens = trunk.tokenizer(CAPTIONS)
    with torch.no_grad():
        t, features, valid = trunk.text_features(tokens)
        end = tokens.argmax(1)
        pooled = features[torch.arange(len(tokens)), end] @ trunk.clip.text_projection
    assert features.shape == (4, 16, 32)
    assert torch.equal(torch.nn.functional.normalize(pooled, dim=-1), t)
    assert torch.equal(valid, tokens != 0)  # the tokenizer pads with zeros, and no word has number 0 here
    assert valid.sum(1).tolist() == (end + 1).tolist()


def test_tokenizer_has_the_trunks_context_truncates_and_travels_to_workers() -> None:
    trunk = build_trunk(RESNET, SIZE)
    tokenizer = pickle.loads(pickle.dumps(trunk.tokenizer))
    tokens = tokenizer(["word " * 50, ""])
    assert tokens.shape == (2, 16)
    assert tokens.dtype == torch.int64
    assert tokens[0, -1] == 49407  # the end token survives truncation
    assert tokens[1, :3].tolist() == [49406, 49407, 0]


def test_scale_starts_at_one_over_temperature_and_never_exceeds_100() -> None:
    trunk = build_trunk(RESNET, SIZE)
    assert trunk.scale().item() == pytest.approx(1 / 0.07)
    with torch.no_grad():
        trunk.logit_scale.fill_(6.0)
    assert trunk.scale().item() == pytest.approx(100.0)


@pytest.mark.parametrize(("sign", "moves"), [(1.0, True), (-1.0, False)])
def test_a_scale_at_the_ceiling_can_come_down_but_not_rise(sign: float, moves: bool) -> None:
    trunk = build_trunk(RESNET, SIZE)
    with torch.no_grad():
        trunk.logit_scale.fill_(6.0)
    (sign * trunk.scale()).backward()
    assert (trunk.logit_scale.grad != 0).item() is moves


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"vision_cfg": {"layers": [1, 1, 1, 1], "width": 6, "head_width": 64, "layer": 1}}, "layer"),
        ({"vision_cfg": {"layers": [1, 1, 1, 1], "width": 9, "head_width": 64}}, "head_width"),
        ({"vision_cfg": {"layers": [1, 1, 1, 1], "width": 16, "head_width": 100}}, "512"),
        ({"vision_cfg": {"layers": 2, "width": 40, "head_width": 64}}, "head_width"),
        ({"vision_cfg": {"layers": 2, "width": 64, "patch_size": 24}}, "use 72"),
        ({"text_cfg": TEXT | {"heads": 3}}, "heads"),
        ({"text_cfg": TEXT | {"vocab_size": 1000}}, "49408"),
        ({"text_cfg": TEXT | {"hf_model_name": "roberta-base"}}, "hub"),
        ({"text_cfg": TEXT | {"pool_type": "eos"}}, "argmax"),
        ({"text_cfg": TEXT | {"context_length": 2}}, "context_length"),
        ({"multimodal_cfg": {}}, "multimodal_cfg"),
        ({"embed_dim": None}, "embed_dim"),
    ],
)
def test_a_trunk_that_cannot_work_is_refused_in_one_line(change: dict, says: str) -> None:
    config = {k: v for k, v in (copy.deepcopy(RESNET) | change).items() if v is not None}
    with pytest.raises(PipeError, match=says) as caught:
        build_trunk(config, SIZE)
    assert "\n" not in str(caught.value)


def test_an_unknown_name_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(PipeError, match="RN50"):
        build_trunk("RN5O", 224)


def test_an_image_size_that_the_resnet_cannot_pool_is_refused_and_112_is_not() -> None:
    with pytest.raises(PipeError, match="use 64"):
        build_trunk(RESNET, 63)
    assert build_trunk(RESNET, 112).encode_image(torch.zeros(2, 3, 112, 112)).shape == (2, 32)


def test_image_size_replaces_the_configs_and_the_callers_mapping_is_left_alone() -> None:
    config = copy.deepcopy(VIT)
    trunk = build_trunk(config, 32)
    assert trunk.encode_image(torch.zeros(1, 3, 32, 32)).shape == (1, 32)
    assert config == VIT


def test_texts_of_another_length_are_refused() -> None:
    model = build(student=False)
    _, tokens = batch(model)
    with pytest.raises(PipeError, match="12 positions and the trunk reads 16"):
        model.encode_text(tokens[:, :12])
