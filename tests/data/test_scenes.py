"""Generated scenes: reproducible, and their labels and captions true of the pixels."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.captions import read_captions
from pipeline.data.index import build_manifest
from pipeline.data.manifest import read_manifest
from pipeline.data.scene_captions import captions
from pipeline.data.scene_files import ATTRIBUTES, PROMPTS, write_probe_set, write_scenes
from pipeline.data.scenes import (
    COLOURS,
    PAPER,
    RADII,
    SHAPES,
    STYLES,
    TEXTURES,
    Dice,
    Scene,
    SceneObject,
    draw,
    make_scene,
    object_map,
    patch_labels,
)

SCENES = [make_scene(11, index) for index in range(150)]
GREY = (178, 181, 186)


def one_object(shape: str = "circle", texture: str = "plain", *, x: float = 0.5, y: float = 0.5) -> Scene:
    thing = SceneObject(shape, "blue", "large", texture, x, y, 0.25, 0.0, COLOURS["blue"])
    return Scene(0, 0, (thing,), "grey", (GREY, GREY))


def well_inside(scene: Scene, number: int, side: int = 64) -> np.ndarray:
    """(side, side) bool: pixels of an object that have nothing but it within two pixels."""
    mine = np.pad(object_map(scene, side) == number, 2)
    shifts = [mine[dy : dy + side, dx : dx + side] for dy in range(5) for dx in range(5)]
    return np.logical_and.reduce(shifts)


# ---- scenes and drawing ----------------------------------------------------------------------------------------------


def test_a_scene_is_the_same_every_time_and_differs_between_seeds_and_indices() -> None:
    assert make_scene(3, 14) == make_scene(3, 14)
    assert len({make_scene(seed, index).objects for seed in range(4) for index in range(25)}) == 100


def test_dice_follow_pythons_guaranteed_sequence() -> None:
    # random.Random(n).random() is documented to be the same in every version; these are its values for n = 1.
    dice = Dice(1)
    assert [dice.between(0, 1) for _ in range(2)] == [0.13436424411240122, 0.8474337369372327]


@pytest.mark.parametrize("key", [-1, 2**32])
def test_dice_refuse_keys_that_would_collide(key: int) -> None:
    with pytest.raises(ValueError, match="not in"):
        Dice(0, key)


def test_another_process_draws_the_same_bytes_whatever_its_hash_seed(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys; from pipeline.data.scene_files import write_scenes;"
        "print(write_scenes(pathlib.Path(sys.argv[1]), 5, 3)[0])"
    )
    run = [sys.executable, "-c", code, str(tmp_path / "there")]
    environment = os.environ | {"PYTHONHASHSEED": "4242"}
    there = subprocess.run(run, capture_output=True, text=True, check=True, env=environment).stdout.strip()
    (here,) = write_scenes(tmp_path / "here", 5, 3)
    assert Path(there).read_bytes() == here.read_bytes()


def test_size_is_a_parameter_and_keeps_the_geometry() -> None:
    small, large = draw(SCENES[0], size=32), draw(SCENES[0], size=128)
    assert (small.size, large.size, small.mode) == ((32, 32), (128, 128), "RGB")
    difference = np.asarray(large.reduce(4), float) - np.asarray(small, float)
    assert np.abs(difference).mean() < 12


@pytest.mark.parametrize("scene", SCENES[:40], ids=lambda s: str(s.index))
def test_plain_objects_have_their_colour_inside(scene: Scene) -> None:
    pixels = np.asarray(draw(scene), float)
    for number, thing in enumerate(scene.objects):
        inside = well_inside(scene, number)
        if thing.texture != "plain" or not inside.any():
            continue
        assert np.abs(pixels[inside] - np.array(thing.rgb)).max() <= 1
        nearest = min(COLOURS, key=lambda name: math.dist(COLOURS[name], pixels[inside].mean(axis=0)))
        assert nearest == thing.colour


@pytest.mark.parametrize("texture", TEXTURES[1:])
def test_textures_show_two_tones_and_plain_shows_one(texture: str) -> None:
    plain, textured = one_object(), one_object(texture=texture)
    inside = well_inside(plain, 0)
    assert np.asarray(draw(plain), float)[inside].std(axis=0).max() == 0
    assert np.asarray(draw(textured), float)[inside].std(axis=0).max() > 25


def test_textures_differ_from_each_other() -> None:
    images = [np.asarray(draw(one_object(texture=texture)), float) for texture in TEXTURES]
    assert min(np.abs(a - b).mean() for i, a in enumerate(images) for b in images[:i]) > 2


def test_shapes_differ_from_each_other() -> None:
    masks = [object_map(one_object(shape), 64) == 0 for shape in SHAPES]
    overlap = [(a & b).sum() / (a | b).sum() for i, a in enumerate(masks) for b in masks[:i]]
    assert max(overlap) < 0.85


def test_a_disc_covers_pi_r_squared_at_its_place() -> None:
    covered = object_map(one_object(x=0.4, y=0.6), 200) == 0
    assert covered.mean() == pytest.approx(math.pi * 0.25**2, rel=0.02)
    assert np.argwhere(covered).mean(axis=0) == pytest.approx((0.6 * 200, 0.4 * 200), abs=1)  # (y, x)


def test_objects_do_not_touch_and_lie_inside_the_image() -> None:
    for scene in SCENES:
        for number, a in enumerate(scene.objects):
            assert a.radius < min(a.x, a.y, 1 - a.x, 1 - a.y)
            assert all(math.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius for b in scene.objects[:number])


def test_the_dominant_object_is_the_largest_and_looks_are_not_repeated() -> None:
    for scene in SCENES:
        assert all(other.radius < scene.dominant.radius for other in scene.objects[1:])
        assert all(low <= thing.radius <= high for thing in scene.objects for low, high in [RADII[thing.size]])
        assert len({(thing.shape, thing.colour) for thing in scene.objects}) == len(scene.objects)


def test_every_attribute_and_count_occurs_and_none_dominates() -> None:
    for attribute, classes in ATTRIBUTES.items():
        seen = Counter(getattr(scene.dominant, attribute) for scene in SCENES)
        assert set(seen) == set(classes)
        assert max(seen.values()) < 0.6 * len(SCENES)
    assert {len(scene.objects) for scene in SCENES} == {1, 2, 3, 4}


def test_the_held_out_style_changes_the_look_but_not_the_scene() -> None:
    for scene in SCENES[:10]:
        plain, sketch = (np.asarray(draw(scene, style=style), float) for style in STYLES)
        assert np.abs(plain - sketch).mean() > 5
        assert (sketch[object_map(scene, 64) < 0] > 180).mean() > 0.95  # paper
        untouched = [n for n, thing in enumerate(scene.objects) if thing.texture == "plain" and thing.size == "large"]
        for number in untouched:
            assert np.median(sketch[well_inside(scene, number)], axis=0) == pytest.approx(PAPER, abs=3)  # an outline


# ---- labels ----------------------------------------------------------------------------------------------------------


def test_patch_labels_follow_the_geometry() -> None:
    labels = patch_labels(one_object("square", x=0.5, y=0.5), 8)
    # The square reaches 0.76 * 0.25 from the centre: columns and rows 0.31 ... 0.69, patches 2.48 ... 5.52 of 8.
    expected = np.full((8, 8), -1)
    expected[2:6, 2:6] = 0
    expected[[2, 2, 5, 5], [2, 5, 2, 5]] = 0 if 0.52**2 >= 0.25 else -1
    assert np.array_equal(labels, expected)


def test_patch_labels_say_background_where_less_than_a_quarter_is_covered() -> None:
    for scene in SCENES[:20]:
        fine = object_map(scene, 128).reshape(8, 16, 8, 16)
        labels = patch_labels(scene, 8)
        for row in range(8):
            for column in range(8):
                covered = Counter(fine[row, :, column].ravel().tolist())
                covered.pop(-1, None)
                best, pixels = max(covered.items(), key=lambda item: (item[1], -item[0]), default=(-1, 0))
                assert labels[row, column] == (best if pixels >= 64 else -1)


def test_labels_are_json_and_name_the_dominant_object() -> None:
    labels = json.loads(json.dumps(SCENES[3].labels()))
    assert labels["count"] == len(labels["objects"]) == len(SCENES[3].objects)
    assert labels["dominant"] == labels["objects"][0]


# ---- files -----------------------------------------------------------------------------------------------------------


def test_tars_are_img2datasets_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    first = write_scenes(tmp_path / "a", 7, 5, tar_size=3)
    again = write_scenes(tmp_path / "b", 7, 5, tar_size=3)
    assert [path.name for path in first] == ["00000.tar", "00001.tar", "00002.tar"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    names, keys = [], []
    for path in first:
        with tarfile.open(path) as tar:
            for member in tar:
                names.append(member.name)
                content = tar.extractfile(member).read()  # type: ignore[union-attr]
                if member.name.endswith(".png"):
                    assert Image.open(io.BytesIO(content)).size == (64, 64)
                elif member.name.endswith(".json"):
                    about = json.loads(content)
                    keys.append(about["key"])
                    assert about["labels"] == json.loads(json.dumps(make_scene(5, int(about["key"])).labels()))
    assert keys == [f"{index:09d}" for index in range(7)]
    assert names == [f"{key}.{suffix}" for key in keys for suffix in ("png", "txt", "json")]


def test_pipe_index_reads_every_caption_of_every_scene(tmp_path: Path) -> None:
    write_scenes(tmp_path / "tars", 6, 5, tar_size=4, style="sketch")
    build_manifest(str(tmp_path / "tars"), tmp_path / "manifest.parquet", workers=1, val_fraction=0.2)
    manifest = read_manifest(tmp_path / "manifest.parquet")
    assert [manifest.captions(row) for row in range(len(manifest))] == [captions(make_scene(5, i)) for i in range(6)]


def test_the_text_file_holds_the_first_caption(tmp_path: Path) -> None:
    (path,) = write_scenes(tmp_path, 1, 9)
    with tarfile.open(path) as tar:
        text, about = (tar.extractfile(name).read() for name in ("000000000.txt", "000000000.json"))  # type: ignore[union-attr]
    assert text.decode() == captions(make_scene(9, 0))[0]
    assert read_captions(text, about).texts == captions(make_scene(9, 0))


@pytest.mark.parametrize("attribute", list(ATTRIBUTES))
def test_probe_sets_are_clip_benchmarks_and_label_the_dominant_object(tmp_path: Path, attribute: str) -> None:
    write_probe_set(tmp_path, attribute, {"train": (5, 21, "plain"), "sketch": (3, 22, "sketch")}, tar_size=2)
    classes = (tmp_path / "classnames.txt").read_text().split()
    assert (tmp_path / "train/nshards.txt").read_text().strip() == "3"
    labels = []
    for shard in range(3):
        with tarfile.open(tmp_path / f"train/{shard}.tar") as tar:
            labels += [int(tar.extractfile(name).read()) for name in tar.getnames() if name.endswith(".cls")]  # type: ignore[union-attr]
    assert [classes[label] for label in labels] == [getattr(make_scene(21, i).dominant, attribute) for i in range(5)]
    templates = (tmp_path / "zeroshot_classification_templates.txt").read_text().splitlines()
    assert templates == list(PROMPTS[attribute])
    assert all("{c}" in template for template in templates)


def test_an_unknown_attribute_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no attribute 'age'"):
        write_probe_set(tmp_path, "age", {})


def test_several_processes_write_the_same_tars(tmp_path: Path) -> None:
    one, two = write_scenes(tmp_path / "a", 4, 5, tar_size=2), write_scenes(tmp_path / "b", 4, 5, tar_size=2, workers=2)
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
