"""A compressed copy holds what the plain cache holds, in standard codecs, under a digest of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import zarr
from cache_sample import ROWS, SHARD_ROWS, UNDECODABLE_ROWS

from pipeline.cache import layout
from pipeline.cache.audit import verify
from pipeline.cache.compress import Compression, compressed_shard, encoder
from pipeline.cache.copy import copy_cache
from pipeline.cache.header import read_header, read_small
from pipeline.cache.layout import RowArray
from pipeline.cache.reader import open_cache
from pipeline.cache.remote import TensorStoreRows, check_foreign_document, is_plain
from pipeline.cache.shards import MISSING_CHUNK, read_state
from pipeline.errors import PipeError

OK_ROWS = np.setdiff1d(np.arange(ROWS), UNDECODABLE_ROWS)


@pytest.mark.parametrize(("codec", "level"), [("blosc", 5), ("blosc", 0), ("zstd", 3), ("zstd", 22)])
@pytest.mark.parametrize("rows_per_chunk", [1, 4])
def test_every_reader_finds_the_plain_stores_values(
    whole_store: Path, tmp_path: Path, codec: Any, level: int, rows_per_chunk: int
) -> None:
    out, how = tmp_path / "copy.zarr", Compression(codec, level, rows_per_chunk)
    copy_cache(whole_store, out, compress=how)
    plain = open_cache(whole_store)
    raw, source = plain.read_raw(OK_ROWS), TensorStoreRows(out)
    for array in plain.arrays:
        document = json.loads((out / array.name / layout.METADATA).read_text())
        check_foreign_document(document, array, ROWS)
        assert not is_plain(document, array, ROWS, SHARD_ROWS)
        wanted = raw[array.name]
        np.testing.assert_array_equal(source.gather(array, OK_ROWS), wanted)
        opened = zarr.open_array(str(out / array.name), mode="r")
        assert opened.chunks[0] == rows_per_chunk
        np.testing.assert_array_equal(opened[:][OK_ROWS], wanted)
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{out / array.name}/"}}
        np.testing.assert_array_equal(tensorstore.open(spec, read=True).result().read().result()[OK_ROWS], wanted)


def test_attributes_states_and_small_arrays_are_the_same_and_the_digest_fits(
    whole_store_with_views: Path, tmp_path: Path
) -> None:
    whole_store, out = whole_store_with_views, tmp_path / "copy.zarr"
    copied = copy_cache(whole_store, out, compress=Compression())
    assert (copied.rows, copied.absent) == (ROWS - len(UNDECODABLE_ROWS), 0)
    attributes, digest, covered = read_header(out)
    plain_attributes, plain_digest, plain_covered = read_header(whole_store)
    assert attributes == plain_attributes
    assert sorted(covered) == sorted(name for name in plain_covered if not name.startswith("seals"))
    assert digest != plain_digest
    for shard in range(3):
        np.testing.assert_array_equal(read_state(out, shard, SHARD_ROWS), read_state(whole_store, shard, SHARD_ROWS))
        file = layout.chunk_path(layout.SATURATED, shard, 2)
        assert (out / file).read_bytes() == (whole_store / file).read_bytes()
    for name in ("fine_basis", "fine_steps", "raw_gram_mean", layout.HELDOUT_ROWS):
        np.testing.assert_array_equal(read_small(out, name), read_small(whole_store, name))
    names = {str(file.relative_to(whole_store)) for file in whole_store.rglob("*") if file.is_file()}
    expected = {name for name in names if not name.startswith("seals")} - {layout.LOCK}
    assert {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()} == expected
    assert not (out / layout.TEMPORARY).exists()


@pytest.mark.parametrize("codec", ["blosc", "zstd"])
def test_compressing_and_copying_back_gives_every_byte(
    whole_store_with_views: Path, tmp_path: Path, codec: Any
) -> None:
    copy_cache(whole_store_with_views, tmp_path / "small.zarr", compress=Compression(codec, rows_per_chunk=2))
    copy_cache(tmp_path / "small.zarr", tmp_path / "plain.zarr")
    found = {f.relative_to(tmp_path / "plain.zarr"): f.read_bytes() for f in files_of(tmp_path / "plain.zarr")}
    assert found == {f.relative_to(whole_store_with_views): f.read_bytes() for f in files_of(whole_store_with_views)}


def files_of(store: Path) -> list[Path]:
    return [file for file in store.rglob("*") if file.is_file() and file.name != layout.LOCK]


def test_rows_scales_and_views_are_chosen_and_compressed_at_once(whole_store_with_views: Path, tmp_path: Path) -> None:
    chosen: dict[str, Any] = {"rows": np.array([2, 3, 9, 19]), "scales": ["mid", "raw"], "views": ["crop2"]}
    copied = copy_cache(whole_store_with_views, tmp_path / "copy.zarr", compress=Compression("zstd", 3), **chosen)
    source, cache = open_cache(whole_store_with_views), copied.cache
    assert (cache.plain, cache.views, [s.name for s in cache.scales]) == (False, ["crop2"], ["mid", "raw"])
    assert np.flatnonzero(cache.state()).tolist() == [2, 3, 9, 19]
    for view in (None, "crop2"):
        wanted = source.read_raw([19, 2, 9], view=view)
        found = cache.read_raw([19, 2, 9], view=view)
        assert set(wanted) - set(found) == {"fine"}
        for name, values in found.items():
            np.testing.assert_array_equal(values, wanted[name])
    assert verify(tmp_path / "copy.zarr").findings == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["copy.zarr"]


def test_values_that_repeat_shrink_and_missing_rows_take_no_room() -> None:
    array = RowArray("fine", (100, 10), np.dtype("i1"), ("token", "component"))
    values = np.zeros((3, 100, 10), np.int8)
    values[1] = 5
    parts = compressed_shard(array, values, np.array([0, 1, 6]), 8, 2, encoder("zstd", 3, array.dtype))
    index = np.frombuffer(parts[-1][:-4], "<u8").reshape(4, 2)
    assert (index[[1, 2]] == MISSING_CHUNK).all()  # rows 2 to 5
    assert index[0].tolist() == [0, len(parts[0])]
    assert index[3].tolist() == [len(parts[0]), len(parts[1])]
    assert len(parts) == 3
    assert len(parts[0]) < 100


def test_a_damaged_row_is_not_copied(store: Path, tmp_path: Path, flip: Callable[[Path, int, int], None]) -> None:
    flip(store / "fine" / "c" / "0" / "0" / "0", 3, 2)
    with pytest.raises(PipeError, match="damaged rows"):
        copy_cache(store, tmp_path / "copy.zarr", compress=Compression())
    assert [entry.name for entry in tmp_path.iterdir()] == ["teacher.zarr"]


def test_what_cannot_be_is_refused(whole_store: Path, tmp_path: Path) -> None:
    for options, words in (
        ({"codec": "gzip"}, "no codec gzip"),
        ({"level": 10}, "level 10"),
        ({"codec": "zstd", "level": 0}, "level 0"),
        ({"rows_per_chunk": 3}, "chunks of 3 rows do not fill a shard"),
        ({"rows_per_chunk": 0}, "chunks of 0 rows"),
    ):
        with pytest.raises(PipeError, match=words):
            copy_cache(whole_store, tmp_path / "new", compress=Compression(**options))
    assert not list(tmp_path.iterdir())
