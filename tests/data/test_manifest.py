"""The manifest file: written whole, read by column, told apart by a fingerprint of images and order."""

from __future__ import annotations

import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.manifest import (
    METADATA_KEY,
    SCHEMA,
    Issue,
    Metadata,
    Source,
    SplitRule,
    read_manifest,
    write_manifest,
)
from pipeline.errors import PipeError

METADATA = Metadata(
    root="/data",
    val_root="/held/out",
    rule=SplitRule(0.01, True),
    sources=[Source("0.tar", "tar", 100, 5, "ab", 4), Source("val:0.tar", "tar", 100, 5, "cd", 2)],
    issues=[Issue("0.tar", "", "source_cut", "at byte 7, “quoted”")],
)


def columns(**changes) -> dict:
    values = {
        "row": [0, 1, 2, 3, 4, 5],
        "source": ["0.tar"] * 4 + ["val:0.tar"] * 2,
        "key": ["a", "b", "ü", "d", "a", "b"],
        "image_offset": [512, 1024, -1, 2048, 512, 1024],
        "image_bytes": [10, 20, 0, 40, 50, 60],
        "caption_offset": [600, 1100, 1500, -1, 600, 1100],
        "caption_bytes": [1, 2, 3, 0, 5, 6],
        "captions": [["one", "uno"], ["two"], ["three"], [], ["five"], ["six"]],
        "width": [4, 4, 0, 4, 4, 4],
        "height": [3, 3, 0, 3, 3, 3],
        "sha256": ["aa", "bb", "", "dd", "ee", "ff"],
        "split": ["train"] * 4 + ["val"] * 2,
        "status": ["ok", "ok", "image_missing", "caption_missing", "ok", "ok"],
        "reason": ["", "note", "no image", "no caption", "", ""],
    }
    return values | changes


@pytest.fixture
def written(tmp_path):
    def write(metadata=METADATA, name="manifest.parquet", **changes):
        write_manifest(tmp_path / name, pa.table(columns(**changes), schema=SCHEMA), metadata)
        return read_manifest(tmp_path / name)

    return write


def test_what_is_written_is_read_back(written):
    manifest = written()
    values = columns()
    assert len(manifest) == 6
    assert manifest.metadata == METADATA
    for row in range(6):
        record = manifest.record(row)
        assert all(getattr(record, name) == values[name][row] for name in SCHEMA.names if name != "captions")
        assert manifest.captions(row) == values["captions"][row]
    assert pq.read_table(manifest.path).to_pydict() == values


def test_rows_are_ascending_and_selected_by_split_and_status(written):
    manifest = written()
    assert manifest.rows().tolist() == [0, 1, 4, 5]
    assert manifest.rows("train").tolist() == [0, 1]
    assert manifest.rows("val").tolist() == [4, 5]
    assert manifest.rows("train", ok_only=False).tolist() == [0, 1, 2, 3]
    assert manifest.rows().dtype == np.int64


def test_summary_counts_every_row_once(written):
    found = written().summary()
    assert found == {"train": {"ok": 2, "image_missing": 1, "caption_missing": 1}, "val": {"ok": 2}}


def test_sources_resolve_to_their_roots(written):
    manifest = written()
    assert manifest.sources().tolist() == columns()["source"]
    assert str(manifest.source_path("0.tar")) == "/data/0.tar"
    assert str(manifest.source_path("val:0.tar")) == "/held/out/0.tar"


def test_fingerprint_follows_images_keys_sources_and_order(written):
    base = written().fingerprint()
    assert len(base) == 64
    for name, value in (("sha256", "zz"), ("key", "z"), ("source", "z.tar")):
        changed = columns()[name]
        changed[1] = value
        assert written(**{name: changed}).fingerprint() != base, name
    swapped = {n: [columns()[n][i] for i in (1, 0, 2, 3, 4, 5)] for n in ("source", "key", "sha256")}
    assert written(**swapped).fingerprint() != base


def test_fingerprint_ignores_captions_places_splits_and_reasons(written):
    base = written().fingerprint()
    moved = replace(METADATA, root="/elsewhere", issues=[])
    changes = {"captions": [["new"]] * 6, "split": ["train"] * 6, "reason": [""] * 6, "image_offset": [1] * 6}
    assert written(moved, **changes).fingerprint() == base


def test_fingerprint_of_the_first_rows_is_that_of_the_shorter_manifest(written):
    shorter = written(name="short.parquet", **{name: values[:4] for name, values in columns().items()})
    assert written().fingerprint(4) == shorter.fingerprint()


def test_fingerprints_are_those_that_caches_carry(written):
    """Digests by the first version of this code: whoever changes one makes every cache there is a stranger."""
    manifest = written()
    assert manifest.fingerprint() == "33da9163ea464875196019cf712efb7cdf47c004b8329f9b1e96cf8d2af46c59"
    assert manifest.fingerprint(4) == "f0a5f2960690e4b1f63ca9a0a57b4727e0db8602865de39b2588e2e3d15f291d"
    assert manifest.split_sha256() == "7c70b6b1c612fa54ce7b84d65b84c9bf97b6846e1973ac7514eda1323f7bf2cb"
    assert manifest.split_sha256(4) == "df3f619804a92fdb4057192dc43dd748ea778adc52bc498ce80524c014b81119"
    escaped = written(key=['a"b', "b\\c", "ü\u2028", "d\n", "\x7fa", "\x1f"])
    assert escaped.fingerprint() == "48b2a56fcab9d050cd810c093a5cc714a777fae04e22f199f7891a36ab52e36a"
    assert escaped.fingerprint(1) == "26aea490209bc88e12834cf971b5e0420d78f257c1a024b0e4d7b258d41a041b"


def test_fingerprint_does_not_depend_on_row_groups(written, tmp_path):
    manifest = written()
    table = pq.read_table(manifest.path)
    pq.write_table(table, tmp_path / "small.parquet", row_group_size=2)
    small = read_manifest(tmp_path / "small.parquet")
    assert small.fingerprint() == manifest.fingerprint()
    assert [small.captions(row) for row in range(6)] == [manifest.captions(row) for row in range(6)]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_captions_are_read_in_other_processes(written, method):
    manifest = written()
    assert len(pickle.dumps(manifest)) < 1_000
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method)) as pool:
        assert list(pool.map(manifest.captions, range(6))) == columns()["captions"]


def test_rows_outside_are_refused(written):
    manifest = written()
    for row in (-1, 6):
        with pytest.raises(IndexError, match="manifest of 6 rows"):
            manifest.record(row)
        with pytest.raises(IndexError):
            manifest.captions(row)


def test_files_that_are_no_manifest_are_told(written, tmp_path):
    with pytest.raises(PipeError, match="there is no manifest"):
        read_manifest(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(PipeError, match="cannot read this manifest"):
        read_manifest(tmp_path / "text.parquet")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "other.parquet")
    with pytest.raises(PipeError, match="not a manifest"):
        read_manifest(tmp_path / "other.parquet")
    later = METADATA.to_json().replace('"version": 1', '"version": 2').encode()
    table = pa.table(columns(), schema=SCHEMA).replace_schema_metadata({METADATA_KEY: later})
    pq.write_table(table, tmp_path / "later.parquet")
    with pytest.raises(PipeError, match="version 2, not 1"):
        read_manifest(tmp_path / "later.parquet")


def test_rows_that_do_not_count_up_are_never_written(written, tmp_path):
    with pytest.raises(ValueError, match="numbered in order"):
        written(row=[0, 1, 2, 3, 5, 4])
    assert not (tmp_path / "manifest.parquet").exists()
