"""Rows of remote and compressed stores equal those of the plain one, whichever way they come."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import zarr
from cache_sample import ROWS, SHARD_ROWS
from file_server import FileServer, serve
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, ZstdCodec

from pipeline.cache import layout, remote, remote_path
from pipeline.cache.header import read_header, read_small
from pipeline.cache.layout import RowArray
from pipeline.cache.reader import open_cache
from pipeline.cache.remote import RemotePath, TensorStoreRows, check_foreign_document, is_plain
from pipeline.cache.shards import read_state
from pipeline.errors import PipeError

ASKED = np.array([19, 0, 7, 7, 2, 12, 8])
CODECS: dict[str, Any] = {
    "blosc": lambda: BloscCodec(cname="zstd", clevel=3, shuffle="shuffle"),
    "blosc_lz4": lambda: BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle"),
    "zstd": lambda: ZstdCodec(level=3),
    "gzip": lambda: GzipCodec(level=5),
}


@pytest.fixture(scope="session")
def arrays(whole_store: Path) -> list[RowArray]:
    return open_cache(whole_store).arrays


@pytest.fixture(scope="session")
def raw(whole_store: Path) -> dict[str, np.ndarray]:
    """What the plain reader gives for `ASKED`."""
    return open_cache(whole_store).read_raw(ASKED, verify=True)


@pytest.fixture(params=["tensorstore", "decoded here"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With tensorstore, and as in a process that must do without it."""
    if request.param != "tensorstore":
        monkeypatch.setattr(remote, "tensorstore_usable", lambda: False)
    return str(request.param)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FileServer]:
    with serve(tmp_path) as running:
        yield running


def document(root: Path, array: RowArray) -> dict[str, Any]:
    return json.loads((root / array.name / layout.METADATA).read_text())


def recode(plain: Path, out: Path, arrays: list[RowArray], codec: str, chunk_rows: int, sharded: bool) -> Path:
    """The row arrays of `plain`, written anew by zarr-python."""
    chain = [CODECS[codec](), Crc32cCodec()]
    for array in arrays:
        values = zarr.open_array(str(plain / array.name), mode="r")[:]
        chunk, shard = (chunk_rows, *array.row_shape), (SHARD_ROWS, *array.row_shape)
        written = zarr.create_array(
            str(out / array.name),
            shape=values.shape,
            dtype=values.dtype,
            chunks=chunk,
            shards=shard if sharded else None,
            compressors=chain,
            serializer=BytesCodec() if array.dtype.itemsize > 1 else BytesCodec(endian=None),
            fill_value=0,
            config={"write_empty_chunks": True},
        )
        written[:] = values
    return out


def assert_equal(source: TensorStoreRows, arrays: list[RowArray], raw: dict[str, np.ndarray]) -> None:
    for array in arrays:
        found = source.gather(array, ASKED)
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, raw[array.name], err_msg=array.name)
        assert source.gather(array, ASKED[:0]).shape == (0, *array.row_shape)


@pytest.mark.parametrize(("codec", "chunk_rows", "sharded"), [
    ("blosc", 1, True), ("blosc", 4, False), ("blosc_lz4", 4, True), ("zstd", 2, True), ("zstd", 1, False),
    ("gzip", 4, True), ("gzip", 8, False),
])  # fmt: skip
def test_stores_that_zarr_compressed_give_the_plain_readers_values(
    whole_store: Path, tmp_path: Path, arrays: list[RowArray], raw: Any, way: str, codec: str, chunk_rows: int,
    sharded: bool,
) -> None:  # fmt: skip
    store = recode(whole_store, tmp_path / "store", arrays, codec, chunk_rows, sharded)
    for array in arrays:
        found = document(store, array)
        check_foreign_document(found, array, ROWS)
        assert not is_plain(found, array, ROWS, SHARD_ROWS)
    assert_equal(TensorStoreRows(store), arrays, raw)


def test_plain_stores_are_read_too(whole_store: Path, arrays: list[RowArray], raw: Any, way: str) -> None:
    assert all(is_plain(document(whole_store, array), array, ROWS, SHARD_ROWS) for array in arrays)
    assert_equal(TensorStoreRows(whole_store), arrays, raw)


@pytest.mark.parametrize("compressed", [False, True])
def test_http_gives_the_plain_readers_values(
    server: FileServer, store: Path, tmp_path: Path, arrays: list[RowArray], raw: Any, way: str, compressed: bool
) -> None:
    folder = recode(store, tmp_path / "recoded", arrays, "zstd", 2, True) if compressed else store
    assert_equal(TensorStoreRows(RemotePath(f"{server.url}/{folder.name}")), arrays, raw)
    sharded = [headers for _, path, headers in server.asked if "/c/" in path]
    assert sharded
    assert all("range" in headers for headers in sharded)  # nobody fetches whole shards


def test_http_without_ranges_is_slow_but_right(
    server: FileServer, store: Path, arrays: list[RowArray], raw: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.ranges = False
    monkeypatch.setattr(remote, "tensorstore_usable", lambda: False)
    assert_equal(TensorStoreRows(RemotePath(f"{server.url}/{store.name}")), arrays, raw)


@pytest.fixture
def s3(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> FileServer:
    """The server as an S3 endpoint whose buckets are folders, without credentials."""
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ACCESS_KEY_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_NO_SIGN_REQUEST", "1")
    return server


def test_s3_gives_the_plain_readers_values(s3: FileServer, store: Path, arrays: list[RowArray], raw: Any) -> None:
    shutil.copytree(store, s3.folder / "bucket" / "some" / "teacher.zarr")
    root = RemotePath("s3://bucket/some/teacher.zarr")
    assert read_header(root) == read_header(store)
    assert_equal(TensorStoreRows(root), arrays, raw)
    assert {path.split("/")[1] for _, path, _ in s3.asked} == {"bucket"}
    assert not any("authorization" in headers for _, _, headers in s3.asked)


def test_s3_requests_are_signed_with_the_environments_key(s3: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    (s3.folder / "signed").mkdir()
    (s3.folder / "signed" / "a").write_bytes(b"x")
    monkeypatch.delenv("AWS_NO_SIGN_REQUEST")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    assert RemotePath("s3://signed/a").read_bytes() == b"x"
    signed = s3.asked[-1][2]["authorization"]
    assert "Credential=AKIDEXAMPLE/" in signed
    assert "/eu-north-1/s3/" in signed


def test_without_tensorstore_s3_goes_to_the_same_endpoint(s3: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/a", b"0123456789")
    monkeypatch.setattr(remote_path, "tensorstore_usable", lambda: False)
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url, **told: (asked.append((url, told)), (memory, url))[1])
    monkeypatch.setattr(type(memory), "_strip_protocol", staticmethod(lambda path: path.removeprefix("s3:/")))
    assert RemotePath("s3://bucket/a").read_bytes() == b"0123456789"
    assert asked == [("s3://bucket/a", {"endpoint_url": s3.url, "anon": True})]
    ranges = [("a", (None, 3)), ("a", (2, 4)), ("a", (8, 99))]
    assert remote_path.read_ranges(RemotePath("s3://bucket"), ranges) == [b"789", b"23", b"89"]
    assert remote_path.fsspec_options("memory") == {}
    memory.rm("/bucket", recursive=True)


@pytest.mark.parametrize("compressed", [False, True])
def test_fsspec_gives_the_plain_readers_values(
    whole_store: Path, tmp_path: Path, arrays: list[RowArray], raw: Any, compressed: bool
) -> None:
    folder = recode(whole_store, tmp_path / "store", arrays, "blosc", 2, True) if compressed else whole_store
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/cache/teacher.zarr", recursive=True)
    try:
        assert_equal(TensorStoreRows(RemotePath("memory://cache/teacher.zarr")), arrays, raw)
    finally:
        memory.rm("/cache", recursive=True)


def test_header_state_and_small_arrays_are_read_from_a_url(server: FileServer, store: Path) -> None:
    root = RemotePath(f"{server.url}/{store.name}/")
    assert read_header(root) == read_header(store)
    np.testing.assert_array_equal(read_state(root, 1, SHARD_ROWS), read_state(store, 1, SHARD_ROWS))
    assert read_state(root, 9, SHARD_ROWS) is None
    np.testing.assert_array_equal(read_small(root, "fine_basis"), read_small(store, "fine_basis"))
    states = [layout.chunk_path(layout.STATE, shard, 1) for shard in (0, 9, 2)]
    assert root.read_many(states) == [(store / states[0]).read_bytes(), None, (store / states[2]).read_bytes()]


def test_a_remote_path_is_as_much_of_a_path_as_reading_needs(server: FileServer, store: Path) -> None:
    root = RemotePath(f"{server.url}/{store.name}")
    assert str(root / "fine" / "zarr.json") == f"{server.url}/{store.name}/fine/zarr.json"
    assert (root / "fine/zarr.json").name == "zarr.json"
    assert (root / "zarr.json").exists()
    assert not (root / "nothing").exists()
    assert (root / "fine").is_dir()
    assert not (root / "coarse").is_dir()
    assert pickle.loads(pickle.dumps(root)) == root
    with pytest.raises(FileNotFoundError):
        (root / "nothing").read_bytes()
    for wrong in ("store/teacher.zarr", "s3:///teacher.zarr"):
        with pytest.raises(PipeError, match="not a URL"):
            RemotePath(wrong)


# --- processes --------------------------------------------------------------------------------------------------------


def test_a_process_forked_after_tensorstore_was_used_reads_without_it(
    whole_store: Path, tmp_path: Path, arrays: list[RowArray], raw: Any
) -> None:
    source = TensorStoreRows(recode(whole_store, tmp_path / "store", arrays, "blosc", 2, True))
    assert_equal(source, arrays, raw)
    assert not run("fork", lambda results: results.put(remote.tensorstore_usable()))
    found = run("fork", lambda results: results.put({array.name: source.gather(array, ASKED) for array in arrays}))
    for name, values in raw.items():
        np.testing.assert_array_equal(found[name], values)


def run(method: str, work: Callable[[Any], object]) -> Any:
    """What `work` puts into the queue in another process; it does not hang here."""
    context = multiprocessing.get_context(method)
    results = context.Queue()
    process = context.Process(target=work, args=(results,))
    process.start()
    try:
        return results.get(timeout=30)
    finally:
        process.kill()
        process.join()


def test_a_spawned_process_opens_the_store_anew(
    whole_store: Path, tmp_path: Path, arrays: list[RowArray], raw: Any
) -> None:
    source = TensorStoreRows(recode(whole_store, tmp_path / "store", arrays, "zstd", 1, True))
    source.gather(arrays[0], ASKED)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply_async(source.gather, (arrays[0], ASKED)).get(timeout=60)
    np.testing.assert_array_equal(found, raw[arrays[0].name])


def test_a_process_forked_before_anything_was_read_uses_tensorstore(whole_store: Path) -> None:
    script = """
import os, sys, numpy as np
from pathlib import Path
from pipeline.cache import remote
from pipeline.cache.reader import open_cache
cache = open_cache(sys.argv[1])
source, array = remote.TensorStoreRows(Path(sys.argv[1])), cache.arrays[0]
for _ in range(2):
    child = os.fork()
    if child == 0:
        same = np.array_equal(source.gather(array, np.array([2, 1])), cache.read_raw([2, 1])[array.name])
        os._exit(0 if same and remote.tensorstore_usable() and "tensorstore" in sys.modules else 3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    done = subprocess.run([sys.executable, "-c", script, str(whole_store)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
