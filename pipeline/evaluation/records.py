"""The result record: one number of one run on one benchmark, with its interval and everything it depends on.

Evaluators return `Measurement`s and know nothing of runs; `stamp` is the one place that turns them into `Record`s.
Strings are a small vocabulary (`docs` of the report rely on it):

    benchmark  the suite entry's name, or `validation` for the manifest's held-out rows
    split      the split that was scored; for leave-one-domain-out, the domain that was left out
    node       trunk | student | fused | gated (the model's output); `global` for the teacher; `none` for chance
    metric     KIND/NAME: retrieval/i2t_recall@1, zero_shot/top1, probe/top1, nodes/gap, drift/slope, gate/image_mean
               a paired difference to another run is METRIC:vs:RUN
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import PipeError
from pipeline.run_folder import read_json, write_bytes

VERSUS = ":vs:"
CHANCE = "chance"
TEACHER = "teacher"
REFERENCE = "reference"  # the `method` of the rows that no run of ours produced

Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]


@dataclass(frozen=True)
class Record:
    """One result. `value` is in [0, 1] for rates; `low` and `high` bound the 95 % interval (None: not resampled).

    `n` counts the units that were resampled (images, not captions). `dataset_sha256` is the evaluated data's digest;
    `cache` is the digest of the teacher cache the run was trained on (None: none). Reference rows (`chance`, `teacher`)
    have no order, fusion, seed or samples.
    """

    run: str
    method: str
    order: int | None
    fusion: str | None
    seed: int | None
    benchmark: str
    split: str
    node: str
    metric: str
    value: float
    low: float | None
    high: float | None
    n: int
    cache: str | None
    samples_seen: int | None
    checkpoint_sha256: str | None
    dataset_sha256: str
    code_version: str

    def sort_key(self) -> tuple[str, ...]:
        return (self.benchmark, self.split, self.metric, self.run, self.node)


@dataclass(frozen=True)
class Measurement:
    """What an evaluator returns: the part of a record that the model and the data alone decide.

    `statistic` computes the value from how often each of the n units was drawn: weights (R, n) -> (R,). Two runs'
    statistics on the same draws give their paired difference (`paired.py`); None where the number is not resampled.
    """

    metric: str
    node: str
    split: str
    value: float
    low: float | None
    high: float | None
    n: int
    statistic: Statistic | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Provenance:
    """Where numbers come from: a run's identity, stamped onto its measurements."""

    run: str
    method: str
    order: int | None = None
    fusion: str | None = None
    seed: int | None = None
    cache: str | None = None
    samples_seen: int | None = None
    checkpoint_sha256: str | None = None

    @classmethod
    def of_run(cls, name: str, record: dict[str, Any]) -> Provenance:
        """From a run folder's name and its `record.json`."""
        known = {f.name for f in fields(cls)} - {"run"}
        found = {key: record[key] for key in known if key in record}
        return cls(run=name, **{"method": "unknown", **found})


def stamp(
    measurements: Iterable[Measurement],
    provenance: Provenance,
    *,
    benchmark: str,
    dataset_sha256: str,
    code_version: str,
) -> list[Record]:
    """Measurements of one run on one benchmark → records. A value that is not a number is refused here, by name."""
    records = []
    for m in measurements:
        if not all(math.isfinite(x) for x in (m.value, m.low, m.high) if x is not None):
            raise PipeError(
                f"{m.metric} is not a finite number ({m.value})",
                where=f"run {provenance.run}, {benchmark}/{m.split}, node {m.node}",
                fix="look for non-finite weights in this run",
            )
        records.append(
            Record(
                **asdict(provenance),
                benchmark=benchmark,
                split=m.split,
                node=m.node,
                metric=m.metric,
                value=_round(m.value),
                low=None if m.low is None else _round(m.low),
                high=None if m.high is None else _round(m.high),
                n=m.n,
                dataset_sha256=dataset_sha256,
                code_version=code_version,
            )
        )
    return records


def to_json(records: Iterable[Record]) -> str:
    """Sorted records, sorted keys, one trailing newline: equal records are equal bytes, whatever order they came in."""
    rows = [asdict(r) for r in sorted(records, key=Record.sort_key)]
    return json.dumps(rows, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def headline_node(nodes: Iterable[str]) -> str:
    """The node that is a run's output: gated, or what stands for it in runs without an injection."""
    found = set(nodes)
    return next((node for node in ("gated", "trunk", "global", "none") if node in found), "gated")


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write `records.json` atomically."""
    write_bytes(path, to_json(records).encode())


def read_records(path: Path) -> list[Record]:
    """Read `records.json`; a file of another shape is one clear error."""
    rows = read_json(path)
    names = {f.name for f in fields(Record)}
    if not isinstance(rows, list) or any(not isinstance(row, dict) or set(row) != names for row in rows):
        raise PipeError("not a list of result records", where=path, fix="run `pipe evaluate` again")
    return [Record(**row) for row in rows]


def _round(value: float) -> float:
    """Ten significant digits: more than any test set resolves, fewer than summation order disturbs."""
    return float(f"{value:.10g}")
