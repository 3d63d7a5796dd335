"""From tars or tables to a manifest: expand the source, read what is new, split it, append it, write it.

Rows are ordered by source and then by position in it, whatever the number of workers. A second call on a grown source
appends; rows that exist keep their numbers and splits.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.console import progress
from pipeline.data.growth import Plan, plan
from pipeline.data.manifest import OK, SCHEMA, VAL_PREFIX, Issue, Manifest, Metadata, Source, SplitRule, read_manifest
from pipeline.data.manifest import write_manifest as write
from pipeline.data.parallel import Scheduler, run_all
from pipeline.data.scan import Scan
from pipeline.data.sources import Expanded, SourceFile, expand
from pipeline.data.splits import TRAIN, VAL, Assigned, split_by_hash, split_by_source
from pipeline.data.tables import Entry, scan_entries
from pipeline.data.tars import scan_tar
from pipeline.errors import PipeError

ENTRIES_PER_JOB = 512  # of a table: about as many images as a small tar holds
EXAMPLES = 5


@dataclass(frozen=True)
class Summary:
    """What an index run found.

    Args:
        rows, added: in the manifest; of them new in this run.
        counts: split → status → rows.
        issues: what is wrong with whole sources.
        examples: a few problems to look at: sources first, then the commonest statuses, one row each.
        copies: usable rows whose image an earlier usable row has, too.
    """

    path: Path
    rows: int
    added: int
    counts: dict[str, dict[str, int]]
    issues: list[Issue]
    examples: list[Issue]
    copies: int
    seconds: float


@dataclass(frozen=True)
class Job:
    """A tar, or some images of a table."""

    file: SourceFile
    entries: list[Entry] | None = None
    source: Source | None = None
    issues: list[Issue] = field(default_factory=list)


def build_manifest(
    source: str,
    out: Path,
    *,
    val_source: str | None = None,
    val_fraction: float = 0.01,
    workers: int | Literal["auto"] = "auto",
    scheduler: Scheduler = "auto",
) -> Summary:
    """Index `source` into the manifest `out`, or append to `out` what is new.

    Args:
        source: folder, glob or brace range of tars, a tar, a CSV or a TSV.
        val_source: the same, held out for validation; None holds out `val_fraction` of the rows (at least
            min(1,000, 10 %)) by hash of the images.
        workers, scheduler: how many tars are read at a time, in threads or processes; 0 and 1: one after the other.

    Raises:
        PipeError: no source, no usable row, or sources of an existing manifest are gone or changed.
    """
    started = time.monotonic()
    found = expand(source)
    found_val = expand(val_source, validation=True) if val_source is not None else None
    files = found.files + (found_val.files if found_val is not None else [])
    old = read_manifest(out) if Path(out).exists() else None
    rule = SplitRule(val_fraction, val_source is not None)
    todo = plan(files, old, rule, workers)
    scans = _read(_jobs(todo), workers, scheduler)
    metadata = _metadata(found, found_val, rule, todo, scans)
    rows = _number(_assign(scans, rule, old), old)
    _refuse_empty(rows, metadata, source, val_source)
    if old is None or len(rows) > len(old) or metadata != old.metadata or not old.is_mapped:
        write(Path(out), rows, metadata)
    return _summary(read_manifest(Path(out)), added=len(rows) - (len(old) if old else 0), started=started)


def _jobs(todo: Plan) -> list[Job]:
    jobs = [Job(file) for file in todo.files]
    for table, file, known in todo.tables:
        starts = range(known, len(table.entries), ENTRIES_PER_JOB) or range(known, known + 1)
        for start in starts:
            entries = table.entries[start : start + ENTRIES_PER_JOB]
            jobs.append(Job(file, entries, table.source, table.issues if start == known else []))
    return sorted(jobs, key=lambda job: (job.file.name.startswith(VAL_PREFIX), job.file.name))  # stable in a table


def read_job(job: Job) -> Scan:
    """Read one job's images; runs in a worker."""
    if job.entries is None or job.source is None:
        return scan_tar(job.file.name, job.file.path)
    return Scan(job.source, scan_entries(job.entries, job.file.path.parent), list(job.issues))


def _read(jobs: Sequence[Job], workers: int | Literal["auto"], scheduler: Scheduler) -> list[Scan]:
    if not jobs:
        return []
    rows = 0
    with progress("indexing", total=len(jobs), unit="tars" if all(j.entries is None for j in jobs) else "parts") as bar:

        def done(scan: Scan) -> None:
            nonlocal rows
            rows += scan.rows.num_rows
            bar.note(f"{rows:,} rows")
            bar.advance()

        return run_all(read_job, jobs, workers=workers, scheduler=scheduler, on_done=done)


def _metadata(found: Expanded, found_val: Expanded | None, rule: SplitRule, todo: Plan, scans: list[Scan]) -> Metadata:
    sources = todo.known | {scan.source.name: scan.source for scan in scans}
    issues = list(found.issues) + (found_val.issues if found_val is not None else [])
    for of_source in [todo.issues, *(scan.issues for scan in scans)]:
        issues += of_source
    return Metadata(
        root=str(found.root),
        val_root=None if found_val is None else str(found_val.root),
        rule=rule,
        sources=[sources[name] for name in sorted(sources)],
        issues=sorted(set(issues), key=lambda issue: (issue.source, issue.status, issue.key, issue.reason)),
    )


def _assign(scans: list[Scan], rule: SplitRule, old: Manifest | None) -> pa.Table:
    """The scans' rows with source, split and final status."""
    rows = pa.concat_tables([_with_source(scan) for scan in scans]) if scans else SCHEMA.empty_table().drop(["row"])
    hashes, status = rows.column("sha256").to_pylist(), rows.column("status").to_pylist()
    sides: dict[str, str] = {}
    usable: Counter[str] = Counter()
    if old is not None:
        kept = old.rows()
        old_split = old.column("split")[kept].tolist()
        sides = dict(zip(old.column("sha256")[kept].tolist(), old_split, strict=True))
        usable = Counter(old_split)
    assigned: Assigned
    if rule.val_source:
        is_val = [name.startswith(VAL_PREFIX) for name in rows.column("source").to_pylist()]
        assigned = split_by_source(hashes, status, is_val, sides)
    else:
        assigned = split_by_hash(hashes, status, sides, usable, rule.fraction)
    columns = {name: rows.column(name) for name in SCHEMA.names if name in rows.column_names}
    columns |= {"split": pa.array(assigned.split, pa.string()), "status": pa.array(assigned.status, pa.string())}
    return pa.table(columns)


def _with_source(scan: Scan) -> pa.Table:
    return scan.rows.append_column("source", pa.array([scan.source.name] * scan.rows.num_rows, pa.string()))


def _number(rows: pa.Table, old: Manifest | None) -> pa.Table:
    """The old rows and behind them the new ones, numbered on; columns of `manifest.SCHEMA`."""
    first = 0 if old is None else len(old)
    numbered = rows.append_column("row", pa.array(range(first, first + rows.num_rows), pa.int64()))
    added = numbered.select(SCHEMA.names).cast(SCHEMA)
    return added if old is None else pa.concat_tables([pq.read_table(old.path).cast(SCHEMA), added])


def _refuse_empty(rows: pa.Table, metadata: Metadata, source: str, val_source: str | None) -> None:
    usable = Counter(rows.filter(pc.equal(rows.column("status"), OK)).column("split").to_pylist())
    for split, name in ((TRAIN, source), (VAL, val_source)):
        if usable[split] or name is None:
            continue
        counts = Counter([*rows.column("status").to_pylist(), *(issue.status for issue in metadata.issues)])
        counts.pop(OK, None)
        seen = ", ".join(f"{status} {number:,}" for status, number in counts.most_common(4))
        reasons = [*(issue.reason for issue in metadata.issues), *rows.column("reason").to_pylist()]
        example = next((reason for reason in reasons if reason), "")
        raise PipeError(
            f"no usable pair of image and caption ({seen or 'nothing was found'}{': ' + example if example else ''})",
            where=name,
            fix="each sample needs key.jpg (.jpeg, .png, .webp) and key.txt or key.json",
        )


def _summary(manifest: Manifest, *, added: int, started: float) -> Summary:
    counts = manifest.summary()
    hashes = manifest.column("sha256")[manifest.rows()]
    return Summary(
        path=manifest.path,
        rows=len(manifest),
        added=added,
        counts=counts,
        issues=manifest.metadata.issues,
        examples=worst_problems(manifest),
        copies=len(hashes) - len(set(hashes.tolist())),
        seconds=time.monotonic() - started,
    )


def worst_problems(manifest: Manifest, count: int = EXAMPLES) -> list[Issue]:
    """Problems to show: one source of each kind of issue, then a row of each status, the commonest first."""
    issues = manifest.metadata.issues
    found = list({issue.status: issue for issue in reversed(issues)}.values())[::-1]
    status = manifest.column("status")
    for name, _ in Counter(status[status != OK].tolist()).most_common():
        row = manifest.record(int((status == name).argmax()))
        found.append(Issue(row.source, row.key, row.status, row.reason))
    rest = [issue for issue in issues if issue not in found]
    return (found + rest)[:count]
