"""Tables of paths and captions: columns by name, any delimiter, several captions an image, dirt with its reason."""

from __future__ import annotations

import pytest
from tar_samples import image

from pipeline.data.index import build_manifest
from pipeline.data.manifest import read_manifest
from pipeline.data.tables import read_table
from pipeline.errors import PipeError


@pytest.fixture
def index(tmp_path):
    """Index a table written beside images/0.png ... 3.png; gives the manifest."""
    (tmp_path / "images").mkdir()
    for n in range(4):
        (tmp_path / "images" / f"{n}.png").write_bytes(image(n, "PNG"))

    def run(text: str | bytes, name: str = "pairs.csv"):
        (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
        build_manifest(str(tmp_path / name), tmp_path / f"{name}.parquet", workers=1)
        return read_manifest(tmp_path / f"{name}.parquet")

    return run


@pytest.mark.parametrize(
    ("name", "header", "delimiter"),
    [
        ("a.csv", ("filepath", "title"), ","),
        ("a.csv", ("caption", "image"), ","),
        ("a.csv", ("id", "Text", "URL", "Path"), ","),
        ("a.tsv", ("filepath", "title"), "\t"),
        ("a.csv", ("filepath", "title"), "\t"),  # open_clip's default
        ("a.csv", ("image", "caption"), ";"),
    ],
)
def test_columns_are_found_by_name_in_any_order_and_delimiter(index, name, header, delimiter):
    cells = {"filepath": "images/{}.png", "image": "images/{}.png", "path": "images/{}.png"}
    lines = [delimiter.join(header)]
    for n in range(2):
        lines.append(delimiter.join(cells.get(c.lower(), "caption {}").format(n) for c in header))
    manifest = index("\n".join(lines) + "\n", name)
    assert [manifest.record(row).key for row in range(2)] == ["images/0.png", "images/1.png"]
    assert [manifest.captions(row) for row in range(2)] == [["caption 0"], ["caption 1"]]
    assert {manifest.record(row).status for row in range(2)} == {"ok"}


def test_quotes_newlines_and_a_byte_order_mark_are_read_as_csv_does(index):
    manifest = index('\ufefffilepath,title\r\nimages/0.png,"a ""big"" dog,\nrunning"\r\n\r\nimages/1.png,plain\r\n')
    assert [manifest.captions(row) for row in range(2)] == [['a "big" dog,\nrunning'], ["plain"]]


def test_a_path_that_comes_again_adds_its_caption(index):
    manifest = index("image,caption\nimages/0.png,a\nimages/1.png,b\nimages/0.png,c\nimages/0.png,a\n")
    assert len(manifest) == 2
    assert manifest.captions(0) == ["a", "c"]


def test_sizes_and_hashes_are_the_files(index, tmp_path):
    record = index(f"image,caption\nimages/2.png,a\n{tmp_path}/images/3.png,absolute\n").record(0)
    assert (record.image_offset, record.image_bytes) == (0, len(image(2, "PNG")))
    assert (record.width, record.height, record.caption_offset) == (16, 12, -1)


def test_dirty_lines_are_rows_with_a_reason(index, tmp_path):
    (tmp_path / "images" / "broken.png").write_bytes(image(0, "PNG")[:-30])
    lines = [
        b"image,caption",
        b"images/0.png,good",
        b"images/none.png,x",
        b"images,x",
        b"images/broken.png,x",
        b"https://example.org/a.jpg,x",
        b",x",
        b"images/1.png,",
        b"images/2.png",
        b"images/3.png,caf\xe9",
        b"images/\xe9.png,x",
    ]
    manifest = index(b"\n".join(lines))
    assert [manifest.record(row).status for row in range(len(manifest))] == [
        "ok",
        *["image_missing"] * 2,
        "image_broken",
        *["image_missing"] * 2,
        "caption_empty",
        "caption_missing",
        "caption_undecodable",
        "image_missing",
    ]
    reasons = [manifest.record(row).reason for row in range(1, len(manifest))]
    assert all(reasons)
    assert "img2dataset" in reasons[3]


def read_text(tmp_path, text: str, name: str = "t.csv"):
    (tmp_path / name).write_text(text)
    return read_table(name, tmp_path / name)


def test_an_open_quote_loses_no_other_row(tmp_path):
    body = "".join(f"{n}.png,caption {n}\n" for n in range(60_000))  # more than one field may hold
    table = read_text(tmp_path, f'image,caption\na.png,fine\nb.png,"open, wide\n{body}')
    assert len(table.entries) == 60_002
    assert table.entries[1].captions == ['"open, wide']
    assert table.entries[2].captions == ["caption 0"]
    assert table.entries[-1].captions == ["caption 59999"]
    assert [(i.key, i.status) for i in table.issues] == [("b.png", "quote_unpaired")]
    assert table.issues[0].reason.startswith('line 3: a " without its partner')


@pytest.mark.parametrize(
    ("line", "caption"),
    [('a.png,"a 5 inch screen', '"a 5 inch screen'), ('a.png,"so" he said', '"so" he said')],
)
def test_a_quote_is_not_paired_with_one_of_another_row(tmp_path, line, caption):
    """Lenient parsers swallow the rows between two such marks; the last row ends in one."""
    table = read_text(
        tmp_path, f'image,caption\n0.png,zero\n{line}\nb.png,plain\nc.png,"quoted, well"\nd.png,12 inch"\n'
    )
    assert {e.path: e.captions for e in table.entries} == {
        "0.png": ["zero"],
        "a.png": [caption],
        "b.png": ["plain"],
        "c.png": ["quoted, well"],
        "d.png": ['12 inch"'],
    }
    assert [i.key for i in table.issues] == ["a.png"]


def test_two_open_quotes_in_a_row_of_rows_are_both_named(tmp_path):
    table = read_text(tmp_path, 'image,caption\na.png,"x\nb.png,y"\nc.png,"z\nd.png,w\n')
    assert [e.path for e in table.entries] == ["a.png", "b.png", "c.png", "d.png"]
    assert [i.reason.split(":")[0] for i in table.issues] == ["line 2", "line 4"]


def test_a_header_without_known_columns_names_what_is_expected(index):
    with pytest.raises(PipeError, match=r"no image or no caption column: 'url,caption'.*filepath and title"):
        index("url,caption\nx,y\n")
    with pytest.raises(PipeError, match="no image or no caption column"):
        index("")


def test_long_tables_keep_their_order_whatever_the_workers(tmp_path):
    (tmp_path / "a.png").write_bytes(image(0, "PNG"))
    lines = "".join(f"none{n}.png,x\n" for n in range(1_300))
    (tmp_path / "t.csv").write_text(f"image,caption\n{lines}a.png,x\n")
    for workers in (1, 3):
        build_manifest(str(tmp_path / "t.csv"), tmp_path / f"{workers}.parquet", workers=workers)
    assert (tmp_path / "1.parquet").read_bytes() == (tmp_path / "3.parquet").read_bytes()
    keys = read_manifest(tmp_path / "3.parquet").column("key").tolist()
    assert keys == [*(f"none{n}.png" for n in range(1_300)), "a.png"]
