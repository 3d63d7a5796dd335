"""A copy of some rows or scales is a valid cache: same rows, same bytes, same manifest."""

from __future__ import annotations

import os
import threading
import time
from collections import namedtuple
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_sample import ROWS, SHARD_ROWS, UNDECODABLE_ROWS, Sample

from pipeline.cache import layout
from pipeline.cache.audit import verify
from pipeline.cache.compress import CompressedWriter, Compression
from pipeline.cache.copy import copy_cache
from pipeline.cache.locks import StoreLock
from pipeline.cache.reader import check_matches, open_cache
from pipeline.cache.writer import CacheWriter
from pipeline.errors import PipeError


def store_bytes(path: Path) -> dict[str, bytes]:
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != layout.LOCK)
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_copy_of_everything_is_the_same_to_the_byte(whole_store: Path, tmp_path: Path, workers: int) -> None:
    copied = copy_cache(whole_store, tmp_path / "copy.zarr", workers=workers)
    assert (copied.rows, copied.absent) == (ROWS - 2, 0)
    assert store_bytes(tmp_path / "copy.zarr") == store_bytes(whole_store)
    assert [entry.name for entry in tmp_path.iterdir()] == ["copy.zarr"]


def test_rows_keep_their_numbers_and_their_bytes(whole_store: Path, tmp_path: Path) -> None:
    rows = np.array([20, 1, 3, 5, 19])  # of shards 0 and 2; 3 and 20 are undecodable
    copied = copy_cache(whole_store, tmp_path / "copy.zarr", rows=rows)
    source, cache = open_cache(whole_store), copied.cache
    assert (cache.rows, cache.shard_rows, cache.digest) == (ROWS, SHARD_ROWS, source.digest)
    assert {row: int(state) for row, state in enumerate(cache.state()) if state} == {1: 1, 3: 2, 5: 1, 19: 1, 20: 2}
    assert copied.rows == 3
    for name, values in cache.read_raw([19, 1, 5], verify=True).items():
        assert values.tobytes() == source.read_raw([19, 1, 5])[name].tobytes()
    with pytest.raises(PipeError, match="absent"):
        cache.read([2])
    assert not (tmp_path / "copy.zarr" / "state" / "c" / "1").exists()
    rows = np.concatenate([source.counts(shard) for shard in range(3)])[[1, 3, 5, 19, 20]]
    assert [*cache.saturated.values()] == rows.sum(axis=0).tolist()
    report = verify(tmp_path / "copy.zarr")
    assert report.findings == []
    assert report.rows == {"ok": 3, "undecodable": 2, "absent": 16}


def test_what_was_cut_off_goes_with_its_row(store: Path, tmp_path: Path, sample: Sample) -> None:
    with CacheWriter.create(store, sample.identity, sample.fit) as writer:  # type: ignore[union-attr]
        for shard in range(3):
            arrays, _ = sample.stored(writer.rows_of(shard))
            rows = np.asarray(writer.rows_of(shard))
            writer.write_shard(shard, arrays, sample.state[rows], np.outer(rows, [1, 100, 10_000]))
    copied = copy_cache(store, tmp_path / "copy.zarr", rows=np.arange(8, ROWS - 1), scales=["fine", "raw"])
    assert copied.cache.saturated == {"fine": sum(range(8, 20)), "raw": 10_000 * sum(range(8, 20))}


def test_a_scale_is_left_out_with_all_that_concerns_it(whole_store: Path, tmp_path: Path) -> None:
    copied = copy_cache(whole_store, tmp_path / "copy.zarr", scales=["raw", "mid"])
    cache, source = copied.cache, open_cache(whole_store)
    assert [scale.name for scale in cache.scales] == ["mid", "raw"]  # in the order in which they are stored
    assert set(cache.fidelity) == set(cache.baseline_losses["gram"]) == {"mid", "raw"}
    assert set(cache.baseline_losses["rkd"]) == {"mid", "raw", "global"}
    assert cache.teacher["scales"] == []  # the sample's teacher names `fine` alone
    assert cache.digest != source.digest
    assert not [name for name in store_bytes(tmp_path / "copy.zarr") if name.startswith("fine")]
    expected = {name: count for name, count in source.saturated.items() if name != "fine"}
    assert cache.saturated == expected
    assert verify(tmp_path / "copy.zarr").findings == []
    rows = np.flatnonzero(source.state() == layout.OK)
    for name, values in cache.read(rows).items():
        np.testing.assert_array_equal(values, source.read(rows)[name])
    check_matches(cache, manifest_fingerprint=source.manifest_fingerprint)


def test_an_extraction_fills_a_copy_up_to_the_original(whole_store: Path, sample: Sample, tmp_path: Path) -> None:
    copy_cache(whole_store, tmp_path / "copy.zarr", rows=np.arange(9, 12))
    with CacheWriter.create(tmp_path / "copy.zarr", sample.identity, sample.fit) as writer:
        assert writer.missing == [0, 1, 2]
        sample.write(writer)
    assert store_bytes(tmp_path / "copy.zarr") == store_bytes(whole_store)


def test_shards_that_are_not_finished_are_left_absent(store: Path, tmp_path: Path) -> None:
    (store / "state" / "c" / "1").unlink()
    copied = copy_cache(store, tmp_path / "copy.zarr")
    assert copied.absent == SHARD_ROWS
    assert verify(tmp_path / "copy.zarr").findings == []


def test_a_place_that_is_taken_is_left_alone(whole_store: Path, tmp_path: Path) -> None:
    (tmp_path / "copy.zarr").write_text("precious")
    with pytest.raises(PipeError, match="something already"):
        copy_cache(whole_store, tmp_path / "copy.zarr")
    assert (tmp_path / "copy.zarr").read_text() == "precious"
    with pytest.raises(PipeError, match="no such folder"):
        copy_cache(whole_store, tmp_path / "nowhere" / "copy.zarr")


def test_damage_is_not_copied_and_leaves_nothing_behind(store: Path, tmp_path: Path) -> None:
    data = bytearray((store / "raw" / "c" / "1" / "0" / "0").read_bytes())
    data[3] ^= 64
    (store / "raw" / "c" / "1" / "0" / "0").write_bytes(data)
    with pytest.raises(PipeError, match=r"1 row \(8\)"):
        copy_cache(store, tmp_path / "copy.zarr")
    assert [entry.name for entry in tmp_path.iterdir()] == ["teacher.zarr"]


def test_a_copy_into_a_cache_is_refused(whole_store: Path, tmp_path: Path) -> None:
    """It would lie among the files of that one, which would no longer be sound."""
    (tmp_path / "link").symlink_to(whole_store / "fine")
    for place in (whole_store / "copy", whole_store / "fine" / "c" / "copy", tmp_path / "link" / "copy"):
        with pytest.raises(PipeError, match=r"inside a cache.*choose another place"):
            copy_cache(whole_store, place)
    assert not verify(whole_store).damage


def test_an_interrupted_copy_leaves_nothing_behind_while_threads_are_at_work(
    whole_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C comes to the calling thread; the others write on for a moment, into a folder that must not come back."""
    write, started, threads = CompressedWriter.write_shard, threading.Barrier(3), list[threading.Thread]()
    written: list[int] = []

    def write_slowly(self: CompressedWriter, *arguments: Any) -> None:
        started.wait(10)
        time.sleep(0.2)
        write(self, *arguments)
        written.append(arguments[0])

    def interrupted(function: Callable[[int], int], items: Sequence[int], **_: Any) -> None:
        threads.extend(threading.Thread(target=function, args=(item,)) for item in items[:2])
        for thread in threads:
            thread.start()
        started.wait(10)
        raise KeyboardInterrupt

    monkeypatch.setattr(CompressedWriter, "write_shard", write_slowly)
    monkeypatch.setattr("pipeline.cache.copy.run_all", interrupted)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        copy_cache(whole_store, tmp_path / "copy", compress=Compression("zstd"))
    assert sorted(written) == [0, 1]  # they had come to an end before the folder was removed
    for thread in threads:
        thread.join()
    assert sorted(tmp_path.iterdir()) == before


def test_no_other_copy_gets_at_one_that_is_whole(
    whole_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is locked until it has its name: the other would clear it."""
    rename, refused = os.rename, []

    def meanwhile(source: Path, target: Path) -> None:
        with pytest.raises(PipeError, match="another copy"):
            copy_cache(whole_store, tmp_path / "copy")
        refused.append(target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", meanwhile)
    copied = copy_cache(whole_store, tmp_path / "copy").cache
    assert refused == [tmp_path / "copy"]
    assert not verify(copied.path).damage
    assert {entry.name for entry in copied.path.iterdir() if entry.name.startswith(".")} == set()


def test_a_killed_copy_is_started_anew_and_a_running_one_left_alone(whole_store: Path, tmp_path: Path) -> None:
    partial = tmp_path / ".copy.zarr.copying"
    (partial / "fine" / "c").mkdir(parents=True)
    (partial / "digest.json").write_text("half")
    lock = StoreLock(partial)
    assert lock.exclusive()
    with pytest.raises(PipeError, match="another copy"):
        copy_cache(whole_store, tmp_path / "copy.zarr")
    assert (partial / "digest.json").read_text() == "half"
    lock.close()
    copy_cache(whole_store, tmp_path / "copy.zarr")
    assert store_bytes(tmp_path / "copy.zarr") == store_bytes(whole_store)
    assert not partial.exists()


def test_what_is_not_there_cannot_be_copied(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy.zarr"
    for rows in ([ROWS], [-1]):
        with pytest.raises(PipeError, match=f"rows 0 to {ROWS - 1}"):
            copy_cache(store, out, rows=np.array(rows))
    with pytest.raises(PipeError, match=r"no scale coarse; the cache has fine, mid, raw"):
        copy_cache(store, out, scales=["mid", "coarse"])
    (store / "state" / "c" / "1").unlink()
    with pytest.raises(PipeError, match="none of these rows"):
        copy_cache(store, out, rows=np.arange(8, 16))
    assert not out.exists()


def test_a_full_disk_is_said_before_the_work(
    whole_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    sizes = {name: len(data) for name, data in store_bytes(whole_store).items() if "/c/" in name}
    arrays = {array.name for array in open_cache(whole_store).arrays}
    needed = sum(size for name, size in sizes.items() if name.split("/")[0] in arrays)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(1, 1, needed - 1))
    with pytest.raises(PipeError, match="GB are free"):
        copy_cache(whole_store, tmp_path / "copy.zarr")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(1, 1, needed))
    assert copy_cache(whole_store, tmp_path / "copy.zarr").rows == ROWS - len(UNDECODABLE_ROWS)
