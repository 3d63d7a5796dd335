"""The tables of results, one builder a kind, from records alone. Tables of runs (compute, provenance) are beside them.

Rates are in percent. A kind without records gives no table: an empty table would look like a result.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pipeline.evaluation.records import Record
from pipeline.report.results import Paired, Results
from pipeline.report.run_tables import run_tables
from pipeline.report.runs import Group, Run
from pipeline.report.table import Column, Number, Row, Table

# Every name under which a report may write a table; files of these names that a report lacks are removed.
NAMES = (
    "headline", "retrieval", "zero_shot", "probe", "paired", "nodes", "node_accuracy", "injection",
    "distillation", "compute", "provenance", "datasets",
)  # fmt: skip

PAIRED_METRICS = {
    "retrieval/mean_recall@1": "mean R@1",
    "retrieval/i2t_recall@1": "image → text R@1",
    "retrieval/t2i_recall@1": "text → image R@1",
    "zero_shot/top1": "zero-shot top-1",
    "probe/top1": "probe top-1",
}


def tables(records: Iterable[Record], runs: Sequence[Run] = ()) -> list[Table]:
    """All tables that the records have something for, headline first; with `runs`, those of the runs too."""
    results = Results(records, runs)
    found = [builder(results) for builder in (headline, retrieval, zero_shot, probe, paired)]
    found += [builder(results) for builder in (nodes, node_accuracy, injection)]
    found += run_tables(results.own_groups, runs)
    found.append(datasets(results))
    return [table.without_empty_columns() for table in found if table is not None and table.rows]


def cells_say(results: Results) -> str:
    """What a cell is, and why something is in bold or nothing is."""
    spread = "In brackets: 95 % bootstrap interval over test items."
    if any(len(group.runs) > 1 for group in results.own_groups):
        spread += " ±: standard deviation over seeds."
    if len(results.own_groups) < 2:
        return spread
    if not results.paired:
        return spread + " Nothing is marked as best: there are no paired intervals, and separate ones are not a test."
    return spread + " Bold: the paired interval against every other run excludes zero (not corrected for many tests)."


def headline(results: Results) -> Table | None:
    """One number a run and benchmark: mean R@1, zero-shot top-1, probe top-1."""
    asked = [
        ("Retrieval, mean R@1", "retrieval", "retrieval/mean_recall@1"),
        ("Zero-shot top-1", "zero_shot", "zero_shot/top1"),
        ("Probe top-1", "probe", "probe/top1"),
    ]
    places = [(title, kind, metric, *place) for title, kind, metric in asked for place in results.headline(kind)]
    columns = [Column("run"), *(Column(benchmark, "rate", title) for title, _, _, benchmark, _ in places)]
    rows = [
        _row(group, [results.marked(group, benchmark, split, metric) for _, _, metric, benchmark, split in places])
        for group in results.groups
    ]
    caption = f"Every run's output, in %. {cells_say(results)}"
    return Table("headline", "At a glance", caption, tuple(columns), _present(rows))


def retrieval(results: Results) -> Table | None:
    """Both directions, R@1/5/10 and median rank; one block a benchmark."""
    columns, metrics = [Column("run")], []
    for group, way in (("image → text", "i2t"), ("text → image", "t2i")):
        columns += [Column(f"R@{k}", "rate", group) for k in (1, 5, 10)] + [Column("median rank", "rank", group)]
        metrics += [f"retrieval/{way}_recall@{k}" for k in (1, 5, 10)] + [f"retrieval/{way}_median_rank"]
    rows: list[Row] = []
    for benchmark, split in results.places("retrieval"):
        n = results.size("retrieval", benchmark, split)
        block = f"{benchmark}, {split} ({n:,} images)"
        rows += _present(
            [
                _row(group, [results.marked(group, benchmark, split, metric) for metric in metrics], block)
                for group in results.groups
            ]
        )
    caption = f"Recall in %, ranks from 1 (lower is better), at every run's output. {cells_say(results)}"
    return Table("retrieval", "Retrieval", caption, tuple(columns), tuple(rows))


def zero_shot(results: Results) -> Table | None:
    """Top-1, 3, 5 and the mean over classes; one block a benchmark."""
    asked = {"top-1": "top1", "top-3": "top3", "top-5": "top5", "mean per class": "mean_per_class"}
    columns = [Column("run"), *(Column(name, "rate") for name in asked)]
    rows: list[Row] = []
    for benchmark, split in results.places("zero_shot"):
        block = f"{benchmark}, {split} ({results.size('zero_shot', benchmark, split):,} images)"
        cells = {
            group: [results.marked(group, benchmark, split, f"zero_shot/{name}") for name in asked.values()]
            for group in results.groups
        }
        rows += _present([_row(group, values, block) for group, values in cells.items()])
    caption = f"Accuracy in % of classes named by text alone, at every run's output. {cells_say(results)}"
    return Table("zero_shot", "Zero-shot classification", caption, tuple(columns), tuple(rows))


def probe(results: Results) -> Table | None:
    """A linear probe's accuracy; a column a benchmark, or a domain left out, with their mean last."""
    places = []
    for benchmark, split in results.places("probe"):
        by_domain = any(place == (benchmark, "mean") for place in results.places("probe"))
        places.append((benchmark, split, "top1", split if by_domain else "top-1"))
        if not by_domain:
            places.append((benchmark, split, "mean_per_class", "mean per class"))
    columns = [Column("run"), *(Column(name, "rate", benchmark) for benchmark, _, _, name in places)]
    rows = [
        _row(group, [results.marked(group, benchmark, split, f"probe/{m}") for benchmark, split, m, _ in places])
        for group in results.groups
    ]
    caption = (
        "Accuracy in % of logistic regression on frozen features, at every run's output; teacher: the same probe on "
        "its global vector. Domains: fitted on all others, tested on the one named; their plain mean last. "
    )
    return Table("probe", "Linear probe", caption + cells_say(results), tuple(columns), _present(rows))


def paired(results: Results) -> Table | None:
    """Differences between two runs' outputs on the same items, the only basis on which one is called better."""
    columns = (
        Column("comparison"),
        Column("measure"),
        Column("points", "points"),
        Column("verdict"),
    )
    rows = [
        Row(
            (f"{p.run} − {p.other}", PAIRED_METRICS[p.metric], Number(p.value, p.low, p.high), p.verdict),
            p.benchmark,
        )
        for p in sorted(results.headline_paired(), key=_by_measure)
        if p.metric in PAIRED_METRICS
    ]
    caption = (
        "First run minus second, in percentage points, on the same test items, with the paired 95 % interval over "
        "items. One run has one seed: the interval covers the choice of items, not of seeds. Not corrected for the "
        "number of comparisons."
    )
    return Table("paired", "Paired differences", caption, columns, tuple(rows))


def nodes(results: Results) -> Table | None:
    """Where images and texts lie, at every node of one checkpoint; a block a benchmark."""
    asked = {
        "gap": "gap", "centroid cosine": "centroid_cosine", "relative gap": "relative_gap", "alignment": "alignment",
        "uniformity, image": "uniformity_image", "uniformity, text": "uniformity_text", "separability": "separability",
    }  # fmt: skip
    columns = [Column("run"), Column("node"), *(Column(name, "plain") for name in asked), Column("mean R@1, %", "rate")]
    rows: list[Row] = []
    for benchmark, split in results.places("nodes"):
        for group in results.own_groups:
            for node in results.nodes(group, "nodes"):
                cells = [results.cell(group, benchmark, split, f"nodes/{name}", node) for name in asked.values()]
                cells.append(results.cell(group, benchmark, split, "retrieval/mean_recall@1", node))
                if any(cell is not None for cell in cells):
                    rows.append(Row((group.label, node, *cells), f"{benchmark}, {split}"))
    caption = (
        "Trunk: injection off. Student: both heads on the teacher's space. Fused: gate fully open. Gated: the output. "
        "All from one checkpoint; a trunk comes to rely on what is injected, so compare a run of fusion none. "
        "Gap: distance of the centroids. Separability: how often a linear classifier tells image from text. "
        "In brackets: 95 % bootstrap interval over pairs."
    )
    return Table("nodes", "Nodes and modality gap", caption, tuple(columns), tuple(rows))


def node_accuracy(results: Results) -> Table | None:
    """Zero-shot and probe accuracy at every node of the runs that have more than one."""
    places = [
        (title, kind, *place)
        for title, kind in (("Zero-shot top-1", "zero_shot"), ("Probe top-1", "probe"))
        for place in results.headline(kind)
    ]
    columns = [Column("run"), Column("node"), *(Column(benchmark, "rate", title) for title, _, benchmark, _ in places)]
    rows: list[Row] = []
    for group in results.own_groups:
        found = sorted({n for kind in ("zero_shot", "probe") for n in results.nodes(group, kind)}, key=_outward)
        for node in found if len(found) > 1 else []:
            cells = [
                results.cell(group, benchmark, split, f"{kind}/top1", node) for _, kind, benchmark, split in places
            ]
            rows.append(Row((group.label, node, *cells)))
    caption = "Accuracy in % at each node of one checkpoint. In brackets: 95 % bootstrap interval over test items."
    return Table("node_accuracy", "Accuracy by node", caption, tuple(columns), tuple(rows))


def injection(results: Results) -> Table | None:
    """First-order drift and the gate, for the runs that inject; a block a benchmark."""
    asked = [
        ("γ", "image", "drift/gamma_image"), ("γ", "text", "drift/gamma_text"),
        ("InfoNCE", "γ = 0", "drift/loss_trunk"), ("InfoNCE", "gated", "drift/loss_gated"),
        ("InfoNCE", "gate open", "drift/loss_fused"),
        ("drift", "slope", "drift/slope"), ("drift", "finite difference", "drift/finite_difference"),
        ("drift", "first order", "drift/first_order"), ("drift", "change", "drift/change"),
        ("drift", "remainder", "drift/remainder"),
        ("image gate", "mean", "gate/image_mean"), ("image gate", "5 %", "gate/image_q05"),
        ("image gate", "95 %", "gate/image_q95"),
        ("text gate", "mean", "gate/text_mean"), ("text gate", "5 %", "gate/text_q05"),
        ("text gate", "95 %", "gate/text_q95"),
    ]  # fmt: skip
    columns = [Column("run"), *(Column(name, "plain", group) for group, name, _ in asked)]
    rows: list[Row] = []
    for benchmark, split in sorted({*results.places("drift"), *results.places("gate")}):
        rows += _present(
            [
                _row(group, [results.cell(group, benchmark, split, m, "gated") for _, _, m in asked], benchmark)
                for group in results.own_groups
            ]
        )
    caption = (
        "What the injection does to the contrastive loss. Change: loss at the trained γ minus loss at γ = 0; first "
        "order: what the slope predicts of it; remainder: what it misses. Slope and finite difference at γ = 0 agree "
        "where the gradient is right. Gate: mean and quantiles over pairs and channels."
    )
    return Table("injection", "Injection and gate", caption, tuple(columns), tuple(rows))


def datasets(results: Results) -> Table | None:
    """What was evaluated: one row a benchmark and split, with its size and digest."""
    titles = {"retrieval": "retrieval", "zero_shot": "zero-shot", "probe": "probe"}
    found = {
        (r.benchmark, r.split, kind, r.dataset_sha256)
        for r in results.plain
        if (kind := r.metric.partition("/")[0]) in titles
    }
    rows = []
    for benchmark, split, kind, digest in sorted(found):
        n = results.size(kind, benchmark, split) or 0
        rows.append(Row((benchmark, split, titles[kind], Number(n), digest[:12])))
    columns = (Column("benchmark"), Column("split"), Column("kind"), Column("images", "whole"), Column("data SHA-256"))
    caption = "The data that were scored; digests shortened, whole in records.json."
    return Table("datasets", "Data", caption, columns, tuple(rows))


def _by_measure(p: Paired) -> tuple[str, int, str, str]:
    names = list(PAIRED_METRICS)
    return (p.benchmark, names.index(p.metric) if p.metric in names else len(names), p.other, p.run)


def _row(group: Group, cells: Sequence[Number | None], block: str = "") -> Row:
    return Row((group.label, *cells), block, group.reference)


def _present(rows: Iterable[Row]) -> tuple[Row, ...]:
    """Rows with at least one number."""
    return tuple(row for row in rows if any(isinstance(cell, Number) for cell in row.cells))


def _outward(node: str) -> tuple[int, str]:
    order = ("trunk", "student", "fused", "gated")
    return (order.index(node) if node in order else len(order), node)
