"""Stores whose files are not ours to examine, compressed or remote: what can be checked is, the rest is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from cache_sample import ROWS, SHARD_ROWS, UNDECODABLE_ROWS
from file_server import FileServer, serve
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec

from pipeline.cache import layout, remote
from pipeline.cache.audit import verify
from pipeline.cache.compress import Compression
from pipeline.cache.copy import copy_cache
from pipeline.cache.findings import Report
from pipeline.cache.info import cache_info, info_lines
from pipeline.cache.reader import open_cache
from pipeline.cache.shards import with_crc
from pipeline.cache.stats import cache_stats
from pipeline.errors import PipeError

OK_ROWS = np.setdiff1d(np.arange(ROWS), UNDECODABLE_ROWS)
SOUND = {"ok": ROWS - 2, "undecodable": 2, "absent": 0}


@pytest.fixture(scope="session")
def whole_compressed(whole_store_with_views: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compressed") / "teacher.zarr"
    copy_cache(whole_store_with_views, out, compress=Compression("zstd", 3, rows_per_chunk=2))
    return out


@pytest.fixture
def compressed(whole_compressed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole_compressed, tmp_path / "teacher.zarr"))


@pytest.fixture
def server(tmp_path: Path, whole_store_with_views: Path) -> Iterator[FileServer]:
    shutil.copytree(whole_store_with_views, tmp_path / "served" / "teacher.zarr")
    with serve(tmp_path / "served") as running:
        yield running


def said(report: Report) -> list[tuple[str, tuple[int, ...]]]:
    return [(finding.file, finding.rows) for finding in report.damage]


def flip(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << (bit % 8)
    file.write_bytes(data)


def contents(store: Path) -> dict[str, bytes]:
    files = [file for file in store.rglob("*") if file.is_file() and file.name != layout.LOCK]
    return {str(file.relative_to(store)): file.read_bytes() for file in files}


# ---- compressed ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["blosc", "zstd"])
@pytest.mark.parametrize("way", ["tensorstore", "decoded here"])
def test_a_sound_compressed_store_is_sound_and_its_want_of_seals_is_said(
    whole_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: Any, way: str
) -> None:
    if way != "tensorstore":
        monkeypatch.setattr(remote, "tensorstore_usable", lambda: False)
    copy_cache(whole_store, tmp_path / "t", compress=Compression(codec))
    report = verify(tmp_path / "t")
    assert (report.findings, report.rows, report.shards, report.repairable) == ([], SOUND, 3, False)
    assert len(report.notes) == 1
    assert "compressed copy" in report.notes[0]
    row_bytes = sum(array.row_bytes + 4 for array in open_cache(whole_store).arrays)
    assert report.bytes_read == len(OK_ROWS) * row_bytes + 3 * (SHARD_ROWS + 4 + 3 * 4 * SHARD_ROWS + 4)


def test_every_flipped_bit_of_a_compressed_store_is_found(compressed: Path) -> None:
    rng = np.random.default_rng(3)
    files = sorted(f for f in compressed.rglob("*") if f.is_file() and f.name != layout.LOCK)
    missed, unnamed = [], []
    for file in files:
        name, good = str(file.relative_to(compressed)), file.read_bytes()
        for bit in rng.choice(8 * len(good), 1).tolist():
            flip(file, bit)
            damage = verify(compressed, workers=0).damage
            file.write_bytes(good)
            if not damage:
                missed.append((name, bit))
            elif name not in {f.file for f in damage} and not name.endswith(layout.METADATA):
                unnamed.append((name, bit))
    assert (missed, unnamed) == ([], [])
    assert verify(compressed).findings == []


@pytest.mark.parametrize("way", ["tensorstore", "decoded here"])
def test_damaged_rows_are_named_by_array_and_row_and_hide_none(
    compressed: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    if way != "tensorstore":
        monkeypatch.setattr(remote, "tensorstore_usable", lambda: False)
    index = 4 * 16 + 4  # two rows a chunk
    flip(compressed / "fine/c/0/0/0", 8 * 3)  # in the first chunk: rows 0 and 1
    data = (compressed / "views/crop1/raw/c/1/0/0").read_bytes()
    flip(compressed / "views/crop1/raw/c/1/0/0", 8 * (len(data) - index) - 9)  # in the last one: rows 14 and 15
    flip(compressed / "global/c/2/0", 8 * ((compressed / "global/c/2/0").stat().st_size - 10))  # in the index
    (compressed / "mid/c/1/0/0").unlink()
    flip(compressed / "state/c/2", 5)
    report = verify(compressed)
    assert said(report) == [
        ("fine/c/0/0/0", (0, 1)),
        ("mid/c/1/0/0", tuple(range(8, 16))),
        ("views/crop1/raw/c/1/0/0", (14, 15)),
        ("state/c/2", ()),  # which rows there should be in this shard, nothing says
    ]
    (compressed / "state/c/2").write_bytes(with_crc(bytes([1, 1, 1, 1, 2, 0, 0, 0])))
    assert ("global/c/2/0", (16, 17, 18, 19)) in said(verify(compressed))


def test_stray_files_and_damaged_metadata_of_a_compressed_store_are_named(compressed: Path) -> None:
    (compressed / "fine/c/0/0/0.bak").write_text("mine")
    (compressed / "raw/zarr.json").write_text("{}")
    text = (compressed / "state/zarr.json").read_text()
    (compressed / "state/zarr.json").write_text(text.replace('"uint8"', '"uint9"'))
    report = verify(compressed)
    named = {finding.file for finding in report.damage}
    damaged = {"fine/c/0/0/0.bak", "raw/zarr.json", "state/zarr.json", "digest.json"}
    assert named - damaged == {f"raw/c/{shard}/0/0" for shard in range(3)}  # of which nobody knows the codecs any more
    assert damaged <= named
    assert "compressed copy" in report.notes[0]


def test_metadata_that_another_program_wrote_is_compared_by_what_must_hold(whole_store: Path, tmp_path: Path) -> None:
    """zarr-python's own form of zarr.json, chunks of three rows without shards; and one without checksums."""

    def rewrite(name: str, *codecs: Any) -> Path:
        store = Path(shutil.copytree(whole_store, tmp_path / name))
        for array in open_cache(whole_store).arrays:
            values = np.zeros((ROWS, *array.row_shape), array.dtype)
            values[OK_ROWS] = open_cache(whole_store).read_raw(OK_ROWS)[array.name]
            shutil.rmtree(store / array.name)
            made = zarr.create_array(
                store / array.name, shape=values.shape, chunks=(3, *array.row_shape), dtype=array.dtype,
                serializer=BytesCodec(), compressors=codecs, filters=None, config={"write_empty_chunks": True},
            )  # fmt: skip
            made[:] = values
        redigest(store)
        return store

    store = rewrite("good", ZstdCodec(level=1), Crc32cCodec())
    assert verify(store).findings == []
    flip(store / "fine/c/2/0/0", 40)
    assert said(verify(store)) == [("fine/c/0/0/0", (6, 7)), ("fine/c/1/0/0", (8,))]  # of one chunk, in two shards
    assert "`codecs`" in verify(rewrite("bad", ZstdCodec(level=1))).damage[0].what


def redigest(store: Path) -> None:
    files = json.loads((store / "digest.json").read_text())["files"]
    (store / "digest.json").write_bytes(layout.json_bytes({"files": files, "sha256": layout.digest_of(store, files)}))


# ---- remote ----------------------------------------------------------------------------------------------------------


def test_a_sound_remote_store_is_sound_and_what_was_not_looked_at_is_said(server: FileServer) -> None:
    report = verify(f"{server.url}/teacher.zarr")
    assert (report.findings, report.rows, report.shards, report.repairable) == ([], SOUND, 3, False)
    assert ["over the network" in note for note in report.notes] == [True]


def test_damage_to_a_remote_store_is_named_by_array_and_row(server: FileServer, tmp_path: Path) -> None:
    store = tmp_path / "served" / "teacher.zarr"
    flip(store / "views/crop2/fine/c/1/0/0", 40)
    (store / "raw/c/0/0/0").unlink()
    flip(store / "fine_basis/c/0/0", 40)
    flip(store / "saturated/c/2/0", 3)
    assert said(verify(f"{server.url}/teacher.zarr")) == [
        ("fine_basis/c/0/0", ()),
        ("digest.json", ()),
        ("raw/c/0/0/0", tuple(row for row in range(8) if row != 3)),
        ("views/crop2/fine/c/1/0/0", (8,)),
        ("saturated/c/2/0", ()),
    ]


def test_exchanged_shards_of_a_remote_store_are_found(sample_with_views: Any, tmp_path: Path) -> None:
    state = np.full(ROWS, layout.OK, np.uint8)
    sample = type(sample_with_views)(
        sample_with_views.identity, sample_with_views.fit, state, sample_with_views.features, sample_with_views.views
    )
    store = sample.build(tmp_path / "served" / "t")
    one, other = store / "views/crop1/geometry/c/0/0", store / "views/crop1/geometry/c/1/0"
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)
    with serve(tmp_path / "served") as running:
        found = said(verify(f"{running.url}/t"))
    assert found == [(f"views/crop1/geometry/c/{i}/0", tuple(range(8 * i, 8 * i + 8))) for i in (0, 1)]


def test_a_remote_copy_in_part_is_sound(whole_store: Path, tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    copy_cache(whole_store, tmp_path / "served" / "t", rows=np.arange(2, 5))
    with serve(tmp_path / "served") as running:
        report = verify(f"{running.url}/t")
    assert (report.findings, report.rows) == ([], {"ok": 2, "undecodable": 1, "absent": 18})


def test_info_and_stats_of_a_remote_store_are_those_of_the_local_one(
    server: FileServer, whole_store_with_views: Path
) -> None:
    url = f"{server.url}/teacher.zarr"
    info, wanted = cache_info(url), cache_info(whole_store_with_views)
    differing = {key for key in wanted if info[key] != wanted[key]}
    assert differing == {"path", "bytes", "shards"}
    assert info["shards"] == wanted["shards"] | {"unfinished": None}
    assert info["bytes"] == wanted["bytes"] | {"on_disk": None, "files": None, "an_image_on_disk": None}
    assert any("not known of a remote store" in line for line in info_lines(info))
    assert cache_stats(open_cache(url), view="crop1") == cache_stats(open_cache(whole_store_with_views), view="crop1")


def test_a_remote_cache_is_fetched_to_the_byte(
    server: FileServer, whole_store_with_views: Path, tmp_path: Path
) -> None:
    copy_cache(f"{server.url}/teacher.zarr", tmp_path / "copy.zarr")
    assert contents(tmp_path / "copy.zarr") == contents(whole_store_with_views)
    rows = np.array([4, 20])
    cache = copy_cache(
        f"{server.url}/teacher.zarr", tmp_path / "part.zarr", rows=rows, scales=["raw"], views=["crop1"]
    ).cache
    assert (np.flatnonzero(cache.state()).tolist(), cache.views) == ([4, 20], ["crop1"])
    assert verify(tmp_path / "part.zarr").findings == []


def test_a_server_that_is_gone_is_one_line_and_no_damage(server: FileServer, tmp_path: Path) -> None:
    url = f"{server.url}/teacher.zarr"
    server.status = 403
    for work in (verify, cache_info, lambda place: copy_cache(place, tmp_path / "copy.zarr")):
        with pytest.raises(PipeError, match=r"403|cannot read"):
            work(url)
    assert not (tmp_path / "copy.zarr").exists()
    server.status = 0
    with pytest.raises(PipeError, match="there is no teacher cache"):
        verify(f"{server.url}/nothing.zarr")
