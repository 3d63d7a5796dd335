"""Tables of the runs themselves: distillation, compute, provenance. They read record.json and metrics.jsonl."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pipeline.report.results import pooled
from pipeline.report.runs import Group, Run
from pipeline.report.table import Cell, Column, Number, Row, Table

TERMS = ("gram/", "rkd/", "global/")  # logged as ratios to a predictor that ignores the image
TOTAL = "total"

_SIMCLR = (Column("SimCLR head", "count", "parameters"), "simclr_parameters")
_TRAINING: tuple[tuple[Column, str], ...] = (
    (Column("transitions", "count", "parameters"), "transition_parameters"),
    (Column("samples", "whole", "training"), "samples_seen"),
    (Column("steps", "whole", "training"), "steps"),
    (Column("time", "seconds", "training"), "seconds"),
    (Column("samples/s", "per_second", "training"), "samples_per_second"),
    (Column("peak memory", "bytes", "training"), "peak_memory_bytes"),
    (Column("FLOPs/sample", "flops", "training"), "flops_per_sample"),
)


def run_tables(groups: Sequence[Group], runs: Sequence[Run]) -> list[Table | None]:
    """All of them; none without run folders."""
    known = {run.name: run for run in runs}
    present = [group for group in groups if all(name in known for name in group.runs)]
    return [distillation(present, known), compute(present, known), provenance(runs)] if known else []


def distillation(groups: Sequence[Group], runs: dict[str, Run]) -> Table | None:
    """Final validation ratio of every distillation term; below 1, the student knows something of the image."""
    final = {name: run.last("val/") for name, run in runs.items()}
    terms = sorted({term for values in final.values() for term in values if term.startswith(TERMS)}, key=_term_order)
    columns = [Column("run"), *(Column(term.split("/", 1)[1], "ratio", term.split("/", 1)[0]) for term in terms)]
    rows = []
    for group in groups:
        cells = [_over_seeds([final[name].get(term) for name in group.runs]) for term in terms]
        if any(cell is not None for cell in cells):
            rows.append(Row((group.label, *cells)))
    caption = (
        "Last validation value of each term, divided by the loss of a predictor that ignores the image (mean Gram "
        "matrix, equal distances, mean vector): 1 means nothing was learned of the image, 0 the teacher itself."
    )
    return Table("distillation", "Distillation", caption, tuple(columns), tuple(rows))


def compute(groups: Sequence[Group], runs: dict[str, Run]) -> Table | None:
    """Parameters by part, and what training took."""

    def parameters(run: Run) -> dict[str, Any]:
        found = run.record.get("parameters") or {}
        return found if TOTAL in found or not found else {**found, TOTAL: sum(found.values())}

    parts = sorted({part for run in runs.values() for part in parameters(run) if part != TOTAL}, key=_part_order)
    asked = [(Column(part.replace("_", " "), "count", "parameters"), part) for part in (*parts, TOTAL)]
    with_head = any(run.record.get(_SIMCLR[1]) for run in runs.values())
    training = (*([_SIMCLR] if with_head else []), *_TRAINING)
    rows = []
    for group in groups:
        members = [runs[name] for name in group.runs]
        cells = [_over_seeds([parameters(run).get(part) for run in members]) for _, part in asked]
        cells += [_over_seeds([run.record.get(key) for run in members]) for _, key in training]
        if any(cell is not None for cell in cells):
            rows.append(Row((group.label, *cells)))
    caption = (
        "Parameters of the saved model by part; transitions are the ranking loss's own, used in training only"
        + (", and so is SLIP's SimCLR head" if with_head else "")
        + ". Time is training alone, without validation; it depends on what else the machine did."
    )
    columns = (Column("run"), *(column for column, _ in (*asked, *training)))
    return Table("compute", "Compute", caption, columns, tuple(rows))


def provenance(runs: Sequence[Run]) -> Table | None:
    """What each run was made from; digests shortened (whole ones are in record.json and records.json)."""
    asked = (
        ("method", "method"), ("order", "order"), ("fusion", "fusion"), ("seed", "seed"),
        ("checkpoint_sha256", "checkpoint"),
        ("cache", "teacher cache"), ("dataset_sha256", "training data"), ("config_sha256", "config"),
        ("code_version", "code"), ("precision", "precision"), ("machine", "machine"),
    )  # fmt: skip
    rows = tuple(
        Row(
            (
                run.name,
                *(_word(run.record.get(key), short=key.endswith("sha256") or key == "cache") for key, _ in asked),
            )
        )
        for run in sorted(runs, key=lambda run: run.name)
    )
    columns = (Column("run"), *(Column(name) for _, name in asked))
    caption = "Digests are SHA-256, first 12 digits. No teacher cache: the run has no student."
    return Table("provenance", "Provenance", caption, columns, rows)


def _word(value: Any, *, short: bool) -> Cell:
    if value is None:
        return None
    if isinstance(value, dict):
        return ", ".join(f"{key} {value[key]}" for key in sorted(value))
    return str(value)[:12] if short else str(value)


def _over_seeds(values: Iterable[Any]) -> Number | None:
    """One run's value, or the mean and std of several."""
    return pooled([float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)])


def _term_order(term: str) -> tuple[int, str]:
    return (TERMS.index(term.split("/")[0] + "/"), term)


def _part_order(part: str) -> tuple[int, str]:
    """Trunk, student, fusion, then what else there is."""
    known = ("trunk", "student", "fusion")
    return (next((i for i, name in enumerate(known) if part.startswith(name)), len(known)), part)
