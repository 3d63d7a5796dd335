"""Reading one tar: true offsets, img2dataset's and cc3m-wds's layouts, and every kind of dirt with its reason."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tar_samples import image, sample, samples, write_tar

from pipeline.data import samples as samples_module
from pipeline.data import scan as scan_module
from pipeline.data.captions import MAX_CAPTION_BYTES
from pipeline.data.tars import scan_tar


def scan(path):
    found = scan_tar(path.name, path)
    return found.rows.to_pylist(), [(issue.status, issue.reason) for issue in found.issues]


def rows_of(tmp_path, members, **options):
    return scan(write_tar(tmp_path / "00000.tar", members, **options))


def test_offsets_and_sizes_point_at_the_members_bytes(tmp_path):
    long_name = "a/" * 60 + "deep"  # needs a longer header than ustar's
    members = [*samples(0, 3), *sample(long_name, 9), *sample("übung", 10)]
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = write_tar(tmp_path / f"{form}.tar", members, format=form)
        raw, content = path.read_bytes(), dict(members)
        rows, issues = scan(path)
        assert issues == []
        assert [row["key"] for row in rows] == ["000000000", "000000001", "000000002", long_name, "übung"]
        for row in rows:
            jpg, txt = content[row["key"] + ".jpg"], content[row["key"] + ".txt"]
            assert raw[row["image_offset"] : row["image_offset"] + row["image_bytes"]] == jpg
            assert raw[row["caption_offset"] : row["caption_offset"] + row["caption_bytes"]] == txt
            assert row["sha256"] == hashlib.sha256(jpg).hexdigest()
            assert (row["width"], row["height"], row["status"], row["reason"]) == (16, 12, "ok", "")


@pytest.mark.parametrize(
    ("suffix", "kind"), [("png", "PNG"), ("webp", "WEBP"), ("jpeg", "JPEG"), ("JPG", "JPEG"), ("jpg", "PNG")]
)
def test_every_image_kind_is_read_by_its_content(tmp_path, suffix, kind):
    rows, _ = rows_of(tmp_path, [(f"a.{suffix}", image(1, kind)), ("a.txt", b"x")])
    assert [(row["status"], row["width"]) for row in rows] == [("ok", 16)]


def test_captions_are_the_text_then_the_jsons_each_once(tmp_path):
    stored = {"captions": ["second", " first ", "third", "second"], "caption": "fourth"}
    rows, _ = rows_of(
        tmp_path,
        [
            *[("a.jpg", image(0)), ("a.txt", b"first\n"), ("a.json", json.dumps(stored).encode())],
            *[("b.jpg", image(1)), ("b.json", b'{"caption": "only in the JSON"}')],
            *[("c.jpg", image(2)), ("c.txt", "\ufeffécrit".encode()), ("c.json", b'{"caption": null}')],
        ],
    )
    captions = [row["captions"] for row in rows]
    assert captions == [["first", "second", "third", "fourth"], ["only in the JSON"], ["écrit"]]


def test_members_of_a_key_may_lie_apart(tmp_path):
    members = [("a.txt", b"A"), ("b.txt", b"B"), ("b.jpg", image(2)), ("a.jpg", image(1)), ("notes.md", b"-")]
    rows, issues = rows_of(tmp_path, members)
    assert [(row["key"], row["captions"], row["status"]) for row in rows] == [("a", ["A"], "ok"), ("b", ["B"], "ok")]
    assert rows[0]["sha256"] == hashlib.sha256(image(1)).hexdigest()
    assert issues == []


CAPTION_DIRT = [
    ([("a.jpg", image(0))], "caption_missing", "no caption"),
    ([("a.jpg", image(0)), ("a.txt", b" \n\t")], "caption_empty", "a caption is empty"),
    ([("a.jpg", image(0)), ("a.txt", "\u200b".encode())], "caption_empty", "a caption is empty"),
    ([("a.jpg", image(0)), ("a.txt", b"caf\xe9")], "caption_undecodable", "a caption is not UTF-8"),
    ([("a.jpg", image(0)), ("a.json", b'{"caption": "\\ud83d"}')], "caption_undecodable", "a caption is not UTF-8"),
    ([("a.jpg", image(0)), ("a.json", b"{nonsense")], "caption_undecodable", "the JSON is not valid"),
    ([("a.jpg", image(0)), ("a.json", b"[" * 100_000)], "caption_undecodable", "the JSON is not valid"),
    ([("a.jpg", image(0)), ("a.json", b'{"caption": 7}')], "caption_undecodable", "a caption in the JSON is not text"),
    ([("a.jpg", image(0)), ("a.txt", b"x" * (MAX_CAPTION_BYTES + 5))], "caption_too_large", "the text has"),
    ([("a.txt", b"x")], "image_missing", "no image"),
    ([("a.seg.jpg", image(0)), ("a.txt", b"x")], "image_missing", "a.seg.jpg is not a.jpg"),
    ([("a.jpg", b""), ("a.txt", b"x")], "image_broken", "cannot decode"),
    ([("a.jpg", b"<html>404</html>"), ("a.txt", b"x")], "image_broken", "cannot decode"),
    ([("a.jpg", image(0)[:-40]), ("a.txt", b"x")], "image_broken", "truncated"),
    ([("a.png", image(0, "PNG")[:-30]), ("a.txt", b"x")], "image_broken", "cannot decode"),
]


@pytest.mark.parametrize(("members", "status", "reason"), CAPTION_DIRT)
def test_a_dirty_sample_is_recorded_with_its_reason_between_clean_ones(tmp_path, members, status, reason):
    rows, issues = rows_of(tmp_path, [*sample("0", 5), *members, *sample("1", 6)])
    assert [row["status"] for row in rows] == ["ok", status, "ok"]
    assert reason in rows[1]["reason"]
    assert issues == []


def test_an_unusable_part_beside_a_usable_one_is_only_noted(tmp_path):
    rows, _ = rows_of(tmp_path, [("a.jpg", image(0)), ("a.txt", b"\xff"), ("a.json", b'{"caption": "good"}')])
    assert (rows[0]["status"], rows[0]["captions"]) == ("ok", ["good"])
    assert rows[0]["reason"] == "a caption is not UTF-8"


def test_a_key_twice_keeps_the_first_and_never_mixes_the_two(tmp_path):
    members = [*sample("a", 1, "first"), *sample("b", 2), *sample("a", 3, "second")]
    rows, _ = rows_of(tmp_path, members)
    found = [(row["key"], row["status"], row["captions"], row["sha256"]) for row in rows]
    assert found[0] == ("a", "ok", ["first"], hashlib.sha256(image(1)).hexdigest())
    assert found[2] == ("a", "key_repeated", ["second"], hashlib.sha256(image(3)).hexdigest())
    # A stray image of a key does not take the caption that follows the later one.
    rows, _ = rows_of(tmp_path, [("a.jpg", image(1)), ("a.jpg", image(2)), ("a.txt", b"of the second")])
    assert [row["status"] for row in rows] == ["caption_missing", "key_repeated"]


def test_a_linked_image_is_recorded_as_missing(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("a.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
        text = tarfile.TarInfo("a.txt")
        text.size = 1
        tar.addfile(text, io.BytesIO(b"x"))
    rows, _ = scan(path)
    assert rows[0]["status"] == "image_missing"
    assert "link" in rows[0]["reason"]


def test_images_of_too_many_bytes_or_pixels_are_refused_without_decoding(tmp_path, monkeypatch):
    monkeypatch.setattr(scan_module, "MAX_IMAGE_BYTES", 2_000)
    monkeypatch.setattr(samples_module, "MAX_IMAGE_PIXELS", 100)
    big = image(1, "BMP", 40, 40)
    rows, _ = rows_of(tmp_path, [("a.jpg", big), ("a.txt", b"x"), ("b.jpg", image(0)), ("b.txt", b"x")])
    assert [row["status"] for row in rows] == ["image_too_large", "image_too_large"]
    assert f"{len(big):,} bytes" in rows[0]["reason"]
    assert "16 x 12 pixels" in rows[1]["reason"]


def test_a_bomb_is_told_from_its_header(tmp_path):
    out = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(out, "PNG")
    rows, _ = rows_of(tmp_path, [("a.png", out.getvalue()), ("a.txt", b"x")])
    assert rows[0]["status"] == "image_too_large"


def test_a_tar_cut_anywhere_gives_the_whole_samples_before_the_cut(tmp_path):
    path = write_tar(tmp_path / "whole.tar", samples(0, 3))
    data = path.read_bytes()
    whole, _ = scan(path)
    cut = tmp_path / "cut.tar"
    for length in range(1, len(data) - 10_000, 211):
        cut.write_bytes(data[:length])
        rows, issues = scan(cut)
        before = [row for row in whole if row["caption_offset"] + row["caption_bytes"] <= length]
        usable = [row for row in rows if row["status"] == "ok"]
        assert [{**row, "reason": ""} for row in usable] == before, length
        assert issues, length
        for row in rows[len(before) :]:
            assert row["status"] in {"image_broken", "caption_missing"}
            assert "cut" in row["reason"] or row["status"] == "caption_missing"
            assert (row["sha256"] == "") == (row["status"] == "image_broken")  # half an image is no image's identity


def test_a_cut_caption_is_not_half_a_caption(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.jpg", image(0)), ("a.txt", b"a dog runs across the road")])
    rows, _ = scan(path)
    path.write_bytes(path.read_bytes()[: rows[0]["caption_offset"] + 8])
    rows, issues = scan(path)
    assert (rows[0]["captions"], rows[0]["status"]) == ([], "caption_missing")
    assert "cut" in rows[0]["reason"]
    assert issues[0][0] == "source_cut"


def test_a_tar_cut_between_two_files_is_known_by_its_missing_end_mark(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(0, 2))
    data = path.read_bytes()
    path.write_bytes(data[: data.find(b"000000001.jpg")])
    rows, issues = scan(path)
    assert [row["status"] for row in rows] == ["ok"]
    assert issues == [("source_cut", "no end mark after 3 files: more may have followed")]


def test_a_header_that_points_backwards_ends_the_reading(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(0, 2))
    data = bytearray(path.read_bytes())
    header = data.find(b"000000001.jpg")
    size = (
        data.find(b"000000000.txt") - header - 512
    )  # back to the second file: some versions of tarfile go round for ever
    data[header + 124 : header + 136] = size.to_bytes(12, "big", signed=True)
    data[header + 148 : header + 156] = b" " * 8
    data[header + 148 : header + 156] = b"%06o\0 " % sum(data[header : header + 512])
    path.write_bytes(data)
    rows, issues = scan(path)
    assert [row["status"] for row in rows] == ["ok"]
    assert [status for status, _ in issues] == ["source_cut"]


def test_damage_in_the_middle_is_told_from_the_end(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(0, 4))
    data = bytearray(path.read_bytes())
    header = data.find(b"000000002.jpg")
    for fill in (b"\xaa", b"\0"):  # nonsense; and zeros, as in a hole that a download left
        path.write_bytes(data[:header] + fill * 512 + data[header + 512 :])
        rows, issues = scan(path)
        assert [row["status"] for row in rows] == ["ok", "ok"]
        assert [status for status, _ in issues] == ["source_cut"]
        assert f"{header:,}" in issues[0][1]


def test_files_that_are_no_tars_are_named_for_what_they_are(tmp_path):
    tar = write_tar(tmp_path / "good.tar", samples(0, 1)).read_bytes()
    cases = {
        "empty.tar": (b"", "source_empty", "0 bytes"),
        "hole.tar": (bytes(100_000), "source_empty", "zeros"),
        "text.tar": (b"<html>not found</html>" * 60, "source_not_tar", "not a tar"),
        "packed.tar": (gzip.compress(tar), "source_not_tar", "gzip"),
        "none.tar": (bytes(10_240), "source_empty", "no sample"),
    }
    for name, (data, status, reason) in cases.items():
        (tmp_path / name).write_bytes(data)
        rows, issues = scan(tmp_path / name)
        assert rows == []
        assert [found for found, _ in issues] == [status], name
        assert reason in issues[0][1]
    (tmp_path / "folder.tar").mkdir()
    assert scan(tmp_path / "folder.tar")[1][0][0] == "source_unreadable"


def test_names_that_are_not_utf8_become_readable_keys(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as tar:
        for name, data in ((b"caf\xe9.jpg", image(0)), (b"caf\xe9.txt", b"x")):
            info = tarfile.TarInfo(name.decode("utf-8", "surrogateescape"))
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    rows, _ = scan(tmp_path / "a.tar")
    assert [(row["key"], row["status"]) for row in rows] == [("caf\\xe9", "ok")]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(damage=st.lists(st.tuples(st.integers(0, 2**16), st.binary(min_size=1, max_size=40)), min_size=1, max_size=6))
def test_no_damage_is_fatal(tmp_path_factory, damage):
    path = tmp_path_factory.getbasetemp() / "fuzzed.tar"
    data = bytearray(write_tar(path, samples(0, 3)).read_bytes())
    for at, patch in damage:
        at %= len(data)
        data[at : at + len(patch)] = patch
    path.write_bytes(data)
    rows, _ = scan(path)
    for row in rows:
        if row["status"] == "ok":
            raw = bytes(data[row["image_offset"] : row["image_offset"] + row["image_bytes"]])
            assert hashlib.sha256(raw).hexdigest() == row["sha256"]
