"""Further views are audited as the base view is: their files, their boxes, the groups that hold them; and copied."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_sample import GLOBAL_WIDTH, IMAGE, ROWS, SHARD_ROWS, UNDECODABLE_ROWS, VIEWS, Sample

from pipeline.cache import layout
from pipeline.cache.audit import invalidate, verify
from pipeline.cache.copy import copy_cache
from pipeline.cache.info import cache_info, info_lines
from pipeline.cache.reader import open_cache
from pipeline.cache.stats import cache_stats, stats_lines
from pipeline.cache.writer import CacheWriter
from pipeline.errors import PipeError

OK_ROWS = np.setdiff1d(np.arange(ROWS), UNDECODABLE_ROWS)
GEOMETRY = "views/crop1/geometry"


class Sizes:
    """As much of a manifest as an audit asks: the rows' fingerprint and the images' sizes."""

    path = Path("manifest.parquet")

    def __init__(self, fingerprint: str, sizes: np.ndarray) -> None:
        self.sha256, self.sizes = fingerprint, sizes

    def __len__(self) -> int:
        return len(self.sizes)

    def fingerprint(self, rows: int | None = None) -> str:
        return self.sha256

    def column(self, name: str, rows: np.ndarray) -> np.ndarray:
        return np.asarray(self.sizes[rows, ("width", "height").index(name)])


def set_geometry(sample: Sample, store: Path, row: int, geometry: list[float], view: str = "crop1") -> None:
    """Write one row's geometry as a writer would, seal and checksum right: what an older or a wrong program stores."""
    cache = open_cache(store)
    with CacheWriter.create(store, sample.identity, sample.fit) as writer:
        shard = row // SHARD_ROWS
        rows = np.asarray(writer.rows_of(shard))
        slots = np.flatnonzero(cache.state()[rows] == layout.OK)
        arrays = {}
        for array in cache.arrays:
            arrays[array.name] = np.zeros((len(rows), *array.row_shape), array.dtype)
            arrays[array.name][slots] = cache.source.gather(array, rows[slots], True)
        arrays[layout.view_name(view, layout.GEOMETRY)][row - rows[0]] = geometry
        writer.write_shard(shard, arrays, np.array(cache.state()[rows]), cache.counts(shard)[: len(rows)])


@pytest.fixture
def sizes(sample_with_views: Sample) -> Any:
    """The manifest of the sample: every image is as large as `IMAGE`, but for one whose size is not known."""
    found = np.tile(np.array(IMAGE), (ROWS, 1))
    found[5] = 0
    return Sizes(sample_with_views.identity.manifest_fingerprint, found)


# ---- verify ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "scheduler"), [(0, "auto"), (2, "threads"), (2, "processes")])
def test_a_sound_store_with_views_is_sound(
    whole_store_with_views: Path, sizes: Any, workers: int, scheduler: Any
) -> None:
    report = verify(whole_store_with_views, manifest=sizes, workers=workers, scheduler=scheduler)
    assert (report.findings, report.notes, report.manifest) == ([], [], "the same rows")
    arrays = open_cache(whole_store_with_views).arrays
    files = [array.file(whole_store_with_views, shard) for array in arrays for shard in range(3)]
    files += [file for name in ("state", "saturated") for file in (whole_store_with_views / name / "c").rglob("*")]
    assert report.bytes_read == sum(file.stat().st_size for file in files if file.is_file())


@pytest.mark.parametrize(
    "geometry",
    [[0, 0, 20, 15, 0.5], [0.5, 0, 20, 15, 0], [20, 0, 20, 15, 0], [5, 9, 20, 8, 1], [-1, 0, 9, 9, 0], [0, 0, 9, 9, 2]],
)
def test_a_box_that_cannot_be_is_found_though_its_checksum_and_seal_fit(
    store_with_views: Path, sample_with_views: Sample, geometry: list[float]
) -> None:
    set_geometry(sample_with_views, store_with_views, 9, geometry)
    found = verify(store_with_views).findings
    assert [(f.array, f.shard, f.rows) for f in found] == [(GEOMETRY, 1, (9,))]
    assert "not a box" in found[0].what


def test_a_box_beyond_its_image_is_found_where_the_manifest_says_how_large_that_is(
    store_with_views: Path, sample_with_views: Sample, sizes: Any
) -> None:
    width, height = IMAGE
    set_geometry(sample_with_views, store_with_views, 2, [0, 0, width, height, 1])  # all of it
    set_geometry(sample_with_views, store_with_views, 5, [0, 0, 10 * width, height, 1])  # its size is not known
    assert verify(store_with_views, manifest=sizes).findings == []
    set_geometry(sample_with_views, store_with_views, 9, [0, 0, width + 1, height, 0])
    set_geometry(sample_with_views, store_with_views, 19, [0, 1, width, height + 1, 0], "crop2")
    assert verify(store_with_views).findings == []
    found = verify(store_with_views, manifest=sizes, scheduler="threads").findings
    assert [(f.array, f.rows) for f in found] == [(GEOMETRY, (9,)), ("views/crop2/geometry", (19,))]
    assert "beyond their images" in found[0].what
    sizes.sha256 = "of other rows"  # whose images say nothing about these
    assert ["fingerprint" in f.what for f in verify(store_with_views, manifest=sizes).findings] == [True]


def test_exchanged_views_are_found(store_with_views: Path) -> None:
    one, other = (store_with_views / "views" / view / "fine/c/0/0/0" for view in VIEWS)
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)
    assert [f.file for f in verify(store_with_views).damage] == [f"views/{view}/fine/c/0/0/0" for view in VIEWS]


@pytest.mark.parametrize(
    "name", ["views/zarr.json", "views/crop1/zarr.json", "views/crop1/fine/zarr.json", "views/crop2/global/c/1/0"]
)
def test_every_removed_file_of_a_view_is_noticed(store_with_views: Path, name: str) -> None:
    (store_with_views / name).unlink()
    assert name in {finding.file for finding in verify(store_with_views).damage}


@pytest.mark.parametrize(
    "name",
    [
        "views/notes",
        "views/crop3/fine/c/0/0/0",
        "views/crop1/fine/c/0/0/1",
        "views/crop1/x/zarr.json",
        "fine/c/c/0/0/0",
    ],
)
def test_files_that_views_do_not_have_are_named(store_with_views: Path, name: str) -> None:
    (store_with_views / name).parent.mkdir(parents=True, exist_ok=True)
    (store_with_views / name).write_text("{}\n")
    assert [f.file for f in verify(store_with_views).damage if f.kind == "stray"] == [name]


def test_rows_of_views_are_read_though_the_attributes_are_gone(
    store_with_views: Path, flip: Callable[[Path, int, int], None]
) -> None:
    (store_with_views / "zarr.json").unlink()
    flip(store_with_views / "views/crop1/raw/c/1/0/0", 3, 1)
    named = {(f.file, f.rows) for f in verify(store_with_views).damage}
    assert ("views/crop1/raw/c/1/0/0", (8,)) in named
    assert not any(f.kind == "stray" for f in verify(store_with_views).damage)


def test_an_attribute_more_is_no_damage(store_with_views: Path) -> None:
    """What a later writer adds to the group's attributes needs no change here, as long as the digest has it."""
    document = json.loads((store_with_views / "zarr.json").read_text())
    document["attributes"]["roi_cosine"] = {"fine": 0.9}
    (store_with_views / "zarr.json").write_bytes(layout.json_bytes(document))
    files = json.loads((store_with_views / "digest.json").read_text())["files"]
    digest = {"files": files, "sha256": layout.digest_of(store_with_views, files)}
    (store_with_views / "digest.json").write_bytes(layout.json_bytes(digest))
    assert verify(store_with_views).findings == []


def test_a_shard_with_a_damaged_view_is_written_again(
    store_with_views: Path, sample_with_views: Sample, flip: Callable[[Path, int, int], None]
) -> None:
    file = store_with_views / "views/crop1/mid_steps/c/1/0"
    good = file.read_bytes()
    flip(file, 3, 1)
    assert invalidate(store_with_views, verify(store_with_views)) == [1]
    with CacheWriter.create(store_with_views, sample_with_views.identity, sample_with_views.fit) as writer:
        sample_with_views.write(writer)
    assert file.read_bytes() == good
    assert verify(store_with_views).findings == []


# ---- info and stats --------------------------------------------------------------------------------------------------


def test_info_names_the_views_and_their_bytes(whole_store_with_views: Path) -> None:
    info = cache_info(whole_store_with_views)
    base = 9 * 4 + 4 * 4 + 4 * 4 + 4 * 6 * 2 + GLOBAL_WIDTH * 2
    assert info["views"] == list(VIEWS)
    assert info["bytes"]["an_image_by_view"] == {"base": base, "crop1": base + 20, "crop2": base + 20}
    assert info["bytes"]["an_image_all"] == 3 * base + 40
    said = "\n".join(info_lines(info))
    assert f"view       crop1: {base + 20} bytes" in said
    assert "views crop1 crop2" in said  # of the settings


def test_the_stats_of_a_view_are_those_of_its_rows(whole_store_with_views: Path) -> None:
    cache = open_cache(whole_store_with_views)
    found = cache_stats(cache, view="crop2")
    read = cache.read(OK_ROWS, view="crop2")
    y = read["fine"].astype(np.float64).reshape(-1, read["fine"].shape[-1])
    np.testing.assert_allclose(found["scales"]["fine"]["mean"], y.mean(axis=0), rtol=1e-9)
    x0, y0, x1, y1, flip = read["geometry"].T
    expected = {"width_mean": (x1 - x0).mean(), "height_mean": (y1 - y0).mean(), "mirrored": flip.mean()}
    assert found["geometry"] == pytest.approx(expected)
    assert found["view"] == "crop2"
    assert cache_stats(cache)["geometry"] is None
    said = "\n".join(stats_lines(found))
    assert "view crop2; bytes of a row by view: base" in said
    assert "mirrored" in said
    with pytest.raises(PipeError, match="no view 'crop9'"):
        cache_stats(cache, view="crop9")


# ---- copy ------------------------------------------------------------------------------------------------------------


def test_a_copy_keeps_all_views_to_the_byte(whole_store_with_views: Path, tmp_path: Path) -> None:
    copy_cache(whole_store_with_views, tmp_path / "copy.zarr")
    assert contents(tmp_path / "copy.zarr") == contents(whole_store_with_views)


def contents(store: Path) -> dict[str, bytes]:
    files = [file for file in store.rglob("*") if file.is_file() and file.name != layout.LOCK]
    return {str(file.relative_to(store)): file.read_bytes() for file in files}


@pytest.mark.parametrize("kept", [["crop2"], []])
def test_a_copy_of_some_views_is_the_cache_that_an_extraction_of_them_makes(
    whole_store_with_views: Path, sample_with_views: Sample, tmp_path: Path, kept: list[str]
) -> None:
    cache = copy_cache(whole_store_with_views, tmp_path / "copy.zarr", views=kept).cache
    source = open_cache(whole_store_with_views)
    assert cache.views == kept
    assert verify(tmp_path / "copy.zarr").findings == []
    for view in (None, *kept):
        for name, values in cache.read(OK_ROWS, view=view).items():
            np.testing.assert_array_equal(values, source.read(OK_ROWS, view=view)[name])
    settings = {key: value for key, value in source.settings.items() if key != "views"}
    if kept:
        settings["views"] = [view for view in source.settings["views"] if view["name"] in kept]
    resumed = CacheWriter.resume(tmp_path / "copy.zarr", sample_with_views.named(settings=settings))
    assert resumed is not None
    with resumed:
        assert resumed.missing == []
    assert (tmp_path / "copy.zarr" / "views").exists() is bool(kept)


def test_a_view_that_is_not_there_is_not_copied(
    whole_store_with_views: Path, whole_store: Path, tmp_path: Path
) -> None:
    with pytest.raises(PipeError, match=r"no view crop9; the cache has crop1, crop2"):
        copy_cache(whole_store_with_views, tmp_path / "copy.zarr", views=["crop9"])
    with pytest.raises(PipeError, match=r"no view crop1; the cache has no further views"):
        copy_cache(whole_store, tmp_path / "copy.zarr", views=["crop1"])
