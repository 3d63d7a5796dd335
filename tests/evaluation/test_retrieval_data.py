"""From tars and manifests to unique images, unique captions and their pairs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from colour_world import COLOURS, ColourModel, jpeg, write_tar

from pipeline.data.index import build_manifest
from pipeline.data.manifest import read_manifest
from pipeline.errors import PipeError
from pipeline.evaluation import registry
from pipeline.evaluation.datasets import Absent
from pipeline.evaluation.registry import Entry, open_entry, retrieval_of, subset
from pipeline.evaluation.suite import run_suite

ENTRY = Entry(name="pairs", kind="retrieval", path="pairs/test")


def sample(key: str, image: bytes, captions: list[str]) -> list[tuple[str, bytes]]:
    return [
        (f"{key}.jpg", image),
        (f"{key}.txt", captions[0].encode()),
        (f"{key}.json", json.dumps({"key": key, "captions": captions}).encode()),
    ]


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Six images with one to three captions; the last is a copy of the first, with a caption of its own."""
    members = []
    for k in range(6):
        colour = list(COLOURS.values())[k % 3]
        members += sample(f"{k:03d}", jpeg(colour, k), [f"image {k} view {c}" for c in range(1 + k % 3)])
    members += sample("006", jpeg(COLOURS["red"], 0), ["image 0 again", "image 0 view 0"])
    write_tar(tmp_path / "data" / "pairs" / "test" / "00000.tar", members)
    return tmp_path / "data"


def test_every_caption_stays_with_its_image_and_copies_are_merged(tars, tmp_path):
    data = open_entry(ENTRY, tars, tmp_path / "cache", 1)
    assert len(data.images) == 6
    owners: dict[int, set[str]] = {}
    for image, text in zip(data.pair_image, data.pair_text, strict=True):
        owners.setdefault(int(image), set()).add(data.texts[text])
    assert owners[0] == {"image 0 view 0", "image 0 again"}
    assert owners[5] == {"image 5 view 0", "image 5 view 1", "image 5 view 2"}
    assert len(data.texts) == len(set(data.texts)) == 13
    assert data.images.load(1).size == (16, 16)


def test_the_tars_are_indexed_once_and_again_when_they_change(tars, tmp_path, monkeypatch):
    calls = []

    def counting(*args, **kwargs):
        calls.append(args)
        return build_manifest(*args, **kwargs)

    monkeypatch.setattr(registry, "build_manifest", counting)
    first = open_entry(ENTRY, tars, tmp_path / "cache", 1).digest
    assert open_entry(ENTRY, tars, tmp_path / "cache", 1).digest == first
    assert len(calls) == 1
    write_tar(tars / "pairs" / "test" / "00001.tar", sample("x", jpeg((1, 2, 3), 7), ["another"]))
    assert open_entry(ENTRY, tars, tmp_path / "cache", 1).digest != first
    assert len(calls) == 2


@pytest.mark.parametrize("path", ["pairs/*/*.tar", "pairs/test/{00000..00000}.tar"])
def test_a_glob_or_range_follows_its_files_too(tars, tmp_path, path):
    entry = ENTRY.model_copy(update={"path": path})
    first = open_entry(entry, tars, tmp_path / "cache", 1)
    assert len(first.images) == 6
    write_tar(tars / "pairs" / "test" / "00000.tar", sample("x", jpeg((1, 2, 3), 7), ["another"]))
    assert open_entry(entry, tars, tmp_path / "cache", 1).texts == ("another",)


def test_a_glob_that_matches_nothing_is_absent(tars, tmp_path):
    with pytest.raises(Absent, match=r"nothing matches pairs/x\*.tar"):
        open_entry(ENTRY.model_copy(update={"path": "pairs/x*.tar"}), tars, tmp_path, 1)


def test_the_digest_does_not_depend_on_where_the_tars_lie(tars, tmp_path):
    moved = tmp_path / "elsewhere"
    here = open_entry(ENTRY, tars, tmp_path / "cache", 1).digest
    tars.rename(moved)
    assert open_entry(ENTRY, moved, tmp_path / "cache2", 1).digest == here


def test_a_folder_without_a_usable_pair_is_a_gap(tmp_path, subject):
    write_tar(tmp_path / "data" / "pairs" / "test" / "0.tar", [("a.jpg", b"broken"), ("a.txt", b"text")])
    results = run_suite([ENTRY], tmp_path / "data", [subject()], cache=tmp_path, workers=1, code_version="v")
    assert results.records == []
    assert len(results.gaps) == 1
    assert results.gaps[0].startswith("pairs (retrieval): ")


def test_only_the_asked_part_of_a_manifest_is_used(tars, tmp_path):
    write_tar(tmp_path / "val" / "0.tar", sample("v", jpeg((9, 200, 9), 50), ["held out"]))
    build_manifest(str(tars / "pairs" / "test"), tmp_path / "m.parquet", val_source=str(tmp_path / "val"), workers=1)
    manifest = read_manifest(tmp_path / "m.parquet")
    held_out = retrieval_of(manifest, "val", "val")
    assert held_out.texts == ("held out",)
    red, green, blue = np.asarray(held_out.images.load(0), dtype=float).mean((0, 1))
    assert green > 150 > max(red, blue)  # its own picture, not the manifest's first
    assert "held out" not in retrieval_of(manifest, "train", "train").texts
    assert "held out" in retrieval_of(manifest, None, "all").texts


def test_a_manifest_without_pairs_of_that_part_is_an_error(tars, tmp_path):
    build_manifest(str(tars / "pairs" / "test"), tmp_path / "m.parquet", workers=1)
    manifest = read_manifest(tmp_path / "m.parquet")
    manifest.rows = lambda part: manifest.column("row")[:0]  # type: ignore[method-assign]
    with pytest.raises(PipeError, match="no usable pair"):
        retrieval_of(manifest, "val", "val")


def test_pairs_are_renumbered_when_images_are_dropped(tars, tmp_path):
    data = open_entry(ENTRY, tars, tmp_path / "cache", 1)
    pair_image, pair_text, used = subset(data, np.array([False, True, True, False, True, True]))
    found = [(int(image), data.texts[used[text]]) for image, text in zip(pair_image, pair_text, strict=True)]
    expected = [(row, f"image {k} view {c}") for row, k in enumerate([1, 2, 4, 5]) for c in range(1 + k % 3)]
    assert sorted(found) == expected
    assert len(used) == len(expected)


def test_a_whole_retrieval_benchmark_runs_from_tars(tars, tmp_path, subject):
    model = ColourModel()
    results = run_suite([ENTRY], tars, [subject(model)], cache=tmp_path / "c", workers=1, code_version="v")
    found = {r.metric: r for r in results.records if r.run == "fake"}
    assert found["retrieval/i2t_recall@1"].n == 6
    assert found["retrieval/t2i_median_rank"].value >= 1
    assert results.gaps == []
