"""Rows of a store that is remote, compressed, or both: through tensorstore, or decoded here where it cannot be used.

`RemotePath` (remote_path.py) stands for the store's URL; chunks.py has the codecs of the other way and the checks of
zarr.json. Values come through the array's own codec chain, so every checksum in it is always verified.

Legend: n rows asked for.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cache import layout
from pipeline.cache.chunks import FIX_COPY, ChunkRows, DamagedRows, check_foreign_document, is_plain
from pipeline.cache.kvstore import (
    TIMEOUT,
    kvstore_spec,
    start_tensorstore,
    tensorstore_context,
    tensorstore_reason,
    tensorstore_usable,
)
from pipeline.cache.layout import RowArray
from pipeline.cache.remote_path import RemotePath
from pipeline.cache.shards import FIX_SHARD, named_rows
from pipeline.cache.store import read_json
from pipeline.errors import PipeError

__all__ = ["RemotePath", "TensorStoreRows", "check_foreign_document", "is_plain"]

POOL_BYTES = 16_000_000  # keeps shard indexes; without a pool each row would fetch its shard's index again
# How tensorstore begins an error about the data; the others are about the way there.
OF_THE_DATA = ("NOT_FOUND", "FAILED_PRECONDITION", "DATA_LOSS", "INVALID_ARGUMENT", "OUT_OF_RANGE")


class TensorStoreRows:
    """Rows of any store that a Zarr v3 library reads. A `RowSource`: picklable, may be forked at any time.

    What is safe: a spawned process (or one of a forkserver) opens everything anew, with tensorstore. So does a process
    that was forked before its parent had read anything. One that was forked later cannot use tensorstore, which
    would abort it: it reads the same ranges without it (chunks.py), s3:// and gs:// by fsspec, which needs s3fs or
    gcsfs. Threads may share one object.

    Args:
        root: the store.
        pool_bytes: memory for what tensorstore keeps (shard indexes).
        timeout: seconds for one `gather`, at most.
    """

    def __init__(self, root: Path | RemotePath, pool_bytes: int = POOL_BYTES, timeout: float = TIMEOUT) -> None:
        self.root, self.pool_bytes, self.timeout = root, pool_bytes, timeout
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "pool_bytes": self.pool_bytes, "timeout": self.timeout}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self.forget()

    def forget(self) -> None:
        """Close everything that is open."""
        self.opened: dict[str, Any] = {}
        self._pid = os.getpid()

    def will_need(self, array: RowArray, rows: np.ndarray) -> None:
        """Nothing: each read asks for all its rows at once."""

    def gather(self, array: RowArray, rows: np.ndarray, check: bool = True) -> np.ndarray:
        """rows (n,) int64, all of state ok, in any order, repetitions allowed → (n, ...) as stored.

        Args:
            check: makes no difference: checksums are part of the codecs.

        Raises:
            PipeError: a chunk or shard is missing, cut short or damaged (array and rows are named), or the server
                cannot be reached.
        """
        if not len(rows):
            return np.empty((0, *array.row_shape), array.dtype)
        if os.getpid() != self._pid:
            self.forget()
        if kvstore_spec(self.root) is None or not tensorstore_usable():
            return self._chunks(array).gather(rows)
        try:
            return self._values(self._store(array), array, rows)
        except (ValueError, OSError) as error:  # a TimeoutError is an OSError
            raise self._problem(array, rows, error) from error

    def _chunks(self, array: RowArray) -> ChunkRows:
        if array.name not in self.opened:
            document = read_json(self.root / array.name / layout.METADATA)  # type: ignore[arg-type]
            self.opened[array.name] = ChunkRows(self.root, array, document)
        found: ChunkRows = self.opened[array.name]
        return found

    def _store(self, array: RowArray) -> Any:
        """The array, opened once; rows of one chunk are decoded together, missing chunks are errors."""
        if array.name not in self.opened:
            spec = {
                "driver": "zarr3",
                "kvstore": kvstore_spec(self.root / array.name),
                "fill_missing_data_reads": False,
                "recheck_cached_data": "open",
            }
            opening = start_tensorstore().open(spec, read=True, open=True, context=tensorstore_context(self.pool_bytes))
            self.opened[array.name] = opening.result(timeout=self.timeout)
        return self.opened[array.name]

    def _values(self, store: Any, array: RowArray, rows: np.ndarray) -> np.ndarray:
        """In ascending order for tensorstore, then in the order asked."""
        distinct, which = np.unique(rows, return_inverse=True)
        found = np.asarray(store[distinct].read().result(timeout=self.timeout))
        if found.shape[1:] != array.row_shape or found.dtype != array.dtype:
            raise PipeError(
                f"the array {array.name} has rows of {found.dtype} {found.shape[1:]}, not {array.dtype} "
                f"{array.row_shape}",
                where=self.root / array.name,
                fix=FIX_COPY,
            )
        return found if len(distinct) == len(rows) and np.array_equal(distinct, rows) else found[which]

    def _problem(self, array: RowArray, rows: np.ndarray, error: Exception) -> PipeError:
        """Which rows it is about: each is read alone, as far as time allows, unless the server is the problem."""
        where, reason = self.root / array.name, tensorstore_reason(error)
        opened = self.opened.get(array.name)
        if opened is None or not reason.startswith(OF_THE_DATA):
            return PipeError(f"cannot read the array {array.name}: {reason}", where=where)
        waiting = [(row, opened[row].read()) for row in np.unique(rows).tolist()]
        bad, deadline = [], time.monotonic() + self.timeout
        for row, future in waiting:
            try:
                future.result(timeout=max(deadline - time.monotonic(), 0.01))
            except TimeoutError:
                break
            except (ValueError, OSError):
                bad.append(row)
        listed = named_rows(np.array(bad or rows))
        missing = reason.startswith("NOT_FOUND")
        what = "rows that `state` promises are missing" if missing else "damaged rows"
        return DamagedRows(what, f"{array.name}, {listed} ({reason})", where=where, fix=FIX_SHARD)
