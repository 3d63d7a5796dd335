"""A cache grows with its manifest: new rows are appended, and what was stored stays as it is, byte for byte."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cache_sample import ROWS, Sample, die_after_renames

from pipeline.cache import header, layout
from pipeline.cache.layout import CacheIdentity
from pipeline.cache.part import Part
from pipeline.cache.reader import open_cache
from pipeline.cache.writer import CacheWriter
from pipeline.errors import PipeError


@pytest.fixture
def grown(sample: Sample) -> CacheIdentity:
    """The sample's manifest with six more rows: 21 → 27, so that the last shard of three grows and a fourth comes."""
    known = {ROWS: sample.identity.manifest_fingerprint}
    return replace(
        sample.identity, rows=27, manifest_fingerprint="e" * 64, prefix_fingerprint=lambda rows: known.get(rows, "?")
    )


def test_old_rows_stay_and_new_ones_are_absent(sample: Sample, grown: CacheIdentity, store: Path) -> None:
    before, rows = open_cache(store), np.flatnonzero(open_cache(store).state() == layout.OK)
    files = {f: f.read_bytes() for f in store.rglob("c/*") if f.is_file()}
    with CacheWriter.resume(store, grown) as writer:  # type: ignore[union-attr]
        assert writer.shards == 4
        assert writer.missing == [2, 3]
        assert not (store / layout.GROWING).exists()
    cache = open_cache(store)
    assert (cache.rows, cache.manifest_fingerprint, cache.segments) == (27, "e" * 64, [21, 27])
    assert cache.digest != before.digest
    assert cache.state()[ROWS:].tolist() == [0] * 6
    assert {f: f.read_bytes() for f in files} == files
    for name, values in before.read_raw(rows).items():
        np.testing.assert_array_equal(cache.read_raw(rows, verify=True)[name], values)
    assert cache.fidelity == before.fidelity
    np.testing.assert_array_equal(cache.baselines["global_mean"], before.baselines["global_mean"])


def test_zarr_sees_the_larger_arrays(sample: Sample, grown: CacheIdentity, store: Path) -> None:
    import zarr

    CacheWriter.resume(store, grown).close()  # type: ignore[union-attr]
    group = zarr.open_group(store, mode="r")
    assert {group[name].shape[0] for name in ("fine", "mid", "mid_steps", "raw", "global", "state")} == {27}
    assert group["saturated"].shape == (27, 3)
    cache = open_cache(store)
    ok = np.flatnonzero(cache.state() == layout.OK)
    assert len(ok) == 19
    np.testing.assert_array_equal(group["fine"][:][ok], cache.read_raw(ok)["fine"])


@pytest.mark.parametrize(
    "change",
    [
        {"prefix_fingerprint": lambda rows: "another"},
        {"prefix_fingerprint": None},
        {"rows": 20},
        {"settings": {"pca": 3}},
    ],
)
def test_another_manifest_is_refused_and_nothing_changes(
    change: dict[str, object], grown: CacheIdentity, store: Path
) -> None:
    before = {f: f.read_bytes() for f in store.rglob("*") if f.is_file() and f.name != ".lock"}
    with pytest.raises(PipeError, match="something else"):
        CacheWriter.resume(store, replace(grown, **change))  # type: ignore[arg-type]
    assert {f: f.read_bytes() for f in store.rglob("*") if f.is_file() and f.name != ".lock"} == before


def test_a_growth_that_was_cut_off_at_any_moment_is_carried_out(
    sample: Sample, grown: CacheIdentity, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before each of its renames: before the journal is there nothing has changed, after it all of it will."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    moments = 1 + 8 + 1  # the journal; group, five arrays, state, saturated; the digest
    for survived in range(moments):
        path = store.parent / f"g{survived}"
        shutil.copytree(store, path)
        child = os.fork()
        if child == 0:
            die_after_renames(survived)
            CacheWriter.resume(path, grown)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        if survived < 2:  # nothing there, or the journal alone
            assert open_cache(path).rows == ROWS
        else:
            with pytest.raises(PipeError, match=r"being made larger.*pipe extract-teacher"):
                open_cache(path)
        with CacheWriter.resume(path, grown) as writer:  # type: ignore[union-attr]
            assert writer.missing == [2, 3]
        assert (open_cache(path).rows, open_cache(path).segments) == (27, [21, 27])
        assert not (path / layout.GROWING).exists()


def test_a_shard_that_is_extended_stays_readable_and_one_that_is_replaced_does_not(
    sample: Sample, grown: CacheIdentity, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with CacheWriter.resume(store, grown) as writer:  # type: ignore[union-attr]
        rows = np.array([16, 17, 18, 19, 0, 1, 2, 4])  # the new rows' features are those of others
        arrays, _ = sample.stored(rows)
        state = np.full(8, layout.OK, np.uint8)
        readable: list[int] = []

        def publish(*arguments: object) -> None:
            readable.append(int((open_cache(store).state()[16:20] == layout.OK).sum()))
            header.publish(*arguments)

        monkeypatch.setattr("pipeline.cache.writer.publish", publish)
        writer.write_shard(2, arrays, state, extends=True)
        assert set(readable) == {4}
        readable.clear()
        writer.write_shard(2, arrays, state)
        assert set(readable) == {0}
    assert open_cache(store).state()[16:24].tolist() == [1] * 8


def test_growth_needs_the_cache_for_itself(sample: Sample, grown: CacheIdentity, store: Path) -> None:
    with (
        CacheWriter.resume(store, sample.identity, Part(1, 2)),  # type: ignore[union-attr]
        pytest.raises(PipeError, match="has to be made larger"),
    ):
        CacheWriter.resume(store, grown, Part(0, 2))
    assert open_cache(store).rows == ROWS


def test_caches_without_segments_have_never_grown(store: Path, grown: CacheIdentity) -> None:
    """Caches made before they could grow do not say so; they open, and grow."""
    document = json.loads((store / "zarr.json").read_text())
    del document["attributes"]["segments"]
    (store / "zarr.json").write_bytes(layout.json_bytes(document))
    files = json.loads((store / "digest.json").read_text())["files"]
    (store / "digest.json").write_bytes(layout.json_bytes({"files": files, "sha256": layout.digest_of(store, files)}))
    assert open_cache(store).segments == [21]
    CacheWriter.resume(store, grown).close()  # type: ignore[union-attr]
    assert open_cache(store).segments == [21, 27]
