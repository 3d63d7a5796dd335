"""Remote and compressed stores that are damaged, and servers that are not there: one clear line each, and soon."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_sample import ROWS, SHARD_ROWS
from file_server import serve

from pipeline.cache import layout, remote, remote_path
from pipeline.cache.compress import Compression
from pipeline.cache.copy import copy_cache
from pipeline.cache.header import read_header
from pipeline.cache.layout import RowArray
from pipeline.cache.remote import RemotePath, TensorStoreRows, check_foreign_document
from pipeline.errors import PipeError

Flip = Callable[[Path, int, int], None]
ALL = np.array([0, 1, 2, 5, 12])


@pytest.fixture
def copy(whole_store: Path, tmp_path: Path) -> Path:
    """A compressed copy with two rows a chunk, to damage."""
    copy_cache(whole_store, tmp_path / "copy.zarr", compress=Compression("zstd", 3, rows_per_chunk=2))
    return tmp_path / "copy.zarr"


@pytest.fixture
def array(copy: Path) -> RowArray:
    return RowArray("fine", (9, 4), np.dtype("i1"), ("token", "component"))


@pytest.fixture(params=["tensorstore", "decoded here", "http, tensorstore", "http, decoded here"])
def source(
    request: pytest.FixtureRequest, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[TensorStoreRows]:
    if "decoded here" in request.param:
        monkeypatch.setattr(remote, "tensorstore_usable", lambda: False)
    with serve(tmp_path) as server:
        root = RemotePath(f"{server.url}/{copy.name}") if "http" in request.param else copy
        yield TensorStoreRows(root)


def refused(source: TensorStoreRows, array: RowArray, rows: np.ndarray = ALL) -> str:
    """The one line, which names the array."""
    with pytest.raises(PipeError) as caught:
        source.gather(array, rows)
    line = str(caught.value)
    assert "\n" not in line
    assert "fine" in line
    return line


def test_a_flipped_bit_names_the_rows_of_its_chunk(
    source: TensorStoreRows, copy: Path, array: RowArray, flip: Flip
) -> None:
    file = array.file(copy, 0)
    index = np.frombuffer(file.read_bytes()[-(16 * SHARD_ROWS // 2 + 4) : -4], "<u8").reshape(-1, 2)
    flip(file, int(index[0].sum()) - 6, 3)  # within the values of rows 0 and 1, before their checksum
    line = refused(source, array)
    assert "damaged rows" in line
    assert "2 rows (0, 1)" in line
    assert source.gather(array, np.array([2, 5, 12])).shape == (3, 9, 4)  # the others can be read


def test_a_flipped_bit_of_the_index_is_found(source: TensorStoreRows, copy: Path, array: RowArray, flip: Flip) -> None:
    file = array.file(copy, 0)
    flip(file, file.stat().st_size - 30, 0)
    line = refused(source, array)
    assert "damaged" in line


def test_a_shard_that_was_cut_short_is_refused(source: TensorStoreRows, copy: Path, array: RowArray) -> None:
    file = array.file(copy, 0)
    whole = file.read_bytes()
    for left in (len(whole) - 5, 40, 0):
        source.forget()
        file.write_bytes(whole[:left])
        assert "rows" in refused(source, array)
    source.forget()
    file.write_bytes(whole)
    assert source.gather(array, ALL).shape == (len(ALL), *array.row_shape)


def test_a_missing_shard_is_never_read_as_zeros(source: TensorStoreRows, copy: Path, array: RowArray) -> None:
    array.file(copy, 0).unlink()
    line = refused(source, array)
    assert "missing" in line
    assert "4 rows (0, 1, 2, 5)" in line


def test_a_missing_chunk_is_never_read_as_zeros(whole_store: Path, source: TensorStoreRows, array: RowArray) -> None:
    plain = TensorStoreRows(whole_store)  # rows 3 and 20 have no chunk
    with pytest.raises(PipeError, match=r"fine, 1 row \(3\)"):
        plain.gather(array, np.array([2, 3]))


def test_a_server_that_is_down_fails_in_seconds(tmp_path: Path, array: RowArray, monkeypatch: Any) -> None:
    with serve(tmp_path) as server:
        url = server.url
    for usable in (True, False):
        monkeypatch.setattr(remote, "tensorstore_usable", lambda usable=usable: usable)
        start = time.monotonic()
        line = refused(TensorStoreRows(RemotePath(f"{url}/copy.zarr")), array)
        assert "cannot read" in line
        assert time.monotonic() - start < 10
    with pytest.raises(PipeError, match=r"cannot read the cache: .*refused"):
        read_header(RemotePath(f"{url}/copy.zarr"))


def test_a_server_that_never_answers_is_given_up(
    copy: Path, array: RowArray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_path, "SILENCE", 0.5)
    with serve(tmp_path) as server:
        root = RemotePath(f"{server.url}/{copy.name}")
        for usable in (True, False):
            monkeypatch.setattr(remote, "tensorstore_usable", lambda usable=usable: usable)
            source = TensorStoreRows(root, timeout=1.0)
            source.gather(array, ALL)
            source.forget()
            server.silent, start = True, time.monotonic()
            refused(source, array)
            assert time.monotonic() - start < 5
            server.silent = False


@pytest.mark.parametrize(("status", "words"), [(403, "Forbidden"), (500, "Internal Server Error")])
def test_an_error_of_the_server_is_named(copy: Path, array: RowArray, tmp_path: Path, status: int, words: str) -> None:
    with serve(tmp_path) as server:
        server.status = status
        root = RemotePath(f"{server.url}/{copy.name}")
        with pytest.raises(OSError, match=f"{status} {words}") as caught:
            (root / "zarr.json").read_bytes()
        assert not isinstance(caught.value, FileNotFoundError)
        assert caught.value.strerror
        assert words in refused(TensorStoreRows(root), array)


def test_a_store_that_is_not_there_is_refused(tmp_path: Path, array: RowArray) -> None:
    with serve(tmp_path) as server:
        root = RemotePath(f"{server.url}/nothing.zarr")
        with pytest.raises(PipeError, match="there is no teacher cache"):
            read_header(root)
        refused(TensorStoreRows(root), array)


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_path, "tensorstore_usable", lambda: False)
    with pytest.raises(PipeError, match="s3fs"):
        RemotePath("s3://bucket/key").read_bytes()
    with pytest.raises(PipeError, match="nosuch"):
        RemotePath("nosuch://bucket/key").read_bytes()


def test_zarr_json_must_agree_with_the_caches_attributes(copy: Path, array: RowArray) -> None:
    found = json.loads((copy / array.name / layout.METADATA).read_text())
    check_foreign_document(found, array, ROWS)
    inner = found["codecs"][0]["configuration"]
    bare = {"name": "sharding_indexed", "configuration": inner | {"codecs": inner["codecs"][:-1]}}
    for key, value, words in (
        ("shape", [ROWS, 9, 5], "`shape`"),
        ("data_type", "uint8", "`data_type` of the array fine is 'uint8', not 'int8'"),
        ("codecs", [bare], "no checksums"),
        ("codecs", None, "no checksums"),
    ):
        with pytest.raises(PipeError, match=words):
            check_foreign_document(found | {key: value}, array, ROWS)


def test_codecs_that_only_tensorstore_reads_are_refused_elsewhere(
    copy: Path, array: RowArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = copy / array.name / layout.METADATA
    document = json.loads(file.read_text())
    document["codecs"][0]["configuration"]["codecs"].insert(
        0, {"name": "transpose", "configuration": {"order": [0, 2, 1]}}
    )
    file.write_text(json.dumps(document))
    monkeypatch.setattr(remote, "tensorstore_usable", lambda: False)
    with pytest.raises(PipeError, match="tensorstore only"):
        TensorStoreRows(copy).gather(array, ALL)


def test_values_of_another_type_are_refused(copy: Path, whole_store: Path, array: RowArray) -> None:
    other = RowArray("fine", (9, 4), np.dtype("u1"), ("token", "component"))
    with pytest.raises(PipeError, match=r"int8 .*not uint8"):
        TensorStoreRows(copy).gather(other, ALL)
