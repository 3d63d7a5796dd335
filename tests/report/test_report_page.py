"""The page: whole, accessible, self-contained, the same each time, and safe against what names may hold."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pipeline.errors import PipeError
from pipeline.evaluation.records import Record, read_records
from pipeline.report.page import Example, write_report
from pipeline.run_folder import RunFolder

VOID = {"meta", "link", "img", "br", "hr", "input"}
PNG = bytes.fromhex("89504e470d0a1a0a")
HOSTILE = '<script>alert("1")</script> & $x_1$'


class Page(HTMLParser):
    """Every element with its attributes and ancestors; ill-nested tags are an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], tuple[str, ...]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), tuple(self.open)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), tuple(self.open)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes, _ in self.elements if name == tag]


@pytest.fixture(scope="module")
def out(records: list[Record], folders: list[RunFolder], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(records, folders, tmp_path_factory.mktemp("report"))


def write(records: list[Record], folders: list[RunFolder], out: Path) -> Path:
    examples: list[Example] = [{"title": "A scene", "caption": "a red circle", "image_png": PNG}]
    write_report(
        records, folders, out, title="Two runs", notes=["The teacher is small."], gaps=["coco: not there"],
        examples=examples,
    )  # fmt: skip
    return out


@pytest.fixture(scope="module")
def html(out: Path) -> str:
    return (out / "index.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_all_files_of_the_report_are_written(out: Path, records: list[Record]) -> None:
    assert read_records(out / "records.json") == sorted(records, key=Record.sort_key)
    tables, figures = ({path.name for path in (out / kind).iterdir()} for kind in ("tables", "figures"))
    assert {"headline.md", "headline.csv", "headline.tex", "compute.csv", "provenance.md"} <= tables
    assert {"train_loss.svg", "train_loss.png", "ratio_gram_fine.svg", "gap_flickr8k.svg", "gamma.svg"} <= figures
    assert not [path for path in out.rglob("*") if path.name.startswith(".")]


def test_the_same_inputs_give_the_same_bytes(
    out: Path, records: list[Record], folders: list[RunFolder], tmp_path: Path
) -> None:
    write(records[::-1], folders[::-1], tmp_path)
    first = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    again = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert first == again


def test_nothing_is_loaded_from_elsewhere(html: str, page: Page) -> None:
    for _, attributes, _ in page.elements:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), attributes
    assert "http://" not in html
    assert "https://" not in html
    assert not re.findall(r"@import|url\((?!#)", html)
    assert not page.all("script")


def test_ids_are_unique_and_every_reference_finds_one(html: str, page: Page) -> None:
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    asked = {a["href"][1:] for _, a, _ in page.elements if (a.get("href") or "").startswith("#")}  # type: ignore[index]
    asked |= {a["aria-labelledby"] for _, a, _ in page.elements if a.get("aria-labelledby")}
    asked |= set(re.findall(r"url\(#([^)]+)\)", html))
    assert asked <= set(ids)


def test_every_table_has_a_caption_and_scoped_headers(page: Page) -> None:
    tables = page.all("table")
    assert len(tables) == len(page.all("caption")) >= 10
    assert all(th.get("scope") in ("col", "row", "colgroup", "rowgroup") for th in page.all("th"))


def test_every_picture_says_what_it_shows_or_is_decoration(page: Page) -> None:
    assert all(image.get("alt") for image in page.all("img"))
    drawings = page.all("svg")
    assert drawings
    assert all((svg.get("role") == "img" and svg.get("aria-label")) or svg.get("aria-hidden") for svg in drawings)
    assert any("clip: 15.0 % image to text" in (svg.get("aria-label") or "") for svg in drawings)


def test_the_page_has_landmarks_one_heading_and_a_skip_link(page: Page) -> None:
    assert [len(page.all(tag)) for tag in ("header", "nav", "main", "footer", "h1")] == [1] * 5
    assert page.all("a")[0]["href"] == "#content"
    assert page.all("html")[0]["lang"] == "en"


def test_wide_content_scrolls_in_its_own_focusable_region(page: Page) -> None:
    for tag, attributes, above in page.elements:
        if tag == "table":
            assert above[-1] == "div"
        if attributes.get("class") == "scroll":
            assert attributes.get("tabindex") == "0"
            assert attributes.get("role") == "region"


def test_hidden_words_in_a_scrolled_table_do_not_widen_the_page(html: str) -> None:
    rule = re.search(r"\.scroll \{([^}]*)\}", html)
    assert rule is not None
    assert "position: relative" in rule[1]  # else absolute ones are laid out against the page, and it scrolls sideways
    assert "overflow-x: auto" in rule[1]


def test_figures_follow_the_theme(html: str) -> None:
    drawings = "".join(re.findall(r"<figure><svg.*?</svg>", html, flags=re.DOTALL))
    assert "var(--ink)" in drawings
    assert not re.findall(r"(?:fill|stroke): #(?!0{6})[0-9a-f]{6}", drawings)
    assert "prefers-color-scheme: dark" in html


def test_notes_gaps_examples_and_configurations_are_shown(page: Page) -> None:
    for text in ("The teacher is small.", "coco: not there", "a red circle", "method: dinorankclip"):
        assert text in page.text
    assert page.all("details")


def test_the_summary_says_what_one_seed_cannot_carry(page: Page) -> None:
    assert "one seed" in page.text
    assert "On flickr8k the mean R@1 of both directions is 10.0 to 17.0 %" in page.text
    assert "1 of 1 distillation terms end below" in page.text


def test_the_summary_names_no_winner(html: str) -> None:
    lead = re.search(r'<p class="lead">(.*?)</p>', html, flags=re.DOTALL)
    assert lead is not None
    assert not re.search(r"\b(best|better|beats|outperform\w*|wins|superior|dino)\b", lead[1])


def test_hostile_names_are_shown_and_not_executed(record: Callable[..., Record], tmp_path: Path) -> None:
    found = [
        replace(record("x", "retrieval/i2t_recall@1", 0.5, 0.4, 0.6), run=HOSTILE, method=HOSTILE, benchmark=HOSTILE),
        replace(record("x", "retrieval/t2i_recall@1", 0.5, 0.4, 0.6), run=HOSTILE, method=HOSTILE, benchmark=HOSTILE),
        replace(record("x", "nodes/gap", 0.5, 0.4, 0.6), run=HOSTILE, method=HOSTILE, benchmark=HOSTILE),
    ]
    index = write_report(found, [], tmp_path / "r", title=HOSTILE, notes=[HOSTILE], gaps=[HOSTILE])
    page = Page(index.read_text(encoding="utf-8"))
    assert not page.all("script")
    assert page.text.count(HOSTILE) >= 5
    assert all(path.resolve().is_relative_to(tmp_path.resolve()) for path in (tmp_path / "r").rglob("*"))


def test_chapters_without_records_are_left_out_of_page_and_contents(
    record: Callable[..., Record], tmp_path: Path
) -> None:
    index = write_report([record("clip", "zero_shot/top1", 0.5, 0.4, 0.6)], [], tmp_path, title="One")
    page = Page(index.read_text(encoding="utf-8"))
    links = [a["href"] for a in page.all("a")]
    assert "#zero-shot" in links
    assert not {"#retrieval", "#probe", "#nodes", "#training", "#distillation", "#gaps", "#configs"} & set(links)
    assert not list((tmp_path / "figures").glob("*"))


def test_what_an_earlier_report_wrote_is_removed_and_other_files_stay(
    record: Callable[..., Record], tmp_path: Path
) -> None:
    for name in ("tables/probe.csv", "tables/mine.csv", "figures/gap_old.svg", "figures/mine.svg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("old")
    write_report([record("clip", "zero_shot/top1", 0.5)], [], tmp_path, title="One")
    assert not (tmp_path / "tables/probe.csv").exists()
    assert not (tmp_path / "figures/gap_old.svg").exists()
    assert (tmp_path / "tables/mine.csv").exists()
    assert (tmp_path / "figures/mine.svg").exists()


def test_no_records_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(PipeError, match=r"no results to report.*pipe evaluate"):
        write_report([], [], tmp_path / "report", title="Nothing")
    assert not (tmp_path / "report").exists()
