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
from pipeline.cache.compress import compress_cache, compressed_shard, encoder
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
    out = compress_cache(whole_store, tmp_path / "copy.zarr", codec, level, rows_per_chunk)
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


def test_attributes_states_and_small_arrays_are_the_same_and_the_digest_fits(whole_store: Path, tmp_path: Path) -> None:
    done: list[int] = []
    out = compress_cache(whole_store, tmp_path / "a" / "copy.zarr", progress=done.append)
    assert done == [8, 8, 5]
    attributes, digest, covered = read_header(out)
    plain_attributes, plain_digest, plain_covered = read_header(whole_store)
    assert attributes == plain_attributes
    assert sorted(covered) == sorted(plain_covered)
    assert digest != plain_digest
    for shard in range(3):
        np.testing.assert_array_equal(read_state(out, shard, SHARD_ROWS), read_state(whole_store, shard, SHARD_ROWS))
        file = layout.chunk_path(layout.SATURATED, shard, 2)
        assert (out / file).exists() == (whole_store / file).exists()
    for name in ("fine_basis", "fine_steps", "raw_gram_mean", layout.HELDOUT_ROWS):
        np.testing.assert_array_equal(read_small(out, name), read_small(whole_store, name))
    names = {str(file.relative_to(whole_store)) for file in whole_store.rglob("*") if file.is_file()}
    assert {str(file.relative_to(out)) for file in out.rglob("*")} >= names - {layout.LOCK}
    assert not (out / layout.TEMPORARY).exists()


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
        compress_cache(store, tmp_path / "copy.zarr")
    with pytest.raises(PipeError, match="never finished"):
        read_header(tmp_path / "copy.zarr")


def test_what_cannot_be_is_refused(whole_store: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    for out, options, words in (
        ("full", {}, "something already"),
        ("full/mine", {}, "something already"),
        ("full/mine/deeper", {}, "cannot write here"),
        ("new", {"codec": "gzip"}, "no codec gzip"),
        ("new", {"level": 10}, "level 10"),
        ("new", {"codec": "zstd", "level": 0}, "level 0"),
        ("new", {"rows_per_chunk": 3}, "chunks of 3 rows do not fill a shard"),
        ("new", {"rows_per_chunk": 0}, "chunks of 0 rows"),
    ):
        with pytest.raises(PipeError, match=words):
            compress_cache(whole_store, tmp_path / out, **options)
    assert not (tmp_path / "new").exists()
    with pytest.raises(PipeError, match="no teacher cache"):
        compress_cache(tmp_path / "nothing", tmp_path / "new")
