"""Fixtures of the captioning tests: folders of tiny captioners, and a manifest of 48 pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_captioners import MAKERS

from pipeline.data.index import build_manifest
from pipeline.data.manifest import Manifest, read_manifest


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """For every test here."""


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kind → a captioner's folder. Read only: copy it."""
    place = tmp_path_factory.mktemp("captioners")
    return {kind: make(place / kind) for kind, make in MAKERS.items()}


@pytest.fixture
def manifest(tiny_tars: Path, tmp_path: Path) -> Manifest:
    build_manifest(str(tiny_tars), tmp_path / "manifest.parquet", workers=0)
    return read_manifest(tmp_path / "manifest.parquet")
