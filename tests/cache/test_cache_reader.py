"""What was written is what is read: by our reader, zarr-python and tensorstore, in any order, from any process."""

from __future__ import annotations

import multiprocessing
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import zarr
from cache_sample import COMPONENTS, GLOBAL_WIDTH, ROWS, SHARD_ROWS, UNDECODABLE_ROWS, Sample

from pipeline.cache import layout
from pipeline.cache.reader import Cache, check_matches, open_cache
from pipeline.errors import PipeError

ARRAYS = ("fine", "mid", "mid_steps", "raw", "global")


@pytest.fixture
def cache(whole_store: Path) -> Cache:
    return open_cache(whole_store)


@pytest.fixture
def ok_rows(sample: Sample) -> np.ndarray:
    return np.flatnonzero(sample.state == layout.OK)


@pytest.mark.parametrize("name", ARRAYS)
def test_our_reader_returns_what_was_written(cache: Cache, sample: Sample, ok_rows: np.ndarray, name: str) -> None:
    expected = sample.stored(ok_rows)[0][name]
    found = cache.read_raw(ok_rows)[name]
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ARRAYS)
def test_zarr_python_returns_what_was_written(
    whole_store: Path, sample: Sample, ok_rows: np.ndarray, name: str
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        array = zarr.open_group(str(whole_store), mode="r")[name]
    assert array.shards == (SHARD_ROWS, *array.shape[1:])
    assert array.chunks == (1, *array.shape[1:])
    np.testing.assert_array_equal(array[:][ok_rows], sample.stored(ok_rows)[0][name])


@pytest.mark.parametrize("name", ARRAYS)
def test_tensorstore_returns_what_was_written(
    whole_store: Path, sample: Sample, ok_rows: np.ndarray, name: str
) -> None:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(whole_store / name)}}
    found = tensorstore.open(spec).result().read().result()
    np.testing.assert_array_equal(found[ok_rows], sample.stored(ok_rows)[0][name])


def test_a_missing_chunk_reads_as_zeros_elsewhere_but_raises_here(whole_store: Path, cache: Cache) -> None:
    assert not zarr.open_array(str(whole_store / "fine"), mode="r")[UNDECODABLE_ROWS[0]].any()
    with pytest.raises(PipeError, match=r"undecodable 1 row \(3\)"):
        cache.read([0, 3])


def test_state_and_small_arrays_are_plain_zarr(whole_store: Path, cache: Cache, sample: Sample) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        group = zarr.open_group(str(whole_store), mode="r")
    np.testing.assert_array_equal(group["state"][:], sample.state)
    np.testing.assert_array_equal(cache.state(), sample.state)
    np.testing.assert_array_equal(group["fine_steps"][:], sample.fit.codecs["fine"].steps)
    np.testing.assert_array_equal(group["fine_basis"][:], sample.fit.codecs["fine"].basis)
    for name, value in sample.fit.baselines.items():
        np.testing.assert_array_equal(group[name][:], value)
        np.testing.assert_array_equal(cache.baselines[name], value)
    assert "raw_basis" not in group
    assert group.attrs["teacher"]["name"] == "toy"


def test_metadata_comes_back_as_it_was_given(cache: Cache, sample: Sample) -> None:
    assert [(s.name, s.layer, s.grid, s.tokens, s.components, s.dtype) for s in cache.scales] == [
        ("fine", -1, 3, 9, COMPONENTS, "int8"),
        ("mid", 4, 2, 4, COMPONENTS, "int8_token"),
        ("raw", 2, 2, 4, 6, "float16"),
    ]
    assert cache.steps["fine"] is not None
    assert cache.steps["mid"] is None
    assert cache.steps["raw"] is None
    assert (cache.rows, cache.global_width, cache.view) == (ROWS, GLOBAL_WIDTH, {"kind": "crop", "size": 32})
    assert cache.teacher["mean"] == [0.5, 0.5, 0.5]
    assert cache.fidelity == sample.fit.fidelity
    assert cache.baseline_losses == sample.fit.baseline_losses
    np.testing.assert_array_equal(cache.heldout_rows, sample.fit.heldout_rows)
    assert cache.basis("raw") is None


def test_read_gives_float32_coefficients_of_every_dtype(cache: Cache, sample: Sample, ok_rows: np.ndarray) -> None:
    found = cache.read(ok_rows)
    assert set(found) == {"fine", "mid", "raw", "global"}
    assert {x.dtype for x in found.values()} == {np.dtype(np.float32)}
    for name, codec in sample.fit.codecs.items():
        stored = codec.encode(sample.features[name][ok_rows])
        np.testing.assert_array_equal(found[name], codec.dequantise(stored.values, stored.token_steps))
    exact = sample.fit.codecs["raw"].project(sample.features["raw"][ok_rows])
    np.testing.assert_allclose(found["raw"], exact, rtol=1e-3)


def test_rows_come_in_the_order_asked_with_duplicates(cache: Cache) -> None:
    rows = [19, 0, 8, 0, 19, 7]
    for name, found in cache.read_raw(rows).items():
        for position, row in enumerate(rows):
            np.testing.assert_array_equal(found[position], cache.read_raw([row])[name][0])


def test_no_rows_give_empty_arrays(cache: Cache) -> None:
    assert {name: x.shape for name, x in cache.read([]).items()}["fine"] == (0, 9, COMPONENTS)


@pytest.mark.parametrize("rows", [[0, ROWS], [-1], [ROWS + 5]])
def test_rows_out_of_range_are_refused(cache: Cache, rows: list[int]) -> None:
    with pytest.raises(PipeError, match="rows 0 to 20"):
        cache.read(rows)


@pytest.mark.parametrize("rows", [[True, False], [0.5], [[0, 1]]])
def test_rows_that_are_no_row_numbers_are_refused(cache: Cache, rows: list) -> None:
    with pytest.raises(PipeError, match="whole numbers"):
        cache.read(rows)


def test_error_names_five_rows_and_both_counts(store: Path) -> None:
    (store / "state" / "c" / "0").unlink()
    with pytest.raises(PipeError, match=r"absent 7 rows \(0, 1, 2, 4, 5, …\); undecodable 1 row \(20\)") as caught:
        open_cache(store).read([20, 7, 6, 5, 4, 2, 1, 0, 0])
    assert "extract-teacher" in str(caught.value)


def test_opening_maps_no_shard(store: Path) -> None:
    for file in store.glob("fine/c/*/0/0"):
        file.unlink()
    cache = open_cache(store)
    assert cache.state().sum() > 0
    with pytest.raises(PipeError, match="is missing"):
        cache.read([0])


def test_few_maps_are_kept_and_the_oldest_goes_first(whole_store: Path, ok_rows: np.ndarray) -> None:
    small, large = open_cache(whole_store, max_open=2), open_cache(whole_store)
    for rows in (ok_rows, ok_rows[::-1], [0, 19, 1, 18]):
        for name, found in small.read_raw(rows).items():
            np.testing.assert_array_equal(found, large.read_raw(rows)[name])
        assert small.source.using.mapped <= 3  # never less than one batch needs
    assert large.source.using.mapped == 3 * len(ARRAYS)


def test_a_cache_that_was_read_can_be_pickled_without_its_maps(cache: Cache) -> None:
    expected = cache.read([0, 9])
    data = pickle.dumps(cache)
    assert len(data) < 20_000
    for name, found in pickle.loads(data).read([0, 9]).items():
        np.testing.assert_array_equal(found, expected[name])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_the_same(cache: Cache, method: str) -> None:
    batches = [[0, 9, 19], [19, 1], [8]]
    expected = [cache.read_raw(batch) for batch in batches]  # maps exist before the fork
    with multiprocessing.get_context(method).Pool(2) as pool:
        found = pool.map(cache.read_raw, batches)
    for mine, theirs in zip(expected, found, strict=True):
        for name in mine:
            np.testing.assert_array_equal(mine[name], theirs[name])


def test_refresh_sees_rows_written_since(store: Path, whole_store: Path) -> None:
    state_chunk = store / "state" / "c" / "2"
    state_chunk.unlink()
    cache = open_cache(store)
    with pytest.raises(PipeError, match="absent"):
        cache.read([16])
    state_chunk.write_bytes((whole_store / "state" / "c" / "2").read_bytes())
    cache.refresh()
    assert len(cache.read([16])["fine"]) == 1


def test_matching_fingerprints_pass_and_differences_are_named(cache: Cache, sample: Sample) -> None:
    fingerprint = sample.identity.manifest_fingerprint
    check_matches(cache)
    check_matches(cache, manifest_fingerprint=fingerprint, teacher=sample.identity.teacher)
    check_matches(cache, teacher={"scales": [{"name": "fine"}], "mean": (0.5, 0.5, 0.5)})
    with pytest.raises(PipeError, match=r"manifest_fingerprint: .*cd.* in the cache, .*ef.* asked for"):
        check_matches(cache, manifest_fingerprint="ef")
    with pytest.raises(PipeError, match=r'teacher\.name: "toy" in the cache, "vit" asked for'):
        check_matches(cache, teacher={"name": "vit"})
    with pytest.raises(PipeError, match=r"teacher\.scales\[0\]\.name"):
        check_matches(cache, teacher={"scales": [{"name": "coarse"}]})
    with pytest.raises(PipeError, match=r"teacher\.norm: not recorded"):
        check_matches(cache, teacher={"norm": True})


def test_reading_needs_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, pipeline.cache.reader; sys.exit(bool({'torch', 'zarr', 'tensorstore'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
