"""Manifests too big for memory: rows are read where they lie in the file, and whatever happens to that part of it,
what is read stays what Parquet holds."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import pickle
import resource
import subprocess
import sys
import textwrap
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from manifest_tables import random_table
from tar_samples import samples, write_tar

from pipeline.data import mapped
from pipeline.data.index import build_manifest
from pipeline.data.manifest import (
    METADATA_KEY,
    SCHEMA,
    Manifest,
    Metadata,
    Source,
    SplitRule,
    read_manifest,
    write_manifest,
)
from pipeline.errors import PipeError

METADATA = Metadata(root="/data", val_root=None, rule=SplitRule(0.01, False), sources=[])
ROWS = 3_000


@pytest.fixture(params=["mapped", "written before", "written elsewhere"])
def both(request, tmp_path, monkeypatch) -> tuple[Manifest, pa.Table]:
    """A manifest of several batches, and its table: as it is written, and in one of the forms that must open too."""
    monkeypatch.setattr(mapped, "GROUP_ROWS", 700)
    table = random_table(ROWS)
    path = tmp_path / "manifest.parquet"
    if request.param == "written before":  # a plain Parquet file
        labelled = table.replace_schema_metadata({METADATA_KEY: METADATA.to_json().encode()})
        pq.write_table(labelled, path, compression="zstd", row_group_size=700)
    else:
        write_manifest(path, table, METADATA)
    if request.param == "written elsewhere":  # by a program that keeps metadata it does not know
        pq.write_table(pq.read_table(path), path, row_group_size=700)
    return read_manifest(path), table


def test_only_what_was_written_here_is_mapped(both, request):
    manifest, table = both
    assert manifest.is_mapped == ("[mapped]" in request.node.name)
    assert table.column("key").num_chunks > 1
    assert {len(captions) for captions in table.column("captions").to_pylist()} == {0, 1, 2}


def test_every_column_row_and_caption_is_what_parquet_holds(both):
    manifest, table = both
    rng = np.random.default_rng(1)
    some = rng.integers(0, ROWS, 500)
    stored = pq.read_table(manifest.path)
    assert stored.equals(table)
    for name in set(SCHEMA.names) - {"captions"}:
        values = stored.column(name).to_pylist()
        assert manifest.column(name).tolist() == values, name
        assert manifest.column(name, some).tolist() == [values[row] for row in some.tolist()], name
        assert manifest.column(name, some[:0]).dtype == manifest.column(name).dtype
    rows = stored.to_pylist()
    for row in [0, 699, 700, ROWS - 1, *some.tolist()]:
        assert asdict(manifest.record(row)) | {"captions": manifest.captions(row)} == rows[row]


def test_selections_and_counts_are_those_of_a_loop(both):
    manifest, table = both
    rows = table.to_pylist()
    wanted = [r["row"] for r in rows if r["split"] == "train" and r["status"] == "ok"]
    assert manifest.rows("train").tolist() == wanted
    for split in ("train", "val"):
        for status, count in manifest.summary()[split].items():
            assert count == sum(r["split"] == split and r["status"] == status for r in rows)
    assert sum(sum(statuses.values()) for statuses in manifest.summary().values()) == ROWS


def test_the_fingerprint_is_the_digest_of_json(both):
    manifest, table = both
    identities = [[r["row"], r["source"], r["key"], r["sha256"]] for r in table.to_pylist()]
    for count in (1, 699, 701, ROWS, ROWS + 5):
        text = "".join(json.dumps(identity, ensure_ascii=False) + ", " for identity in identities[:count])
        assert manifest.fingerprint(count) == hashlib.sha256(text.encode()).hexdigest()
    assert manifest.fingerprint() == manifest.fingerprint(ROWS)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_rows_are_read_in_other_processes_after_and_before_the_first_read(both, method):
    manifest, table = both
    rows = list(range(0, ROWS, 131))
    expected = [table.column("captions")[row].as_py() for row in rows]
    for _ in range(2):
        assert len(pickle.dumps(manifest)) < 1_000
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(method)) as pool:
            assert list(pool.map(manifest.captions, rows)) == expected
            assert [r.key for r in pool.map(manifest.record, rows)] == [f"{row:09d}" for row in rows]
        assert [manifest.captions(row) for row in rows] == expected


def test_rows_outside_are_refused(both):
    manifest, _ = both
    for rows in ([-1], [0, ROWS]):
        with pytest.raises(IndexError, match=f"table of {ROWS} rows"):
            manifest.column("key", np.array(rows))


def test_an_empty_manifest_opens(tmp_path):
    write_manifest(tmp_path / "m.parquet", SCHEMA.empty_table(), METADATA)
    manifest = read_manifest(tmp_path / "m.parquet")
    assert (len(manifest), manifest.rows().tolist(), manifest.summary()) == (0, [], {"train": {}, "val": {}})
    assert manifest.column("key").tolist() == manifest.column("key", np.arange(0)).tolist() == []
    assert manifest.fingerprint() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # of nothing


def test_a_bit_that_flips_in_the_mapped_part_changes_nothing_that_is_read(tmp_path, caplog):
    table = random_table(40, source_rows=7)
    path = tmp_path / "m.parquet"
    write_manifest(path, table, METADATA)
    place = json.loads(pq.read_metadata(path).metadata[mapped.STREAM_KEY])
    good, rows = path.read_bytes(), table.to_pylist()
    rng = np.random.default_rng(2)
    told = 0
    for at in rng.integers(8 * place["offset"], 8 * (place["offset"] + place["bytes"]), 300).tolist():
        damaged = bytearray(good)
        damaged[at // 8] ^= 1 << at % 8
        path.with_suffix(".new").write_bytes(damaged)  # as all writers here do: never over a file that is mapped
        path.with_suffix(".new").rename(path)
        caplog.clear()
        manifest = read_manifest(path)
        assert [asdict(manifest.record(i)) | {"captions": manifest.captions(i)} for i in range(40)] == rows, at
        told += any("damaged" in message for message in caplog.messages)
    assert told > 200  # the others hit padding


def test_a_full_disk_leaves_the_old_manifest_and_one_line(tmp_path):
    path = tmp_path / "m.parquet"
    write_manifest(path, random_table(50), METADATA)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(PipeError, match="cannot write"):
            write_manifest(path, random_table(ROWS), METADATA)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_big_manifest_takes_little_memory(tmp_path):
    """All columns of these rows are 60 MB and more as Arrow arrays; mapped, they are no memory of the process."""
    path = tmp_path / "m.parquet"
    write_manifest(path, random_table(200_000), METADATA)
    script = """
        import sys
        from pathlib import Path
        import numpy as np
        from pipeline.data.manifest import read_manifest

        def anonymous():
            return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

        before = anonymous()
        manifest = read_manifest(Path(sys.argv[1]))
        for row in np.random.default_rng(0).integers(0, len(manifest), 1_000).tolist():
            manifest.captions(row), manifest.record(row)
        assert "torch" not in sys.modules and "dask" not in sys.modules
        print(anonymous() - before)
    """
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux's /proc")
    command = [sys.executable, "-c", textwrap.dedent(script), str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 30_000  # kB


def test_indexing_again_gives_an_old_manifest_the_mapped_part(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    write_tar(tmp_path / "tars" / "0.tar", samples(0, 20))
    path = tmp_path / "m.parquet"
    build_manifest(str(tmp_path / "tars"), path, workers=1)
    new = path.read_bytes()
    table = pq.read_table(path)
    old_metadata = {METADATA_KEY: table.schema.metadata[METADATA_KEY]}
    pq.write_table(table.replace_schema_metadata(old_metadata), path)
    assert not read_manifest(path).is_mapped
    build_manifest(str(tmp_path / "tars"), path, workers=1)
    assert read_manifest(path).is_mapped
    assert path.read_bytes() == new
    assert not caplog.messages  # an old manifest is no damage


def test_what_it_says_of_its_sources_has_a_checksum(tmp_path):
    """A path or a size with a flipped bit is no other path; and whatever is broken is one line."""
    path = tmp_path / "m.parquet"
    sources = [Source("a.tar", "tar", 1_000, 2_000, "ab" * 32, 3)]
    write_manifest(path, random_table(3), Metadata("/data", None, SplitRule(0.01, False), sources))
    whole = path.read_bytes()
    start, end = (whole.rindex(part) for part in (b'{"crc32c": ', b', "version": 1}'))
    assert b"a.tar" in whole[start:end]
    for byte in range(start, end):
        path.write_bytes(whole[:byte] + bytes([whole[byte] ^ 1]) + whole[byte + 1 :])
        if b'"crc32c"' in path.read_bytes()[start:end]:
            with pytest.raises(PipeError):
                read_manifest(path)
    old = Metadata.from_json(json.dumps({"version": 1, **asdict(METADATA)}), path)  # as it was written before
    assert old == METADATA


def test_a_manifest_that_was_written_anew_is_not_read_half_and_half(tmp_path):
    path = tmp_path / "m.parquet"

    def write_old(rows: int) -> None:
        pq.write_table(random_table(rows).replace_schema_metadata({METADATA_KEY: METADATA.to_json().encode()}), path)

    write_old(50)
    manifest = read_manifest(path)
    assert len(manifest.column("key")) == 50
    write_old(60)
    with pytest.raises(PipeError, match="written anew"):
        manifest.rows()
    write_manifest(path, random_table(50), METADATA)
    mapped_one = read_manifest(path)
    write_manifest(path, random_table(60), METADATA)
    assert len(mapped_one.rows(ok_only=False)) == 50  # the mapped file is still the old one
