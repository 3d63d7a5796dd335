"""The report: one self-contained page, and the same results as records, tables and figures beside it.

    report/index.html   records.json   tables/NAME.{md,csv,tex}   figures/NAME.{svg,png}

Equal inputs give equal bytes. Files of an earlier report that this one has no table or figure for are removed.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline.errors import PipeError
from pipeline.evaluation.records import Record, write_records
from pipeline.report.curves import Section
from pipeline.report.figures import figures
from pipeline.report.results import Results
from pipeline.report.runs import Group, Run
from pipeline.report.style import COLOURS, GLYPHS, css_variables
from pipeline.report.summary import summary
from pipeline.report.table import Number, Table
from pipeline.report.tables import NAMES, tables
from pipeline.report.text import show, slug
from pipeline.run_folder import RunFolder, write_bytes

# (id, title, tables, figures), in the page's order. A chapter without content is left out, of the contents too.
CHAPTERS = (
    ("glance", "At a glance", ("headline",), ""),
    ("retrieval", "Retrieval", ("retrieval",), "retrieval"),
    ("zero-shot", "Zero-shot classification", ("zero_shot",), ""),
    ("probe", "Linear probe", ("probe",), ""),
    ("paired", "Paired differences", ("paired",), ""),
    ("nodes", "Nodes and modality gap", ("nodes", "node_accuracy"), "nodes"),
    ("injection", "Injection and gate", ("injection",), "injection"),
    ("training", "Training", (), "training"),
    ("distillation", "Distillation", ("distillation",), "distillation"),
    ("compute", "Compute", ("compute",), ""),
)


class Example(TypedDict):
    """A picture for the gallery: PNG bytes, and what it shows in words."""

    title: str
    caption: str
    image_png: bytes


@dataclass(frozen=True)
class Chapter:
    """A section of the page."""

    id: str
    title: str
    tables: list[Table]
    figures: Section


def write_report(
    records: Sequence[Record],
    runs: Sequence[RunFolder],
    out: Path,
    *,
    title: str,
    notes: Sequence[str] = (),
    gaps: Sequence[str] = (),
    examples: Sequence[Example] = (),
) -> Path:
    """Write the whole report under `out`.

    Args:
        records: results of `runs` and of the references; others' too.
        runs: the folders whose curves, costs and configurations are shown.
        notes: paragraphs under the title.
        gaps: what was asked for and is not there, a line each.
        examples: pictures for a gallery.

    Returns:
        The path of index.html.

    Raises:
        PipeError: there is nothing to report.
    """
    if not records:
        raise PipeError("there are no results to report", where=out, fix="run: pipe evaluate")
    read = sorted((Run.read(folder) for folder in runs), key=lambda run: run.name)
    results = Results(records, read)
    made, drawn = tables(records, read), figures(results, read)
    write_records(out / "records.json", records)
    _write_tables(out / "tables", made)
    _write_figures(out / "figures", drawn)
    page = render(results, read, made, drawn, title=title, notes=notes, gaps=gaps, examples=examples)
    write_bytes(out / "index.html", page.encode())
    return out / "index.html"


def render(
    results: Results,
    runs: Sequence[Run],
    made: Sequence[Table],
    drawn: Mapping[str, Section],
    *,
    title: str,
    notes: Sequence[str],
    gaps: Sequence[str],
    examples: Sequence[Example],
) -> str:
    """The page as HTML. Everything that comes from outside is escaped by the template."""
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    by_name = {table.name: table for table in made}
    pictures = [{**example, "data": base64.b64encode(example["image_png"]).decode("ascii")} for example in examples]
    return environment.get_template("page.html").render(
        title=title,
        summary=summary(results, runs, gaps),
        notes=notes,
        chapters=_chapters(by_name, drawn),
        examples=pictures,
        gaps=gaps,
        runs=[run for run in runs if run.config],
        provenance=by_name.get("provenance"),
        datasets=by_name.get("datasets"),
        glyphs={group.label: glyph(group) for group in results.own_groups},
        glyph=glyph,
        inline=lambda figure: Markup(figure.inline()),
        is_number=lambda cell: isinstance(cell, Number),
        show=show,
        slug=slug,
        css=Markup((here / "page.css").read_text(encoding="utf-8")),
        light=Markup(css_variables(0)),
        dark=Markup(css_variables(1)),
        versions=sorted({record.code_version for record in results.records}),
        paper=COLOURS["paper"],
    )


def glyph(group: Group) -> Markup:
    """A group's mark, in its colour and shape, as figures draw it; decoration beside the name."""
    colour, shape = group.index % 8, GLYPHS[group.index % len(GLYPHS)]
    return Markup(
        f'<svg class="glyph" viewBox="0 0 10 10" aria-hidden="true"><path d="{shape}" fill="var(--s{colour})"/></svg>'
    )


def _chapters(by_name: Mapping[str, Table], drawn: Mapping[str, Section]) -> list[Chapter]:
    found = []
    for identity, title, names, panel in CHAPTERS:
        chapter = Chapter(identity, title, [by_name[n] for n in names if n in by_name], drawn.get(panel, Section()))
        if chapter.tables or chapter.figures.figures:
            found.append(chapter)
    return found


def _write_tables(folder: Path, made: Iterable[Table]) -> None:
    kept = set()
    for table in made:
        for ending, text in (("md", table.to_markdown()), ("csv", table.to_csv()), ("tex", table.to_latex())):
            write_bytes(folder / f"{table.name}.{ending}", text.encode())
            kept.add(f"{table.name}.{ending}")
    _remove_others(folder, kept, {f"{name}.{ending}" for name in NAMES for ending in ("md", "csv", "tex")})


def _write_figures(folder: Path, drawn: Mapping[str, Section]) -> None:
    kept = set()
    for section in drawn.values():
        for figure in section.figures:
            for ending, data in (("svg", figure.svg), ("png", figure.png)):
                write_bytes(folder / f"{figure.name}.{ending}", data)
                kept.add(f"{figure.name}.{ending}")
    prefixes = ("retrieval_", "gap_", "relative_gap_", "recall_", "train_", "val_", "ratio_", "gamma", "gate_", "beta_")
    there = {path.name for path in folder.glob("*") if path.name.startswith(prefixes)} if folder.is_dir() else set()
    _remove_others(folder, kept, there)


def _remove_others(folder: Path, kept: set[str], ours: set[str]) -> None:
    """Remove files that an earlier report wrote and this one has not; names that are not ours stay."""
    for name in sorted(ours - kept):
        (folder / name).unlink(missing_ok=True)
