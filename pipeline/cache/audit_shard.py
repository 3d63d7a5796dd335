"""Auditing one shard: its `state`, `saturated` and `seals` chunks, and its shard files.

Legend: R rows, S rows a shard.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.cache import layout
from pipeline.cache.audit_file import FileAudit
from pipeline.cache.findings import Finding, as_rows
from pipeline.cache.layout import RowArray
from pipeline.cache.seals import SEALS, read_seals, seal, seal_file
from pipeline.cache.shards import CRC_BYTES, without_crc
from pipeline.errors import PipeError

BEYOND = np.uint8(255)  # what stands for the state of slots behind the last row
ADDING = "rows are being added, or that was cut off; pipe extract-teacher goes on with this shard"
NOT_ITS_OWN = "sound, but not the file that was written here (its seal does not fit): exchanged with another?"


@dataclass(frozen=True)
class Plan:
    """What the metadata says that a store holds: R rows in shards of S, its sharded arrays, whether it has seals."""

    root: Path
    rows: int
    shard_rows: int
    arrays: tuple[RowArray, ...]
    scales: int
    sealed: bool

    @property
    def shards(self) -> int:
        return -(-self.rows // self.shard_rows)

    def rows_of(self, shard: int) -> int:
        """Manifest rows of a shard; the last one has fewer."""
        return min(self.shard_rows, self.rows - shard * self.shard_rows)

    def state_file(self, shard: int) -> Path:
        return self.root / layout.chunk_path(layout.STATE, shard, 1)

    def saturated_file(self, shard: int) -> Path:
        return self.root / layout.chunk_path(layout.SATURATED, shard, 2)


@dataclass
class ShardAudit:
    """Of one shard: what was found, its rows by state (0, 1, 2), bytes read."""

    shard: int
    findings: list[Finding] = field(default_factory=list)
    states: tuple[int, int, int] = (0, 0, 0)
    bytes_read: int = 0


def audit_shard(plan: Plan, shard: int) -> ShardAudit:
    """Examine all files of one shard that has some. Nothing in it raises: whatever is wrong is a finding."""
    before = _content(plan.state_file(shard))
    if before is None:
        return _without_state(plan, shard)
    found = _Shard(plan, shard, before).run()
    if found.findings and _content(plan.state_file(shard)) != before:  # an extraction is at work on this shard
        return _without_state(plan, shard)
    return found


def _without_state(plan: Plan, shard: int) -> ShardAudit:
    file = str(plan.state_file(shard).relative_to(plan.root))
    what = "not published: an extraction was stopped, or is at work; pipe extract-teacher writes this shard"
    return ShardAudit(shard, [Finding(what, file, layout.STATE, shard, kind="unfinished")], (0, 0, 0))


def _content(file: Path) -> bytes | None:
    """A file's bytes; None where there is none, empty where something else is in its place or it cannot be read."""
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError:
        return b""


class _Shard:
    """One shard under examination."""

    def __init__(self, plan: Plan, shard: int, state: bytes) -> None:
        self.plan, self.shard, self.state_bytes = plan, shard, state
        self.found = ShardAudit(shard)
        self.first = shard * plan.shard_rows
        self.in_part = False
        self.ok_rows: tuple[int, ...] = ()
        self.checksums: dict[str, list[bytes]] = {}  # of the files that were read whole: each may explain the seal

    def run(self) -> ShardAudit:
        state, extended = self._state(), False
        if state is not None:
            self.ok_rows = as_rows(self.first + np.flatnonzero(state == layout.OK))
            in_shard = state[: self.plan.rows_of(self.shard)]
            absent, fine, undecodable = (int((in_shard == value).sum()) for value in range(3))
            self.found.states, self.in_part = (absent, fine, undecodable), absent > 0
            state = np.append(in_shard, np.full(self.plan.shard_rows - len(in_shard), BEYOND))
        self._saturated()
        for array in self.plan.arrays:
            audit = FileAudit(self.plan.root, array, self.shard, self.first, self.plan.shard_rows, state).run()
            self.found.findings += audit.findings
            self.found.bytes_read += audit.bytes_read
            if options := audit.sealed():
                self.checksums[array.name] = options
            extended = extended or audit.extended
        if self.plan.sealed:
            extended = self._seals(extended)
        if extended:
            file = str(self.plan.state_file(self.shard).relative_to(self.plan.root))
            self.found.findings.append(Finding(ADDING, file, layout.STATE, self.shard, kind="unfinished"))
        return self.found

    def _note(self, what: str, name: str, file: Path, rows: tuple[int, ...] = ()) -> None:
        self.found.findings.append(Finding(what, str(file.relative_to(self.plan.root)), name, self.shard, rows))

    def _chunk(self, name: str, file: Path, data: bytes | None, length: int) -> bytes | None:
        """The values of a small chunk, or None after a finding."""
        if data is None:
            self._note("the file is missing", name, file)
            return None
        self.found.bytes_read += len(data)
        if len(data) != length + CRC_BYTES:
            self._note(f"{len(data):,} bytes where there should be {length + CRC_BYTES:,}", name, file)
            return None
        try:
            body = without_crc(data, file)
        except PipeError:
            self._note("the checksum does not fit", name, file)
            return None
        self.checksums[name] = [data[-CRC_BYTES:]]
        return body

    def _state(self) -> np.ndarray | None:
        file = self.plan.state_file(self.shard)
        body = self._chunk(layout.STATE, file, self.state_bytes, self.plan.shard_rows)
        if body is None:
            return None
        state, here = np.frombuffer(body, np.uint8), self.plan.rows_of(self.shard)
        if len(wrong := np.flatnonzero(state[:here] > layout.UNDECODABLE)):
            self._note("states other than 0, 1 and 2", layout.STATE, file, as_rows(self.first + wrong))
        if state[here:].any():
            self._note("states beyond the last row", layout.STATE, file)
        return state

    def _saturated(self) -> None:
        file = self.plan.saturated_file(self.shard)
        body = self._chunk(layout.SATURATED, file, _content(file), 8 * self.plan.scales)
        if body is not None and (np.frombuffer(body, "<i8") < 0).any():
            self._note("negative counts", layout.SATURATED, file)

    def _seals(self, extended: bool) -> bool:
        """Compare the seals with the files; whether rows are being added (`extended`: their chunks are there).

        Then chunks and seals are replaced before `state` is: what it promises is the same throughout.
        """
        file, plan = seal_file(self.plan.root, self.shard), self.plan
        try:
            seals = read_seals(plan.root, self.shard, plan.arrays)
        except PipeError as error:
            what = "the file is missing" if not file.exists() else error.what
            self._note(what, SEALS, file)
            return extended
        misfits = {
            name
            for name, options in self.checksums.items()
            if not any(seal(name, self.shard, option) == seals[name] for option in options)
        }
        if misfits and misfits == set(self.checksums):
            self._note("the seals are of another shard", SEALS, file)
            return extended
        if extended:
            misfits -= {layout.STATE, layout.SATURATED}
        elif self.in_part and misfits == {layout.STATE}:  # the rows that are added are all undecodable
            return True
        arrays = {array.name: array.file(plan.root, self.shard) for array in plan.arrays}
        files = arrays | {layout.STATE: plan.state_file(self.shard), layout.SATURATED: plan.saturated_file(self.shard)}
        for name in (name for name in files if name in misfits):
            self._note(NOT_ITS_OWN, name, files[name], self.ok_rows if name in arrays else ())
        return extended
