"""`pipe index`: data.source (and data.val_source) → workspace/manifest.parquet, and what was wrong with them."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.console import log
from pipeline.data.index import Summary, build_manifest
from pipeline.data.manifest import OK
from pipeline.errors import PipeError
from pipeline.run_folder import Workspace

if TYPE_CHECKING:
    from pipeline.config import Config


def run(config: Config) -> None:
    """Index the data source of `config`; a second run appends what is new.

    Raises:
        PipeError: data.source is not set, holds nothing usable, or lost something that was indexed before.
    """
    data = config.data
    if data.source is None:
        raise PipeError("data.source is not set", where="data.source", fix="name a folder of tars, a glob or a CSV")
    summary = build_manifest(
        data.source,
        Workspace(config.workspace).manifest,
        val_source=data.val_source,
        val_fraction=data.val_fraction,
        workers=data.workers,
    )
    show(summary, Console(stderr=True))


def show(summary: Summary, console: Console) -> None:
    """Counts by status and split, the problems worth a look, and where the manifest is."""
    console.print(counts_table(summary))
    if summary.examples:
        console.print(problems_table(summary))
    rate = f", {summary.added / summary.seconds:,.0f} rows/s" if summary.added else ""
    new = "nothing new" if not summary.added else f"{summary.added:,} new"
    log.info("%s rows (%s) in %.1f s%s: %s", f"{summary.rows:,}", new, summary.seconds, rate, summary.path)
    if summary.copies:
        log.info("%s usable rows are copies of an earlier row's image", f"{summary.copies:,}")


def counts_table(summary: Summary) -> Table:
    """One line a status, `ok` first; below, in a column of their own, what is wrong with whole sources."""
    table = Table(box=box.SIMPLE_HEAD, title="rows of the manifest", title_justify="left")
    table.add_column("status")
    for split in summary.counts:
        table.add_column(split, justify="right")
    if summary.issues:
        table.add_column("sources", justify="right")
    statuses = Counter({OK: 0})
    for counts in summary.counts.values():
        statuses.update(counts)
    for status in sorted(statuses, key=lambda s: (s != OK, -statuses[s], s)):
        table.add_row(status, *(f"{counts.get(status, 0):,}" for counts in summary.counts.values()))
    for status, number in Counter(issue.status for issue in summary.issues).most_common():
        table.add_row(status, *("" for _ in summary.counts), f"{number:,}")
    return table


def problems_table(summary: Summary) -> Table:
    """A few problems: source, key, what, why."""
    table = Table(box=box.SIMPLE_HEAD, title="problems, one of each kind", title_justify="left")
    for name in ("source", "key", "status", "reason"):
        table.add_column(name, overflow="fold")
    for issue in summary.examples:
        table.add_row(*(escape(text) for text in (issue.source, issue.key, issue.status, issue.reason)))
    return table
