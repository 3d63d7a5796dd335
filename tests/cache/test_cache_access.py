"""Rows through memory maps and by positioned reads: the same bytes, the same refusals, hints that never fail."""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cache_sample import Sample

from pipeline.cache import layout
from pipeline.cache import mapped as mapped_module
from pipeline.cache.layout import RowArray
from pipeline.cache.local import LocalShards, on_network_disk
from pipeline.cache.mapped import MappedShards
from pipeline.cache.positioned import PositionedShards
from pipeline.cache.reader import open_cache
from pipeline.cache.shards import MISSING_CHUNK, RowOffsets, States, assemble_shard, named_rows, with_crc
from pipeline.errors import PipeError

Flip = Callable[[Path, int, int], None]


def states(root: Path, state: np.ndarray) -> States:
    """`state` as the only shard of a store at `root`."""
    (root / "state" / "c").mkdir(parents=True, exist_ok=True)
    (root / "state" / "c" / "0").write_bytes(with_crc(state.tobytes()))
    return States(root, len(state), len(state))


@pytest.fixture(scope="module")
def ok_rows(whole_store: Path) -> np.ndarray:
    return np.flatnonzero(open_cache(whole_store).state() == layout.OK)


@pytest.mark.parametrize("verify", [False, True])
def test_positioned_reads_give_what_maps_give(whole_store: Path, ok_rows: np.ndarray, verify: bool) -> None:
    mapped, read = open_cache(whole_store, access="map"), open_cache(whole_store, access="read")
    rng = np.random.default_rng(0)
    for rows in (ok_rows, ok_rows[::-1], rng.choice(ok_rows, 100), ok_rows[:1], ok_rows[:0]):
        for name, values in mapped.read_raw(rows, verify=verify).items():
            found = read.read_raw(rows, verify=verify)[name]
            assert found.dtype == values.dtype
            np.testing.assert_array_equal(found, values)
    assert isinstance(read.source.using, PositionedShards)  # type: ignore[attr-defined]
    assert isinstance(mapped.source.using, MappedShards)  # type: ignore[attr-defined]


@pytest.mark.parametrize("access", ["map", "read"])
def test_a_damaged_row_is_named_whichever_way_it_is_read(access: str, store: Path, flip: Flip) -> None:
    array = open_cache(store).arrays[0]
    flip(array.file(store, 1), 2 * (array.row_bytes + 4) + 5, 1)
    flip(array.file(store, 1), 5 * (array.row_bytes + 4) - 1, 0)  # in a checksum
    cache = open_cache(store, access=access)  # type: ignore[arg-type]
    with pytest.raises(PipeError, match=r"2 rows \(10, 12\).*fine/c/1/0/0.*pipe cache verify --repair"):
        cache.read(np.array([8, 9, 10, 11, 12, 12]), verify=True)
    assert len(cache.read([8, 9, 11], verify=True)["fine"]) == 3


@pytest.mark.parametrize("access", ["map", "read"])
def test_a_shard_cut_short_is_one_line(access: str, store: Path) -> None:
    file = open_cache(store).arrays[0].file(store, 0)
    os.truncate(file, file.stat().st_size - 30)
    with pytest.raises(PipeError, match=r"cut short: .* bytes.*fine/c/0/0/0"):
        open_cache(store, access=access).read([0])  # type: ignore[arg-type]


def test_a_shard_cut_while_it_is_open_is_one_line_where_it_is_read(store: Path) -> None:
    """With maps that kills the process; positioned reads say what happened."""
    cache = open_cache(store, access="read")
    cache.read([0])
    array = cache.arrays[0]
    os.truncate(array.file(store, 0), 10)
    with pytest.raises(PipeError, match="cut short"):
        cache.read([7])


@pytest.mark.parametrize("access", ["map", "read"])
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_the_same(access: str, method: str, whole_store: Path, ok_rows: np.ndarray) -> None:
    cache = open_cache(whole_store, access=access)  # type: ignore[arg-type]
    batches = [ok_rows[::2], ok_rows[:3]]
    expected = [cache.read_raw(batch) for batch in batches]  # files are open, and threads run, before the fork
    with multiprocessing.get_context(method).Pool(2) as pool:
        found = pool.map(cache.read_raw, batches)
    for mine, theirs in zip(expected, found, strict=True):
        for name in mine:
            np.testing.assert_array_equal(mine[name], theirs[name])


@pytest.mark.parametrize("access", ["map", "read"])
def test_threads_share_a_cache_with_few_open_files(access: str, whole_store: Path, ok_rows: np.ndarray) -> None:
    cache = open_cache(whole_store, access=access, max_open=2, verify=True)  # type: ignore[arg-type]
    expected, wrong = open_cache(whole_store).read_raw(ok_rows), []

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(20):
            places = rng.integers(0, len(ok_rows), 12)
            found = cache.read_raw(ok_rows[places])
            wrong.extend(name for name in found if not np.array_equal(found[name], expected[name][places]))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    using = cache.source.using  # type: ignore[attr-defined]
    assert (using.mapped if access == "map" else len(using.opened)) <= 3  # what a batch needs is never closed


@pytest.mark.parametrize("access", ["map", "read"])
def test_descriptors_are_given_back(access: str, whole_store: Path, ok_rows: np.ndarray) -> None:
    def held() -> tuple[int, int]:
        maps = Path("/proc/self/maps").read_text().count(str(whole_store))
        return len(os.listdir("/proc/self/fd")), maps

    before = held()
    cache = open_cache(whole_store, access=access)  # type: ignore[arg-type]
    cache.read(ok_rows)
    files = 3 * len(cache.arrays)
    assert held() == (before[0] + files * (access == "read"), before[1] + files * (access == "map"))
    del cache
    assert held() == before


@pytest.mark.parametrize("access", ["map", "read"])
def test_reading_ahead_is_a_hint(access: str, whole_store: Path, ok_rows: np.ndarray) -> None:
    cache = open_cache(whole_store, access=access)  # type: ignore[arg-type]
    expected = open_cache(whole_store).read_raw(ok_rows)
    cache.will_need(ok_rows)
    cache.will_need([])
    cache.will_need([3, 20, -1, 999])  # undecodable, undecodable, outside, outside
    for name, values in cache.read_raw(ok_rows).items():
        np.testing.assert_array_equal(values, expected[name])


def test_reading_ahead_brings_rows_into_memory(tmp_path: Path, sample: Sample) -> None:
    """Rows that were dropped from the page cache are there again a moment after the hint, and no others need be."""
    path, size, count = tmp_path / "big" / "c" / "0" / "0", 64 * 1024, 256
    path.parent.mkdir(parents=True)
    array = RowArray("big", (size,), np.dtype("i1"), ("byte",))
    data = np.random.default_rng(0).integers(-127, 128, (count, size), np.int8)
    path.write_bytes(b"".join(bytes(part) for part in assemble_shard(data, np.ones(count, bool))))
    shards = LocalShards(tmp_path, states(tmp_path, np.ones(count, np.uint8)))
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    shards.will_need(array, np.arange(100, 140))
    for _ in range(100):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
        np.testing.assert_array_equal(shards.gather(array, np.arange(100, 140), True), data[100:140])
        if resource.getrusage(resource.RUSAGE_SELF).ru_majflt == before:
            break
        time.sleep(0.02)
    else:
        pytest.fail("rows never came into memory")


def test_without_maps_rows_are_read(whole_store: Path, ok_rows: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit on addresses (ulimit -v) is no reason to fail."""

    def refuse(length: int) -> int:
        raise mapped_module.NoSpan("Cannot allocate memory")

    expected = open_cache(whole_store).read_raw(ok_rows)
    monkeypatch.setattr(mapped_module, "_reserve", refuse)
    for ahead in (True, False):
        cache = open_cache(whole_store, access="map")
        if ahead:
            cache.will_need(ok_rows)
        for name, values in cache.read_raw(ok_rows, verify=True).items():
            np.testing.assert_array_equal(values, expected[name])
        assert isinstance(cache.source.using, PositionedShards)  # type: ignore[attr-defined]


def test_addresses_are_refused_by_the_system_not_by_a_crash() -> None:
    with pytest.raises(mapped_module.NoSpan):
        mapped_module._reserve(2**62)


def test_what_was_used_longest_ago_makes_room(store: Path) -> None:
    cache = open_cache(store, access="map", max_open=6)
    using = cache.source.using  # type: ignore[attr-defined]
    expected = open_cache(store).read_raw([0, 8, 16])
    for _ in range(2):
        for place, row in enumerate((0, 8, 16)):
            for name, values in cache.read_raw([row], verify=True).items():
                np.testing.assert_array_equal(values[0], expected[name][place])
            assert using.mapped <= 6
            assert all(span.mapped[row // 8] for span in using.spans.values())


def test_a_shard_with_more_than_its_rows_is_read_another_way(store: Path) -> None:
    """Other writers may leave holes; no map reaches beyond its place."""
    array = open_cache(store).arrays[0]
    file = array.file(store, 0)
    data = file.read_bytes()
    index = 16 * 8 + 4
    file.write_bytes(data[:-index] + bytes(9000) + data[-index:])
    expected = open_cache(store, access="read").read_raw([0, 7], verify=True)
    with pytest.raises(PipeError, match=r"more than its rows.*data\.cache_access=read"):
        open_cache(store, access="map").read_raw([0])
    assert len(expected["fine"]) == 2


# ---- parts of it -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["all", "some", "other order", "with gaps"])
def test_offsets_are_kept_small_and_come_back(kind: str) -> None:
    stride, slots = 20, 6
    offsets = {
        "all": np.arange(slots) * stride,
        "some": np.array([0, -1, 20, 40, -1, 60]),
        "other order": np.array([60, 40, 20, 0, 80, 100]),
        "with gaps": np.array([0, 21, 45, -1, 66, 100]),
    }[kind]
    kept = RowOffsets(offsets, stride)
    there = np.flatnonzero(offsets >= 0)
    np.testing.assert_array_equal(kept.at(there[::-1]), offsets[there][::-1])
    assert (kept.offsets is not None) == (kind == "with gaps")
    assert (kept.ranks is not None) == (kind in ("some", "other order"))


def test_another_writers_order_is_read_by_its_index(tmp_path: Path) -> None:
    """Chunks in reverse order with a hole between them: valid Zarr, not as our writer does it."""
    array = RowArray("x", (4,), np.dtype("i1"), ("byte",))
    rows = np.arange(12, dtype=np.int8).reshape(3, 4)
    chunks = [with_crc(row.tobytes()) for row in rows]
    body = chunks[2] + b"hole!" + chunks[1] + chunks[0]
    index = np.array([[21, 8], [13, 8], [0, 8], [MISSING_CHUNK, MISSING_CHUNK]], "<u8")
    (tmp_path / "x" / "c" / "0").mkdir(parents=True)
    (tmp_path / "x" / "c" / "0" / "0").write_bytes(body + with_crc(index.tobytes()))
    for mapped in (True, False):
        shards = LocalShards(tmp_path, states(tmp_path, np.array([1, 1, 1, 0], np.uint8)), mapped=mapped)
        np.testing.assert_array_equal(shards.gather(array, np.array([2, 0, 1, 0]), True), rows[[2, 0, 1, 0]])
        shards.will_need(array, np.array([0, 2]))


def test_network_disks_are_told_by_the_mount_that_a_path_lies_on(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "1 0 8:1 / / rw - ext4 /dev/sda rw\n"
        f"2 1 0:40 / {tmp_path}/far rw shared:3 - nfs4 server:/x rw\n"
        f"3 2 8:2 / {tmp_path}/far/scratch rw - xfs /dev/nvme0 rw\n"
        f"4 1 0:41 / {tmp_path}/a\\040b rw - fuse.sshfs host:/x rw\n"
    )
    far = {name: on_network_disk(tmp_path / name, mounts) for name in ("far/cache", "far/scratch/c", "near", "a b/c")}
    assert far == {"far/cache": True, "far/scratch/c": False, "near": False, "a b/c": True}
    assert not on_network_disk(tmp_path, tmp_path / "nowhere")


def test_an_error_names_five_rows() -> None:
    assert named_rows(np.array([4, 4])) == "1 row (4)"
    assert named_rows(np.arange(1234)) == "1,234 rows (0, 1, 2, 3, 4, …)"


def test_more_files_are_asked_for_where_a_process_may_open_few() -> None:
    """In a child: a limit, once lowered for good, stays lowered."""
    from pipeline.cache.positioned import _default_open

    child = os.fork()
    if child == 0:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (256, 900))
            opened = _default_open()
            os._exit(0 if (opened, resource.getrlimit(resource.RLIMIT_NOFILE)) == (450, (900, 900)) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_fork_between_the_two_steps_of_unmapping_finds_no_map(
    whole_store: Path, ok_rows: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Addresses that are gone must not be believed to be mapped, not for a moment: to read them is SIGSEGV."""
    cache, place, seen = open_cache(whole_store, access="map", max_open=1), mapped_module._place, []

    def watched(address: int, length: int, protection: int, *others: int) -> None:
        if not protection:
            spans = cache.source.using.spans.values()  # type: ignore[attr-defined]
            of = next(span for span in spans if span.base <= address < span.base + span.length)
            seen.append(bool(of.mapped[(address - of.base) // of.room]))
        place(address, length, protection, *others)

    monkeypatch.setattr(mapped_module, "_place", watched)
    for row in (ok_rows[0], ok_rows[-1], ok_rows[0]):
        cache.read_raw([row])
    assert seen
    assert not any(seen)


@pytest.mark.parametrize("access", ["map", "read"])
def test_refresh_waits_for_whoever_reads_and_keeps_their_lock(access: str, whole_store: Path) -> None:
    """Two locks at a time would let one thread unmap what another one copies."""
    cache = open_cache(whole_store, access=access)  # type: ignore[arg-type]
    cache.read_raw([0])
    using = cache.source.using  # type: ignore[attr-defined]
    lock = using._locked()
    with lock:
        refreshing = threading.Thread(target=cache.refresh)
        refreshing.start()
        refreshing.join(0.1)
        assert using.spans if access == "map" else using.opened
    refreshing.join(10)
    assert not (using.spans if access == "map" else using.opened)
    assert using._locked() is lock


def test_files_that_the_system_does_not_map_are_read_by_position(
    whole_store: Path, ok_rows: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, cache, place = open_cache(whole_store).read_raw(ok_rows), open_cache(whole_store, access="map"), []

    def refuse(address: int, length: int, protection: int, *others: int) -> None:
        place.append(address)
        if len(place) > 2:
            raise mapped_module.NoSpan("No such device")
        real(address, length, protection, *others)

    real = mapped_module._place
    monkeypatch.setattr(mapped_module, "_place", refuse)
    found = cache.read_raw(ok_rows)
    assert isinstance(cache.source.using, PositionedShards)  # type: ignore[attr-defined]
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_a_refused_map_gives_all_others_back_but_not_its_own_addresses(
    whole_store: Path, ok_rows: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system refuses them where a process has too many: what is there must go, or nothing else works either."""
    cache, freed, spans = open_cache(whole_store, access="map"), [], []
    real_free, real_reserve, real_place = mapped_module._free, mapped_module._reserve, mapped_module._place

    def free(base: int, length: int, lost: int | None, room: int) -> None:
        freed.append((base, lost))
        real_free(base, length, lost, room)

    def place(address: int, *others: int) -> None:
        if len(spans) == 2:
            raise mapped_module.NoSpan("Cannot allocate memory")
        real_place(address, *others)

    monkeypatch.setattr(mapped_module, "_free", free)
    monkeypatch.setattr(mapped_module, "_reserve", lambda length: spans.append(real_reserve(length)) or spans[-1])
    monkeypatch.setattr(mapped_module, "_place", place)
    cache.read_raw(ok_rows)
    gc.collect()
    assert sorted(freed, key=str) == sorted([(spans[0], None), (spans[1], 0)], key=str)
    with open("/proc/self/maps") as maps:
        assert str(whole_store) not in maps.read()


@pytest.mark.parametrize("source", [MappedShards, PositionedShards])
def test_rows_beyond_4_gib_of_a_shard_are_found(source: type, tmp_path: Path) -> None:
    """A sparse file; a row that is not there moves the others, so that their offsets are kept one by one."""
    array, state = RowArray("big", (16 * 2**20,), np.dtype("i1"), ("number",)), np.ones(300, np.uint8)
    state[1] = layout.UNDECODABLE
    stride, file = array.row_bytes + 4, array.file(tmp_path, 0)
    places = {row: number * stride for number, row in enumerate(np.flatnonzero(state == layout.OK).tolist())}
    index = np.full((len(state), 2), MISSING_CHUNK, "<u8")
    for row, place in places.items():
        index[row] = place, stride
    file.parent.mkdir(parents=True)
    with open(file, "wb") as handle:
        for row in (250, 299):
            handle.seek(places[row])
            handle.write(bytes([row - 200]))
        handle.seek(len(places) * stride)
        handle.write(with_crc(index.tobytes()))
    shards = source(tmp_path, states(tmp_path, state))
    assert [int(shards.gather(array, np.array([row]), False)[0, 0]) for row in (0, 250, 299)] == [0, 50, 99]


def test_a_disk_that_gives_less_than_was_asked_for_is_asked_again(
    whole_store: Path, ok_rows: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, cache = open_cache(whole_store).read_raw(ok_rows), open_cache(whole_store, access="read")
    preadv, calls = os.preadv, []

    def short(handle: int, buffers: list[np.ndarray], at: int) -> int:
        calls.append(at)
        return preadv(handle, [next(buffer[:5] for buffer in buffers if len(buffer))], at)

    monkeypatch.setattr(os, "preadv", short)
    found = cache.read_raw(ok_rows, verify=True)
    assert len(calls) > 2 * len(ok_rows) * len(found)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("access", ["map", "read"])
def test_what_cannot_be_read_is_one_line(access: str, store: Path) -> None:
    cache = open_cache(store, access=access)  # type: ignore[arg-type]
    for file in (cache.arrays[0].file(store, 0), store / "state" / "c" / "0"):
        file.unlink()
        file.mkdir()
        with pytest.raises(PipeError, match=r"cannot read .*: Is a directory"):
            open_cache(store, access=access).read([0])  # type: ignore[arg-type]
