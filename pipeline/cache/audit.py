"""Reading a whole store to see whether it is what was written: metadata, every byte of every shard, stray files.

Shards are read in parallel by Dask, one task each, in blocks of a few MiB; memory does not depend on their number.
Of remote stores and compressed copies, whose files are not ours to examine, every row is read through its codecs.
What a stopped extraction leaves (files of a shard whose `state` was never published) is unfinished, and no damage.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pipeline.cache import layout, seals
from pipeline.cache.audit_metadata import MetadataAudit
from pipeline.cache.audit_plan import Plan
from pipeline.cache.audit_shard import ShardAudit, audit_shard
from pipeline.cache.findings import Finding, Report
from pipeline.cache.local import RowSource
from pipeline.cache.reader import place_of
from pipeline.cache.remote_path import RemotePath
from pipeline.console import progress
from pipeline.data.manifest import Manifest
from pipeline.data.parallel import Scheduler, run_all
from pipeline.errors import PipeError
from pipeline.run_folder import sync_folder

MOVE = "move it away"
DEEPEST = 8  # folders below the store; a layout has at most six


def verify(
    path: str | Path,
    *,
    manifest: Manifest | None = None,
    shards: Collection[int] | None = None,
    workers: int | Literal["auto"] = "auto",
    scheduler: Scheduler = "auto",
) -> Report:
    """Examine the store at `path`; whatever is wrong with it is a finding, and no finding hides another.

    Args:
        path: a folder, or a URL as `open_cache` takes it.
        manifest: compare the cache's fingerprint with this one's, and the boxes of further views with its images.
        shards: read only these; metadata and the list of files are examined all the same.
        workers, scheduler: as `pipeline.data.parallel.run_all` takes them.

    Raises:
        PipeError: there is no cache at all.
    """
    place = path if isinstance(path, Path) else place_of(path)
    local = not isinstance(place, RemotePath)
    if not _anything(place):
        raise PipeError("there is no teacher cache", where=place, fix="run: pipe extract-teacher")
    if local and _set_up_cut_off(place):
        what = "setting this cache up was cut off: pipe extract-teacher starts anew"
        return Report(str(place), [Finding(what, layout.DIGEST, kind="unfinished")])
    metadata = MetadataAudit(place).run()
    report = Report(str(place), list(metadata.findings))
    if metadata.plan is None:
        report.notes.append("rows were not checked: nothing says any more what they look like")
        return report
    clause, wrong = _compare_manifest(metadata.header, manifest)
    plan = replace(metadata.plan, manifest=None if wrong else manifest)
    if not local or plan.foreign:
        plan, scheduler = replace(plan, source=_row_source(place)), "threads"
    present, strays = _inventory(plan, metadata.covered) if local else (_published(plan), [])
    todo = sorted(present if shards is None else present & set(shards))
    audits = _audit_shards(plan, todo, workers, scheduler)
    report.findings.extend(finding for audit in audits for finding in audit.findings)
    report.findings.extend(strays)
    report.notes.extend(_notes(plan))
    return _with_totals(report, plan, audits, clause, wrong)


def _anything(place: Path) -> bool:
    if (place / layout.METADATA).exists() or (place / layout.DIGEST).exists():
        return True
    return not isinstance(place, RemotePath) and any(place.glob("*/zarr.json"))


def _row_source(place: Path) -> RowSource:
    from pipeline.cache.remote import TensorStoreRows

    return TensorStoreRows(place)


def _notes(plan: Plan) -> list[str]:
    """What could not be looked at."""
    notes = []
    if plan.foreign:
        notes.append(
            "a compressed copy: rows were read through their codecs; without seals, exchanged shards go unnoticed"
        )
    elif not plan.sealed:
        notes.append("without seals (of an older writer): exchanged shards would not be noticed")
    if isinstance(plan.root, RemotePath):
        notes.append("read over the network, which lists no files: stray ones and unfinished shards go unnoticed")
    return notes


def _set_up_cut_off(path: Path) -> bool:
    """digest.json is the last file of setting up; no row is written before it."""
    return not (path / layout.DIGEST).exists() and not any((path / layout.STATE).glob("c/*"))


def _audit_shards(
    plan: Plan, shards: list[int], workers: int | Literal["auto"], scheduler: Scheduler
) -> list[ShardAudit]:
    total = sum(plan.rows_of(shard) for shard in shards)
    with progress("verifying", total=total, unit="rows") as bar:
        damaged = 0

        def done(audit: ShardAudit) -> None:
            nonlocal damaged
            bar.advance(plan.rows_of(audit.shard))
            if any(finding.kind == "damage" for finding in audit.findings):
                damaged += 1
                bar.note(f"{damaged} shards damaged")

        work = functools.partial(audit_shard, plan)
        return run_all(work, shards, workers=workers, scheduler=scheduler, on_done=done)


def _with_totals(
    report: Report, plan: Plan, audits: list[ShardAudit], manifest: str, findings: list[Finding]
) -> Report:
    ok, undecodable = (sum(audit.states[state] for audit in audits) for state in (layout.OK, layout.UNDECODABLE))
    return Report(
        path=report.path,
        findings=report.findings + findings,
        rows={"ok": ok, "undecodable": undecodable, "absent": plan.rows - ok - undecodable},
        shards=len(audits),
        bytes_read=sum(audit.bytes_read for audit in audits),
        manifest=manifest,
        notes=report.notes,
        repairable=plan.source is None,
    )


def _compare_manifest(header: dict[str, object], manifest: Manifest | None) -> tuple[str, list[Finding]]:
    """A clause, and what is wrong. A manifest that has grown still begins with the rows that the cache is of."""
    rows, recorded = header.get("rows"), header.get("manifest_fingerprint")
    if manifest is None or type(rows) is not int:
        return "not checked", []
    if len(manifest) >= rows and manifest.fingerprint(rows) == recorded:
        more = len(manifest) - rows
        return ("the same rows" if not more else f"the same rows, and {more:,} new ones behind them"), []
    what = f"of other rows than the manifest's ({manifest.path}): its fingerprint does not fit"
    fix = "use the manifest that the cache was made with, or extract the cache again into a new folder"
    return "other rows", [Finding(what, layout.METADATA, fix=fix)]


# --- files ------------------------------------------------------------------------------------------------------------


def _inventory(plan: Plan, covered: Collection[str]) -> tuple[set[int], list[Finding]]:
    """The shards of which there is any file, and the files that have no place in the layout."""
    dimensions = {array.name: len(array.row_shape) + 1 for array in plan.arrays}
    dimensions |= {layout.STATE: 1, layout.SATURATED: 2, seals.SEALS: 3}
    present, strays = set[int](), list[Finding]()
    expected = {*covered, layout.METADATA, layout.DIGEST, layout.LOCK, layout.GROWING}
    for name in _files(plan.root):
        if name in expected or name.split("/")[0] == layout.TEMPORARY:
            continue
        array, _, chunk = name.rpartition("/c/")
        if array in plan.uneven:
            continue
        first = chunk.split("/")[0]
        shard = int(first) if first.isascii() and first.isdigit() else -1
        if shard < 0 or name != layout.chunk_path(array, shard, dimensions.get(array, 0)):
            strays.append(Finding("a file that has no place in a cache", name, kind="stray", fix=MOVE))
        elif shard >= plan.shards:
            strays.append(Finding("a file of a shard beyond the last row", name, array, kind="stray", fix=MOVE))
        else:
            present.add(shard)
    return present, strays


def _published(plan: Plan) -> set[int]:
    """The shards of a remote store that have a `state`."""
    names = [layout.chunk_path(layout.STATE, shard, 1) for shard in range(plan.shards)]
    try:
        found = RemotePath(str(plan.root)).read_many(names)
    except OSError as error:
        raise PipeError(f"cannot read the cache: {error.strerror}", where=plan.root) from error
    return {shard for shard, data in enumerate(found) if data is not None}


def _files(root: Path, below: str = "", depth: int = 0) -> Iterator[str]:
    """Relative paths of everything below `root` that is no folder, in order."""
    with os.scandir(root / below) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            name = f"{below}/{entry.name}" if below else entry.name
            if entry.is_dir() and depth < DEEPEST:
                yield from _files(root, name, depth + 1)
            else:
                yield name


# --- repair -----------------------------------------------------------------------------------------------------------


def invalidate(path: Path, report: Report) -> list[int]:
    """Make the damaged shards of `report` ones that an extraction writes again. Hold the store's lock.

    A shard's `state` goes first: from then on nothing promises that its other files are there. Of these only the
    damaged ones go; an extraction replaces the rest. Being killed in between leaves an unfinished shard, no wrong one.

    Returns:
        The shards.

    Raises:
        PipeError: there is damage that writing shards again does not repair.
    """
    if report.beyond_repair:
        first = report.beyond_repair[0]
        raise PipeError(f"no shard is to blame for this: {first.what}", where=path / first.file, fix=first.fix)
    for shard in report.damaged_shards:
        _remove(path / layout.chunk_path(layout.STATE, shard, 1))
        for finding in report.damage:
            if finding.shard == shard:
                _remove(path / finding.file)
    return report.damaged_shards


def _remove(file: Path) -> None:
    try:
        if file.is_dir() and not file.is_symlink():
            shutil.rmtree(file)
        else:
            file.unlink(missing_ok=True)
        if file.parent.is_dir():
            sync_folder(file.parent)
    except OSError as error:
        raise PipeError(f"cannot remove this damaged file: {error.strerror}", where=file) from error
