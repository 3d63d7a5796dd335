"""Every kind of source as pictures in order: who they are, their bytes, and what is wrong with some of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tar_samples import image, sample, samples, write_tar

from pipeline.data.pictures import LOOSE_IN_PART, Part, list_parts
from pipeline.data.samples import SampleError
from pipeline.errors import PipeError


def write(path: Path, seed: int, kind: str = "JPEG") -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image(seed, kind))
    return path.read_bytes()


def all_of(parts: list[Part], captions: bool = False) -> list[tuple[str, str, bytes | str, tuple[str, ...]]]:
    """(source, key, bytes or problem, captions) of all pictures."""
    found = []
    for part in parts:
        for picture in part.pictures(captions):
            try:
                data: bytes | str = picture.read()
            except SampleError as error:
                data = str(error)
            found.append((picture.source, picture.key, data, picture.captions))
    return found


def test_a_folder_of_images_is_read_with_its_sub_folders_in_order_of_names(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    expected = [
        ("photos", name, write(photos / name, n), ()) for n, name in enumerate(["a.jpg", "b/c.JPEG", "b/d.png"])
    ]
    write(photos / ".hidden.jpg", 8)
    write(photos / ".cache" / "x.jpg", 9)
    (photos / "notes.txt").write_text("no image")
    parts = list_parts(str(photos))
    assert [(part.name, part.count) for part in parts] == [("images-00000", 3)]
    assert all_of(parts) == expected
    assert all_of(list_parts(str(photos / "**" / "*.png"))) == [("photos", "b/d.png", image(2), ())]
    assert all_of(list_parts(str(photos / "{a,b}.jpg"))) == [("photos", "a.jpg", image(0), ())]
    assert [row[1] for row in all_of(list_parts(str(photos / "a.jpg")))] == ["a.jpg"]


def test_many_files_are_several_parts_that_know_when_they_change(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("pipeline.data.pictures.LOOSE_IN_PART", 2)
    assert LOOSE_IN_PART > 2
    for n in range(5):
        write(tmp_path / "photos" / f"{n}.jpg", n)
    parts = list_parts(str(tmp_path / "photos"))
    assert [part.count for part in parts] == [2, 2, 1]
    assert [key for _, key, _, _ in all_of(parts)] == [f"{n}.jpg" for n in range(5)]
    before = [part.state() for part in parts]
    (tmp_path / "photos" / "2.jpg").write_bytes(image(7) + b"longer")
    after = [part.state() for part in list_parts(str(tmp_path / "photos"))]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]


def test_tars_give_their_samples_and_captions_and_say_what_is_wrong(tmp_path: Path) -> None:
    write_tar(tmp_path / "tars" / "00000.tar", samples(0, 2))
    cut = write_tar(tmp_path / "tars" / "00001.tar", [*sample("x", 5), ("alone.txt", b"no image here")])
    data = cut.read_bytes().rstrip(b"\0")
    cut.write_bytes(data + bytes(-len(data) % 512))  # without its end mark
    (tmp_path / "tars" / "00002.tar").write_bytes(b"not a tar at all" * 64)
    found = all_of(list_parts(str(tmp_path / "tars")), captions=True)
    assert found[:3] == [
        ("00000.tar", "000000000", image(0), ("caption of 000000000",)),
        ("00000.tar", "000000001", image(1), ("caption of 000000001",)),
        ("00001.tar", "x", image(5), ("caption of x",)),
    ]
    assert found[3] == ("00001.tar", "alone", "no image", ("no image here",))
    assert found[4][:2] == ("00001.tar", "")
    assert "no end mark" in found[4][2]
    assert found[5][:2] == ("00002.tar", "")
    assert "not a tar" in found[5][2]
    without = all_of(list_parts(str(tmp_path / "tars" / "{00000..00003}.tar")))
    assert {texts for *_, texts in without} == {()}
    assert without[-1] == ("00003.tar", "", "no such file in the range", ())


def test_a_table_names_files_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "pictures" / "a.jpg", 1)
    rows = [
        "filepath,title",
        "pictures/a.jpg,one",
        "pictures/gone.jpg,two",
        "https://x/y.jpg,three",
        "pictures/a.jpg,1",
    ]
    (tmp_path / "list.csv").write_text("\n".join(rows))
    found = all_of(list_parts(str(tmp_path / "list.csv")), captions=True)
    assert found[0] == ("list.csv", "pictures/a.jpg", image(1), ("one", "1"))
    assert found[1][1:3] == ("pictures/gone.jpg", "cannot read the file (No such file or directory)")
    assert found[2][1:3] == ("https://x/y.jpg", "no path of a file")


def test_what_is_no_source_is_refused_with_what_would_be_one(tmp_path: Path) -> None:
    write(tmp_path / "both" / "a.jpg", 1)
    write_tar(tmp_path / "both" / "0.tar", samples(0, 1))
    (tmp_path / "empty").mkdir()
    for source, says in [("both", "both tars and images"), ("empty", "no tars"), ("gone", "does not exist")]:
        with pytest.raises(PipeError, match=says):
            list_parts(str(tmp_path / source))
    with pytest.raises(PipeError, match="only local files"):
        list_parts("s3://bucket/x")
