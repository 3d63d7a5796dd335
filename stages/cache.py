"""`pipe cache info | verify | stats`: look at a teacher cache, check it, repair it. Copies are in cache_copy.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cache.findings import Finding, Report
from pipeline.cache.remote_path import RemotePath
from pipeline.config import Config
from pipeline.console import log
from pipeline.data.manifest import Manifest, read_manifest
from pipeline.errors import PipeError, Stopped
from pipeline.run_folder import Workspace

SHOWN = 100  # findings printed; --json has them all


def locate(path: str | None, config: Config | None) -> Path:
    """The cache that a command is about: the folder or URL that is named, else the workspace's."""
    from pipeline.cache.reader import place_of

    if path is not None:
        return place_of(path)
    if config is None:
        raise PipeError("which cache?", fix="name its folder, or a config with --config")
    return Workspace(config.workspace).teacher


def manifest_of(path: Path, config: Config | None) -> Manifest | None:
    """The workspace's manifest, else the one beside the cache; None where there is none."""
    if config is None and isinstance(path, RemotePath):
        return None
    place = Workspace(path.absolute().parent if config is None else config.workspace).manifest
    return read_manifest(place) if place.is_file() else None


# --- info and stats ---------------------------------------------------------------------------------------------------


def info(path: Path, config: Config | None, *, as_json: bool = False) -> None:
    """Print what the cache at `path` is; reads no rows.

    Raises:
        PipeError: no cache there, or its metadata is damaged.
    """
    from pipeline.cache.info import cache_info, info_lines

    found = cache_info(path, manifest_of(path, config))
    print(_json(found) if as_json else "\n".join(info_lines(found)))


def stats(
    path: Path, *, rows: int | None = None, seed: int = 0, view: str | None = None, as_json: bool = False
) -> None:
    """Print moments and spectra of all rows, or of a random `rows` of them; of a further `view`, or of the base view.

    Raises:
        PipeError: no cache there, no rows or no such view in it, or a damaged row.
    """
    from pipeline.cache.reader import open_cache
    from pipeline.cache.stats import cache_stats, stats_lines

    found = cache_stats(open_cache(path), rows=rows, seed=seed, view=view)
    print(_json(found) if as_json else "\n".join(stats_lines(found)))


# --- verify and repair ------------------------------------------------------------------------------------------------


def verify(path: Path, config: Config | None, *, repair: bool = False, as_json: bool = False) -> bool:
    """Read all of the cache at `path` and print what is wrong with it; returns whether it is sound (now).

    Args:
        config: for the manifest, and for the teacher that a repair runs.
        repair: extract the damaged shards again, and read these once more.

    Raises:
        PipeError: no cache there; repair without a config, with one of another cache, or of a remote or compressed one.
        Stopped: a signal arrived during the repair; pipe extract-teacher goes on.
    """
    from pipeline.cache import audit

    if repair and config is None:
        raise PipeError("a repair runs the teacher again", fix="name the config: --config FILE")
    if repair:
        _refuse_to_repair(path)
    manifest = manifest_of(path, config)
    report = audit.verify(path, manifest=manifest)
    after = None
    if not as_json:
        print("\n".join(_report_lines(report)))
    if repair and config is not None and report.damaged_shards and not report.beyond_repair:
        there = _rows_there(path, report.damaged_shards)
        extract_again(config, path, report)
        after = audit.verify(path, manifest=manifest, shards=report.damaged_shards)
        if not as_json:
            more = _rows_there(path, report.damaged_shards) - there
            print("\n".join(_repair_lines(report, after, more)))
    elif repair and report.beyond_repair and not as_json:
        print("not repaired: extracting shards again does not help here")
    if as_json:
        repaired = None if after is None else {"shards": report.damaged_shards, "after": after.to_json()}
        print(_json(report.to_json() | {"repair": repaired}))
    return not (after or report).damage


def _refuse_to_repair(path: Path) -> None:
    """Rows are extracted into plain stores on a disk alone; which a store with damaged metadata is, nobody can say."""
    from pipeline.cache.reader import open_cache

    if isinstance(path, RemotePath):
        raise PipeError("a remote cache is not repaired from here", where=path, fix="repair it where it lies")
    try:
        plain = open_cache(path).plain
    except PipeError:
        return
    if not plain:
        fix = "copy it again from the plain one, or move it away and run: pipe extract-teacher"
        raise PipeError("this cache is a compressed copy, which is not repaired", where=path, fix=fix)


def extract_again(config: Config, path: Path, report: Report) -> None:
    """Extract the damaged shards of `report` again. Nothing is given up before manifest and teacher are seen to fit.

    Raises:
        PipeError: the cache is of something else than the config says, or another process writes to it.
        Stopped: a signal arrived; the shards are unfinished now, and no longer damaged.
    """
    from pipeline.cache import audit
    from pipeline.cache.reader import open_cache
    from pipeline.cache.writer import CacheWriter
    from pipeline.teacher.extract import extract, identify
    from stages.extract_teacher import load, settings_of

    manifest = read_manifest(Workspace(config.workspace).manifest)
    teacher, settings = load(config), settings_of(config)
    identity = identify(manifest, teacher, settings, open_cache(path).settings["precision"])
    writer = CacheWriter.resume(path, identity)  # refuses another teacher or manifest, and takes the lock
    if writer is None:
        raise PipeError("there is no teacher cache", where=path, fix="run: pipe extract-teacher")
    with writer:
        shards = audit.invalidate(path, report)
    log.info("extracting %d damaged shards again", len(shards))
    try:
        extract(manifest, teacher, path, settings, shards=shards)
    except Stopped as stop:
        raise Stopped("in the repair", "pipe extract-teacher goes on from here") from stop


def _rows_there(path: Path, shards: Sequence[int]) -> int:
    """Rows with a state, ok or undecodable, in `shards`; a damaged `state` counts as full."""
    from pipeline.cache.reader import open_cache
    from pipeline.cache.shards import read_state

    cache, count = open_cache(path), 0
    for shard in shards:
        try:
            state = read_state(path, shard, cache.shard_rows)
        except (PipeError, OSError):
            state = np.ones(min(cache.shard_rows, cache.rows - shard * cache.shard_rows), np.uint8)
        count += 0 if state is None else int(np.count_nonzero(state))
    return count


def _report_lines(report: Report) -> list[str]:
    rows = report.rows or {"ok": 0, "undecodable": 0, "absent": 0}
    counts = ", ".join(f"{count:,} {name}" for name, count in rows.items())
    lines = [
        f"teacher cache   {report.path}",
        f"read            {report.shards:,} shards, {report.bytes_read / 1e6:,.1f} MB; rows: {counts}",
        f"manifest        {report.manifest}",
        *(f"note            {note}" for note in report.notes),
        *_bounded(report.findings),
    ]
    if not report.damage:
        unfinished = len(report.unfinished)
        return [*lines, f"sound{f', {unfinished:,} shards unfinished' if unfinished else ''}"]
    shards, rows_hit = report.damaged_shards, {row for finding in report.damage for row in finding.rows}
    lines.append(f"DAMAGED: {len(report.damage):,} findings, {len(shards):,} shards, {len(rows_hit):,} rows named")
    if shards and not report.beyond_repair and report.repairable:
        lines.append("to extract the damaged shards again: pipe cache verify --repair")
    return lines


def _bounded(findings: Sequence[Finding]) -> list[str]:
    lines = [finding.line() for finding in findings[:SHOWN]]
    more = len(findings) - SHOWN
    return [*lines, f"... and {more:,} more (--json lists them all)"] if more > 0 else lines


def _repair_lines(before: Report, after: Report, more: int) -> list[str]:
    shards = f"{len(before.damaged_shards):,} shards were extracted again"
    if after.damage:
        return [f"repaired in part: {shards}, but this is still wrong:", *_bounded(after.damage)]
    lines = [f"repaired: {shards}, read once more and found sound"]
    if more > 0:  # of a copy, or below a limit: an extraction writes whole shards
        lines.append(f"note: {more:,} rows of these shards that were absent are there now")
    return lines


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
