"""Auditing the rows of one array and shard by reading them: of remote stores, and of arrays that are encoded otherwise.

Whatever reads them checks every checksum on the way. Where a block of rows cannot be read, each is read alone, so that
the damaged ones are named; a server that cannot be reached ends the audit instead, and is no damage.

Legend: S rows a shard, n rows of a block; a slot is a row's place in its shard.
"""

from __future__ import annotations

import numpy as np

from pipeline.cache import layout
from pipeline.cache.audit_values import impossible
from pipeline.cache.chunks import DamagedRows
from pipeline.cache.findings import Finding, as_rows
from pipeline.cache.layout import RowArray
from pipeline.cache.local import RowSource
from pipeline.cache.shards import CRC_BYTES, crc32c
from pipeline.errors import PipeError

BLOCK_BYTES = 8 * 2**20  # as one request: a store far away sends it within the reader's patience


class RowsAudit:
    """What was found in the rows of one array and shard; `run` does the work. Attributes as `audit_file.FileAudit`.

    Args:
        source: reads the rows.
        array, shard, first: which rows; `first` is the one in slot 0.
        state: (S,) uint8; None where it cannot be believed: then nothing says which rows there should be.
        sizes: (S, 2) int64, of the images; see `audit_values.impossible`.
        plain: whether a chunk's checksum is that of the row's bytes, as seals are over.
        local: whether a store that cannot be read is damaged, and not just far away.
    """

    extended = False

    def __init__(
        self,
        source: RowSource,
        array: RowArray,
        shard: int,
        first: int,
        state: np.ndarray | None,
        sizes: np.ndarray | None,
        *,
        plain: bool,
        local: bool,
    ) -> None:
        self.source, self.array, self.shard, self.first = source, array, shard, first
        self.slots = np.zeros(0, np.int64) if state is None else np.flatnonzero(state == layout.OK)
        self.sizes, self.plain, self.local = sizes, plain, local
        self.findings: list[Finding] = []
        self.bytes_read = 0
        self.computed = np.zeros(len(self.slots), "<u4")

    def run(self) -> RowsAudit:
        """Raises PipeError where a remote store cannot be read, which says nothing about its rows."""
        bad: dict[str, list[int]] = {}
        step = max(1, BLOCK_BYTES // self.array.row_bytes)
        for start in range(0, len(self.slots), step):
            block = self.slots[start : start + step]
            try:
                self._look(start, block, bad)
            except DamagedRows:
                self._one_by_one(start, block, bad)
            except PipeError as error:
                if not self.local:
                    raise
                bad.setdefault(error.what, []).extend(block.tolist())
        file = layout.chunk_path(self.array.name, self.shard, len(self.array.row_shape) + 1)
        for what, slots in bad.items():
            rows = as_rows(self.first + np.array(slots))
            self.findings.append(Finding(what, file, self.array.name, self.shard, rows))
        return self

    def _one_by_one(self, start: int, slots: np.ndarray, bad: dict[str, list[int]]) -> None:
        for number, slot in enumerate(slots.tolist(), start):
            try:
                self._look(number, np.array([slot]), bad)
            except DamagedRows as error:
                bad.setdefault(error.reason, []).append(slot)

    def _look(self, start: int, slots: np.ndarray, bad: dict[str, list[int]]) -> None:
        """Read `slots` (n,), which are `self.slots[start : start + n]`."""
        values = self.source.gather(self.array, self.first + slots, True)
        self.bytes_read += values.nbytes + CRC_BYTES * len(slots)
        flat = values.reshape(len(slots), -1).view(np.uint8)
        self.computed[start : start + len(slots)] = [crc32c(row) for row in flat] if self.plain else 0
        for what, where in impossible(self.array, flat, None if self.sizes is None else self.sizes[slots]):
            if where.any():
                bad.setdefault(what, []).extend(slots[where].tolist())

    def sealed(self) -> list[bytes]:
        """What the file's seal may be over; [] where some row could not be read, or seals are not over its bytes."""
        return [self.computed.tobytes()] if self.plain and not self.findings and len(self.slots) else []
