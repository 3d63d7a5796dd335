"""Captions on their way: a small Parquet file for every few hundred rows, until all are there and they are joined.

Each part is written under another name, synced and renamed, and says whose captions it holds and of which manifest, as
the joined file does. A part may be there twice over (killed between the joined file and the parts' removal): the same
rows then say the same.

`.lock` in the parts' folder tells a second captioner of the same workspace to keep away; it ends with its process.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.cache import layout
from pipeline.cache.locks import StoreLock
from pipeline.data.mapped import GROUP_ROWS
from pipeline.data.synthetic_captions import ABSENT, METADATA_KEY, SCHEMA, CaptionsMetadata
from pipeline.errors import PipeError
from pipeline.run_folder import replacing, sync_folder

ATTEMPTS = 100  # to enter while others remove the folder; what stands in the way for good does so still
CHECKSUM_KEY = b"dinorankclip.crc32c"  # of the rows: Parquet has none that covers them all


class CaptionParts:
    """The parts of one workspace; a context in which this process alone may write them.

    Args:
        folder: workspace/captions.parts; it is there only while there are parts, or somebody works on them.

    Raises (on entering):
        PipeError: another process is captioning.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock: StoreLock | None = None

    def __enter__(self) -> CaptionParts:
        attempts = 0
        while self._lock is None:
            attempts += 1
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                lock = StoreLock(self.folder)
            except (OSError, PipeError) as error:
                cause = error.__cause__ if isinstance(error, PipeError) else error
                if isinstance(cause, FileExistsError | FileNotFoundError) and attempts < ATTEMPTS:
                    continue  # as below, between two looks at the folder
                if isinstance(error, PipeError):
                    raise
                raise PipeError(f"cannot make this folder: {error.strerror}", where=self.folder) from error
            if not lock.exclusive():
                holders = lock.holders()
                lock.close()
                raise PipeError(
                    f"another pipe caption is at work ({holders})",
                    where=self.folder,
                    fix="wait for it to end, or stop it; it can be resumed",
                )
            if lock.in_place():  # else the one before has finished and removed the folder in this moment
                self._lock = lock
            else:
                lock.close()
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the folder where nothing is left in it, and let go."""
        assert self._lock is not None
        with contextlib.suppress(OSError):
            if os.listdir(self.folder) == [layout.LOCK]:
                (self.folder / layout.LOCK).unlink()
                self.folder.rmdir()
        self._lock.close()
        self._lock = None

    def files(self) -> list[Path]:
        """The parts, in the order in which they were written."""
        return sorted(self.folder.glob("part-*.parquet"))

    def read(self, path: Path) -> tuple[pa.Table, CaptionsMetadata]:
        """A part's rows and what it says of itself.

        Raises:
            PipeError: it is damaged.
        """
        try:
            table = pq.read_table(path, partitioning=None)
            metadata = CaptionsMetadata.from_json(table.schema.metadata[METADATA_KEY].decode("utf-8"))
            if table.schema.metadata[CHECKSUM_KEY] != _checksum(table):
                raise ValueError("its checksum does not fit")
            return table.cast(SCHEMA), metadata
        except (pa.ArrowException, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise PipeError(
                f"this part is damaged ({type(error).__name__})",
                where=path,
                fix="remove it and run the same command; its rows are captioned again",
            ) from error

    def write(self, table: pa.Table, metadata: CaptionsMetadata) -> None:
        """Publish a part: a table of `SCHEMA` with any rows. Raises PipeError where the disk refuses."""
        numbers = [int(path.stem.removeprefix("part-")) for path in self.files()]
        said = {METADATA_KEY: metadata.to_json().encode(), CHECKSUM_KEY: _checksum(table)}
        labelled = table.cast(SCHEMA).replace_schema_metadata(said)
        with replacing(self.folder / f"part-{max(numbers, default=-1) + 1:06d}.parquet") as temporary:
            pq.write_table(labelled, temporary, compression="zstd")

    def clear(self) -> None:
        """Remove all parts, and what writers that were killed left."""
        for path in [*self.files(), *self.folder.glob(".part-*.tmp")]:
            path.unlink()
        sync_folder(self.folder)


def _checksum(table: pa.Table) -> bytes:
    """CRC-32C of the rows as JSON, in digits."""
    return str(google_crc32c.value(json.dumps(table.to_pylist()).encode())).encode()


def join(tables: list[pa.Table], rows: int) -> pa.Table:
    """One table of `SCHEMA` with rows 0, 1 ... `rows` - 1; where several have a row, the first counts, and rows that
    none has are absent. Rows that a table calls absent are not there."""
    there = [table.filter(pc.not_equal(table.column("status"), ABSENT)) for table in tables]
    large = pa.schema([field.with_type(pa.large_string()) if field.name != "row" else field for field in SCHEMA])
    found = pa.concat_tables([large.empty_table(), *(table.cast(large) for table in there)]).combine_chunks()
    numbers = found.column("row").to_numpy()
    position = np.full(rows, -1, np.int64)  # (rows,) where in `found`
    position[numbers[::-1]] = np.arange(len(numbers))[::-1]
    return pa.concat_tables([_rows_between(found, position, at) for at in range(0, max(rows, 1), GROUP_ROWS)])


def _rows_between(found: pa.Table, position: np.ndarray, start: int) -> pa.Table:
    """The joined table's rows from `start` on, as many as a batch holds (all text of millions may pass 2 GiB)."""
    here = position[start : start + GROUP_ROWS]
    taken = found.take(pa.array(here, mask=here < 0))
    columns = {
        "row": pa.array(np.arange(start, start + len(here), dtype=np.int64)),
        "status": pc.fill_null(taken.column("status"), ABSENT),
        "caption": taken.column("caption"),
        "reason": pc.fill_null(taken.column("reason"), ""),
    }
    return pa.table(columns).cast(SCHEMA)
