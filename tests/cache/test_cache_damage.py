"""A store that was damaged is refused with one clear line; it never yields wrong numbers or kills the process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cache_sample import COMPONENTS, SHARD_ROWS

from pipeline.cache import layout
from pipeline.cache.reader import open_cache
from pipeline.cache.shards import assemble_shard, index_bytes, with_crc, without_crc
from pipeline.errors import PipeError

Flip = Callable[[Path, int, int], None]
FIRST_SHARD = "fine/c/0/0/0"
FINE_ROW_BYTES = 9 * COMPONENTS


def test_every_flipped_bit_of_a_zarr_json_is_noticed(store: Path, flip: Flip) -> None:
    file = store / "fine" / "zarr.json"
    length = file.stat().st_size
    for byte in range(0, length, 7):
        flip(file, byte, byte % 8)
        with pytest.raises(PipeError):
            open_cache(store)
        flip(file, byte, byte % 8)
    open_cache(store)


@pytest.mark.parametrize(
    "name",
    ["zarr.json", "state/zarr.json", "global/zarr.json", "fine_steps/c/0", "fine_basis/c/0/0", "fine_gram_mean/c/0/0",
     "global_mean/c/0", "heldout_rows/c/0"],
)  # fmt: skip
def test_a_flipped_bit_in_anything_the_digest_covers_is_noticed(store: Path, flip: Flip, name: str) -> None:
    flip(store / name, 3, 5)
    with pytest.raises(PipeError, match="digest does not fit"):
        open_cache(store)


def test_every_flipped_bit_of_the_digest_file_is_noticed(store: Path, flip: Flip) -> None:
    file = store / "digest.json"
    for byte in range(0, file.stat().st_size, 5):
        flip(file, byte, byte % 8)
        with pytest.raises(PipeError):
            open_cache(store)
        flip(file, byte, byte % 8)


def test_an_array_that_the_digest_leaves_out_is_refused(store: Path) -> None:
    recorded = json.loads((store / "digest.json").read_text())
    files = [name for name in recorded["files"] if name != "fine/zarr.json"]
    (store / "digest.json").write_text(json.dumps({"files": files, "sha256": layout.digest_of(store, files)}))
    with pytest.raises(PipeError, match=r"does not cover fine/zarr\.json"):
        open_cache(store)


def _rewrite_metadata(store: Path, name: str, change: Callable[[dict], object]) -> None:
    """Change an array's zarr.json, and make the digest fit."""
    document = json.loads((store / name / "zarr.json").read_text())
    change(document)
    (store / name / "zarr.json").write_text(json.dumps(document))
    files = json.loads((store / "digest.json").read_text())["files"]
    (store / "digest.json").write_text(json.dumps({"files": files, "sha256": layout.digest_of(store, files)}))


def test_an_array_of_another_shape_is_refused_even_with_a_fitting_digest(store: Path) -> None:
    _rewrite_metadata(store, "fine", lambda document: document["shape"].__setitem__(0, 22))
    with pytest.raises(PipeError, match="`shape` of the array fine"):
        open_cache(store)


def test_codecs_that_the_bytes_do_not_have_are_one_line_when_they_are_read(store: Path) -> None:
    """Other codecs are allowed (compressed copies have them); bytes that do not decode are damage."""
    zstd = {"name": "zstd", "configuration": {"level": 3, "checksum": False}}
    codecs: Callable[[dict], list] = lambda document: document["codecs"][0]["configuration"]["codecs"]  # noqa: E731
    _rewrite_metadata(store, "fine", lambda document: codecs(document).insert(1, zstd))
    cache = open_cache(store)
    assert not cache.plain
    with pytest.raises(PipeError, match="damaged rows: fine"):
        cache.read([0])


def test_a_version_of_the_future_is_refused(store: Path) -> None:
    document = json.loads((store / "zarr.json").read_text())
    document["attributes"]["version"] = layout.VERSION + 1
    (store / "zarr.json").write_text(json.dumps(document))
    files = json.loads((store / "digest.json").read_text())["files"]
    (store / "digest.json").write_text(json.dumps({"files": files, "sha256": layout.digest_of(store, files)}))
    with pytest.raises(PipeError, match="version 1"):
        open_cache(store)


def test_no_cache_and_an_unfinished_one_say_what_to_run(store: Path, tmp_path: Path) -> None:
    with pytest.raises(PipeError, match=r"there is no teacher cache.*extract-teacher"):
        open_cache(tmp_path / "nothing")
    (store / "digest.json").unlink()
    with pytest.raises(PipeError, match="never finished"):
        open_cache(store)


def test_a_flipped_bit_in_a_row_is_found_when_rows_are_verified(store: Path, flip: Flip) -> None:
    flip(store / FIRST_SHARD, 2 * (FINE_ROW_BYTES + 4) + 1, 6)  # in the bytes of row 2
    for rows in ([0, 1, 9], [4]):
        open_cache(store).read(rows, verify=True)
    with pytest.raises(PipeError, match=r"damaged rows, checksums do not fit: 1 row \(2\)"):
        open_cache(store).read([9, 2, 1], verify=True)
    with pytest.raises(PipeError, match="damaged rows"):
        open_cache(store, verify=True).read([2])


def test_a_flipped_bit_in_a_rows_checksum_is_found(store: Path, flip: Flip) -> None:
    flip(store / FIRST_SHARD, FINE_ROW_BYTES + 1, 0)
    with pytest.raises(PipeError, match=r"1 row \(0\)"):
        open_cache(store).read([0], verify=True)


def test_every_flipped_bit_of_a_shard_index_is_found_without_asking(store: Path, flip: Flip) -> None:
    file = store / FIRST_SHARD
    size = file.stat().st_size
    for byte in range(size - index_bytes(SHARD_ROWS), size, 9):
        flip(file, byte, byte % 8)
        with pytest.raises(PipeError, match="checksum"):
            open_cache(store).read([0])
        flip(file, byte, byte % 8)


@pytest.mark.parametrize("keep", [0, 3, 100, -1])
def test_a_shard_cut_short_is_an_error_and_no_crash(store: Path, keep: int) -> None:
    file = store / FIRST_SHARD
    data = file.read_bytes()
    file.write_bytes(data[:keep])
    with pytest.raises(PipeError, match="cut short") as caught:
        open_cache(store).read([0])
    assert FIRST_SHARD in str(caught.value)


def test_a_shard_that_lost_its_middle_is_an_error(store: Path) -> None:
    file = store / "global" / "c" / "0" / "0"
    data = file.read_bytes()
    file.write_bytes(data[:5] + data[9:] + b"1234")
    with pytest.raises(PipeError, match="checksum"):
        open_cache(store).read([0])


def test_an_index_that_points_outside_the_shard_is_refused(store: Path) -> None:
    file = store / FIRST_SHARD
    data = file.read_bytes()
    size = index_bytes(SHARD_ROWS)
    entries = np.frombuffer(without_crc(data[-size:], file), "<u8").reshape(-1, 2).copy()
    entries[0, 0] = len(data)
    file.write_bytes(data[:-size] + with_crc(entries.tobytes()))
    with pytest.raises(PipeError, match="points outside"):
        open_cache(store).read([0])


def test_a_row_marked_ok_without_a_chunk_raises(store: Path) -> None:
    values = np.ones((SHARD_ROWS, 9, COMPONENTS), np.int8)
    present = np.ones(SHARD_ROWS, bool)
    present[5] = False
    chunks, index = assemble_shard(values, present)
    (store / FIRST_SHARD).write_bytes(chunks.tobytes() + index)
    with pytest.raises(PipeError, match="marked ok but have no chunk"):
        open_cache(store).read([0])


@pytest.mark.parametrize("damage", [b"", b"\x01" * 12, b"\x01" * 8])
def test_a_damaged_state_chunk_is_refused(store: Path, damage: bytes) -> None:
    (store / "state" / "c" / "1").write_bytes(damage)
    with pytest.raises(PipeError, match="checksum"):
        open_cache(store).state()


def test_a_shard_may_hold_its_chunks_in_any_order(store: Path) -> None:
    """Other writers may; Zarr says nothing about the order of chunks in a shard."""
    expected = open_cache(store).read_raw([0, 1, 2])["fine"]
    data = (store / FIRST_SHARD).read_bytes()
    size, stride = index_bytes(SHARD_ROWS), FINE_ROW_BYTES + 4
    entries = np.frombuffer(data[-size:-4], "<u8").reshape(-1, 2).copy()
    entries[[0, 2]] = entries[[2, 0]]
    body = data[2 * stride : 3 * stride] + data[stride : 2 * stride] + data[:stride] + data[3 * stride : -size]
    (store / FIRST_SHARD).write_bytes(body + with_crc(entries.tobytes()))
    np.testing.assert_array_equal(open_cache(store).read_raw([0, 1, 2], verify=True)["fine"], expected)
