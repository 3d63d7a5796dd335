"""The table of fidelities: its bytes are those on the disk, its features have the traits that it promises."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def fidelity(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("cache_fidelity")


def test_bytes_of_a_row_are_those_of_a_stores_shards(fidelity: ModuleType, tmp_path: Path) -> None:
    stores = importlib.import_module("cache_read")
    cache = stores.build_store(tmp_path / "teacher.zarr", tmp_path / "flat", 512)  # one whole shard
    files = [array.file(cache.path, 0).stat().st_size - 4 for array in cache.arrays]  # without the index's checksum
    assert fidelity.default_bytes(fidelity.Way("int8", 256)) == sum(files) / 512
    halved = fidelity.default_bytes(fidelity.Way("int8", 256), dict.fromkeys(("fine", "mid", "coarse"), 0.5))
    assert sum(files) / 512 - halved == 294 * 256 / 2


def test_steps_come_from_the_maximum_or_the_quantile_of_the_calibration(fidelity: ModuleType) -> None:
    features = np.random.default_rng(0).normal(size=(40, 9, 12)).astype(np.float32)
    on = fidelity.Calibration.of(features)
    flat = np.abs(features.reshape(-1, 12))
    maxima = flat.max(axis=0) / 127
    np.testing.assert_allclose(fidelity.fit(fidelity.Way("int8", None), on).steps, maxima, rtol=1e-6)
    codec = fidelity.fit(fidelity.Way("int8", None, 99.0), on)
    np.testing.assert_allclose(codec.steps, np.quantile(flat, 0.99, axis=0) / 127, rtol=1e-6)
    codec = fidelity.fit(fidelity.Way("int8", None, one_step=True), on)
    np.testing.assert_allclose(codec.steps, np.full(12, maxima.max()), rtol=1e-6)


def test_a_basis_keeps_the_same_share_of_every_width(fidelity: ModuleType) -> None:
    features = np.random.default_rng(0).normal(size=(40, 9, 12)).astype(np.float32) * np.arange(12, 0, -1)
    moment = fidelity.SecondMoment(12)
    moment.update(features)
    codec = fidelity.fit(fidelity.Way("float16", 256), fidelity.Calibration.of(features))
    basis, explained = fidelity.fit_basis(moment, 4)  # 256 of 768 is a third
    np.testing.assert_array_equal(codec.basis, basis)
    assert codec.explained == pytest.approx(explained, rel=1e-6)


def test_more_components_and_finer_steps_lose_less(fidelity: ModuleType) -> None:
    features = fidelity.synthetic(24, 48, {"fine": 4})
    held, fitted = {"fine": features["fine"][:8]}, {"fine": fidelity.Calibration.of(features["fine"][8:])}
    found = {str(way): fidelity.measure(way, fitted, held) for way in fidelity.ways()}
    losses = [found[f"float16, {kept}"]["relative_l2"] for kept in ("all", "PCA 384", "PCA 256", "PCA 128")]
    assert losses == sorted(losses)
    assert losses[0] < 1e-3 < losses[1]
    assert found["int8, all"]["relative_l2"] > found["float16, all"]["relative_l2"]
    assert found["int8, PCA 256, q 99 %"]["saturated"] > found["int8, PCA 256"]["saturated"]
    assert found["int8, all"]["zstd_kilobytes"] != found["int8, all"]["plain_kilobytes"]


def test_synthetic_features_have_a_few_outlier_channels_and_come_from_a_seed(fidelity: ModuleType) -> None:
    features = fidelity.synthetic(32, 48, {"fine": 4}, seed=3)["fine"]
    assert features.shape == (32, 16, 48)
    assert features.dtype == np.float32
    means = np.sort(np.abs(features.reshape(-1, 48).mean(axis=0)))[::-1]
    assert means[3] > 6
    assert means[4] < 3
    assert not np.array_equal(features, fidelity.synthetic(32, 48, {"fine": 4}, seed=4)["fine"])
    np.testing.assert_array_equal(features, fidelity.synthetic(32, 48, {"fine": 4}, seed=3)["fine"])
