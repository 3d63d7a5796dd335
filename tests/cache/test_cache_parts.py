"""Several writers of one cache: who gets which shards, who is told to stop, and what a killed one leaves behind."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from cache_sample import SHARD_ROWS, Sample

from pipeline.cache import locks
from pipeline.cache.header import refuse_foreign
from pipeline.cache.locks import StoreLock
from pipeline.cache.part import Part
from pipeline.cache.reader import open_cache
from pipeline.cache.writer import CacheWriter
from pipeline.errors import PipeError


def contents(root: Path) -> dict[str, bytes]:
    return {str(f.relative_to(root)): f.read_bytes() for f in root.rglob("*") if f.is_file() and f.name != ".lock"}


# ---- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("total", "count"), [(0, 1), (1, 3), (21, 1), (21, 4), (5860, 8)])
def test_the_parts_are_all_shards_once(total: int, count: int) -> None:
    dealt = [shard for index in range(count) for shard in Part(index, count).shards(total)]
    assert sorted(dealt) == list(range(total))
    sizes = [len(Part(index, count).shards(total)) for index in range(count)]
    assert max(sizes) - min(sizes) <= 1


def test_a_part_is_written_as_people_count() -> None:
    assert Part.parse("3/8") == Part(2, 8)
    assert str(Part.parse("3/8")) == "part 3 of 8"
    assert Part().whole
    for wrong in ("0/8", "9/8", "3", "3/", "/8", "a/b", "-1/4", "1.5/4", "1/0"):
        with pytest.raises(PipeError, match="--part"):
            Part.parse(wrong)


@pytest.mark.parametrize(
    ("environment", "part", "names"),
    [
        ({}, Part(0, 1), ""),
        ({"RANK": "5", "WORLD_SIZE": "16", "SLURM_PROCID": "1"}, Part(5, 16), "RANK, WORLD_SIZE"),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, Part(0, 1), ""),  # a batch script: one process for all
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3"}, Part(3, 8), "SLURM_STEP_NUM_TASKS"),
        (
            {"SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "1"}
            | {"SLURM_ARRAY_TASK_STEP": "2"},
            Part(3, 4),
            "SLURM_ARRAY_TASK_ID",
        ),
        (
            {"SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_MIN": "0"}
            | {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1"},
            Part(9, 12),
            "SLURM_STEP_NUM_TASKS, SLURM_ARRAY_TASK_ID",
        ),
    ],
)
def test_launchers_say_which_part_a_process_has(environment: dict[str, str], part: Part, names: str) -> None:
    assert Part.of_environment(environment) == (part, names)


def test_two_parts_side_by_side_make_the_cache_of_one(sample: Sample, whole_store: Path, tmp_path: Path) -> None:
    path = tmp_path / "c"
    first = CacheWriter.create(path, sample.identity, sample.fit, shard_rows=SHARD_ROWS, part=Part(0, 2))
    second = CacheWriter.create(path, sample.identity, sample.fit, shard_rows=SHARD_ROWS, part=Part(1, 2))
    assert first is not None
    assert second is not None
    assert (first.missing, second.missing) == ([0, 2], [1])
    sample.write(second)
    sample.write(first)
    assert (first.missing, second.missing, first.finished) == ([], [], [0, 1, 2])
    first.close()
    second.close()
    assert contents(path) == contents(whole_store)


# ---- locks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [Part(), Part(0, 2), Part(0, 3)])
def test_a_second_writer_of_the_same_shards_is_told_who_has_them(part: Part, sample: Sample, tmp_path: Path) -> None:
    path = tmp_path / "c"
    with (
        CacheWriter.create(path, sample.identity, sample.fit, shard_rows=SHARD_ROWS, part=Part(0, 2)),  # type: ignore[union-attr]
        pytest.raises(PipeError, match=rf"writing shard 0 of this cache \(process {os.getpid()} on .*, part 1 of 2\)"),
    ):
        CacheWriter.resume(path, sample.identity, part)
    with CacheWriter.resume(path, sample.identity, part) as writer:  # type: ignore[union-attr]
        assert writer.missing[0] == 0


def test_others_wait_while_one_sets_the_cache_up_and_a_lone_one_is_refused(sample: Sample, tmp_path: Path) -> None:
    path = tmp_path / "c"

    def fit():  # type: ignore[no-untyped-def]
        assert CacheWriter.create(path, sample.identity, sample.fit, part=Part(1, 2)) is None
        with pytest.raises(PipeError, match="another extraction is setting this cache up"):
            CacheWriter.create(path, sample.identity, sample.fit)
        return sample.fit

    with CacheWriter.create(path, sample.identity, fit, shard_rows=SHARD_ROWS, part=Part(0, 2)):  # type: ignore[union-attr]
        calls: list[int] = []
        late = CacheWriter.create(path, sample.identity, lambda: calls.append(1), part=Part(1, 2))  # type: ignore[arg-type,func-returns-value]
        assert late is not None
        assert not calls  # the fit that is there stands
        late.close()


def test_locks_exclude_shares_and_claims_as_they_should(tmp_path: Path) -> None:
    one, two = StoreLock(tmp_path, "one"), StoreLock(tmp_path, "two")
    assert one.exclusive()
    assert not two.exclusive()
    assert not two.shared()
    assert one.shared()  # steps down
    assert two.shared()
    assert not one.exclusive()
    assert one.claim([0, 1, 2, 7]) is None
    assert two.claim([3, 4]) is None
    assert two.claim([6, 7, 8]) == 7
    one.close()
    assert two.claim([6, 7, 8]) is None
    assert two.exclusive()
    two.close()


def _die_with_locks(path: Path) -> None:
    lock = StoreLock(path)
    lock.exclusive()
    lock.claim([0, 1])
    os._exit(9)


def test_locks_end_with_the_process_however_it_ends(tmp_path: Path) -> None:
    child = multiprocessing.get_context("fork").Process(target=_die_with_locks, args=(tmp_path,))
    child.start()
    child.join()
    assert child.exitcode == 9
    lock = StoreLock(tmp_path)
    assert lock.exclusive()
    assert lock.claim([0, 1]) is None
    lock.close()


def test_the_other_kind_of_lock_tells_processes_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Systems without OFD locks: POSIX locks, by process."""
    monkeypatch.delattr(locks.fcntl, "F_OFD_SETLK")
    lock = StoreLock(tmp_path)
    assert lock.shared()
    assert lock.claim([2, 3]) is None

    def look() -> None:
        other = StoreLock(tmp_path)
        os._exit(10 * other.exclusive() + (other.claim([1, 2]) or 0))

    child = multiprocessing.get_context("fork").Process(target=look)
    child.start()
    child.join()
    assert child.exitcode == 2
    lock.close()


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(locks.fcntl, "fcntl", none)
    monkeypatch.setattr(locks.fcntl, "lockf", none)
    with pytest.raises(PipeError, match="gives no locks"):
        StoreLock(tmp_path).exclusive()


def test_leftovers_of_a_killed_writer_go_when_nobody_else_writes(sample: Sample, tmp_path: Path) -> None:
    path = tmp_path / "c"
    with CacheWriter.create(path, sample.identity, sample.fit, shard_rows=SHARD_ROWS, part=Part(0, 2)):  # type: ignore[union-attr]
        (path / ".tmp").mkdir(exist_ok=True)
        (path / ".tmp" / "half").write_bytes(b"x")
        with CacheWriter.resume(path, sample.identity, Part(1, 2)):  # type: ignore[union-attr]
            assert (path / ".tmp" / "half").exists()  # it may be the first one's
    with CacheWriter.resume(path, sample.identity):  # type: ignore[union-attr]
        assert not (path / ".tmp" / "half").exists()
    assert np.array_equal(open_cache(path).state(), np.zeros(21))


def test_a_writer_that_ends_leaves_the_others_their_place(sample: Sample, tmp_path: Path) -> None:
    """The folder of unfinished files goes with the last writer: another may be about to open a file in it."""
    path = tmp_path / "c"
    first = CacheWriter.create(path, sample.identity, sample.fit, shard_rows=SHARD_ROWS, part=Part(0, 2))
    second = CacheWriter.resume(path, sample.identity, Part(1, 2))
    assert first is not None
    assert second is not None
    (path / ".tmp").mkdir(exist_ok=True)
    first.close()
    assert (path / ".tmp").is_dir()
    second.close()
    assert not (path / ".tmp").exists()


def test_a_folder_that_is_being_cleared_is_no_foreign_one(sample: Sample, store: Path) -> None:
    """Setting up was cut off, and another process clears the rest while this one looks."""
    (store / "digest.json").unlink()
    shutil.rmtree(store / "state")
    refuse_foreign(store)
    (store / "state").mkdir()
    refuse_foreign(store)
    (store / "state" / "c").mkdir()
    refuse_foreign(store)
    (store / "state" / "c" / "0").write_bytes(b"")
    with pytest.raises(PipeError, match=r"holds rows, but its digest\.json is gone"):
        refuse_foreign(store)
