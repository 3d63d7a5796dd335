"""The whole index: the same manifest from any number of workers, growth that moves nobody, splits, summaries."""

from __future__ import annotations

import os
import shutil
from collections import Counter

import pyarrow.parquet as pq
import pytest
from tar_samples import image, sample, samples, write_tar

from pipeline.data.index import build_manifest
from pipeline.data.manifest import read_manifest
from pipeline.errors import PipeError


def contents(path):
    return pq.read_table(path).to_pylist()


@pytest.fixture
def dirty(tmp_path):
    """Five tars: two clean, one cut, one with a bad sample of each kind, one that is no tar."""
    folder = tmp_path / "tars"
    write_tar(folder / "a.tar", samples(0, 12))
    write_tar(folder / "b.tar", samples(0, 7))  # the same keys and images as in a
    cut = write_tar(folder / "c.tar", samples(20, 4))
    cut.write_bytes(cut.read_bytes()[:6_000])
    bad = [("x.jpg", b"no image"), ("x.txt", b"x"), ("y.txt", b"y"), ("z.jpg", image(30)), ("z.txt", b" ")]
    write_tar(folder / "d.tar", [*sample("k", 31), *bad, *sample("k", 32), ("u.jpg", image(33)), ("u.txt", b"\xff")])
    (folder / "e.tar").write_bytes(b"404: Not Found")
    return folder


def build(source, out, **options):
    return build_manifest(str(source), out, **({"workers": 1} | options))


def test_threads_and_processes_and_one_worker_give_the_same_file(dirty, tmp_path):
    ways = [{"workers": 0}, {"workers": 3, "scheduler": "threads"}, {"workers": 2, "scheduler": "processes"}]
    for number, way in enumerate(ways):
        build(dirty, tmp_path / f"{number}.parquet", **way)
    files = {(tmp_path / f"{number}.parquet").read_bytes() for number in range(len(ways))}
    assert len(files) == 1


def test_rows_follow_sources_and_positions_and_problems_are_counted(dirty, tmp_path):
    summary = build(dirty, tmp_path / "m.parquet")
    manifest = read_manifest(tmp_path / "m.parquet")
    assert manifest.column("row").tolist() == list(range(len(manifest)))
    assert manifest.sources().tolist() == sorted(manifest.sources().tolist())
    offsets = [record["image_offset"] for record in contents(manifest.path) if record["source"] == "a.tar"]
    assert offsets == sorted(offsets)
    counted = Counter(manifest.column("status").tolist())
    assert summary.counts == manifest.summary()
    assert sum(sum(statuses.values()) for statuses in summary.counts.values()) == summary.rows == len(manifest)
    assert counted["ok"] >= 12 + 7 + 2 + 1
    for status in ("image_broken", "image_missing", "caption_empty", "caption_undecodable", "key_repeated"):
        assert counted[status] >= 1, status
    assert {(issue.source, issue.status) for issue in summary.issues} == {
        ("c.tar", "source_cut"),
        ("e.tar", "source_not_tar"),
    }
    assert len(summary.examples) == 5
    assert all(problem.reason for problem in summary.examples)


def test_keys_may_repeat_between_sources_and_copies_fall_on_one_side(dirty, tmp_path):
    summary = build(dirty, tmp_path / "m.parquet")
    manifest = read_manifest(tmp_path / "m.parquet")
    usable = [manifest.record(row) for row in manifest.rows().tolist()]
    identities = Counter((record.source, record.key) for record in usable)
    assert max(identities.values()) == 1
    sides = {}
    for record in usable:
        assert sides.setdefault(record.sha256, record.split) == record.split
    assert summary.copies == 7
    assert {"train", "val"} == set(sides.values())


def test_a_validation_source_is_held_out_whole_and_its_copies_are_not_trained_on(tmp_path):
    write_tar(tmp_path / "train" / "0.tar", samples(0, 10))
    write_tar(tmp_path / "held" / "0.tar", samples(8, 4))
    build(tmp_path / "train", tmp_path / "m.parquet", val_source=str(tmp_path / "held"))
    manifest = read_manifest(tmp_path / "m.parquet")
    assert manifest.rows("train").tolist() == list(range(8))
    assert manifest.rows("val").tolist() == [10, 11, 12, 13]
    assert [manifest.record(row).status for row in (8, 9)] == ["duplicate_of_val"] * 2
    assert manifest.record(10).source == "val:0.tar"
    assert manifest.source_path("val:0.tar") == tmp_path / "held" / "0.tar"


def test_a_second_run_appends_new_tars_also_those_that_sort_first(tmp_path):
    folder, out = tmp_path / "tars", tmp_path / "m.parquet"
    write_tar(folder / "00005.tar", samples(0, 30))
    write_tar(folder / "00007.tar", samples(30, 10))
    first = build(folder, out)
    before, prefix = contents(out), read_manifest(out).fingerprint()
    write_tar(folder / "00001.tar", samples(40, 25))
    write_tar(folder / "00009.tar", [*samples(5, 3), *samples(70, 20)])
    second = build(folder, out, workers=2)
    after, manifest = contents(out), read_manifest(out)
    assert after[: len(before)] == before
    assert (first.added, second.added, second.rows) == (40, 48, 88)
    assert [row["source"] for row in after[40:]] == ["00001.tar"] * 25 + ["00009.tar"] * 23
    assert [row["row"] for row in after] == list(range(88))
    assert manifest.fingerprint(40) == prefix
    sides = {}
    for row in after:
        assert sides.setdefault(row["sha256"], row["split"]) == row["split"]
    assert len(manifest.rows("val")) == 9  # a tenth of all, not of each part


def test_a_run_without_news_leaves_the_file_alone(tmp_path):
    write_tar(tmp_path / "tars" / "0.tar", samples(0, 5))
    out = tmp_path / "m.parquet"
    build(tmp_path / "tars", out)
    os.utime(out, (1, 1))
    assert build(tmp_path / "tars", out).added == 0
    assert out.stat().st_mtime == 1


def test_changed_and_vanished_sources_are_refused_by_name(tmp_path):
    folder, out = tmp_path / "tars", tmp_path / "m.parquet"
    for n in range(3):
        write_tar(folder / f"{n}.tar", samples(5 * n, 5))
    build(folder, out)
    stored = out.read_bytes()
    good = (folder / "1.tar").read_bytes()
    at = contents(out)[5]["image_offset"] + 30
    (folder / "1.tar").write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])  # same size, one bit
    with pytest.raises(PipeError, match=r"changed since it was indexed.*1\.tar; put the old file back, or index anew"):
        build(folder, out)
    (folder / "1.tar").write_bytes(good + bytes(512))  # a tar does not grow
    with pytest.raises(PipeError, match=r"changed since it was indexed.*1\.tar"):
        build(folder, out)
    (folder / "1.tar").unlink()
    (folder / "0.tar").unlink()
    with pytest.raises(PipeError, match=r"is gone.*0\.tar and 1 more"):
        build(folder, out)
    assert out.read_bytes() == stored


def test_a_moved_and_touched_copy_is_the_same_source(tmp_path):
    write_tar(tmp_path / "here" / "0.tar", samples(0, 6))
    out = tmp_path / "m.parquet"
    build(tmp_path / "here", out)
    before, fingerprint = contents(out), read_manifest(out).fingerprint()
    shutil.move(tmp_path / "here", tmp_path / "there")
    os.utime(tmp_path / "there" / "0.tar", (5, 5))
    write_tar(tmp_path / "there" / "1.tar", samples(6, 2))
    build(tmp_path / "there", out)
    manifest = read_manifest(out)
    assert contents(out)[:6] == before
    assert manifest.root == tmp_path / "there"
    assert manifest.fingerprint(6) == fingerprint


def test_a_source_that_gave_no_rows_may_be_mended(tmp_path):
    folder, out = tmp_path / "tars", tmp_path / "m.parquet"
    write_tar(folder / "1.tar", samples(0, 4))
    (folder / "0.tar").write_bytes(b"")
    assert [issue.status for issue in build(folder, out).issues] == ["source_empty"]
    write_tar(folder / "0.tar", samples(4, 3))
    mended = build(folder, out)
    assert (mended.added, mended.issues) == (3, [])


def test_rows_keep_the_split_rule_they_were_made_by(tmp_path):
    write_tar(tmp_path / "tars" / "0.tar", samples(0, 4))
    out = tmp_path / "m.parquet"
    build(tmp_path / "tars", out)
    with pytest.raises(PipeError, match=r"split by val_fraction 0\.01"):
        build(tmp_path / "tars", out, val_fraction=0.2)
    with pytest.raises(PipeError, match=r"split by val_fraction 0\.01"):
        build(tmp_path / "tars", out, val_source=str(tmp_path / "tars"))


def test_a_later_validation_row_never_takes_an_image_that_was_trained_on(tmp_path):
    out = tmp_path / "m.parquet"
    write_tar(tmp_path / "train" / "0.tar", samples(0, 4))
    write_tar(tmp_path / "held" / "0.tar", samples(4, 2))
    build(tmp_path / "train", out, val_source=str(tmp_path / "held"))
    write_tar(tmp_path / "held" / "1.tar", samples(3, 2))
    write_tar(tmp_path / "train" / "1.tar", samples(5, 2))
    build(tmp_path / "train", out, val_source=str(tmp_path / "held"))
    added = {(row["source"], row["key"]): row["status"] for row in contents(out)[6:]}
    assert added == {
        ("1.tar", "000000005"): "duplicate_of_val",
        ("1.tar", "000000006"): "ok",
        ("val:1.tar", "000000003"): "duplicate_of_train",
        ("val:1.tar", "000000004"): "ok",
    }


def test_a_grown_table_appends_and_its_images_are_checked(tmp_path):
    out, table = tmp_path / "m.parquet", tmp_path / "t.csv"
    for n in range(4):
        (tmp_path / f"{n}.jpg").write_bytes(image(n))
    table.write_text("image,caption\n2.jpg,two\n0.jpg,zero\n")
    build(table, out)
    before = contents(out)
    with open(table, "a") as file:
        file.write("1.jpg,one\n2.jpg,also two\n")
    summary = build(table, out)
    assert contents(out)[:2] == before
    assert [row["key"] for row in contents(out)] == ["2.jpg", "0.jpg", "1.jpg"]
    assert [(issue.key, issue.status) for issue in summary.issues] == [("2.jpg", "key_repeated")]
    assert build(table, out).added == 0
    (tmp_path / "0.jpg").write_bytes(b"other")
    with pytest.raises(PipeError, match=r"image of the manifest is gone or changed, row 1: 0\.jpg"):
        build(table, out)
    (tmp_path / "0.jpg").write_bytes(image(0))
    table.write_text("image,caption\n0.jpg,zero\n2.jpg,two\n1.jpg,one\n3.jpg,three and more\n")
    with pytest.raises(PipeError, match="changed since it was indexed"):
        build(table, out)


def test_nothing_usable_is_an_error_that_says_why_and_writes_nothing(tmp_path):
    write_tar(tmp_path / "tars" / "0.tar", [("a.jpg", b"no"), ("a.txt", b"x"), ("b.jpg", b"no"), ("b.txt", b"x")])
    with pytest.raises(PipeError, match=r"no usable pair of image and caption \(image_broken 2: cannot decode"):
        build(tmp_path / "tars", tmp_path / "m.parquet")
    write_tar(tmp_path / "good" / "0.tar", samples(0, 2))
    with pytest.raises(PipeError, match="no usable pair"):
        build(tmp_path / "good", tmp_path / "m.parquet", val_source=str(tmp_path / "tars"))
    assert not (tmp_path / "m.parquet").exists()


def test_an_interrupted_write_leaves_the_old_manifest(tmp_path, monkeypatch):
    write_tar(tmp_path / "tars" / "0.tar", samples(0, 4))
    out = tmp_path / "m.parquet"
    build(tmp_path / "tars", out)
    stored = out.read_bytes()
    write_tar(tmp_path / "tars" / "1.tar", samples(4, 4))

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(PipeError, match="No space left"):
        build(tmp_path / "tars", out)
    assert out.read_bytes() == stored
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.parquet", "tars"]
