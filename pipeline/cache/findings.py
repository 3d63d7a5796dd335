"""What an audit says: one finding for each thing that is wrong, and the report of them all.

A finding that names a shard can be repaired by extracting this shard again; one without concerns what all rows share.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np

RESTORE = "restore it from a copy of the cache, or extract the cache again into a new folder"
NAMED_RUNS = 12  # runs of rows that one line names

Kind = Literal["damage", "stray", "unfinished"]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Args:
        what: in one clause.
        file: relative to the store, with /.
        array, shard: what the file belongs to; a shard number means that extracting it again repairs this.
        rows: the rows of the cache that it concerns; empty where it concerns the file as a whole.
        kind: "unfinished" is what a stopped extraction leaves, and no damage; a "stray" file should not be there.
        fix: what to do where extracting the shard again is not the answer.
    """

    what: str
    file: str
    array: str | None = None
    shard: int | None = None
    rows: tuple[int, ...] = ()
    kind: Kind = "damage"
    fix: str | None = None

    def line(self) -> str:
        """`damage: fine/c/3/0/0 (shard 3): checksums do not fit; 3 rows: 1536, 1540-1541`"""
        shard = "" if self.shard is None else f" (shard {self.shard})"
        rows = f"; {named(self.rows)}" if self.rows else ""
        return f"{self.kind}: {self.file}{shard}: {self.what}{rows}" + (f"; {self.fix}" if self.fix else "")


@dataclass(frozen=True)
class Report:
    """What an audit found.

    Args:
        path: of the store.
        findings: metadata first, then shard by shard.
        rows: how many are "ok", "undecodable", "absent" (of the shards whose state is readable; the rest is absent).
        shards: how many shards hold rows and were read.
        bytes_read: of their files.
        manifest: what the comparison with the manifest said, in one clause.
        notes: what could not be checked, and is no damage.
        repairable: whether rows can be extracted into it: a plain store on a disk.
    """

    path: str
    findings: list[Finding] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)
    shards: int = 0
    bytes_read: int = 0
    manifest: str = "not checked"
    notes: list[str] = field(default_factory=list)
    repairable: bool = True

    @property
    def damage(self) -> list[Finding]:
        """Whatever a sound store does not have, stray files included."""
        return [finding for finding in self.findings if finding.kind != "unfinished"]

    @property
    def unfinished(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.kind == "unfinished"]

    @property
    def damaged_shards(self) -> list[int]:
        """Shards that extracting again would repair."""
        return sorted({finding.shard for finding in self.damage if finding.shard is not None})

    @property
    def beyond_repair(self) -> list[Finding]:
        """Damage, stray files apart, that extracting a shard again does not repair."""
        return [finding for finding in self.findings if finding.kind == "damage" and finding.shard is None]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"damaged_shards": self.damaged_shards, "sound": not self.damage}


def named(rows: Sequence[int]) -> str:
    """`4 rows: 3, 8-10`; of many runs the first twelve."""
    runs = list(_runs(rows))
    listed = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs[:NAMED_RUNS])
    more = ", ..." if len(runs) > NAMED_RUNS else ""
    return f"{len(rows):,} row{'s' if len(rows) != 1 else ''}: {listed}{more}"


def _runs(rows: Sequence[int]) -> Iterable[tuple[int, int]]:
    """First and last of each run of consecutive rows; `rows` ascending."""
    starts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(rows)) if b != a + 1), len(rows)]
    return ((rows[a], rows[b - 1]) for a, b in pairwise(starts)) if len(rows) else ()


def as_rows(rows: np.ndarray) -> tuple[int, ...]:
    """Row numbers as plain, ascending integers."""
    return tuple(np.sort(rows).tolist())
