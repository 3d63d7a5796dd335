"""A table as data, and its three plain forms: Markdown for reading, CSV for computing, LaTeX (booktabs) for papers."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, field
from itertools import groupby

from pipeline.report.text import MISSING, Kind, latex, markdown, one_line, show


@dataclass(frozen=True)
class Column:
    """`group` is a heading over neighbouring columns; `kind` decides how a number is written."""

    name: str
    kind: Kind = "text"
    group: str = ""

    @property
    def full_name(self) -> str:
        return f"{self.group} {self.name}" if self.group else self.name


@dataclass(frozen=True)
class Number:
    """A value with what is known of its uncertainty.

    `low`, `high`: 95 % interval over test items (one run). `std` over `seeds` runs (several): then no interval.
    `best`: a paired interval against every other run excludes zero.
    """

    value: float
    low: float | None = None
    high: float | None = None
    std: float | None = None
    seeds: int = 1
    best: bool = False

    def uncertainty(self, kind: Kind) -> str:
        """`[11.0, 13.7]`, `± 0.4`, or nothing."""
        if self.std is not None:
            return f"± {show(self.std, 'rate' if kind == 'points' else kind)}"
        if self.low is None or self.high is None:
            return ""
        return f"[{show(self.low, kind)}, {show(self.high, kind)}]"


Cell = str | Number | None


@dataclass(frozen=True)
class Row:
    """The first cell names the row. `reference`: chance or the teacher, no run of ours. `block`: its benchmark."""

    cells: tuple[Cell, ...]
    block: str = ""
    reference: bool = False


@dataclass(frozen=True)
class Table:
    """`name` is the file's; `caption` says what the cells are."""

    name: str
    title: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...] = field(default=())

    def blocks(self) -> list[tuple[str, list[Row]]]:
        """Neighbouring rows of one block together."""
        return [(block, list(rows)) for block, rows in groupby(self.rows, key=lambda row: row.block)]

    def groups(self) -> list[tuple[str, int]]:
        """The headings over the columns, each with its span; empty where there is none."""
        if not any(column.group for column in self.columns):
            return []
        return [(group, len(list(columns))) for group, columns in groupby(self.columns, key=lambda c: c.group)]

    def without_empty_columns(self) -> Table:
        """The same without columns in which no row has anything."""
        kept = [i for i, _ in enumerate(self.columns) if any(row.cells[i] is not None for row in self.rows)]
        rows = tuple(Row(tuple(row.cells[i] for i in kept), row.block, row.reference) for row in self.rows)
        return Table(self.name, self.title, self.caption, tuple(self.columns[i] for i in kept), rows)

    def to_markdown(self) -> str:
        """A GitHub table and its caption; numbers right-aligned, blocks as a first column."""
        named = any(row.block for row in self.rows)
        head = [*(["benchmark"] if named else []), *(column.full_name for column in self.columns)]
        rule = [*([":--"] if named else []), *(":--" if c.kind == "text" else "--:" for c in self.columns)]
        lines = [[markdown(h) for h in head], rule]
        for row in self.rows:
            cells = [_in_markdown(cell, column) for cell, column in zip(row.cells, self.columns, strict=True)]
            lines.append([*([markdown(row.block)] if named else []), *cells])
        body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"{body}\n\n{one_line(self.caption)}\n"

    def to_csv(self) -> str:
        """Unrounded numbers, rates in [0, 1]. A column X with intervals has X low and X high beside it; with seeds,
        X std and X seeds. An empty field: not measured."""
        named = any(row.block for row in self.rows)
        extras = [self._extras(i) for i, _ in enumerate(self.columns)]
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        head = ["benchmark"] if named else []
        for column, extra in zip(self.columns, extras, strict=True):
            head += [column.full_name, *(f"{column.full_name} {name}" for name in extra)]
        writer.writerow(head)
        for row in self.rows:
            line: list[str] = [row.block] if named else []
            for cell, extra in zip(row.cells, extras, strict=True):
                line += _in_csv(cell, extra)
            writer.writerow(line)
        return out.getvalue()

    def _extras(self, index: int) -> list[str]:
        numbers = [row.cells[index] for row in self.rows if isinstance(row.cells[index], Number)]
        found = ["low", "high"] if any(n.low is not None for n in numbers if isinstance(n, Number)) else []
        pooled = any(n.std is not None for n in numbers if isinstance(n, Number))
        return found + (["std", "seeds"] if pooled else [])

    def to_latex(self) -> str:
        """A booktabs table, whole and escaped, for \\input."""
        align = "".join("l" if column.kind == "text" else "r" for column in self.columns)
        lines = [
            "% needs \\usepackage{booktabs}",
            "\\begin{table}",
            "\\centering",
            f"\\caption{{{latex(self.caption)}}}",
            f"\\label{{tab:{self.name}}}",
            f"\\begin{{tabular}}{{{align}}}",
            "\\toprule",
            *self._latex_groups(),
            " & ".join(latex(column.name) for column in self.columns) + " \\\\",
        ]
        for block, rows in self.blocks():
            lines.append("\\midrule")
            if block:
                lines.append(f"\\multicolumn{{{len(self.columns)}}}{{l}}{{\\emph{{{latex(block)}}}}} \\\\")
            for row in rows:
                cells = [_in_latex(cell, column) for cell, column in zip(row.cells, self.columns, strict=True)]
                lines.append(" & ".join(cells) + " \\\\")
        return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", "\\end{table}", ""])

    def _latex_groups(self) -> list[str]:
        groups = self.groups()
        if not groups:
            return []
        heads, rules, at = [], [], 1
        for name, span in groups:
            heads.append(f"\\multicolumn{{{span}}}{{c}}{{{latex(name)}}}" if name else " & ".join([""] * span))
            rules += [f"\\cmidrule(lr){{{at}-{at + span - 1}}}"] if name else []
            at += span
        return [" & ".join(heads) + " \\\\", " ".join(rules)]


def _in_markdown(cell: Cell, column: Column) -> str:
    if not isinstance(cell, Number):
        return markdown(cell) if cell is not None else MISSING
    text = show(cell.value, column.kind)
    # Our own numbers and brackets need no escape: "[a, b]" is no link where no "(" or "[" follows.
    return " ".join(filter(None, [f"**{text}**" if cell.best else text, cell.uncertainty(column.kind)]))


def _in_csv(cell: Cell, extra: list[str]) -> list[str]:
    if not isinstance(cell, Number):
        return [one_line(cell) if cell is not None else "", *([""] * len(extra))]
    every = {"low": cell.low, "high": cell.high, "std": cell.std, "seeds": cell.seeds}
    return [repr(cell.value), *("" if every[name] is None else repr(every[name]) for name in extra)]


def _in_latex(cell: Cell, column: Column) -> str:
    if not isinstance(cell, Number):
        return latex(cell) if cell is not None else latex(MISSING)
    text = latex(show(cell.value, column.kind))
    text = f"\\textbf{{{text}}}" if cell.best else text
    spread = cell.uncertainty(column.kind)
    return f"{text} {{\\scriptsize {latex(spread)}}}" if spread else text
