"""A step's batch: images, captions and cache rows of the same rows."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import torch

from pipeline.cache.reader import open_cache
from pipeline.data.manifest import read_manifest
from pipeline.data.samples import SampleError, SampleReader
from pipeline.data.views import Preprocess, View
from pipeline.errors import PipeError
from pipeline.training.data import PairDataset, batches, permuted_rows
from pipeline.training.sampler import Step, caption_choice

PREPROCESS = Preprocess(View(kind="crop", size=32), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def spell(captions: list[str]) -> torch.Tensor:
    """A tokenizer that loses nothing: the bytes of a caption."""
    return torch.tensor([[*text.encode().ljust(64)] for text in captions])


def said(tokens: torch.Tensor) -> list[str]:
    return [bytes(row).decode().rstrip() for row in tokens.tolist()]


class Killed:
    """A dataset whose worker is killed, as the system does where memory runs out."""

    def __getitem__(self, step: Step) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_one_line():
    with pytest.raises(PipeError, match=r"a process that reads batches was killed.*data\.workers.*--resume"):
        next(batches(Killed(), [Step(0, 0, np.arange(2))], workers=1))


def test_captions_are_those_the_epoch_chooses_and_all_come_in_turn(tiny_stage_one):
    manifest = read_manifest(tiny_stage_one / "workspace" / "manifest.parquet")
    dataset = PairDataset(SampleReader(manifest), PREPROCESS, spell, seed=3)
    seen: dict[int, set[str]] = {}
    for epoch in range(2):
        batch = dataset[Step(0, epoch, np.arange(12))]
        for row, caption in zip(batch.rows.tolist(), said(batch.tokens), strict=True):
            assert caption == manifest.captions(row)[caption_choice(3, epoch, row, 2)]
            seen.setdefault(row, set()).add(caption)
    assert all(captions == set(manifest.captions(row)) for row, captions in seen.items())


def test_a_batch_without_rows_has_the_shapes_of_any_other(tiny_stage_one, monkeypatch):
    manifest = read_manifest(tiny_stage_one / "workspace" / "manifest.parquet")
    dataset = PairDataset(SampleReader(manifest), PREPROCESS, spell)
    whole = dataset[Step(0, 0, np.arange(2))]

    def gone(self, row):
        raise SampleError("gone")

    monkeypatch.setattr(SampleReader, "read", gone)
    none = dataset[Step(0, 0, np.arange(2))]
    assert len(none.failed) == 2
    assert none.images.shape == (0, *whole.images.shape[1:])
    assert none.tokens.shape == (0, *whole.tokens.shape[1:])


def test_targets_are_the_rows_own_or_the_permuted_ones(tiny_stage_one):
    cache = open_cache(tiny_stage_one / "workspace" / "teacher.zarr")
    manifest = read_manifest(tiny_stage_one / "workspace" / "manifest.parquet")
    rows = np.array([5, 0, 9])
    own = PairDataset(SampleReader(manifest), PREPROCESS, spell, cache=cache)[Step(0, 0, rows)]
    np.testing.assert_array_equal(own.targets["fine"].numpy(), cache.read_raw(rows)["fine"])
    permuted = permuted_rows(np.arange(20), manifest_rows=len(manifest), seed=1)
    assert (permuted[rows] != rows).any()
    other = PairDataset(SampleReader(manifest), PREPROCESS, spell, cache=cache, target_rows=permuted)[Step(0, 0, rows)]
    np.testing.assert_array_equal(other.targets["fine"].numpy(), cache.read_raw(permuted[rows])["fine"])
    assert torch.equal(other.images, own.images)
