"""Datasets on disk, clean and dirty, and the suite's YAML."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from colour_world import colour_members, jpeg, write_colours, write_tar

from pipeline.errors import PipeError
from pipeline.evaluation import datasets
from pipeline.evaluation.datasets import Absent, open_classification
from pipeline.evaluation.registry import Entry, open_entry, parse_suite
from pipeline.evaluation.zero_shot import TEMPLATES

SUITES = Path(__file__).parents[2] / "configs" / "suites"


@pytest.fixture
def logged(caplog, monkeypatch):
    monkeypatch.setattr("pipeline.console.log.propagate", True)
    return caplog


def test_a_webdataset_gives_its_images_labels_names_and_templates(colours, tmp_path):
    data = open_classification(colours, ["train", "test"], tmp_path)
    assert data.class_names == ("red", "green", "blue")
    assert data.templates == ("a photo of a {c} thing.", "something {c}.")
    assert {name: len(split.labels) for name, split in data.splits.items()} == {"train": 60, "test": 24}
    test = data.splits["test"]
    np.testing.assert_array_equal(test.labels, np.arange(24) % 3)
    for k in range(24):
        mean = np.asarray(test.images.load(k), dtype=float).mean((0, 1))
        assert mean.argmax() == test.labels[k]


def test_image_folders_are_classes_in_sorted_order(tmp_path):
    for k, name in enumerate(("wild_cat", "ant", "bee")):
        for split in ("train", "test"):
            folder = tmp_path / "pets" / split / name
            folder.mkdir(parents=True)
            (folder / "1.jpg").write_bytes(jpeg((50 * k, 10, 10), k))
            (folder / "notes.txt").write_text("not an image")
    data = open_classification(tmp_path / "pets", ["train", "test"], tmp_path / "cache")
    assert data.class_names == ("ant", "bee", "wild cat")
    assert data.templates == TEMPLATES
    np.testing.assert_array_equal(data.splits["test"].labels, [0, 1, 2])


def test_a_class_that_only_one_split_has_keeps_its_number(tmp_path):
    for split, names in (("train", ("a", "b", "c")), ("test", ("a", "c"))):
        for name in names:
            (tmp_path / "d" / split / name).mkdir(parents=True)
            (tmp_path / "d" / split / name / "1.png").write_bytes(jpeg((9, 9, 9), 0))
    data = open_classification(tmp_path / "d", ["train", "test"], tmp_path / "cache")
    np.testing.assert_array_equal(data.splits["test"].labels, [0, 2])


def test_what_is_not_there_is_absent(colours, tmp_path):
    with pytest.raises(Absent, match="no folder nowhere"):
        open_classification(tmp_path / "nowhere", ["test"], tmp_path)
    with pytest.raises(Absent, match="no split val in colours"):
        open_classification(colours, ["val"], tmp_path)


def test_samples_without_usable_label_are_skipped_counted_and_logged(tmp_path, logged):
    root = write_colours(tmp_path / "dirty", {"test": 3})
    members = [*colour_members(6), ("x.jpg", jpeg((1, 1, 1), 0)), ("y.jpg", jpeg((1, 1, 1), 1)), ("y.cls", b"cat")]
    members += [("z.jpg", jpeg((1, 1, 1), 2)), ("z.cls", b"7"), ("lonely.cls", b"1"), ("readme.md", b"hello")]
    write_tar(root / "test" / "0.tar", members)
    data = open_classification(root, ["test"], tmp_path / "cache")
    assert len(data.splits["test"].labels) == 6
    for problem in ("1 skipped (no .cls)", "1 skipped (the .cls is no number)", "1 skipped (class 7 of 3)"):
        assert problem in logged.text


def test_a_cut_tar_gives_what_came_before_the_cut(tmp_path, logged):
    root = write_colours(tmp_path / "cut", {"test": 12})
    path = root / "test" / "0.tar"
    with tarfile.open(path) as tar:
        at = tar.getmember("s0007.jpg").offset_data + 100
    path.write_bytes(path.read_bytes()[:at])
    data = open_classification(root, ["test"], tmp_path / "cache")
    np.testing.assert_array_equal(data.splits["test"].labels, np.arange(7) % 3)
    assert "ends early" in logged.text


def test_tars_that_nshards_promises_and_that_are_missing_are_named(tmp_path, logged):
    root = write_colours(tmp_path / "part", {"test": 6})
    (root / "test" / "nshards.txt").write_text("3")
    write_tar(root / "test" / "2.tar", colour_members(3))
    assert len(open_classification(root, ["test"], tmp_path / "cache").splits["test"].labels) == 9
    assert "not there: 1" in logged.text


def test_tars_are_read_in_numerical_order(tmp_path):
    root = write_colours(tmp_path / "many", {"test": 1})
    for k in (2, 10):
        write_tar(root / "test" / f"{k}.tar", [("a.jpg", jpeg((9, 9, 9), k)), ("a.cls", b"%d" % (k % 3))])
    data = open_classification(root, ["test"], tmp_path / "cache")
    np.testing.assert_array_equal(data.splits["test"].labels, [0, 2, 1])


def test_the_index_is_kept_and_follows_a_changed_file(tmp_path, monkeypatch):
    root = write_colours(tmp_path / "kept", {"test": 6})
    first = open_classification(root, ["test"], tmp_path / "cache").digest

    def never(*_):
        raise AssertionError("indexed again")

    with monkeypatch.context() as patch:
        patch.setattr(datasets, "_walk_tars", never)
        assert open_classification(root, ["test"], tmp_path / "cache").digest == first
    write_tar(root / "test" / "0.tar", colour_members(9))
    assert open_classification(root, ["test"], tmp_path / "cache").digest != first


def test_two_datasets_that_look_alike_have_an_index_each(tmp_path):
    """Equal relative paths, sizes and times of change: archives with a fixed time, or padded to one size."""
    labels = {}
    for name, flip in (("a", False), ("b", True)):
        root = write_colours(tmp_path / name, {"test": 6})
        members = [(n, b"0" if flip and n.endswith("cls") else d) for n, d in colour_members(6)]
        write_tar(root / "test" / "0.tar", members)
        os.utime(root / "test" / "0.tar", ns=(10**18, 10**18))
        data = open_classification(root, ["test"], tmp_path / "cache")
        labels[name] = data.splits["test"].labels.tolist()
    assert len(set(labels["a"])) > 1
    assert labels["b"] == [0] * 6


def write_folders(root: Path, **classes: int) -> Path:
    for name, count in classes.items():
        (root / "test" / name).mkdir(parents=True)
        for k in range(count):
            (root / "test" / name / f"{k}.jpg").write_bytes(jpeg((20 * k, 9, 9), k))
    return root


def test_hidden_and_empty_folders_are_no_classes(tmp_path):
    root = write_folders(tmp_path / "f", ant=2, bird=1, empty=0)
    (root / "test" / ".ipynb_checkpoints").mkdir()
    (root / "test" / ".ipynb_checkpoints" / "x.jpg").write_bytes(jpeg((1, 2, 3), 0))
    data = open_classification(root, ["test"], tmp_path / "cache")
    assert data.class_names == ("ant", "bird")
    assert data.splits["test"].labels.tolist() == [0, 0, 1]


def test_class_names_find_their_folders_by_name(tmp_path):
    root = write_folders(tmp_path / "f", ant=2, water_bird=1)
    (root / "classnames.txt").write_text("Water bird\nant")
    data = open_classification(root, ["test"], tmp_path / "cache")
    assert data.class_names == ("Water bird", "ant")
    assert data.splits["test"].labels.tolist() == [1, 1, 0]


def test_class_names_of_other_words_go_by_position(tmp_path):
    root = write_folders(tmp_path / "f", n01=2, n02=1)
    (root / "classnames.txt").write_text("zebra\nant")
    data = open_classification(root, ["test"], tmp_path / "cache")
    assert data.splits["test"].labels.tolist() == [0, 0, 1]


@pytest.mark.parametrize("names", ["bird\nwasp", "ant", "ant\nbird\ncow"])
def test_class_names_that_do_not_fit_the_folders_are_refused(tmp_path, names):
    root = write_folders(tmp_path / "f", ant=2, bird=1)
    (root / "classnames.txt").write_text(names)
    with pytest.raises(PipeError, match="class names do not fit 2 class folders"):
        open_classification(root, ["test"], tmp_path / "cache")


def test_the_digest_covers_labels_names_and_templates(tmp_path):
    digests = set()
    for change in ("", "names", "templates", "labels"):
        root = write_colours(tmp_path / f"d{change}", {"test": 6})
        if change == "names":
            (root / "classnames.txt").write_text("crimson\ngreen\nblue")
        if change == "templates":
            (root / "zeroshot_classification_templates.txt").write_text("{c}")
        if change == "labels":
            members = [(n, b"0" if n.endswith("cls") else d) for n, d in colour_members(6)]
            write_tar(root / "test" / "0.tar", members)
        digests.add(open_classification(root, ["test"], tmp_path / "cache").digest)
    assert len(digests) == 4


def test_a_template_without_a_place_for_the_class_is_refused(colours, tmp_path):
    (colours / "zeroshot_classification_templates.txt").write_text("a photo of a {}.")
    with pytest.raises(PipeError, match="a template without"):
        open_classification(colours, ["test"], tmp_path)


def test_a_folder_without_one_labelled_image_is_an_error(tmp_path):
    root = write_colours(tmp_path / "empty", {"test": 3})
    write_tar(root / "test" / "0.tar", [("a.txt", b"no image")])
    with pytest.raises(PipeError, match="not one labelled image"):
        open_classification(root, ["test"], tmp_path / "cache")


@pytest.mark.parametrize("name", ["full", "real"])
def test_shipped_suites_parse_and_say_how_to_obtain_each(name):
    entries = parse_suite(yaml.safe_load((SUITES / f"{name}.yaml").read_text()), name)
    assert len(entries) >= 5
    assert all(entry.obtain for entry in entries)
    assert {entry.kind for entry in entries} == {"retrieval", "zero_shot", "probe"}


def test_all_problems_of_a_suite_come_at_once_with_the_nearest_key():
    rows = [
        {"name": "a", "kind": "probe", "path": "a", "tain": "x"},
        {"name": "b", "kind": "prob", "path": "b"},
        {"name": "c", "kind": "zero_shot", "path": "c", "domains": ["x", "y"]},
    ]
    with pytest.raises(PipeError) as caught:
        parse_suite({"entries": rows}, "mine.yaml")
    text = str(caught.value)
    assert "unknown key tain (did you mean train?)" in text
    assert "entry b: kind" in text
    assert "domains are for kind probe" in text


def test_the_same_entry_twice_is_refused():
    row = {"name": "a", "kind": "probe", "path": "a"}
    with pytest.raises(PipeError, match="two entries are a probe"):
        parse_suite({"entries": [row, row]}, "mine.yaml")


def test_an_absent_retrieval_set_is_absent(tmp_path):
    with pytest.raises(Absent, match="no coco/test"):
        open_entry(Entry(name="coco", kind="retrieval", path="coco/test"), tmp_path, tmp_path, 1)
