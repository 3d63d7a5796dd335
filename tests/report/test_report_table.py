"""A table's three plain forms: they carry the same numbers, and nothing in a name can break them."""

from __future__ import annotations

import csv
import io
import re

import pytest

from pipeline.report.table import Column, Number, Row, Table
from pipeline.report.text import byte_size, compact, duration, latex, markdown, shortened, show, slug

HOSTILE = 'a_b & 100% $x^2$ {c} #1 ~ \\input{/etc/passwd}|<script>alert(1)</script>\nnext, "quoted"'


def example(name: str = "clip", *, block: str = "") -> Table:
    columns = (Column("run"), Column("R@1", "rate", "image → text"), Column("gap", "plain"))
    rows = (
        Row((name, Number(0.12345678901, 0.11, 0.137), Number(0.5)), block),
        Row(("pooled", Number(0.2, std=0.004, seeds=3), None), block),
        Row(("chance", Number(0.01), None), block, reference=True),
    )
    return Table("t", "T", "What the cells are: 95 % & more.", columns, rows)


def test_a_rate_is_shown_in_percent_with_its_interval_in_brackets() -> None:
    assert "| clip | 12.3 [11.0, 13.7] | 0.500 |" in example().to_markdown()


def test_several_seeds_are_shown_as_mean_and_deviation() -> None:
    assert "| pooled | 20.0 ± 0.4 | – |" in example().to_markdown()


def test_csv_parses_back_to_the_same_numbers() -> None:
    head, first, pooled, chance = csv.reader(io.StringIO(example().to_csv()))
    row = dict(zip(head, first, strict=True))
    key = "image → text R@1"
    assert [float(row[k]) for k in (key, f"{key} low", f"{key} high", "gap")] == [0.12345678901, 0.11, 0.137, 0.5]
    assert float(dict(zip(head, pooled, strict=True))[f"{key} std"]) == 0.004
    assert dict(zip(head, chance, strict=True))[f"{key} low"] == ""


def test_csv_has_as_many_fields_in_every_row_whatever_the_name() -> None:
    rows = list(csv.reader(io.StringIO(example(HOSTILE, block=HOSTILE).to_csv())))
    assert {len(row) for row in rows} == {len(rows[0])}
    assert rows[1][1] == HOSTILE.replace("\n", " ")


def test_latex_prints_special_characters_and_executes_none() -> None:
    text = latex(HOSTILE)
    assert "\\input" not in text
    assert re.search(r"(?<!\\)[&%#_]", text) is None
    assert text.count("$") == text.count("\\$")
    assert "\n" not in text


def test_latex_tables_are_booktabs_with_equal_columns_in_every_row() -> None:
    lines = example(HOSTILE, block="flickr_8k").to_latex().splitlines()
    assert [rule for rule in ("\\toprule", "\\midrule", "\\bottomrule") if rule in lines] == [
        "\\toprule", "\\midrule", "\\bottomrule",
    ]  # fmt: skip
    body = [line for line in lines if line.endswith("\\\\") and "multicolumn" not in line]
    assert {len(re.findall(r"(?<!\\)&", line)) for line in body} == {2}
    assert "\\emph{flickr\\_8k}" in "\n".join(lines)


def test_latex_braces_balance_whatever_the_name() -> None:
    text = re.sub(r"\\[{}\\]", "", example(HOSTILE).to_latex())
    assert text.count("{") == text.count("}")


def test_markdown_rows_keep_their_number_of_cells_whatever_the_name() -> None:
    rows = [line for line in example(HOSTILE).to_markdown().splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {4}
    assert "\\<script>" in markdown(HOSTILE)


def test_a_mark_is_bold_in_markdown_and_latex() -> None:
    table = Table("t", "T", "", (Column("run"), Column("x", "rate")), (Row(("a", Number(0.5, best=True))),))
    assert "**50.0**" in table.to_markdown()
    assert "\\textbf{50.0}" in table.to_latex()


def test_columns_in_which_nothing_was_measured_are_left_out() -> None:
    columns = (Column("run"), Column("x", "rate"), Column("y", "rate"))
    table = Table("t", "T", "", columns, (Row(("a", None, Number(1.0))),)).without_empty_columns()
    assert [column.name for column in table.columns] == ["run", "y"]
    assert table.rows[0].cells == ("a", Number(1.0))


@pytest.mark.parametrize(
    ("value", "kind", "shown"),
    [
        (-0.0001, "rate", "0.0"), (-0.012, "points", "−1.2"), (0.012, "points", "+1.2"), (0.0, "points", "0.0"),
        (3.5, "rank", "3.5"), (12.0, "rank", "12"), (7_623_456, "count", "7.62 M"), (0, "count", "0"),
        (0.00002, "plain", "2.0e-05"),
    ],
)  # fmt: skip
def test_numbers_are_written_for_people(value: float, kind: str, shown: str) -> None:
    assert show(value, kind) == shown  # type: ignore[arg-type]


def test_units_switch_where_the_next_one_reads_better() -> None:
    assert [compact(999), compact(1000), byte_size(1 << 30), duration(83), duration(4310), duration(259_200)] == [
        "999", "1.00 k", "1.00 GiB", "83.0 s", "71.8 min", "72.0 h",
    ]  # fmt: skip


def test_long_names_keep_both_ends_in_a_figure() -> None:
    name = "a_run_with_a_very_long_name_indeed_bs128_s1"
    assert shortened("clip") == "clip"
    assert (len(shortened(name)), shortened(name)[-8:]) == (36, "bs128_s1")


def test_slugs_are_safe_file_names() -> None:
    assert slug("../Pacs art/painting") == "pacs_art_painting"
    assert slug("…") == "unnamed"
