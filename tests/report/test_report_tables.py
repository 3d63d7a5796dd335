"""Which number stands in which cell, and when something may be called better."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.evaluation.records import Record
from pipeline.report.results import Results
from pipeline.report.runs import Run, group_runs
from pipeline.report.table import Number, Table
from pipeline.report.tables import NAMES, tables
from pipeline.run_folder import RunFolder

MakeRecord = Callable[..., Record]


def named(found: list[Table], name: str) -> Table:
    return next(table for table in found if table.name == name)


def cell(table: Table, row: str, column: str) -> Any:
    at = [c.full_name for c in table.columns].index(column)
    return next(r.cells[at] for r in table.rows if r.cells[0] == row)


def test_every_kind_of_record_gives_its_table_and_other_kinds_give_none(records: list[Record]) -> None:
    names = [table.name for table in tables(records)]
    assert names == [
        "headline", "retrieval", "zero_shot", "probe", "paired", "nodes", "node_accuracy", "injection", "datasets",
    ]  # fmt: skip
    only = [r for r in records if r.metric.startswith("probe/")]
    assert [table.name for table in tables(only)] == ["headline", "probe", "node_accuracy", "datasets"]
    assert set(names) <= set(NAMES)


def test_results_are_taken_at_the_output_and_not_at_another_node(records: list[Record]) -> None:
    table = named(tables(records), "retrieval")
    gated = next(r for r in records if (r.run, r.node, r.metric) == ("dino", "gated", "retrieval/i2t_recall@5"))
    assert cell(table, "dino", "image → text R@5") == Number(gated.value, gated.low, gated.high)


def test_the_order_of_records_does_not_matter(records: list[Record]) -> None:
    assert tables(records) == tables(records[::-1])


def test_several_seeds_become_numpys_mean_and_sample_deviation(record: MakeRecord) -> None:
    values = [0.10, 0.13, 0.19]
    found = [
        record(f"clip-s{seed}", "retrieval/mean_recall@1", v, v - 0.1, v + 0.1, seed=seed, method="clip")
        for seed, v in enumerate(values)
    ]
    number = cell(named(tables(found), "headline"), "clip (3 seeds)", "Retrieval, mean R@1 flickr8k")
    assert number.value == pytest.approx(np.mean(values), abs=1e-15)
    assert number.std == pytest.approx(np.std(values, ddof=1), abs=1e-15)
    assert (number.low, number.high, number.seeds) == (None, None, 3)


@pytest.mark.parametrize(
    "differs", [{"seed": 0}, {"samples_seen": 9}, {"fusion": "full"}, {"order": 2}, {"cache": "e"}]
)
def test_runs_that_are_not_seeds_of_one_recipe_are_never_averaged(record: MakeRecord, differs: dict[str, Any]) -> None:
    first = record("a", "zero_shot/top1", 0.2, method="m")
    second = record("b", "zero_shot/top1", 0.4, method="m", **({"seed": 1} | differs))
    assert sorted(group.label for group in group_runs([first, second])) == ["a", "b"]


def test_runs_whose_configurations_differ_are_not_averaged(folder: Callable[..., RunFolder]) -> None:
    same = [Run.read(folder(f"clip-s{seed}", seed=seed)) for seed in (0, 1)]
    assert [group.label for group in group_runs([], same)] == ["clip (2 seeds)"]
    changed = [same[0], Run(same[1].name, same[1].record, [], same[1].config + "loss: {cross: 2}\n")]
    assert [group.label for group in group_runs([], changed)] == ["clip-s0", "clip-s1"]


def test_rows_stand_in_reading_order(records: list[Record]) -> None:
    labels = [group.label for group in group_runs(records)]
    assert labels == ["chance", "clip", "dino", "teacher"]


def test_a_run_is_marked_only_where_its_paired_interval_excludes_zero(records: list[Record]) -> None:
    found = tables(records)
    assert cell(named(found, "headline"), "dino", "Retrieval, mean R@1 flickr8k").best
    assert not cell(named(found, "retrieval"), "dino", "image → text R@1").best  # its interval includes zero
    assert not cell(named(found, "headline"), "clip", "Retrieval, mean R@1 flickr8k").best


def test_without_paired_data_nothing_is_marked_and_the_caption_says_so(record: MakeRecord) -> None:
    far_apart = [
        record("clip", "zero_shot/top1", 0.1, 0.09, 0.11),
        record("dino", "zero_shot/top1", 0.9, 0.89, 0.91, node="gated"),
    ]
    table = named(tables(far_apart), "zero_shot")
    assert not any(isinstance(c, Number) and c.best for row in table.rows for c in row.cells)
    assert "Nothing is marked" in table.caption


def test_the_reverse_of_a_paired_difference_is_known_too(record: MakeRecord) -> None:
    found = [
        record("clip", "probe/top1", 0.5),
        record("dino", "probe/top1", 0.4, node="gated"),
        record("dino", "probe/top1:vs:clip", -0.1, -0.15, -0.05, node="gated"),
    ]
    assert cell(named(tables(found), "probe"), "clip", "flickr8k top-1").best


def test_a_lower_median_rank_is_the_better_one(record: MakeRecord) -> None:
    metric = "retrieval/i2t_median_rank"
    results = Results([
        record("clip", metric, 9), record("dino", metric, 5, node="gated"),
        record("dino", f"{metric}:vs:clip", -4, -6, -2, node="gated"),
    ])  # fmt: skip
    assert results.paired[0].verdict == "better"


def test_one_undecided_opponent_is_enough_to_mark_nobody(record: MakeRecord) -> None:
    found = [record(name, "probe/top1", value) for name, value in (("a", 0.3), ("b", 0.5), ("c", 0.4))]
    found += [record("b", "probe/top1:vs:a", 0.2, 0.1, 0.3), record("c", "probe/top1:vs:b", -0.1, -0.3, 0.1)]
    assert Results(found).best("flickr8k", "test", "probe/top1") is None


def test_chance_is_k_of_n_where_no_record_says_it(record: MakeRecord) -> None:
    found = [record("clip", "retrieval/t2i_recall@5", 0.3, n=50), record("chance", "zero_shot/top1", 0.5, node="none")]
    assert cell(named(tables(found), "retrieval"), "chance", "text → image R@5") == Number(5 / 50)


def test_leave_one_domain_out_is_shown_by_domain_and_summarised_by_its_mean(records: list[Record]) -> None:
    found = tables(records)
    assert [c.name for c in named(found, "probe").columns] == ["run", "photo", "sketch", "mean"]
    assert [c.name for c in named(found, "headline").columns if c.group == "Probe top-1"] == ["pacs"]


def test_the_teacher_stands_in_the_probe_as_a_reference(records: list[Record]) -> None:
    row = next(row for row in named(tables(records), "probe").rows if row.cells[0] == "teacher")
    assert row.reference
    assert row.cells[-1] == Number(0.9, 0.88, 0.92)


def test_the_nodes_of_a_run_are_rows_from_the_trunk_outward(records: list[Record]) -> None:
    rows = [row.cells[:2] for row in named(tables(records), "nodes").rows]
    assert rows == [("clip", "trunk"), *(("dino", node) for node in ("trunk", "student", "fused", "gated"))]


def test_distillation_is_the_last_validation_line_and_nulls_are_not_measured(
    records: list[Record], folders: list[RunFolder]
) -> None:
    table = named(tables(records, [Run.read(folder) for folder in folders]), "distillation")
    assert [column.full_name for column in table.columns] == ["run", "gram fine"]
    assert [row.cells for row in table.rows] == [("dino", Number(0.8))]


def test_distillation_of_several_seeds_is_their_mean_and_deviation(folder: Callable[..., RunFolder]) -> None:
    about = {"method": "dinorankclip", "order": 3, "fusion": "full"}
    runs = [Run.read(folder(f"d{seed}", about, seed=seed, level=level)) for seed, level in enumerate((0.5, 0.7))]
    number = cell(named(tables([], runs), "distillation"), "dinorankclip-r3-full (2 seeds)", "gram fine")
    assert number.value == pytest.approx(0.6)
    assert number.std == pytest.approx(np.std([0.5, 0.7], ddof=1))


def test_compute_adds_parameters_up_where_the_record_does_not(records: list[Record], folders: list[RunFolder]) -> None:
    table = named(tables(records, [Run.read(folder) for folder in folders]), "compute")
    assert cell(table, "dino", "parameters total").value == 1200
    assert cell(table, "dino", "parameters transitions").value == 24
    assert cell(table, "clip", "training samples/s").value == 51.2


def test_slips_head_is_counted_where_a_run_has_one(records: list[Record], folders: list[RunFolder]) -> None:
    runs = [Run.read(folder) for folder in folders]
    without = named(tables(records, runs), "compute")
    assert "SimCLR" not in without.caption
    assert not any(column.name == "SimCLR head" for column in without.columns)
    for run in runs:
        run.record["simclr_parameters"] = 77 if run.name.startswith("clip") else 0
    table = named(tables(records, runs), "compute")
    assert cell(table, "clip", "parameters SimCLR head").value == 77
    assert "SimCLR head" in table.caption


def test_a_cut_last_line_of_metrics_is_left_out(folder: Callable[..., RunFolder]) -> None:
    run = folder("clip")
    with run.metrics.open("a") as file:
        file.write('{"step": 11, "samples": 704, "train/lo')
    assert [line["step"] for line in Run.read(run).metrics][-2:] == [10, 10]


def test_a_run_folder_without_metrics_or_config_is_read(tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    run = Run.read(RunFolder(tmp_path / "bare"))
    assert (run.record, run.metrics, run.config, run.last("val/")) == ({}, [], "", {})
