"""The figures of `stats` and `info` against float64 over all rows at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_sample import ROWS, SPECS, Sample

from pipeline.cache import layout
from pipeline.cache.info import cache_info, info_lines
from pipeline.cache.moments import effective_rank
from pipeline.cache.reader import Cache, open_cache
from pipeline.cache.stats import cache_stats, stats_lines
from pipeline.cache.writer import CacheWriter
from pipeline.errors import PipeError


def brute_force(cache: Cache, rows: np.ndarray) -> dict[str, dict[str, Any]]:
    """Everything in float64, all rows in memory, pair by pair."""
    read, raw, found = cache.read(rows), cache.read_raw(rows), {}
    for scale in cache.scales:
        y = read[scale.name].astype(np.float64)
        flat = y.reshape(-1, scale.components)
        norms = np.linalg.norm(flat, axis=1)
        cosines = [
            x[s] @ x[t] / (np.linalg.norm(x[s]) * np.linalg.norm(x[t]))
            for x in y
            for s in range(scale.tokens)
            for t in range(scale.tokens)
            if s != t
        ]
        singular = np.linalg.svd(flat, compute_uv=False) ** 2
        centred = np.linalg.svd(flat - flat.mean(axis=0), compute_uv=False) ** 2
        found[scale.name] = {
            "tokens": len(flat),
            "norm_mean": norms.mean(),
            "norm_std": norms.std(),
            "mean_norm": np.linalg.norm(flat.mean(axis=0)),
            "mean": flat.mean(axis=0),
            "std": flat.std(axis=0),
            "energy": (flat**2).sum(axis=0) / (flat**2).sum(),
            "effective_rank": np.exp(-sum(p * np.log(p) for p in singular / singular.sum())),
            "effective_rank_centred": np.exp(-sum(p * np.log(p) for p in centred / centred.sum())),
            "token_cosine_mean": np.mean(cosines),
            "token_cosine_std": np.std(cosines),
        }
        if scale.dtype != "float16":
            q = raw[scale.name].reshape(-1, scale.components).astype(int)
            found[scale.name]["at_limit"] = (np.abs(q) == 127).mean()
            levels = []
            for column in q.T:
                p = np.unique(column, return_counts=True)[1] / len(column)
                levels.append(np.exp(-(p * np.log(p)).sum()))
            found[scale.name]["levels"] = {"mean": np.mean(levels), "least": min(levels), "most": max(levels)}
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_the_figures_are_those_of_all_rows_at_once(whole_store: Path, workers: int) -> None:
    cache = open_cache(whole_store)
    there = np.flatnonzero(cache.state() == layout.OK)
    stats = cache_stats(cache, workers=workers)
    assert (stats["rows"], stats["of"]) == (ROWS - 2, ROWS - 2)
    for name, expected in brute_force(cache, there).items():
        for key, value in expected.items():
            if key == "levels":
                assert stats["scales"][name][key] == pytest.approx(value, rel=1e-9)
            else:
                np.testing.assert_allclose(stats["scales"][name][key], value, rtol=1e-7, atol=1e-12, err_msg=key)
    assert stats["scales"]["raw"]["at_limit"] is None
    assert stats["scales"]["fine"]["cut_off"] == cache.saturated["fine"]


def test_the_vectors_of_images_are_measured(whole_store: Path) -> None:
    cache = open_cache(whole_store)
    g = cache.read(np.flatnonzero(cache.state() == layout.OK))["global"].astype(np.float64)
    unit = g / np.linalg.norm(g, axis=1, keepdims=True)
    between = [unit[i] @ unit[j] for i in range(len(g)) for j in range(len(g)) if i != j]
    found = cache_stats(cache)["global"]
    assert found["norm_mean"] == pytest.approx(np.linalg.norm(g, axis=1).mean(), rel=1e-9)
    assert found["norm_std"] == pytest.approx(np.linalg.norm(g, axis=1).std(), rel=1e-6)
    assert found["image_cosine_mean"] == pytest.approx(np.mean(between), rel=1e-9)


def test_figures_do_not_depend_on_cores_or_blocks(whole_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = cache_stats(open_cache(whole_store), workers=0)
    assert cache_stats(open_cache(whole_store), workers=2) == expected
    monkeypatch.setattr("pipeline.cache.stats.BLOCK_BYTES", 1)  # row by row
    other = cache_stats(open_cache(whole_store))
    np.testing.assert_allclose(other["scales"]["fine"]["std"], expected["scales"]["fine"]["std"], rtol=1e-9)


def test_a_sample_is_drawn_by_seed_from_rows_that_are_there(whole_store: Path) -> None:
    cache = open_cache(whole_store)
    stats = cache_stats(cache, rows=5, seed=3)
    there = np.flatnonzero(cache.state() == layout.OK)
    rows = np.sort(np.random.default_rng(3).choice(there, 5, replace=False))
    assert (stats["rows"], stats["of"], stats["seed"]) == (5, ROWS - 2, 3)
    expected = brute_force(cache, rows)["mid"]
    np.testing.assert_allclose(stats["scales"]["mid"]["energy"], expected["energy"], rtol=1e-7)
    assert stats["scales"]["mid"]["cut_off"] is None  # is known of whole shards only
    assert cache_stats(cache, rows=10**9)["rows"] == ROWS - 2


def test_the_effective_rank_is_the_number_of_equal_directions() -> None:
    assert effective_rank(np.diag([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3)
    assert effective_rank(np.diag([1.0, 0.0])) == pytest.approx(1)


def test_cumulative_energy_ends_at_one(whole_store: Path) -> None:
    found = cache_stats(open_cache(whole_store))["scales"]["raw"]  # 6 components
    assert list(found["cumulative"]) == ["1", "6"]
    assert found["cumulative"]["1"] == found["energy"][0]
    assert found["cumulative"]["6"] == pytest.approx(1)


def test_damage_is_not_measured(store: Path) -> None:
    data = bytearray((store / "raw" / "c" / "1" / "0" / "0").read_bytes())
    data[3] ^= 64
    (store / "raw" / "c" / "1" / "0" / "0").write_bytes(data)
    with pytest.raises(PipeError, match=r"1 row \(8\)"):
        cache_stats(open_cache(store), workers=0)


def test_stats_and_info_are_json_and_text(whole_store: Path, sample: Sample, tmp_path: Path) -> None:
    cache = open_cache(whole_store)
    stats = json.loads(json.dumps(cache_stats(cache), allow_nan=False))
    assert any(line.startswith("fine") for line in stats_lines(stats))
    info = json.loads(json.dumps(cache_info(whole_store), allow_nan=False))
    assert any(cache.digest in line for line in info_lines(info))
    with (
        CacheWriter.create(tmp_path / "t", sample.identity, sample.fit),
        pytest.raises(PipeError, match="no row of this cache has features"),
    ):
        cache_stats(open_cache(tmp_path / "t"))


# ---- info ------------------------------------------------------------------------------------------------------------


def test_info_says_how_big_and_how_complete(store: Path, sample: Sample) -> None:
    info = cache_info(store)
    assert info["rows"] == {"all": ROWS, "ok": ROWS - 2, "undecodable": 2, "absent": 0}
    assert info["shards"] == {"all": 3, "rows_each": 8, "done": 3, "in_part": 0, "unfinished": 0, "absent": 0}
    files = [file for file in store.rglob("*") if file.is_file()]
    assert info["bytes"]["files"] == len(files)
    assert info["bytes"]["on_disk"] == sum(file.stat().st_size for file in files)
    expected = {"fine": 9 * 4, "mid": 4 * 4, "mid_steps": 4 * 4, "raw": 4 * 6 * 2, "global": 5 * 2}
    assert info["bytes"]["an_image"] == expected
    assert info["bytes"]["an_image_all"] == sum(expected.values())
    assert [scale["name"] for scale in info["scales"]] == [spec.name for spec in SPECS]
    assert info["fidelity"] == sample.fit.fidelity


def test_info_tells_unfinished_shards_from_absent_and_partial_ones(store: Path, sample: Sample) -> None:
    (store / "state" / "c" / "0").unlink()
    for array in open_cache(store).arrays:
        array.file(store, 1).unlink()
    (store / "state" / "c" / "1").unlink()
    state = np.full(5, layout.OK, np.uint8)
    state[3:] = layout.ABSENT
    with CacheWriter.create(store, sample.identity, sample.fit) as writer:
        arrays, _ = sample.stored(writer.rows_of(2))
        writer.write_shard(2, arrays, state)
    info = cache_info(store)
    assert info["shards"] == {"all": 3, "rows_each": 8, "done": 0, "in_part": 1, "unfinished": 1, "absent": 1}
    assert info["rows"] == {"all": ROWS, "ok": 3, "undecodable": 0, "absent": 18}


def test_info_reads_no_row(store: Path) -> None:
    expected = cache_info(store)
    for array in open_cache(store).arrays:
        for shard in range(3):
            file = array.file(store, shard)
            file.write_bytes(bytes(file.stat().st_size))
    assert cache_info(store) == expected
