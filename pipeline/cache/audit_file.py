"""Auditing one shard file, every byte of it: its length, its index, what the index says, and every chunk.

The file is read in blocks by position, never mapped: one that is cut short meanwhile must not kill the process.
Where the index itself is damaged, rows are looked for where our writer puts them: damaged rows are named all the same.

Legend: S rows a shard, n chunks of a block; a slot is a row's place in its shard; the stride is a row's bytes and CRC.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.cache import layout
from pipeline.cache.audit_values import impossible
from pipeline.cache.findings import Finding, as_rows
from pipeline.cache.layout import RowArray
from pipeline.cache.shards import CRC_BYTES, MISSING_CHUNK, crc32c, index_bytes

BLOCK_BYTES = 8 * 2**20
NOWHERE = -1


class FileAudit:
    """What was found in one shard file; `run` does the work.

    Args:
        root, array, shard: which file.
        first: the row in slot 0.
        shard_rows: S.
        state: (S,) uint8; None where it cannot be believed. Slots of state 1 must have a chunk, and those of state 0
            may: while new rows are added to a shard, its `state` promises the old ones alone. All others must not.
        sizes: (S, 2) int64, of the images; see `audit_values.impossible`.

    Attributes:
        findings: all of them.
        bytes_read: of the file.
        stored, computed: the CRC-32C of each chunk, (S,) uint32, as written in the file and as its values give.
        slots: those whose chunk was read, ascending; None where some chunk could not be.
        extended: whether there are chunks of rows that `state` calls absent.
    """

    def __init__(
        self,
        root: Path,
        array: RowArray,
        shard: int,
        first: int,
        shard_rows: int,
        state: np.ndarray | None,
        sizes: np.ndarray | None = None,
    ) -> None:
        self.root, self.array, self.shard, self.first, self.state = root, array, shard, first, state
        self.sizes = sizes
        self.ok = None if state is None else state == layout.OK
        self.extended = False
        self.shard_rows, self.stride = shard_rows, array.row_bytes + CRC_BYTES
        self.file = array.file(root, shard)
        self.findings: list[Finding] = []
        self.bytes_read = 0
        self.stored, self.computed = np.zeros(shard_rows, "<u4"), np.zeros(shard_rows, "<u4")
        self.slots: np.ndarray | None = None

    def run(self) -> FileAudit:
        try:
            if not stat.S_ISREG(os.stat(self.file).st_mode):
                self._note("this is no file", self._ok_slots())
                return self
            handle = os.open(self.file, os.O_RDONLY)
            try:
                self._examine(handle, os.fstat(handle).st_size)
            finally:
                os.close(handle)
        except FileNotFoundError:
            self._note("the file is missing", self._ok_slots())
        except OSError as error:
            self._note(f"the file cannot be read ({error.strerror})", self._ok_slots())
        return self

    def _note(self, what: str, slots: np.ndarray | None = None) -> None:
        """Add a finding; one about rows only where there are such rows."""
        rows = () if slots is None else as_rows(self.first + slots)
        self.findings.append(Finding(what, str(self.file.relative_to(self.root)), self.array.name, self.shard, rows))

    def _ok_slots(self) -> np.ndarray:
        return np.flatnonzero(self.ok) if self.ok is not None else np.zeros(0, np.int64)

    def _examine(self, handle: int, size: int) -> None:
        end = size - index_bytes(self.shard_rows)
        index = self._index_at(handle, end)
        if index is None and self.ok is not None:
            usual = int(self.ok.sum()) * self.stride
            if end < usual:
                self._note(f"cut short: {size:,} of {size - end + usual:,} bytes")
            elif end > usual:  # bytes were appended: the index may stand where it did
                self._note(f"{end - usual:,} bytes longer than its rows and its index")
                end, index = usual, self._index_at(handle, usual)
        if index is None:
            self._note("its index is cut off or damaged (the checksum does not fit)")
        self._check_chunks(handle, self._usual_offsets(size) if index is None else self._offsets(index, end))
        self.bytes_read = size

    def _index_at(self, handle: int, place: int) -> np.ndarray | None:
        """(S, 2) uint64, the index that begins at byte `place`; None where there is no sound one."""
        length = index_bytes(self.shard_rows)
        data = os.pread(handle, length, place) if place >= 0 else b""
        sound = len(data) == length and crc32c(data[:-CRC_BYTES]) == int.from_bytes(data[-CRC_BYTES:], "little")
        return np.frombuffer(data[:-CRC_BYTES], "<u8").reshape(-1, 2) if sound else None

    def _usual_offsets(self, size: int) -> np.ndarray:
        """Where our writer puts the chunks: in row order, without gaps."""
        offsets, present = np.full(self.shard_rows, NOWHERE, np.int64), self._ok_slots()
        if self.ok is None and size == self.shard_rows * self.stride + index_bytes(self.shard_rows):
            present = np.arange(self.shard_rows)
        offsets[present] = np.arange(len(present)) * self.stride
        beyond = present[offsets[present] + self.stride > size]
        if len(beyond):
            self._note("chunks are cut off", beyond)
            offsets[beyond] = NOWHERE
        return offsets

    def _offsets(self, entries: np.ndarray, end: int) -> np.ndarray:
        """(S,) int64 from a sound index (S, 2) of a file whose chunks end at byte `end`; -1 where there is none."""
        missing = (entries == MISSING_CHUNK).all(axis=1)
        length_ok = entries[:, 1] == self.stride
        inside = entries[:, 0] <= np.uint64(max(end - self.stride, 0)) if end >= self.stride else np.zeros_like(missing)
        wrong: list[tuple[str, np.ndarray]] = [
            ("the index gives a chunk a wrong length", ~missing & ~length_ok),
            ("the index points outside the file", ~missing & length_ok & ~inside),
        ]
        if self.state is not None:
            wrong.append(("marked ok, but there is no chunk", (self.state == layout.OK) & missing))
            wrong.append(("there is a chunk, but `state` forbids it", (self.state > layout.OK) & ~missing))
            self.extended = bool(((self.state == layout.ABSENT) & ~missing).any())
        for what, where in wrong:
            if where.any():
                self._note(what, np.flatnonzero(where))
        readable = ~missing & length_ok & inside
        offsets = np.where(readable, entries[:, 0].astype(np.int64), NOWHERE)
        self._check_cover(offsets, end)
        return offsets

    def _check_cover(self, offsets: np.ndarray, end: int) -> None:
        """Every byte before the index belongs to exactly one chunk."""
        slots = np.flatnonzero(offsets != NOWHERE)
        slots = slots[np.argsort(offsets[slots], kind="stable")]
        starts = np.append(offsets[slots], end)
        ends = np.append(0, offsets[slots] + self.stride)
        gaps = starts - np.maximum.accumulate(ends)
        overlapping = np.flatnonzero(gaps[:-1] < 0)  # with the chunk before it
        if len(overlapping):
            self._note("chunks overlap", np.unique(slots[np.append(overlapping, overlapping - 1)]))
        if (loose := int(np.maximum(gaps, 0).sum())) > 0:
            self._note(f"{loose:,} bytes belong to no chunk")

    def _check_chunks(self, handle: int, offsets: np.ndarray) -> None:
        slots = np.flatnonzero(offsets != NOWHERE)
        bad: dict[str, list[np.ndarray]] = {}
        for block in _blocks(slots[np.argsort(offsets[slots], kind="stable")], offsets, self.stride):
            data = os.pread(handle, len(block) * self.stride, int(offsets[block[0]]))
            whole = len(data) // self.stride
            bad.setdefault("cannot be read to its end", []).append(block[whole:])
            block = block[:whole]
            chunks = np.frombuffer(data, np.uint8, whole * self.stride).reshape(whole, self.stride)
            self.stored[block] = np.ascontiguousarray(chunks[:, -CRC_BYTES:]).view("<u4")[:, 0]
            self.computed[block] = [crc32c(chunk[:-CRC_BYTES]) for chunk in chunks]
            broken = self.stored[block] != self.computed[block]
            bad.setdefault("checksums do not fit", []).append(block[broken])
            sizes = None if self.sizes is None else self.sizes[block]
            for what, where in impossible(self.array, chunks[:, :-CRC_BYTES], sizes):
                bad.setdefault(what, []).append(block[where & ~broken])
        for what, found in bad.items():
            if len(rows := np.concatenate(found)):
                self._note(what, rows)
        unread = any(len(part) for part in bad.get("cannot be read to its end", []))
        complete = np.isin(self._ok_slots(), slots).all() and not unread
        self.slots = slots if complete else None

    def sealed(self) -> list[bytes]:
        """What the file's seal may be over: its chunks' checksums as they stand or as the values give (one of the two
        was damaged), of all chunks or (while rows are added) of those that `state` promises; [] where some is unread.
        """
        if self.slots is None:
            return []
        promised = self.slots if self.ok is None else self.slots[self.ok[self.slots]]
        options = [sums[slots].tobytes() for slots in (self.slots, promised) for sums in (self.stored, self.computed)]
        return list(dict.fromkeys(options))


def _blocks(slots: np.ndarray, offsets: np.ndarray, stride: int) -> Iterator[np.ndarray]:
    """Cut slots, in the order of their chunks, into runs that lie side by side, each at most 8 MiB (or one chunk)."""
    most = max(1, BLOCK_BYTES // stride)
    for run in np.split(slots, np.flatnonzero(np.diff(offsets[slots]) != stride) + 1):
        for start in range(0, len(run), most):
            yield run[start : start + most]
