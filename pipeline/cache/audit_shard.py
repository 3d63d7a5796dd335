"""Auditing one shard: its `state`, `saturated` and `seals` chunks, and its shard files, or rows where files are away.

Legend: R rows, S rows a shard.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.cache import counts, layout
from pipeline.cache.audit_file import FileAudit
from pipeline.cache.audit_plan import Plan
from pipeline.cache.audit_rows import RowsAudit
from pipeline.cache.findings import Finding, as_rows
from pipeline.cache.layout import RowArray
from pipeline.cache.remote_path import RemotePath
from pipeline.cache.seals import SEALS, read_seals, seal
from pipeline.cache.shards import CRC_BYTES, without_crc
from pipeline.errors import PipeError

BEYOND = np.uint8(255)  # what stands for the state of slots behind the last row
ADDING = "rows are being added, or that was cut off; pipe extract-teacher goes on with this shard"
SMALL_CHUNKS = {layout.STATE: 1, layout.SATURATED: 2}  # their dimensions
NOT_ITS_OWN = "sound, but not the file that was written here (its seal does not fit): exchanged with another?"


@dataclass
class ShardAudit:
    """Of one shard: what was found, its rows by state (0, 1, 2), bytes read."""

    shard: int
    findings: list[Finding] = field(default_factory=list)
    states: tuple[int, int, int] = (0, 0, 0)
    bytes_read: int = 0


def audit_shard(plan: Plan, shard: int) -> ShardAudit:
    """Examine all files of one shard that has some. Nothing in it raises: whatever is wrong is a finding."""
    before = _content(_state_file(plan, shard))
    if before is None:
        return _without_state(plan, shard)
    found = _Shard(plan, shard, before).run()
    if found.findings and _content(_state_file(plan, shard)) != before:  # an extraction is at work on this shard
        return _without_state(plan, shard)
    return found


def _without_state(plan: Plan, shard: int) -> ShardAudit:
    file = layout.chunk_path(layout.STATE, shard, 1)
    what = "not published: an extraction was stopped, or is at work; pipe extract-teacher writes this shard"
    return ShardAudit(shard, [Finding(what, file, layout.STATE, shard, kind="unfinished")], (0, 0, 0))


def _state_file(plan: Plan, shard: int) -> Path:
    return plan.root / layout.chunk_path(layout.STATE, shard, 1)


def _content(file: Path) -> bytes | None:
    """A file's bytes; None where there is none, empty where something else is in its place or it cannot be read."""
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        if isinstance(file, RemotePath):
            raise PipeError(f"cannot read the cache: {error.strerror}", where=file) from error
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
        sizes = self.plan.image_sizes(self.shard) if self.plan.views else None
        for array in self.plan.arrays:
            audit = self._audit_of(array, state, sizes).run()
            self.found.findings += audit.findings
            self.found.bytes_read += audit.bytes_read
            if options := audit.sealed():
                self.checksums[array.name] = options
            extended = extended or audit.extended
        if self.plan.sealed and not (self.plan.source and self.in_part):  # whether rows are being added, files say
            extended = self._seals(extended)
        if extended:
            file = layout.chunk_path(layout.STATE, self.shard, 1)
            self.found.findings.append(Finding(ADDING, file, layout.STATE, self.shard, kind="unfinished"))
        return self.found

    def _audit_of(self, array: RowArray, state: np.ndarray | None, sizes: np.ndarray | None) -> FileAudit | RowsAudit:
        plan = self.plan
        if plan.source is None:
            return FileAudit(plan.root, array, self.shard, self.first, plan.shard_rows, state, sizes)
        plain, local = array.name not in plan.foreign, not isinstance(plan.root, RemotePath)
        return RowsAudit(plan.source, array, self.shard, self.first, state, sizes, plain=plain, local=local)

    def _note(self, what: str, name: str, file: str, rows: tuple[int, ...] = ()) -> None:
        self.found.findings.append(Finding(what, file, name, self.shard, rows))

    def _chunk(self, name: str, file: str, data: bytes | None, length: int) -> bytes | None:
        """The values of a small chunk, or None after a finding."""
        if data is None:
            self._note("the file is missing", name, file)
            return None
        self.found.bytes_read += len(data)
        if len(data) != length + CRC_BYTES:
            self._note(f"{len(data):,} bytes where there should be {length + CRC_BYTES:,}", name, file)
            return None
        try:
            body = without_crc(data, self.plan.root / file)
        except PipeError:
            self._note("the checksum does not fit", name, file)
            return None
        self.checksums[name] = [data[-CRC_BYTES:]]
        return body

    def _state(self) -> np.ndarray | None:
        file = layout.chunk_path(layout.STATE, self.shard, 1)
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
        file, length = layout.chunk_path(layout.SATURATED, self.shard, 2), counts.chunk_bytes(self.plan.attributes)
        body = self._chunk(layout.SATURATED, file, _content(self.plan.root / file), length)
        if body is not None and (counts.parse(body, self.plan.attributes) < 0).any():
            self._note("negative counts", layout.SATURATED, file)

    def _seals(self, extended: bool) -> bool:
        """Compare the seals with the files; whether rows are being added (`extended`: their chunks are there).

        Then chunks and seals are replaced before `state` is: what it promises is the same throughout.
        """
        file, plan = layout.chunk_path(SEALS, self.shard, 3), self.plan
        try:
            seals = read_seals(plan.root, self.shard, plan.arrays)
        except PipeError as error:
            what = "the file is missing" if not (plan.root / file).exists() else error.what
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
        arrays = {a.name: layout.chunk_path(a.name, self.shard, len(a.row_shape) + 1) for a in plan.arrays}
        files = arrays | {name: layout.chunk_path(name, self.shard, d) for name, d in SMALL_CHUNKS.items()}
        for name in (name for name in files if name in misfits):
            self._note(NOT_ITS_OWN, name, files[name], self.ok_rows if name in arrays else ())
        return extended
