"""Image and target of a batch are of one view: the teacher itself, run on the batch's images, says so."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.cache.reader import Cache, open_cache
from pipeline.config import load_config
from pipeline.data.geometry import ViewSpec
from pipeline.data.manifest import Manifest, read_manifest
from pipeline.data.roi import BOXES, RoiSpec
from pipeline.data.samples import SampleReader
from pipeline.data.views import Preprocess, View
from pipeline.teacher.extract import Settings, extract
from pipeline.teacher.teacher import Teacher
from pipeline.training.data import Batch, PairDataset, batches, permuted_rows
from pipeline.training.sampler import BatchPlan, Step
from pipeline.training.validation import validation_steps
from stages.extract_teacher import load

VIEWS = (ViewSpec("near", (0.2, 0.5)), ViewSpec("far", (0.5, 0.9)))
SETTINGS = Settings(pca=None, dtype="float16", calibration_rows=24, batch_size=8, shard_rows=16, workers=1, views=VIEWS)


def spell(captions: list[str]) -> torch.Tensor:
    return torch.tensor([[*text.encode().ljust(64)] for text in captions])


@pytest.fixture(scope="module")
def stage_one(
    tiny_stage_one: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Manifest, Teacher, Cache]]:
    """The tiny pictures, a teacher whose every parameter is random, a cache of all channels and two further views."""
    manifest = read_manifest(tiny_stage_one / "workspace" / "manifest.parquet")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    teacher = load(load_config(tiny_stage_one / "pipe.yaml"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    out = tmp_path_factory.mktemp("views") / "teacher.zarr"
    yield manifest, teacher, extract(manifest, teacher, out, SETTINGS).cache
    torch.set_num_threads(threads)


def dataset(stage_one: tuple[Manifest, Teacher, Cache], **changes: object) -> PairDataset:
    """Images as the teacher takes them."""
    manifest, teacher, cache = stage_one
    prepare = Preprocess(View("crop", 32), teacher.mean, teacher.std)
    arguments = {"cache": cache, "views": VIEWS, "seed": 3} | changes
    return PairDataset(SampleReader(manifest), prepare, spell, **arguments)  # type: ignore[arg-type]


def agrees(batch: Batch, teacher: Teacher) -> np.ndarray:
    """(B,) bool: whether each image's target is what the teacher sees in that very image, on every scale."""
    assert batch.targets is not None
    live, same = teacher(batch.images), torch.ones(len(batch.rows), dtype=torch.bool)
    for name, values in live.items():
        off = (batch.targets[name].float() - values).flatten(1).norm(dim=1) / values.flatten(1).norm(dim=1)
        same &= off < 5e-3
    return same.numpy()


def all_agree(data: PairDataset, teacher: Teacher) -> bool:
    """Of 24 rows over three epochs, in which each row comes in each of its three views."""
    return all(agrees(data[Step(epoch, epoch, np.arange(24))], teacher).all() for epoch in range(3))


def test_image_and_target_are_always_of_the_same_view(stage_one: tuple[Manifest, Teacher, Cache]) -> None:
    assert all_agree(dataset(stage_one), stage_one[1])


def swapped(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Geometry of the other view."""
    geometry = cache.geometry
    other = {"near": "far", "far": "near"}
    monkeypatch.setattr(cache, "geometry", lambda rows, view: geometry(rows, other[view]))


def base_targets(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets of the base view, whatever the image shows."""
    raw = cache.read_raw
    monkeypatch.setattr(cache, "read_raw", lambda rows, view=None: raw(rows))


def base_images(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of the base view, whatever the target is of."""
    monkeypatch.setattr(PairDataset, "_geometry", lambda *_: None)


def unflipped(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = cache.geometry
    keep = np.array([1, 1, 1, 1, 0], np.float32)
    monkeypatch.setattr(cache, "geometry", lambda rows, view: geometry(rows, view) * keep)


def neighbours(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next row's box."""
    geometry = cache.geometry
    monkeypatch.setattr(cache, "geometry", lambda rows, view: geometry([row + 1 for row in rows], view))


def shuffled_within_a_view(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = cache.read_raw
    monkeypatch.setattr(cache, "read_raw", lambda rows, view=None: raw(rows[::-1], view=view))


@pytest.mark.parametrize(
    "mistake",
    [swapped, base_targets, base_images, unflipped, neighbours, shuffled_within_a_view],
    ids=lambda m: m.__name__,
)
def test_the_test_above_would_notice(
    mistake, stage_one: tuple[Manifest, Teacher, Cache], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, teacher, cache = stage_one
    own = open_cache(cache.path)  # mistakes must not outlive their test
    mistake(own, monkeypatch)
    assert not all_agree(dataset((manifest, teacher, own)), teacher)


def test_a_batch_mixes_views_and_epochs_change_them(stage_one: tuple[Manifest, Teacher, Cache]) -> None:
    data, cache, rows = dataset(stage_one), stage_one[2], np.arange(24)
    views: dict[int, set[str | None]] = {row: set() for row in rows.tolist()}
    stored = {name: cache.read_raw(rows, view=name)["fine"] for name in (None, "near", "far")}
    for epoch in range(3):
        found = data[Step(0, epoch, rows)].targets["fine"].numpy()  # type: ignore[index]
        of = {name: (found == values).all((1, 2)) for name, values in stored.items()}
        assert all(1 <= same.sum() < 24 for same in of.values())  # all three in one batch
        for row in rows.tolist():
            (view,) = [name for name, same in of.items() if same[row]]
            views[row].add(view)
    assert all(seen == {None, "near", "far"} for seen in views.values())


def test_without_a_cache_the_very_same_crops_are_seen(stage_one: tuple[Manifest, Teacher, Cache]) -> None:
    with_cache, without = dataset(stage_one), dataset(stage_one, cache=None)
    for epoch in range(3):
        step = Step(0, epoch, np.arange(24))
        assert torch.equal(with_cache[step].images, without[step].images)
        assert without[step].targets is None
    other_seed = dataset(stage_one, cache=None, view_seed=1)
    assert not torch.equal(other_seed[Step(0, 0, np.arange(24))].images, without[Step(0, 0, np.arange(24))].images)


def test_validation_takes_the_base_view_always(stage_one: tuple[Manifest, Teacher, Cache]) -> None:
    cache, rows = stage_one[2], np.arange(16)
    (step,) = validation_steps(rows, batch_size=16)
    plain = dataset(stage_one, views=())[Step(0, 0, rows)]
    for changes in ({}, {"views": (), "roi": RoiSpec()}):
        batch = dataset(stage_one, **changes)[step]
        assert torch.equal(batch.images, plain.images)
        np.testing.assert_array_equal(batch.targets["fine"].numpy(), cache.read_raw(rows)["fine"])  # type: ignore[index]
        assert BOXES not in batch.targets  # type: ignore[operator]


def test_a_config_without_views_trains_on_the_base_view_of_a_cache_with_them(
    stage_one: tuple[Manifest, Teacher, Cache],
) -> None:
    batch = dataset(stage_one, views=())[Step(0, 5, np.arange(24))]
    assert agrees(batch, stage_one[1]).all()
    np.testing.assert_array_equal(batch.targets["mid"].numpy(), stage_one[2].read_raw(np.arange(24))["mid"])  # type: ignore[index]


def test_permuted_targets_are_another_rows_of_the_same_view(stage_one: tuple[Manifest, Teacher, Cache]) -> None:
    """The control changes whose targets they are, and nothing about the images."""
    manifest, _, cache = stage_one
    permuted = permuted_rows(np.arange(24), manifest_rows=len(manifest), seed=1)
    own, other = dataset(stage_one), dataset(stage_one, target_rows=permuted)
    step = Step(0, 1, np.arange(24))
    assert torch.equal(own[step].images, other[step].images)
    found = other[step].targets["fine"].numpy()  # type: ignore[index]
    for row in range(24):
        view = own._view_of(1, row)
        expected = cache.read_raw([permuted[row]], view=None if view is None else view.name)["fine"][0]
        np.testing.assert_array_equal(found[row], expected)


@pytest.mark.parametrize("bad", [0, 3])
def test_rows_that_cannot_be_read_leave_the_others_their_own_views(
    bad: int, stage_one: tuple[Manifest, Teacher, Cache], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.data.samples import SampleError

    read = SampleReader.read

    def spoilt(self: SampleReader, row: int) -> object:
        if row % 5 == bad:
            raise SampleError("spoilt")
        return read(self, row)

    monkeypatch.setattr(SampleReader, "read", spoilt)
    for changes in ({}, {"views": (), "roi": RoiSpec()}):
        batch = dataset(stage_one, **changes)[Step(0, 1, np.arange(24))]
        assert [row for row, _ in batch.failed] == [row for row in range(24) if row % 5 == bad]
        if not changes:
            assert agrees(batch, stage_one[1]).all()
        else:
            expected = np.stack([RoiSpec().draw(3, 1, row) for row in batch.rows.tolist()])
            np.testing.assert_array_equal(batch.targets[BOXES].numpy(), expected)  # type: ignore[index]


def test_workers_give_the_same_batches(stage_one: tuple[Manifest, Teacher, Cache]) -> None:
    plan = BatchPlan(np.arange(40), 8, 10, 0, "shards", 16, 2)
    for changes in ({}, {"views": (), "roi": RoiSpec()}):
        alone = list(batches(dataset(stage_one, **changes), plan.steps(), workers=0))
        several = list(batches(pickle.loads(pickle.dumps(dataset(stage_one, **changes))), plan.steps(), workers=2))
        for a, b in zip(alone, several, strict=True):
            assert torch.equal(a.images, b.images)
            assert a.targets is not None
            assert all(torch.equal(a.targets[name], b.targets[name]) for name in a.targets)  # type: ignore[index]


@pytest.mark.parametrize("shuffle", ["full", "shards"])
def test_what_is_read_ahead_is_of_the_view_that_comes(
    shuffle, stage_one: tuple[Manifest, Teacher, Cache], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, teacher, cache = stage_one
    own = open_cache(cache.path)
    asked: set[tuple[int, str | None]] = set()
    late: list[int] = []
    will_need, read_raw = own.will_need, own.read_raw
    calls: dict[str, int] = {"asked": 0, "read": 0}

    def noted(rows: np.ndarray, view: str | None = None) -> None:
        asked.update((row, view) for row in rows.tolist())
        calls["asked"] += len(rows)
        will_need(rows, view=view)

    def read(rows: np.ndarray, view: str | None = None) -> dict[str, np.ndarray]:
        late.extend(row for row in rows.tolist() if (row, view) not in asked)
        calls["read"] += len(rows)
        return read_raw(rows, view=view)

    monkeypatch.setattr(own, "will_need", noted)
    monkeypatch.setattr(own, "read_raw", read)
    plan = BatchPlan(np.arange(48), 8, 30, 0, shuffle, 16, 1)
    data = dataset((manifest, teacher, own))
    for step in plan.steps():
        data[step]
    assert len(late) <= 8 * (8 if shuffle == "full" else 2)  # the run's beginning
    assert calls["asked"] <= calls["read"]  # one view of a row each time, not all three


# ---- crops of the base view ------------------------------------------------------------------------------------------


def test_a_roi_batch_carries_boxes_the_base_views_targets_and_images_cut_by_them(
    stage_one: tuple[Manifest, Teacher, Cache],
) -> None:
    manifest, teacher, cache = stage_one
    rows, spec = np.array([7, 2, 30]), RoiSpec((0.3, 0.6))
    batch = dataset(stage_one, views=(), roi=spec)[Step(0, 4, rows)]
    boxes = np.stack([spec.draw(3, 4, row) for row in rows.tolist()])
    assert batch.targets is not None
    assert batch.targets[BOXES].dtype == torch.float32
    np.testing.assert_array_equal(batch.targets[BOXES].numpy(), boxes)
    for name, values in cache.read_raw(rows).items():
        np.testing.assert_array_equal(batch.targets[name].numpy(), values)
    prepare, reader = Preprocess(View("crop", 32), teacher.mean, teacher.std), SampleReader(manifest)
    expected = torch.stack([prepare(reader.image(row), box=box) for row, box in zip(rows.tolist(), boxes, strict=True)])
    assert torch.equal(batch.images, expected)
    moved = batch.to(torch.device("cpu"))
    assert torch.equal(moved.targets[BOXES], batch.targets[BOXES])  # type: ignore[index]
    without = dataset(stage_one, views=(), roi=spec, cache=None)[Step(0, 4, rows)]
    assert torch.equal(without.images, batch.images)
    assert without.targets is None
    assert not torch.equal(dataset(stage_one, views=(), roi=spec)[Step(0, 5, rows)].images, batch.images)
