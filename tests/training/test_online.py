"""The teacher in the loop says what the cache holds, to the bit on one CPU; a cache that says otherwise is noticed."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from pipeline.cache.layout import GLOBAL
from pipeline.cache.reader import open_cache
from pipeline.config import load_config
from pipeline.console import log
from pipeline.data.manifest import read_manifest
from pipeline.data.roi import BOXES, RoiSpec
from pipeline.data.samples import SampleError, SampleReader
from pipeline.data.views import Preprocess, View
from pipeline.errors import PipeError
from pipeline.training.data import TEACHER_PIXELS, PairDataset
from pipeline.training.online import Difference, OnlineTeacher, compare, judge
from pipeline.training.sampler import Step
from stages.extract_teacher import load

PREPROCESS = Preprocess(View(kind="crop", size=32), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
ROWS = np.array([31, 2, 17, 40, 8, 9, 23])  # in no order, and no multiple of what a forward on a CPU takes


def spell(captions: list[str]) -> torch.Tensor:
    return torch.zeros(len(captions), 4, dtype=torch.int64)


@pytest.fixture(scope="module")
def stored(tiny_stage_one):
    return open_cache(tiny_stage_one / "workspace" / "teacher.zarr")


@pytest.fixture(scope="module")
def teacher(tiny_stage_one):
    return load(load_config(tiny_stage_one / "pipe.yaml"))


@pytest.fixture
def samples(tiny_stage_one):
    return SampleReader(read_manifest(tiny_stage_one / "workspace" / "manifest.parquet"))


def online_of(teacher, cache):
    return OnlineTeacher(teacher, cache, torch.device("cpu"), batch_size=8)


@pytest.mark.parametrize("roi", [None, RoiSpec((0.3, 0.6), (0.75, 1.3))], ids=["whole", "crops"])
def test_targets_are_those_of_the_cache_to_the_bit(stored, teacher, samples, roi):
    online = online_of(teacher, stored)
    live = PairDataset(samples, PREPROCESS, spell, teacher_view=online.view, roi=roi)
    cached = PairDataset(samples, PREPROCESS, spell, cache=stored, roi=roi)
    a, b = online(live[Step(0, 3, ROWS)]), cached[Step(0, 3, ROWS)]
    assert torch.equal(a.images, b.images)
    assert (BOXES in b.targets) == (roi is not None)
    assert set(a.targets) == set(b.targets)
    for name, values in b.targets.items():
        assert a.targets[name].dtype == values.dtype
        assert torch.equal(a.targets[name], values), name
    assert (b.targets["fine"] != b.targets["fine"][0]).any()  # images differ


def test_a_batch_without_images_has_the_shapes_of_any_other(stored, teacher, samples, monkeypatch):
    online = online_of(teacher, stored)
    dataset = PairDataset(samples, PREPROCESS, spell, teacher_view=online.view)

    def gone(self, row):
        raise SampleError("gone")

    whole = online(dataset[Step(0, 0, ROWS)]).targets
    monkeypatch.setattr(SampleReader, "read", gone)
    none = online(dataset[Step(0, 0, ROWS)]).targets
    assert {name: (x.dtype, x.shape) for name, x in none.items()} == {
        name: (x.dtype, (0, *x.shape[1:])) for name, x in whole.items()
    }


def test_pixels_are_the_base_views_and_cross_as_bytes(stored, teacher, samples):
    dataset = PairDataset(samples, PREPROCESS, spell, teacher_view=View("crop", 32))
    pixels = dataset[Step(0, 0, ROWS)].targets[TEACHER_PIXELS]
    assert pixels.dtype == torch.uint8
    want = np.stack([np.asarray(View("crop", 32)(samples.image(row))) for row in ROWS.tolist()])
    np.testing.assert_array_equal(pixels.numpy(), want)


def test_another_teacher_than_the_caches_is_refused(tiny_stage_one, stored):
    other = load(load_config(tiny_stage_one / "pipe.yaml"), seed=5)
    with pytest.raises(PipeError, match=r"does not match: .*weights_sha256"):
        online_of(other, stored)


def test_a_whole_cache_agrees_and_one_of_other_images_is_refused(stored, teacher, samples, monkeypatch):
    online = online_of(teacher, stored)
    found = online.difference(stored, samples, ROWS)
    assert (found.rows, found.most, found.mean) == (7, 0, 0)
    assert found.worst == pytest.approx(1, abs=1e-6)
    image = SampleReader.image
    monkeypatch.setattr(SampleReader, "image", lambda self, row: image(self, (row + 1) % 48).rotate(90))
    other = online.difference(stored, samples, ROWS)
    assert other.most > 1
    with pytest.raises(PipeError, match="the cached targets are not the teacher's: at most"):
        judge(Difference(7, 9, 1.0, 0.98, 0.9), "teacher.zarr")


def test_what_is_not_there_or_not_readable_is_not_compared(stored, teacher, samples, monkeypatch):
    online = online_of(teacher, stored)
    state = stored.state().copy()
    state[ROWS[1:]] = 0
    monkeypatch.setattr(type(stored), "state", lambda self: state)
    assert online.difference(stored, samples, np.append(ROWS, stored.rows + 3)).rows == 1
    state[ROWS] = 2
    assert online.difference(stored, samples, ROWS) is None


def test_differences_are_counted_in_steps_and_cosines_of_coefficients():
    steps = {"fine": np.array([1.0, 100.0], np.float32)}
    stored = {"fine": torch.tensor([[[3, 0], [0, 5]]], dtype=torch.int8), GLOBAL: torch.ones(1, 2).half()}
    online = {"fine": torch.tensor([[[3, 4], [0, 5]]], dtype=torch.int8), GLOBAL: torch.ones(1, 2).half() * 2}
    found = compare(online, stored, steps)
    assert (found.rows, found.most, found.mean) == (1, 4, 1.0)
    assert found.worst == pytest.approx(3 / np.hypot(3, 400), rel=1e-5)
    assert found.cosine == pytest.approx((1 + 3 / np.hypot(3, 400)) / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("found", "level", "words"),
    [
        (Difference(7, 1, 0.01, 0.9999, 0.9995), logging.INFO, "7 cached rows agree"),
        (Difference(7, 2, 0.01, 0.9999, 0.9995), logging.WARNING, "7 cached rows differ"),
        (Difference(7, 0, 0.0, 0.9999, 0.99), logging.WARNING, "7 cached rows differ"),
        (None, logging.INFO, "was not checked"),
    ],
)
def test_the_check_is_said_once_by_the_process_that_logs(found, level, words):
    said: list[tuple[int, str]] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append((record.levelno, record.getMessage()))  # type: ignore[method-assign]
    log.addHandler(handler)
    before, _ = log.level, log.setLevel(logging.INFO)
    try:
        judge(found, "teacher.zarr")
        judge(found, "teacher.zarr", show=False)
    finally:
        log.removeHandler(handler)
        log.setLevel(before)
    assert [(of, words in text) for of, text in said] == [(level, True)]
