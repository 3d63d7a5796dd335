"""What to read when there is a manifest already: only what is new. Its rows keep number, split and status."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from pipeline.data.captions import collect_captions
from pipeline.data.manifest import OK, Issue, Manifest, Source, SplitRule
from pipeline.data.parallel import run_all
from pipeline.data.scan import KEY_REPEATED, valid_utf8
from pipeline.data.sources import SourceFile
from pipeline.data.tables import Table, read_table
from pipeline.errors import PipeError


@dataclass(frozen=True)
class Change:
    """How a file that the manifest knows compares with what it was: the same, longer at its end, or another."""

    file: SourceFile
    state: Literal["same", "longer", "changed"]
    mtime_ns: int


@dataclass
class Plan:
    """What to read: whole files, and tables with the number of their first images that have rows already.

    Args:
        known: sources of rows that stand, by name.
    """

    files: list[SourceFile]
    tables: list[tuple[Table, SourceFile, int]]
    known: dict[str, Source]
    issues: list[Issue]


def plan(files: Sequence[SourceFile], old: Manifest | None, rule: SplitRule, workers: int | Literal["auto"]) -> Plan:
    """Decide what to read.

    Raises:
        PipeError: a source of the old manifest is gone or changed, or it was split by another rule.
    """
    new = {file.name: file for file in files}
    known: dict[str, Source] = {}
    grown: list[SourceFile] = []
    issues: list[Issue] = []
    if old is not None:
        _same_rule(old, rule)
        standing = {name: source for name, source in old.source_table.items() if source.rows}
        gone = sorted(set(standing) - set(new))
        if gone:
            raise _refusal("is gone", old, gone)
        changes = run_all(_compare, [(new[name], source) for name, source in standing.items()], workers=workers)
        changed = [change.file.name for change in changes if change.state == "changed"]
        if changed:
            raise _refusal("changed since it was indexed", old, changed)
        for change in changes:
            file = new.pop(change.file.name)
            known[file.name] = replace(standing[file.name], mtime_ns=change.mtime_ns)
            grown += [file] if change.state == "longer" else []
            if file.kind == "table":
                _check_images(old, file)
        issues = [issue for issue in old.metadata.issues if issue.source in known]
    tables = [(read_table(file.name, file.path), file, 0) for file in new.values() if file.kind == "table"]
    for file in grown:
        assert old is not None
        tables.append(_grown(old, file, issues))
    return Plan([file for file in new.values() if file.kind == "tar"], tables, known, issues)


def _same_rule(old: Manifest, rule: SplitRule) -> None:
    if old.metadata.rule != rule:
        was = old.metadata.rule
        how = "a val_source" if was.val_source else f"val_fraction {was.fraction:g}"
        raise PipeError(
            f"this manifest was split by {how}, and rows keep their split",
            where=old.path,
            fix=f"set that again, or {_anew(old)}",
        )


def _refusal(what: str, old: Manifest, names: list[str]) -> PipeError:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return PipeError(
        f"a source of the manifest {what}, but its rows are numbered",
        where=f"{old.source_path(names[0]).name if '/' not in names[0] else names[0]}{more}",
        fix=f"put the old file back, or {_anew(old)}",
    )


def _anew(old: Manifest) -> str:
    return f"index anew: move {old.path} away and run pipe index (a teacher cache may then no longer fit)"


def _compare(item: tuple[SourceFile, Source]) -> Change:
    """Size and time first; where only the time differs (a copy, another machine) the content decides."""
    file, source = item
    stat = file.path.stat()
    if (stat.st_size, stat.st_mtime_ns) == (source.bytes, source.mtime_ns):
        return Change(file, "same", stat.st_mtime_ns)
    longer = stat.st_size > source.bytes
    if stat.st_size < source.bytes or (longer and file.kind == "tar"):
        return Change(file, "changed", stat.st_mtime_ns)
    if _sha256_of_start(file.path, source.bytes) != source.sha256:
        return Change(file, "changed", stat.st_mtime_ns)
    return Change(file, "longer" if longer else "same", stat.st_mtime_ns)


def _sha256_of_start(path: Path, count: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while count > 0 and (chunk := file.read(min(count, 2**20))):
            digest.update(chunk)
            count -= len(chunk)
    return digest.hexdigest()


def _rows_of(old: Manifest, name: str) -> list[int]:
    return [int(row) for row in np.flatnonzero(old.sources() == name)]


def _check_images(old: Manifest, file: SourceFile) -> None:
    """A table's images are files of their own: each must be there with the size it had."""
    keys, sizes, status = (old.column(name) for name in ("key", "image_bytes", "status"))
    for row in _rows_of(old, file.name):
        path = file.path.parent / keys[row]
        if status[row] == OK and (not path.is_file() or path.stat().st_size != sizes[row]):
            raise PipeError(
                "an image of the manifest is gone or changed",
                where=f"row {row}: {keys[row]}",
                fix=f"put the old file back, or {_anew(old)}",
            )


def _grown(old: Manifest, file: SourceFile, issues: list[Issue]) -> tuple[Table, SourceFile, int]:
    """A table with more lines than before: which images are new; a caption added to an old one is only noted."""
    table = read_table(file.name, file.path)
    rows = _rows_of(old, file.name)
    if [valid_utf8(entry.path) for entry in table.entries[: len(rows)]] != old.column("key")[rows].tolist():
        raise _refusal("changed since it was indexed", old, [file.name])
    for row, entry in zip(rows, table.entries, strict=False):
        if collect_captions(entry.captions).texts != old.captions(row):
            reason = f"a caption added to row {row} is not taken up: captions stay as they were first indexed"
            issues.append(Issue(file.name, valid_utf8(entry.path), KEY_REPEATED, reason))
    return table, file, len(rows)
