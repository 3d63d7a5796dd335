"""Stage one with further views: what is stored of a view is what the teacher sees in it, however the run was cut up."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from tiny_teacher import SCALES, SIZE, write_tar

from pipeline.cache import layout
from pipeline.cache import writer as writer_module
from pipeline.cache.layout import GEOMETRY, GLOBAL
from pipeline.cache.part import Part
from pipeline.cache.reader import open_cache
from pipeline.data import roi
from pipeline.data.geometry import ViewSpec, replay
from pipeline.data.index import build_manifest
from pipeline.data.manifest import Manifest, read_manifest
from pipeline.data.samples import SampleReader
from pipeline.data.views import Preprocess, View, to_tensor
from pipeline.errors import PipeError
from pipeline.teacher.extract import Settings, extract, identify, summary
from pipeline.teacher.feed import Feed
from pipeline.teacher.teacher import Teacher

MakeManifest = Callable[..., Manifest]
VIEWS = (ViewSpec("crop", (0.2, 0.7)), ViewSpec("mirror", (1.0, 1.0), (1.0, 1.0), 1.0))
SETTINGS = Settings(pca=16, batch_size=4, workers=2, shard_rows=10, calibration_rows=16, views=VIEWS)


def store_bytes(path: Path, leave_out: tuple[str, ...] = (".lock",)) -> dict[str, bytes]:
    files = {str(f.relative_to(path)): f for f in sorted(path.rglob("*")) if f.is_file()}
    return {name: f.read_bytes() for name, f in files.items() if not name.startswith(leave_out)}


def live(manifest: Manifest, teacher: Teacher, row: int, geometry: np.ndarray) -> dict[str, np.ndarray]:
    """The teacher's features of the replayed view, image by image."""
    seen = replay(SampleReader(manifest).image(row), geometry, SIZE)
    found = teacher(to_tensor(seen, teacher.mean, teacher.std)[None])
    return {name: values[0].numpy() for name, values in found.items()}


@pytest.mark.parametrize("change", [{}, {"dtype": "int8_token"}, {"dtype": "float16", "pca": None}])
def test_what_is_stored_of_a_view_is_what_the_teacher_sees_in_it(
    change: dict[str, object], make_manifest: MakeManifest, vit: Teacher, tmp_path: Path
):
    manifest = make_manifest(22, broken=(5,))
    cache = extract(manifest, vit, tmp_path / "t.zarr", replace(SETTINGS, **change)).cache  # type: ignore[arg-type]
    rows = [0, 3, 9, 10, 17, 23]
    for spec in VIEWS:
        stored, raw = cache.read(rows, view=spec.name), cache.read_raw(rows, view=spec.name)
        for place, row in enumerate(rows):
            geometry = spec.draw(0, row, 80, 72)
            np.testing.assert_array_equal(stored[GEOMETRY][place], geometry)
            features = live(manifest, vit, row, geometry)
            for scale in SCALES:
                basis, steps = cache.basis(scale.name), cache.steps[scale.name]
                coefficients = features[scale.name] if basis is None else features[scale.name] @ basis
                if f"{scale.name}_steps" in raw:
                    steps = raw[f"{scale.name}_steps"][place][:, None]
                bound = 0.5 * steps + 1e-4 if steps is not None else 2e-3 * np.abs(coefficients) + 1e-3
                inside = np.abs(coefficients) <= (127 * steps if steps is not None else 65504)
                assert inside.mean() > 0.85  # steps are the base view's
                assert (np.abs(stored[scale.name][place] - coefficients) <= bound)[inside].all()
            np.testing.assert_allclose(stored[GLOBAL][place], features[GLOBAL], rtol=1e-3, atol=1e-3)


def test_the_base_view_is_the_same_to_the_byte_with_and_without_further_views(
    make_manifest: MakeManifest, vit: Teacher, tmp_path: Path
):
    manifest = make_manifest(22, broken=(5, 11))
    extract(manifest, vit, tmp_path / "with.zarr", SETTINGS)
    extract(manifest, vit, tmp_path / "without.zarr", replace(SETTINGS, views=()))
    # Metadata and seals name the views; values cut off count those of all views.
    others = (".lock", "views", "seals", "zarr.json", "digest.json", "saturated")
    base, plain = (store_bytes(tmp_path / name, others) for name in ("with.zarr", "without.zarr"))
    assert base == plain
    assert {name.split("/")[0] for name in plain} >= {"fine", "mid", "coarse", "global", "state", "fine_steps"}
    views = [name for name in store_bytes(tmp_path / "with.zarr") if name.startswith("views/")]
    assert (
        len([name for name in views if "/c/" in name]) == 3 * 2 * 5
    )  # shards x views x (three scales, global, geometry)


def test_an_undecodable_image_has_no_chunk_in_any_view(make_manifest: MakeManifest, vit: Teacher, tmp_path: Path):
    manifest = make_manifest(22, broken=(4, 5, 6, 7, 23))  # a whole batch among them
    cache = extract(manifest, vit, tmp_path / "t.zarr", SETTINGS).cache
    assert np.flatnonzero(cache.state() == 2).tolist() == [4, 5, 6, 7, 23]
    for array in cache.arrays:
        size = array.file(cache.path, 0).stat().st_size
        assert size == 6 * (array.row_bytes + 4) + 16 * 10 + 4
    with pytest.raises(PipeError, match="undecodable 1 row"):
        cache.geometry([4], "crop")


def test_limit_parts_and_resumption_keep_the_bytes(make_manifest: MakeManifest, vit: Teacher, tmp_path: Path):
    manifest, out = make_manifest(28, broken=(12,)), tmp_path / "t.zarr"
    extract(manifest, vit, out, SETTINGS, limit=13)
    assert np.flatnonzero(open_cache(out).state()).tolist() == list(range(13))
    for index in (1, 0):
        extract(manifest, vit, out, replace(SETTINGS, workers=1), part=Part(index, 2))
    extract(manifest, vit, tmp_path / "whole.zarr", SETTINGS)
    assert store_bytes(out) == store_bytes(tmp_path / "whole.zarr")


def test_growth_keeps_the_old_rows_of_all_views(make_manifest: MakeManifest, vit: Teacher, tmp_path: Path):
    manifest, out = make_manifest(22), tmp_path / "t.zarr"
    cache = extract(manifest, vit, out, SETTINGS).cache
    rows = np.flatnonzero(cache.state() == 1)
    before = {view: cache.read_raw(rows, view=view) for view in (None, "crop", "mirror")}
    folder = manifest.path.parent
    write_tar(folder / "train" / "2.tar", range(100, 107), first=500)
    build_manifest(str(folder / "train"), manifest.path, val_source=str(folder / "val"), workers=0)
    grown = read_manifest(manifest.path)
    assert extract(grown, vit, out, SETTINGS).rows == len(grown) - len(manifest)
    after = open_cache(out)
    for view, values in before.items():
        for name, found in after.read_raw(rows, view=view).items():
            np.testing.assert_array_equal(found, values[name])
    new = np.arange(len(manifest), len(grown))
    assert after.geometry(new, "crop").tolist() == [VIEWS[0].draw(0, row, 80, 72).tolist() for row in new]


def test_every_array_of_every_view_is_there_before_the_state(
    make_manifest: MakeManifest, vit: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    written: list[str] = []
    publish = writer_module.publish

    def noted(root: Path, file: Path, *parts: object) -> None:
        written.append(str(file.relative_to(root)))
        publish(root, file, *parts)  # type: ignore[arg-type]

    monkeypatch.setattr(writer_module, "publish", noted)
    extract(make_manifest(12), vit, tmp_path / "t.zarr", SETTINGS)
    states = [place for place, name in enumerate(written) if name.startswith("state/")]
    assert len(states) == 2
    arrays = {array.name for array in open_cache(tmp_path / "t.zarr").arrays}
    assert {"views/crop/geometry", "views/mirror/global"} <= arrays
    for start, end in zip([0, states[0] + 1], states, strict=True):
        assert arrays <= {name.split("/c/")[0] for name in written[start:end]}


@pytest.mark.parametrize("file", ["views/crop/geometry/c/1/0", "views/mirror/fine/c/1/0/0", "state/c/1"])
def test_cut_off_between_two_views_it_goes_on_to_the_same_bytes(
    file: str, make_manifest: MakeManifest, vit: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As a kill leaves a store; tests/teacher/test_extract_parts.py kills processes."""
    manifest, out = make_manifest(28), tmp_path / "t.zarr"
    publish = writer_module.publish

    def cut_off(root: Path, target: Path, *parts: object) -> None:
        if str(target).endswith(file):
            raise KeyboardInterrupt
        publish(root, target, *parts)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(writer_module, "publish", cut_off)
        with pytest.raises(KeyboardInterrupt):
            extract(manifest, vit, out, SETTINGS)
    assert (out / "global/c/1/0").exists()  # there, but not promised
    assert np.flatnonzero(open_cache(out).state()).tolist() == list(range(10))
    assert extract(manifest, vit, out, SETTINGS).rows == 20
    extract(manifest, vit, tmp_path / "whole.zarr", SETTINGS)
    assert store_bytes(out) == store_bytes(tmp_path / "whole.zarr")


@pytest.mark.parametrize(
    ("views", "field"),
    [
        ((), r"settings\.views"),
        (VIEWS[:1], r"settings\.views"),
        ((replace(VIEWS[0], area=(0.3, 0.7)), VIEWS[1]), r"settings\.views\[0\]\.area\[0\]"),
        ((replace(VIEWS[0], flip=0.25), VIEWS[1]), r"settings\.views\[0\]\.flip"),
    ],
)
def test_a_cache_of_other_views_is_not_gone_on_with(
    views: tuple[ViewSpec, ...], field: str, make_manifest: MakeManifest, vit: Teacher, tmp_path: Path
):
    manifest, out = make_manifest(22), tmp_path / "t.zarr"
    extract(manifest, vit, out, SETTINGS, limit=4)
    with pytest.raises(PipeError, match=field):
        extract(manifest, vit, out, replace(SETTINGS, views=views))


# ---- reading ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"folder": tmp_path_factory.mktemp("views")}


@pytest.fixture
def store(shared: dict[str, Path], make_manifest: MakeManifest, vit: Teacher) -> Path:
    """Made once, only read."""
    if "store" not in shared:
        settings = replace(SETTINGS, dtype="int8_token")
        shared["store"] = extract(make_manifest(22, broken=(5,)), vit, shared["folder"] / "t.zarr", settings).cache.path
    return shared["store"]


@pytest.mark.parametrize("view", ["crop", "mirror"])
def test_zarr_python_opens_the_groups_of_the_views(store: Path, view: str):
    cache = open_cache(store)
    rows = np.flatnonzero(cache.state() == 1)
    raw = cache.read_raw(rows, view=view)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        group = zarr.open_group(str(store), mode="r")
    assert set(group["views"].group_keys()) == {"crop", "mirror"}
    assert set(group[f"views/{view}"].array_keys()) == set(raw)
    assert {"geometry", "fine", "fine_steps", "global"} <= set(raw)
    for name, values in raw.items():
        array = group[f"views/{view}/{name}"]
        assert array.chunks == (1, *array.shape[1:])
        np.testing.assert_array_equal(array[:][rows], values)
    assert group[f"views/{view}/geometry"].metadata.dimension_names == ("row", "number")


def test_a_view_is_read_in_any_order_from_a_pickle_by_either_access_and_with_checksums(store: Path):
    rows = [19, 0, 8, 0, 23]
    expected = open_cache(store).read(rows, view="crop")
    assert expected["fine"].shape == (5, 16, 16)
    assert expected[GEOMETRY].shape == (5, 5)
    for cache in (
        pickle.loads(pickle.dumps(open_cache(store))),
        open_cache(store, access="read"),
        open_cache(store, verify=True),
    ):
        cache.will_need(rows, view="crop")
        for name, values in cache.read(rows, view="crop").items():
            np.testing.assert_array_equal(values, expected[name])
        np.testing.assert_array_equal(cache.geometry(rows, "crop"), expected[GEOMETRY])
    assert "geometry" not in open_cache(store).read(rows)
    assert not np.array_equal(open_cache(store).read(rows)["fine"], expected["fine"])


def test_an_unknown_view_is_one_line_that_names_those_there_are(store: Path):
    cache = open_cache(store)
    for read in (cache.read, cache.read_raw, cache.will_need):
        with pytest.raises(PipeError, match=r"no view 'croop', .*t\.zarr; it has crop, mirror"):
            read([0], view="croop")
    with pytest.raises(PipeError, match="no view"):
        cache.geometry([0], "base")


def test_damage_to_a_view_is_named(store: Path, tmp_path: Path):
    import shutil

    copy = Path(shutil.copytree(store, tmp_path / "t.zarr"))
    file = copy / "views/mirror/fine/c/0/0/0"
    data = bytearray(file.read_bytes())
    data[3] ^= 1
    file.write_bytes(data)
    cache = open_cache(copy, verify=True)
    cache.read([0], view="crop")
    with pytest.raises(PipeError, match=r"views/mirror/fine"):
        cache.read([0], view="mirror")
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(PipeError, match=r"views/mirror/fine"):
        open_cache(copy).read([0], view="mirror")


def test_rows_a_shard_count_the_bytes_of_all_views(
    make_manifest: MakeManifest, vit: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[int] = []
    auto = layout.auto_shard_rows
    monkeypatch.setattr(layout, "auto_shard_rows", lambda size, rows: (asked.append(size), auto(size, rows))[1])
    cache = extract(make_manifest(10), vit, tmp_path / "t.zarr", replace(SETTINGS, shard_rows=None), limit=1).cache
    assert asked == [sum(array.row_bytes for array in cache.arrays)]
    assert summary(cache)["bytes_per_image"] == asked[0]
    base = sum(array.row_bytes for array in layout.row_arrays(cache.scales, cache.global_width))
    assert asked[0] == 3 * base + 2 * 20


def test_a_cache_made_before_views_reads_as_before(store: Path, make_manifest: MakeManifest, vit: Teacher):
    identity = identify(make_manifest(22), vit, replace(SETTINGS, views=()), "float32")
    assert "views" not in identity.settings  # so that an older cache is still of these settings


# ---- crops of stored maps --------------------------------------------------------------------------------------------


def test_the_calibration_measures_crops_against_the_live_teacher(
    make_manifest: MakeManifest, vit: Teacher, tmp_path: Path
):
    """The same figures by hand: bilinear samples in float64 of what is stored, the teacher on each crop."""
    manifest = make_manifest(28)
    cache = extract(manifest, vit, tmp_path / "t.zarr", replace(SETTINGS, views=())).cache
    reader, view = SampleReader(manifest), View("crop", SIZE)
    preprocess = Preprocess(view, vit.mean, vit.std)
    rows = cache.heldout_rows[:8].tolist()
    assert len(rows) == 8
    sums: dict[str, np.ndarray] = {name: np.zeros(5) for name in ("fine", "mid", "coarse", GLOBAL)}
    for row, stored in zip(rows, _by_row(cache.read(rows)), strict=True):
        for k, box in enumerate(roi.probes(0, row)):
            features = {n: v[0].numpy() for n, v in vit(preprocess(reader.image(row), box=box)[None]).items()}
            for scale in SCALES:
                map_ = stored[scale.name].astype(np.float64).reshape(scale.grid, scale.grid, -1)
                mine, live_ = (
                    _bilinear(map_, box).reshape(scale.tokens, -1),
                    features[scale.name] @ cache.basis(scale.name),
                )
                sums[scale.name][k] += _cosine(mine, live_).mean() / len(rows)
            sums[GLOBAL][k] += _cosine(stored[GLOBAL], features[GLOBAL]) / len(rows)
    for name, values in sums.items():
        found = cache.roi_cosine[name]
        assert list(found) == ["0.2", "0.35", "0.5", "0.75", "1"]  # sorted in the JSON
        np.testing.assert_allclose([found[f"{s:g}"] for s in roi.SHARES], values, atol=2e-4)
    assert cache.roi_cosine["fine"]["1"] > 0.98


def _by_row(values: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    return [{name: x[i] for name, x in values.items()} for i in range(len(values[GLOBAL]))]


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def _bilinear(map_: np.ndarray, box: np.ndarray) -> np.ndarray:
    """(g, g, K): samples at the middles of the box's cells; one dimension after the other."""
    grid, (x0, y0, x1, y1) = len(map_), box.astype(np.float64)
    middles = (np.arange(grid) + 0.5) / grid
    columns, lines = ((a + middles * (b - a)) * grid - 0.5 for a, b in ((x0, x1), (y0, y1)))
    own = np.arange(grid)
    across = np.stack(
        [np.stack([np.interp(columns, own, line[:, k]) for k in range(map_.shape[2])], -1) for line in map_]
    )
    return np.stack(
        [np.stack([np.interp(lines, own, across[:, j, k]) for k in range(map_.shape[2])], -1) for j in range(grid)], 1
    )


def test_crops_are_seen_on_a_few_held_out_rows_only(
    make_manifest: MakeManifest, vit: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pipeline.teacher.calibration.CROPPED_ROWS", (3, 32))
    seen: list[int] = []
    crops = Feed.crops
    monkeypatch.setattr(Feed, "crops", lambda self, row, boxes: (seen.append(row), crops(self, row, boxes))[1])
    cache = extract(make_manifest(28), vit, tmp_path / "t.zarr", SETTINGS).cache
    assert seen == cache.heldout_rows[:3].tolist()
    extract(read_manifest(tmp_path / "from-0" / "manifest.parquet"), vit, cache.path, SETTINGS)
    assert len(seen) == 3  # not again


def test_an_encoder_takes_the_geometry_of_its_own_rows(make_manifest: MakeManifest, vit: Teacher, tmp_path: Path):
    """Undecodable rows shift what is left of a batch: geometry and features have to shift alike."""
    manifest = make_manifest(10, broken=(0, 2))
    cache = extract(manifest, vit, tmp_path / "t.zarr", replace(SETTINGS, dtype="float16", pca=None)).cache
    for row in (1, 3, 4):
        found, geometry = cache.read([row], view="crop"), VIEWS[0].draw(0, row, 80, 72)
        np.testing.assert_array_equal(found[GEOMETRY][0], geometry)
        np.testing.assert_allclose(found[GLOBAL][0], live(manifest, vit, row, geometry)[GLOBAL], atol=2e-3, rtol=1e-3)
