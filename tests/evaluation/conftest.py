"""Fixtures of the evaluation tests: a webdataset of colours, embedders and subjects around tiny models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from colour_world import ColourModel, preprocess, tokenizer, write_colours

from pipeline.evaluation.embeddings import Embedder, Encoder
from pipeline.evaluation.records import Provenance
from pipeline.evaluation.suite import Subject


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    return write_colours(tmp_path / "data" / "colours", {"train": 60, "test": 24})


@pytest.fixture
def embedder(tmp_path: Path) -> Callable[..., Embedder]:
    """Make an embedder around a model; the store is shared by all of one test."""

    def make(model: torch.nn.Module | None = None, *, name: str = "fake", digest: str = "d", **options) -> Embedder:
        chosen = ColourModel() if model is None else model
        return Embedder(
            name,
            digest=digest,
            load=lambda: Encoder(chosen, preprocess, tokenizer),
            store=tmp_path / "store",
            device=torch.device("cpu"),
            **{"batch_size": 7, "workers": 3, **options},
        )

    return make


@pytest.fixture
def subject(embedder) -> Callable[..., Subject]:
    def make(model: torch.nn.Module | None = None, *, name: str = "fake", **options) -> Subject:
        made = embedder(model, name=name, **{"digest": name, **options})
        return Subject(made, Provenance(name, "clip", order=0, fusion="none", seed=0, checkpoint_sha256=name))

    return make
