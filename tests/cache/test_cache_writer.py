"""Publication: whole shards or nothing, resumable after any death, by one writer, into its own store only."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cache_sample import SHARD_ROWS, Sample, die_after_renames

from pipeline.cache import counts, layout
from pipeline.cache import store as files
from pipeline.cache.audit import verify
from pipeline.cache.copy import copy_cache
from pipeline.cache.reader import open_cache
from pipeline.cache.shards import with_crc
from pipeline.cache.writer import CacheWriter
from pipeline.errors import PipeError


def contents(path: Path) -> dict[str, bytes]:
    """Every file of a store but the lock."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and file.name != layout.LOCK
    }


def test_two_extractions_of_the_same_are_equal_to_the_byte(whole_store: Path, sample: Sample, tmp_path: Path) -> None:
    assert contents(sample.build(tmp_path / "again")) == contents(whole_store)


def test_a_store_holds_nothing_but_its_layout(whole_store: Path) -> None:
    arrays = {
        "fine",
        "mid",
        "mid_steps",
        "raw",
        "global",
        "state",
        "saturated",
        "seals",
        "fine_steps",
        "fine_basis",
        "mid_basis",
    }
    arrays |= {"fine_gram_mean", "mid_gram_mean", "raw_gram_mean", "global_mean", "calibration_rows", "heldout_rows"}
    assert {p.name for p in whole_store.iterdir()} == arrays | {"zarr.json", "digest.json", ".lock"}


def test_shards_cover_the_manifest(sample: Sample, tmp_path: Path) -> None:
    with CacheWriter.create(tmp_path / "c", sample.identity, sample.fit, shard_rows=SHARD_ROWS) as writer:
        assert writer.shards == 3
        assert [row for shard in range(3) for row in writer.rows_of(shard)] == list(range(21))
        assert writer.missing == [0, 1, 2]
        sample.write(writer, [1])
        assert (writer.finished, writer.missing) == ([1], [0, 2])
        with pytest.raises(IndexError):
            writer.rows_of(3)
    assert (open_cache(tmp_path / "c").state() > 0).sum() == 8


def test_resume_writes_only_what_is_missing(sample: Sample, whole_store: Path, tmp_path: Path) -> None:
    path = tmp_path / "c"
    with CacheWriter.create(path, sample.identity, sample.fit, shard_rows=SHARD_ROWS) as writer:
        sample.write(writer, [1])
    before = (path / "fine/c/1/0/0").stat().st_ino
    with CacheWriter.resume(path, sample.identity) as writer:  # type: ignore[union-attr]
        assert writer.missing == [0, 2]
        sample.write(writer)
        assert writer.missing == []
    assert (path / "fine/c/1/0/0").stat().st_ino == before
    assert contents(path) == contents(whole_store)


def test_resume_of_nothing_is_none(sample: Sample, tmp_path: Path) -> None:
    assert CacheWriter.resume(tmp_path / "nothing", sample.identity) is None
    assert not (tmp_path / "nothing").exists()


def test_a_resumed_writer_encodes_as_the_first_did(sample: Sample, whole_store: Path) -> None:
    with CacheWriter.resume(whole_store, sample.identity) as writer:  # type: ignore[union-attr]
        assert writer.shard_rows == SHARD_ROWS
        for name, codec in sample.fit.codecs.items():
            first, again = codec.encode(sample.features[name]), writer.codecs[name].encode(sample.features[name])
            np.testing.assert_array_equal(first.values, again.values)
            assert writer.codecs[name].explained == codec.explained


def test_create_on_an_existing_cache_resumes_and_keeps_its_fit(sample: Sample, store: Path) -> None:
    before = contents(store)
    other = replace(sample.fit, fidelity={}, heldout_rows=np.arange(2))
    with CacheWriter.create(store, sample.identity, other, shard_rows=4) as writer:
        assert (writer.missing, writer.shard_rows) == ([], SHARD_ROWS)
    assert contents(store) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 22}, r"rows: 21 in the cache, 22 asked for"),
        ({"teacher": {"name": "other"}}, r'teacher\.name: "toy" in the cache, "other" asked for'),
        ({"teacher": {"name": "toy"}}, r"teacher\.mean: \[0\.5, 0\.5, 0\.5\] in the cache, not asked for"),
        ({"view": {"kind": "squash", "size": 32}}, r"view\.kind"),
        ({"manifest_fingerprint": "ee"}, r"manifest_fingerprint"),
        ({"settings": {"dtype": "int8", "pca": 4, "seed": 1}}, r"settings\.seed: 0 in the cache, 1 asked for"),
        ({"settings": {"dtype": "int8", "pca": None, "seed": 0}}, r"settings\.pca"),
        ({"global_width": 6}, r"global_width"),
        ({"scales": (layout.ScaleSpec("fine", -1, 3),)}, r"scales"),
    ],
)
def test_a_cache_of_something_else_is_refused_naming_the_field(
    sample: Sample, whole_store: Path, change: dict, message: str
) -> None:
    identity = sample.named(**change)
    for attempt in (CacheWriter.resume, lambda p, i: CacheWriter.create(p, i, sample.fit)):
        with pytest.raises(PipeError, match=message):
            attempt(whole_store, identity)
    with CacheWriter.resume(whole_store, sample.identity):  # type: ignore[union-attr]
        pass  # the refusals left no lock behind


def test_a_folder_of_something_else_is_left_alone(sample: Sample, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(PipeError, match="not a teacher cache"):
        CacheWriter.create(tmp_path, sample.identity, sample.fit)
    assert [file.name for file in tmp_path.iterdir()] == ["photo.jpg"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
    with pytest.raises(PipeError, match=r"not a teacher cache \(zarr\.json\)"):
        CacheWriter.create(tmp_path / "other", sample.identity, sample.fit)
    with pytest.raises(PipeError, match="File exists"):
        CacheWriter.create(tmp_path / "photo.jpg", sample.identity, sample.fit)


def test_rows_are_never_thrown_away_because_the_digest_is_gone(sample: Sample, store: Path) -> None:
    (store / "digest.json").unlink()
    before = contents(store)
    with pytest.raises(PipeError, match=r"digest\.json is gone"):
        CacheWriter.create(store, sample.identity, sample.fit)
    assert contents(store) == before


def test_a_second_writer_says_so_and_stops(sample: Sample, tmp_path: Path) -> None:
    path = tmp_path / "c"
    with CacheWriter.create(path, sample.identity, sample.fit, shard_rows=SHARD_ROWS):
        with pytest.raises(PipeError, match=rf"another extraction.*process {os.getpid()} on"):
            CacheWriter.resume(path, sample.identity)
        with pytest.raises(PipeError, match="another extraction"):
            CacheWriter.create(path, sample.identity, sample.fit)
        open_cache(path)  # readers need no lock
    with CacheWriter.create(path, sample.identity, sample.fit) as writer:
        assert writer.missing == [0, 1, 2]


def test_a_killed_writers_lock_is_free(sample: Sample, tmp_path: Path) -> None:
    def die() -> None:
        CacheWriter.create(tmp_path / "c", sample.identity, sample.fit, shard_rows=SHARD_ROWS)
        os._exit(9)

    assert _in_child(die) == 9
    with CacheWriter.create(tmp_path / "c", sample.identity, sample.fit) as writer:
        assert writer.missing == [0, 1, 2]


def test_death_before_any_rename_can_be_resumed_to_the_same_bytes(
    sample: Sample, whole_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed with a file written but not yet in place, at every such moment: header, arrays and state alike."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # the process dies here, not the machine
    renames = len(contents(whole_store))
    for survived in range(renames):
        path = tmp_path / f"c{survived}"

        def die_at_rename(path: Path = path, survived: int = survived) -> None:
            die_after_renames(survived)
            sample.build(path)

        assert _in_child(die_at_rename) == 9
        assert list((path / layout.TEMPORARY).iterdir())
        if (path / layout.DIGEST).exists():
            cache = open_cache(path)
            ok = np.flatnonzero(cache.state() == layout.OK)
            cache.read(ok, verify=True)  # state 1 implies published data
        sample.build(path)
        assert contents(path) == contents(whole_store)


def test_a_full_disk_is_one_line_and_leaves_the_store_intact(
    sample: Sample, whole_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c"
    with CacheWriter.create(path, sample.identity, sample.fit, shard_rows=SHARD_ROWS) as writer:
        sample.write(writer, [0])
        before = contents(path)

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(files.os, "fsync", full)
            with pytest.raises(PipeError, match=r"cannot write the cache: No space left.*same command"):
                sample.write(writer, [1])
        assert contents(path) == before
        assert writer.finished == [0]
        sample.write(writer)
    assert contents(path) == contents(whole_store)


def test_a_limited_extraction_leaves_its_shard_unfinished(sample: Sample, whole_store: Path, tmp_path: Path) -> None:
    path = tmp_path / "c"
    with CacheWriter.create(path, sample.identity, sample.fit, shard_rows=SHARD_ROWS) as writer:
        rows = np.asarray(writer.rows_of(0))
        state = np.where(rows < 5, sample.state[rows], layout.ABSENT).astype(np.uint8)
        writer.write_shard(0, sample.stored(rows)[0], state)
        assert not writer.done(0)
        assert len(open_cache(path).read([0, 1, 2, 4])["fine"]) == 4
        with pytest.raises(PipeError, match=r"absent 1 row \(5\)"):
            open_cache(path).read([5])
        sample.write(writer)
    assert contents(path) == contents(whole_store)


@pytest.mark.parametrize("name", ["fine/c/1/0/0", "global/c/1/0", "state/c/1"])
def test_a_lost_or_shortened_file_makes_its_shard_unfinished(sample: Sample, store: Path, name: str) -> None:
    original = (store / name).read_bytes()
    for damage in (original[:-1], None):
        (store / name).unlink() if damage is None else (store / name).write_bytes(damage)
        with CacheWriter.resume(store, sample.identity) as writer:  # type: ignore[union-attr]
            assert writer.missing == [1]
            sample.write(writer)
        assert (store / name).read_bytes() == original


def test_saturated_values_are_counted_over_all_shards(sample: Sample, whole_store: Path) -> None:
    cache, ok = open_cache(whole_store), sample.state == layout.OK
    expected = {name: codec.encode(sample.features[name][ok]).saturated for name, codec in sample.fit.codecs.items()}
    assert cache.saturated == expected
    assert expected["fine"] > 0
    by_row = np.concatenate([cache.counts(shard) for shard in range(3)])[:21]
    levels = sample.fit.codecs["fine"].project(sample.features["fine"]) / cache.steps["fine"]
    beyond = (np.abs(np.rint(levels)) > 127).sum(axis=(1, 2))
    np.testing.assert_array_equal(by_row[:, 0], np.where(ok, beyond, 0))


def test_caches_of_older_writers_count_whole_shards_and_go_on_so(sample: Sample, store: Path, tmp_path: Path) -> None:
    """They have no count of a row: what they grow by, and what is copied whole, adds to a shard's."""
    cache, name = open_cache(store), layout.SATURATED
    totals = [cache.saturated_in(shard) for shard in range(3)]
    group = json.loads((store / "zarr.json").read_text())
    del group["attributes"]["saturated_by"]
    documents = {"zarr.json": group, f"{name}/zarr.json": counts.document(group["attributes"])}
    for file, document in documents.items():
        (store / file).write_bytes(layout.json_bytes(document))
    for shard, total in enumerate(totals):
        (store / name / "c" / str(shard) / "0").write_bytes(with_crc(np.array([*total.values()], "<i8").tobytes()))
    shutil.rmtree(store / "seals")
    files = [f for f in json.loads((store / "digest.json").read_text())["files"] if not f.startswith("seals")]
    (store / "digest.json").write_bytes(layout.json_bytes({"files": files, "sha256": layout.digest_of(store, files)}))
    old = open_cache(store)
    assert not old.counts_by_row
    assert [old.saturated_in(shard) for shard in range(3)] == totals
    assert verify(store).findings == []
    assert copy_cache(store, tmp_path / "copy.zarr").cache.saturated == old.saturated
    (store / "state" / "c" / "1").unlink()
    with CacheWriter.resume(store, sample.identity) as writer:  # type: ignore[union-attr]
        sample.write(writer)
    assert [open_cache(store).saturated_in(shard) for shard in range(3)] == totals
    assert verify(store).findings == []


def test_the_digest_does_not_depend_on_rows_written(sample: Sample, whole_store: Path, tmp_path: Path) -> None:
    with CacheWriter.create(tmp_path / "c", sample.identity, sample.fit, shard_rows=SHARD_ROWS):
        assert open_cache(tmp_path / "c").digest == open_cache(whole_store).digest


def test_wrong_arrays_are_refused_before_anything_is_written(sample: Sample, tmp_path: Path) -> None:
    with CacheWriter.create(tmp_path / "c", sample.identity, sample.fit, shard_rows=SHARD_ROWS) as writer:
        arrays, _ = sample.stored(writer.rows_of(0))
        state = np.ones(8, np.uint8)
        before = contents(tmp_path / "c")
        wrong = [
            ({**arrays, "fine": arrays["fine"].astype(np.int16)}, state),
            ({**arrays, "fine": arrays["fine"][:7]}, state),
            ({name: x for name, x in arrays.items() if name != "mid_steps"}, state),
            (arrays, state[:7]),
            (arrays, state * 3),
        ]
        for given, its_state in wrong:
            with pytest.raises(ValueError, match=r"expected|state must"):
                writer.write_shard(0, given, its_state)
        assert contents(tmp_path / "c") == before
    with pytest.raises(ValueError, match="closed"):
        writer.write_shard(0, arrays, state)


def test_values_that_are_not_finite_are_refused_naming_the_row(sample: Sample, tmp_path: Path) -> None:
    with CacheWriter.create(tmp_path / "c", sample.identity, sample.fit, shard_rows=SHARD_ROWS) as writer:
        rows = np.asarray(writer.rows_of(1))
        arrays, _ = sample.stored(rows)
        arrays["global"][3] = np.inf
        with pytest.raises(PipeError, match=r"not finite, global, row 11"):
            writer.write_shard(1, arrays, sample.state[rows])
        skipped = sample.state[rows].copy()
        skipped[3] = layout.UNDECODABLE  # what is not stored may hold anything
        writer.write_shard(1, arrays, skipped)


def test_a_manifest_without_rows_is_refused(sample: Sample, tmp_path: Path) -> None:
    with pytest.raises(PipeError, match="no rows"):
        CacheWriter.create(tmp_path / "c", sample.named(rows=0), sample.fit)


@pytest.mark.parametrize(
    ("row_bytes", "rows", "expected"),
    [(76_800, 3_000_000, 1024), (76_800, 4_000, 512), (1_500, 3_000_000, 4096), (10**6, 3_000_000, 512)],
)
def test_shards_have_512_to_4096_rows_by_bytes(row_bytes: int, rows: int, expected: int) -> None:
    assert layout.auto_shard_rows(row_bytes, rows) == expected


def _in_child(action: object) -> int | None:
    process = multiprocessing.get_context("fork").Process(target=action)  # type: ignore[arg-type]
    process.start()
    process.join(60)
    return process.exitcode


def test_a_shard_whose_images_are_all_undecodable_is_written(sample: Sample, tmp_path: Path) -> None:
    broken = replace(sample, state=np.full(len(sample.state), layout.UNDECODABLE, np.uint8))
    store = broken.build(tmp_path / "c")
    assert (open_cache(store).state() == layout.UNDECODABLE).all()
    with CacheWriter.create(store, sample.identity, sample.fit) as writer:
        assert writer.missing == []
