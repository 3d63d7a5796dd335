"""The demo's teacher: it learns, it is saved as timm's own network, and its labels lie where the objects lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from pipeline.cache.layout import ScaleSpec
from pipeline.data.scene_files import ATTRIBUTES
from pipeline.data.scenes import draw, make_scene, patch_labels
from pipeline.errors import PipeError
from pipeline.teacher.scene_teacher import (
    CLASSES,
    Heads,
    Recipe,
    card_path,
    fit,
    labelled_scenes,
    new_network,
    objective,
    score,
    tokens_of,
    train_scene_teacher,
)
from pipeline.teacher.teacher import load_teacher

NAME = "vit_small_patch16_dinov3_qkvb"
ARGS: dict[str, Any] = {
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "init_values": 0.5,
    "num_classes": 0,
}
TINY = Recipe(steps=20, batch_size=8, lr=4e-3, warmup_steps=3, scenes=24, held_out=10, seed=9000)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    weights = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    return weights, train_scene_teacher(weights, name=NAME, model_args=ARGS, image_size=64, recipe=TINY)


def test_the_loss_falls_within_twenty_steps() -> None:
    model = new_network(NAME, ARGS, 64, 0)
    data = labelled_scenes(16, seed=1, size=64, grid=8, model=model)
    _, losses = fit(model, data, TINY)
    assert len(losses) == 20
    assert np.mean(losses[-4:]) < 0.8 * losses[0]


def test_it_loads_strictly_as_a_teacher(trained: tuple[Path, dict[str, Any]]) -> None:
    weights, _ = trained
    scales = [ScaleSpec("fine", -1, 8), ScaleSpec("mid", 0, 4)]
    teacher = load_teacher(NAME, model_args=ARGS, checkpoint=weights, image_size=64, scales=scales)
    features = teacher(torch.zeros(2, 3, 64, 64))
    assert {key: tuple(value.shape) for key, value in features.items()} == {
        "fine": (2, 64, 32),
        "mid": (2, 16, 32),
        "global": (2, 32),
    }


def test_the_file_holds_exactly_the_networks_keys(trained: tuple[Path, dict[str, Any]]) -> None:
    network = timm.create_model(NAME, img_size=64, **ARGS)
    assert load_file(trained[0]).keys() == network.state_dict().keys()


def test_the_teacher_sees_what_was_trained(trained: tuple[Path, dict[str, Any]]) -> None:
    """The tokens that the labels taught are those that extraction stores: same norm, no prefix, same pixels."""
    weights, _ = trained
    teacher = load_teacher(NAME, model_args=ARGS, checkpoint=weights, image_size=64, scales=[ScaleSpec("fine", -1, 8)])
    model = new_network(NAME, ARGS, 64, 0)
    model.load_state_dict(load_file(weights))
    data = labelled_scenes(3, seed=5, size=64, grid=8, model=model)
    pixels = np.stack([np.asarray(draw(make_scene(5, index))) for index in range(3)])
    images = teacher.normalise(torch.from_numpy(pixels))
    torch.testing.assert_close(images, data.images)
    with torch.no_grad():
        cls, tokens = tokens_of(model.eval(), data.images)
    features = teacher(images)
    torch.testing.assert_close(features["fine"], tokens, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(features["global"], cls, atol=1e-5, rtol=1e-5)


def test_the_card_says_what_it_is(trained: tuple[Path, dict[str, Any]]) -> None:
    weights, card = trained
    assert json.loads(card_path(weights).read_text()) == json.loads(json.dumps(card))
    assert "not DINOv3" in card["what"]
    assert card["recipe"]["steps"] == 20
    assert set(ATTRIBUTES) <= set(card["held_out"])
    assert card["parameters"] == sum(value.numel() for value in load_file(weights).values())


def test_training_is_reproducible() -> None:
    weights = []
    for _ in range(2):
        model = new_network(NAME, ARGS, 64, 3)
        fit(model, labelled_scenes(8, seed=1, size=64, grid=8, model=model), Recipe(steps=2, batch_size=4, scenes=8))
        weights.append(torch.cat([value.flatten() for value in model.state_dict().values()]))
    assert torch.equal(*weights)


def test_patch_labels_name_the_object_on_the_patch() -> None:
    model = new_network(NAME, ARGS, 64, 0)
    data = labelled_scenes(6, seed=2, size=64, grid=8, model=model)
    assert data.patches.shape == (6, 64, 3)
    for index in range(6):
        scene = make_scene(2, index)
        for patch, number in enumerate(patch_labels(scene, 8).ravel().tolist()):
            named = [
                classes[label] if label < len(classes) else None
                for label, classes in zip(data.patches[index, patch].tolist(), ATTRIBUTES.values(), strict=True)
            ]
            thing = None if number < 0 else scene.objects[number]
            assert named == [None if thing is None else getattr(thing, attribute) for attribute in ATTRIBUTES]


def test_presence_lists_the_attributes_that_occur() -> None:
    model = new_network(NAME, ARGS, 64, 0)
    data = labelled_scenes(6, seed=2, size=64, grid=8, model=model)
    names = [name for classes in ATTRIBUTES.values() for name in classes]
    assert len(names) == CLASSES
    for index in range(6):
        expected = {getattr(thing, attribute) for thing in make_scene(2, index).objects for attribute in ATTRIBUTES}
        assert {name for name, on in zip(names, data.present[index].tolist(), strict=True) if on} == expected


def test_the_loss_equals_its_formula() -> None:
    """Against plain loops in float64."""
    model = new_network(NAME, ARGS, 64, 0).eval()
    torch.manual_seed(0)
    heads = Heads(32)
    data = labelled_scenes(2, seed=4, size=64, grid=8, model=model)
    with torch.no_grad():
        found = objective(model, heads, data, Recipe(background_weight=0.15, place_weight=3.0))
        cls, tokens = tokens_of(model, data.images)
        share = torch.sigmoid(heads.scene(cls).double())
        expected = -(data.present * share.log() + (1 - data.present) * (1 - share).log()).mean()
        for a, (attribute, classes) in enumerate(ATTRIBUTES.items()):
            log_p = heads.patch[attribute](tokens).double().log_softmax(-1).flatten(0, 1)
            truth = data.patches[..., a].flatten().tolist()
            weights = [0.15 if label == len(classes) else 1.0 for label in truth]
            costs = [-w * float(log_p[k, label]) for k, (label, w) in enumerate(zip(truth, weights, strict=True))]
            expected = expected + (2 if attribute == "shape" else 1) * sum(costs) / sum(weights)
        off = (heads.place(tokens) - data.places)[data.patches[..., 0] < 8].double().abs()
        expected = expected + 3 * torch.where(off < 1, off**2 / 2, off - 0.5).mean()
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_places_point_from_the_objects_centre_to_the_patch() -> None:
    model = new_network(NAME, ARGS, 64, 0)
    data = labelled_scenes(6, seed=2, size=64, grid=8, model=model)
    for index in range(6):
        scene = make_scene(2, index)
        for patch, number in enumerate(patch_labels(scene, 8).ravel().tolist()):
            x, y, radius = data.places[index, patch].tolist()
            if number < 0:
                assert (x, y, radius) == (0, 0, 0)
                continue
            thing = scene.objects[number]
            assert radius / 8 == pytest.approx(thing.radius, abs=1e-5)
            assert (patch % 8 + 0.5 - x) / 8 == pytest.approx(thing.x, abs=1e-5)
            assert (patch // 8 + 0.5 - y) / 8 == pytest.approx(thing.y, abs=1e-5)


def test_a_mirrored_batch_is_the_mirrored_scene_with_its_labels() -> None:
    model = new_network(NAME, ARGS, 64, 0)
    data = labelled_scenes(3, seed=2, size=64, grid=8, model=model)
    batch = data.batch(torch.tensor([2, 0]), mirrored=True)
    for k, row in enumerate((2, 0)):
        for y, x in ((1, 0), (4, 5), (7, 7)):
            here, there = y * 8 + x, y * 8 + 7 - x
            pixels = data.images[row, :, y * 8 : y * 8 + 8, x * 8 : x * 8 + 8]
            assert torch.equal(batch.images[k, :, y * 8 : y * 8 + 8, 56 - x * 8 : 64 - x * 8], pixels.flip(2))
            assert torch.equal(batch.patches[k, there], data.patches[row, here])
            assert torch.equal(batch.places[k, there], data.places[row, here] * torch.tensor([-1.0, 1.0, 1.0]))
    assert torch.equal(data.batch(torch.tensor([1]), mirrored=False).images[0], data.images[1])


def test_the_score_counts_object_patches_only() -> None:
    model = new_network(NAME, ARGS, 64, 0)
    data = labelled_scenes(10, seed=4, size=64, grid=8, model=model)
    heads = Heads(32)
    with torch.no_grad():  # heads that always say class 2
        for parameter in heads.patch.parameters():
            parameter.zero_()
            if parameter.ndim == 1:  # a bias
                parameter[2], parameter[-1] = 1, 5  # "background" is no answer where there is an object
    found = score(model, heads, data)
    for a, (attribute, classes) in enumerate(ATTRIBUTES.items()):
        truth = data.patches[..., a].flatten()
        truth = truth[truth < len(classes)]
        assert found[attribute]["accuracy"] == pytest.approx(float((truth == 2).float().mean()), abs=1e-4)
    assert found["patches"] == len(truth)


def test_a_network_without_cls_is_refused() -> None:
    with pytest.raises(PipeError, match="no CLS token"):
        new_network(NAME, ARGS | {"class_token": False, "num_reg_tokens": 0}, 64, 0)
