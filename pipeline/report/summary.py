"""The page's first paragraph, written by the data: what was measured, and what it can and cannot carry."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.evaluation.records import CHANCE
from pipeline.report.results import Results
from pipeline.report.run_tables import TERMS
from pipeline.report.runs import Run
from pipeline.report.text import listed, plural, show


def summary(results: Results, runs: Sequence[Run], gaps: Sequence[str]) -> str:
    """A few sentences. None names a winner: that is the paired table's to say, interval by interval."""
    said = [_scope(results), _seeds(results), _retrieval(results), _paired(results), _distillation(runs)]
    if gaps:
        are = "is" if len(gaps) == 1 else "are"
        said.append(f"{plural(len(gaps), 'result')} could not be measured and {are} listed under Gaps.")
    return " ".join(sentence for sentence in said if sentence)


def _scope(results: Results) -> str:
    kinds = {"retrieval": "retrieval", "zero_shot": "zero-shot classification", "probe": "linear probes"}
    parts = []
    for kind, called in kinds.items():
        names = list(dict.fromkeys(benchmark for benchmark, _ in results.headline(kind)))
        if names:
            parts.append(f"{called} on {listed(names)}")
    count = sum(len(group.runs) for group in results.own_groups)
    return f"{plural(count, 'run')}, scored by {listed(parts)}." if parts else f"{plural(count, 'run')}."


def _seeds(results: Results) -> str:
    groups = results.own_groups
    single = [group for group in groups if len(group.runs) == 1]
    if groups and len(single) == len(groups):
        return (
            "Each was trained once, with one seed: the intervals cover the choice of test items and nothing else, so a "
            "difference between two rows can be the seed's."
        )
    if single:
        has, its = ("has", "its interval covers") if len(single) == 1 else ("have", "their intervals cover")
        count = f"{len(single)} of {plural(len(groups), 'recipe')}"
        return f"{count} {has} one seed only; {its} the choice of test items alone."
    return "Every recipe has several seeds; ± is their standard deviation."


def _retrieval(results: Results) -> str:
    for benchmark, split in results.headline("retrieval"):
        metric = "retrieval/mean_recall@1"
        cells = [results.cell(group, benchmark, split, metric) for group in results.own_groups]
        found = sorted(cell.value for cell in cells if cell is not None)
        if not found:
            continue
        low, high = show(found[0], "rate"), show(found[-1], "rate")
        spread = f"{low} %" if low == high else f"{low} to {high} %"
        by_chance = next((group for group in results.groups if group.label == CHANCE), None)
        level = results.cell(by_chance, benchmark, split, metric) if by_chance else None
        chance = f"; a random order would reach {100 * level.value:.2g} %" if level else ""
        return f"On {benchmark} the mean R@1 of both directions is {spread}{chance}."
    return ""


def _paired(results: Results) -> str:
    asked = ("retrieval/mean_recall@1", "zero_shot/top1", "probe/top1")
    judged = [p for p in results.headline_paired() if p.metric in asked]
    if not judged:
        return ""
    clear = sum(p.verdict != "undecided" for p in judged)
    return (
        f"Of {plural(len(judged), 'paired difference')} between two runs' outputs, {clear} "
        f"{'has' if clear == 1 else 'have'} a 95 % interval that excludes zero."
    )


def _distillation(runs: Sequence[Run]) -> str:
    ratios = [v for run in runs for term, v in run.last("val/").items() if term.startswith(TERMS)]
    if not ratios:
        return ""
    below = sum(ratio < 1 for ratio in ratios)
    return (
        f"On validation rows, {below} of {len(ratios)} distillation terms end below what a predictor that ignores the "
        "image scores."
    )
