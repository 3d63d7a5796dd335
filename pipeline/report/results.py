"""Records, indexed: which number stands in which cell, and which runs a paired interval tells apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline.evaluation.records import CHANCE, VERSUS, Record, headline_node
from pipeline.report.runs import Group, Run, group_runs
from pipeline.report.table import Number

LOWER_IS_BETTER = ("_median_rank",)
NODES = ("trunk", "student", "fused", "gated")


@dataclass(frozen=True)
class Paired:
    """run − other on the same test items, with the 95 % interval of the difference."""

    run: str
    other: str
    benchmark: str
    split: str
    metric: str
    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """`better` or `worse` only where the interval excludes zero."""
        if self.low <= 0 <= self.high:
            return "undecided"
        return "better" if (self.low > 0) != self.metric.endswith(LOWER_IS_BETTER) else "worse"


class Results:
    """All records of a report. `runs`, where given, keep differently configured runs apart."""

    def __init__(self, records: Iterable[Record], runs: Sequence[Run] = ()) -> None:
        self.records = sorted(records, key=Record.sort_key)
        self.groups: list[Group] = group_runs(self.records, runs)
        self.plain = [r for r in self.records if VERSUS not in r.metric]
        self.paired = [_paired(r) for r in self.records if VERSUS in r.metric and r.low is not None]
        self._places: dict[str, dict[tuple[str, str], int]] = {}  # kind -> (benchmark, split) -> n
        self._nodes: dict[tuple[str, str], set[str]] = {}  # (run, kind) -> nodes
        for r in self.plain:
            kind = r.metric.partition("/")[0]
            sizes = self._places.setdefault(kind, {})
            sizes[r.benchmark, r.split] = max(r.n, sizes.get((r.benchmark, r.split), 0))
            self._nodes.setdefault((r.run, kind), set()).add(r.node)
        self._cells = {(r.run, r.benchmark, r.split, r.node, r.metric): r for r in self.plain}
        self._verdicts = {}
        for p in self.paired:
            where = (p.benchmark, p.split, p.metric)
            self._verdicts[(*where, p.run, p.other)] = p.verdict
            opposite = {"better": "worse", "worse": "better"}.get(p.verdict, p.verdict)
            self._verdicts.setdefault((*where, p.other, p.run), opposite)

    @property
    def own_groups(self) -> list[Group]:
        return [group for group in self.groups if not group.reference]

    def places(self, kind: str) -> list[tuple[str, str]]:
        """(benchmark, split) of every record of a kind (retrieval, probe …), in order; a mean after its parts."""
        return sorted(self._places.get(kind, {}), key=lambda place: (place[0], place[1] == "mean", place[1]))

    def place_name(self, benchmark: str, split: str, kind: str) -> str:
        """The benchmark, with its split where it has several."""
        several = len([place for place in self.places(kind) if place[0] == benchmark]) > 1
        return f"{benchmark} {split}" if several else benchmark

    def headline(self, kind: str) -> list[tuple[str, str]]:
        """`places`, with benchmarks that have a mean over domains represented by it alone."""
        places = self.places(kind)
        averaged = {benchmark for benchmark, split in places if split == "mean"}
        return [place for place in places if place[0] not in averaged or place[1] == "mean"]

    def headline_paired(self) -> list[Paired]:
        """Paired differences at the places of `headline`: of domains, only their mean's."""
        kinds = ("retrieval", "zero_shot", "probe")
        places = {(kind, *place) for kind in kinds for place in self.headline(kind)}
        return [p for p in self.paired if (p.metric.partition("/")[0], p.benchmark, p.split) in places]

    def size(self, kind: str, benchmark: str, split: str) -> int | None:
        """n of a place: images, or test items."""
        return self._places.get(kind, {}).get((benchmark, split))

    def nodes(self, group: Group, kind: str) -> list[str]:
        """The nodes at which a group has records of a kind, from the trunk outward."""
        found: set[str] = set().union(*(self._nodes.get((run, kind), set()) for run in group.runs))
        return [*(node for node in NODES if node in found), *sorted(found - set(NODES))]

    def cell(self, group: Group, benchmark: str, split: str, metric: str, node: str | None = None) -> Number | None:
        """One run's value and interval, or several seeds' mean and std; at its output where `node` is None."""
        at = node or headline_node(self.nodes(group, metric.partition("/")[0]))
        found = [self._cells.get((run, benchmark, split, at, metric)) for run in group.runs]
        records = [record for record in found if record is not None]
        if not records:
            return self._chance(group, benchmark, split, metric)
        if len(group.runs) == 1:
            return Number(records[0].value, records[0].low, records[0].high)
        return pooled([record.value for record in records])

    def _chance(self, group: Group, benchmark: str, split: str, metric: str) -> Number | None:
        """What no record of chance says: the mean of both directions, and K / n for a caption's one image."""
        if group.label != CHANCE or not metric.startswith("retrieval/"):
            return None
        name, _, k = metric.partition("@")
        if name == "retrieval/mean_recall":
            both = [self.cell(group, benchmark, split, f"retrieval/{way}_recall@{k}") for way in ("i2t", "t2i")]
            values = [cell.value for cell in both if cell is not None]
            return Number(sum(values) / 2) if len(values) == 2 else None
        n = self.size("retrieval", benchmark, split)
        return Number(min(1.0, int(k) / n)) if name == "retrieval/t2i_recall" and n else None

    def best(self, benchmark: str, split: str, metric: str) -> Group | None:
        """The run that paired intervals put ahead of every other one; None without them, and where seeds are pooled."""
        groups = [g for g in self.own_groups if self.cell(g, benchmark, split, metric) is not None]
        if len(groups) < 2 or any(len(group.runs) > 1 for group in groups):
            return None
        for group in groups:
            others = [other.runs[0] for other in groups if other is not group]
            keys = [(benchmark, split, metric, group.runs[0], other) for other in others]
            if all(self._verdicts.get(key) == "better" for key in keys):
                return group
        return None

    def marked(self, group: Group, benchmark: str, split: str, metric: str) -> Number | None:
        """`cell` at the run's output, marked where it is the best."""
        found = self.cell(group, benchmark, split, metric)
        return (
            replace(found, best=True) if found is not None and self.best(benchmark, split, metric) is group else found
        )


def pooled(values: Sequence[float]) -> Number | None:
    """Mean and sample standard deviation (ddof 1) of one value a seed; a single seed has no spread."""
    if not values:
        return None
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Number(float(np.mean(values)), std=spread, seeds=len(values))


def _paired(record: Record) -> Paired:
    metric, _, other = record.metric.partition(VERSUS)
    assert record.low is not None
    assert record.high is not None
    return Paired(record.run, other, record.benchmark, record.split, metric, record.value, record.low, record.high)
