"""data.source: folder, glob, brace range, single files; what is refused says what to write instead."""

from __future__ import annotations

import pytest

from pipeline.data.sources import expand, expand_braces
from pipeline.errors import PipeError


@pytest.fixture
def folder(tmp_path):
    for name in ("00001.tar", "00000.tar", "00003.tar", "00000_stats.json", "00000.parquet", "._00000.tar"):
        (tmp_path / "data" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "data" / name).write_bytes(b"")
    return tmp_path / "data"


def names(source, **options):
    return [file.name for file in expand(str(source), **options).files]


def test_a_folder_gives_its_tars_sorted_and_nothing_else(folder):
    found = expand(str(folder))
    assert [file.name for file in found.files] == ["00000.tar", "00001.tar", "00003.tar"]
    assert {file.kind for file in found.files} == {"tar"}
    assert found.root == folder
    assert found.files[1].path == folder / "00001.tar"


def test_a_brace_range_reports_what_is_not_there(folder):
    found = expand(f"{folder}/{{00000..00003}}.tar")
    assert [file.name for file in found.files] == ["00000.tar", "00001.tar", "00003.tar"]
    assert [(issue.source, issue.status) for issue in found.issues] == [("00002.tar", "source_missing")]
    assert found.root == folder


def test_globs_span_folders_and_name_files_from_the_fixed_part(folder):
    (folder / "more").mkdir()
    (folder / "more" / "00000.tar").write_bytes(b"")
    assert names(f"{folder}/**/*0.tar") == ["00000.tar", "more/00000.tar"]
    assert names(f"{folder.parent}/d*/more/*") == ["data/more/00000.tar"]
    assert names(f"{folder}/{{more,none}}/*.tar") == ["more/00000.tar"]


def test_single_files_are_named_from_their_folder(folder):
    (folder / "pairs.TSV").write_text("x")
    assert names(folder / "00003.tar") == ["00003.tar"]
    assert [(f.name, f.kind) for f in expand(str(folder / "pairs.TSV")).files] == [("pairs.TSV", "table")]


def test_validation_names_cannot_meet_others(folder):
    assert names(folder / "00003.tar", validation=True) == ["val:00003.tar"]
    (folder / "val:00003.tar").write_bytes(b"")
    with pytest.raises(PipeError, match="names that begin with val:"):
        expand(str(folder))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{08..11}.tar", ["08.tar", "09.tar", "10.tar", "11.tar"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{a,b}-{0..1}", ["a-0", "a-1", "b-0", "b-1"]),
        ("plain.tar", ["plain.tar"]),
    ],
)
def test_braces_expand_as_in_a_shell(text, expected):
    assert expand_braces(text) == expected


def test_what_cannot_be_a_source_says_what_to_write(folder, tmp_path):
    (folder / "more").mkdir()
    cases = [
        (tmp_path / "nowhere", "does not exist"),
        (f"{folder}/x*.tar", "no tar or table matches"),
        (f"{folder}/{{5..7}}.tar", "no tar or table matches"),
        (f"{folder}/{{7..5}}.tar", r"counts down.*write \{5\.\.7\}"),
        (f"{folder}/{{7}}.tar", "braces hold a range or a list"),
        (f"{folder}/{{0..9999999}}.tar", "more than 1,000,000"),
        ("s3://bucket/{0..9}.tar", "only local files"),
        (folder / "more", "no tars in this folder"),
        (tmp_path, r"no tars in this folder.*choose one of its folders \(data\)"),
    ]
    for source, message in cases:
        with pytest.raises(PipeError, match=message):
            expand(str(source))


def test_a_folder_of_packed_tars_or_tables_gets_the_right_advice(tmp_path):
    (tmp_path / "0.tar.gz").write_bytes(b"")
    with pytest.raises(PipeError, match=r"unpack compressed tars first \(0\.tar\.gz\)"):
        expand(str(tmp_path))
    (tmp_path / "pairs.csv").write_text("x")
    with pytest.raises(PipeError, match=r"name it: .*pairs\.csv"):
        expand(str(tmp_path))
