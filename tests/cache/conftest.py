"""Fixtures of the cache's tests: a finished cache to look at, and copies of it to damage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cache_sample import VIEWS, Sample, make_sample


@pytest.fixture(scope="session")
def sample() -> Sample:
    return make_sample()


@pytest.fixture(scope="session")
def whole_store(sample: Sample, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cache; only for tests that do not touch its files."""
    return sample.build(tmp_path_factory.mktemp("cache") / "teacher.zarr")


@pytest.fixture(scope="session")
def sample_with_views() -> Sample:
    return make_sample(views=VIEWS)


@pytest.fixture(scope="session")
def whole_store_with_views(sample_with_views: Sample, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cache with two further views; only for tests that do not touch its files."""
    return sample_with_views.build(tmp_path_factory.mktemp("cache") / "teacher.zarr")


@pytest.fixture
def store_with_views(whole_store_with_views: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(whole_store_with_views, tmp_path / "views.zarr"))


@pytest.fixture
def store(whole_store: Path, tmp_path: Path) -> Path:
    """A copy of the finished cache that a test may damage."""
    return Path(shutil.copytree(whole_store, tmp_path / "teacher.zarr"))


@pytest.fixture
def flip() -> Callable[[Path, int, int], None]:
    """Flip one bit of a file: flip(file, byte, bit)."""

    def flip_bit(file: Path, byte: int, bit: int = 0) -> None:
        data = bytearray(file.read_bytes())
        data[byte] ^= 1 << bit
        file.write_bytes(data)

    return flip_bit
