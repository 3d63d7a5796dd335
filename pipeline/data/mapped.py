"""A table in one Parquet file, twice: as Parquet, and before that uncompressed, so that single rows can be read.

Parquet packs tens of thousands of values into what can only be unpacked whole. So the file also holds the table as an
Arrow stream, which is mapped: opening it reads next to nothing, a row is read from where it lies, and all processes
share the pages. It lies between Parquet's first four bytes and its first column, where no Parquet reader looks (a
footer at the file's end says where every column is). Both come and go together, and no stream can be older than its
Parquet columns.

The stream is never needed. A file without one, or with a damaged one (each of its columns has a CRC-32C, checked when
the column is first used), is read from its Parquet columns into memory; their pages have a CRC-32 each, so that damage
to both copies is an error and never another value.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.console import log
from pipeline.errors import PipeError
from pipeline.run_folder import replacing

STREAM_KEY = b"dinorankclip.stream"  # JSON: offset and bytes of the Arrow stream, crc32c of each of its columns
GROUP_ROWS = 131_072  # of the Parquet file's row groups and the stream's batches
ALIGNMENT = 64  # of the stream in the file, as Arrow wants it for its buffers


def write_mapped(path: Path, table: pa.Table, coded: Sequence[str]) -> None:
    """Write `table` atomically; the columns `coded`, of few values, are kept as dictionaries in the stream.

    Raises:
        PipeError: the disk refuses.
    """
    with (
        replacing(path) as temporary,
        pa.OSFile(str(temporary), "wb") as file,
        pq.ParquetWriter(file, table.schema, compression="zstd", write_page_checksum=True) as parquet,
    ):
        place = _write_stream(file, _with_dictionaries(table, coded))
        file.flush()
        columns = _open_stream(temporary, **place)
        checksums = {name: _checksum(columns.column(name)) for name in columns.column_names}
        parquet.write_table(table, row_group_size=GROUP_ROWS)
        parquet.add_key_value_metadata({STREAM_KEY: json.dumps({**place, "crc32c": checksums}).encode()})


class MappedTable:
    """The columns of a file of `write_mapped`, or of a plain Parquet file, each read when it is first asked for.

    Attributes:
        names, rows, metadata: the columns' names, their length, and the file's metadata (bytes → bytes).
    """

    def __init__(self, path: Path, coded: Sequence[str], *, remake: str = "pipe index") -> None:
        """`remake`: the command that writes such a file, for messages.

        Raises pa.ArrowException or OSError where this is no Parquet file.
        """
        self.path, self._coded, self._remake = path, list(coded), remake
        with pq.ParquetFile(path) as parquet:
            self.names: list[str] = parquet.schema_arrow.names
            self.rows: int = parquet.metadata.num_rows
            self.metadata: dict[bytes, bytes] = parquet.metadata.metadata or {}
        self._columns: dict[str, pa.ChunkedArray] = {}
        self._stream, self._checksums = self._find_stream()

    def column(self, name: str) -> pa.ChunkedArray:
        """A column of `rows` values: mapped, or where that cannot be, read into memory; kept either way."""
        if name not in self._columns:
            mapped = self._mapped(name)
            self._columns[name] = self._unpacked(name) if mapped is None else mapped
        return self._columns[name]

    @property
    def is_mapped(self) -> bool:
        """Whether every column can be mapped: its copy for that is there and whole."""
        return self._stream is not None and all(self._mapped(name) is not None for name in self.names)

    def take(self, name: str, rows: NDArray[np.int64]) -> NDArray[Any]:
        """(n,) the values of `rows` (n,), in their order; raises IndexError outside the table."""
        if len(rows) and not 0 <= rows.min() <= rows.max() < self.rows:
            raise IndexError(f"rows {rows.min()} to {rows.max()} of a table of {self.rows} rows")
        column = self.column(name)
        ends = np.cumsum([len(chunk) for chunk in column.chunks])
        chunk_of = np.searchsorted(ends, rows, side="right")
        # Chunk by chunk: Arrow's own `take` would first copy all chunks of text into one.
        values = column.slice(0, 0).to_numpy()
        taken = np.empty(len(rows), values.dtype)
        for index in np.unique(chunk_of).tolist():
            chunk, chosen = column.chunk(index), np.flatnonzero(chunk_of == index)
            inside = rows[chosen] - (ends[index] - len(chunk))
            taken[chosen] = chunk.take(pa.array(inside)).to_numpy(zero_copy_only=False)
        return taken

    def _find_stream(self) -> tuple[pa.Table | None, dict[str, int]]:
        if STREAM_KEY not in self.metadata:
            return None, {}
        try:
            place = json.loads(self.metadata[STREAM_KEY])
            stream = _open_stream(self.path, place["offset"], place["bytes"])
            if (stream.column_names, stream.num_rows) == (self.names, self.rows):
                return stream, place["crc32c"]
        except (ValueError, LookupError, TypeError, OSError, pa.ArrowException):
            pass  # said below
        log.warning("%s: its rows can only be read as Parquet, into memory: damaged, or rewritten?", self.path)
        return None, {}

    def _mapped(self, name: str) -> pa.ChunkedArray | None:
        """The column in the stream, or None: damaged lengths or offsets would lead Arrow out of its memory."""
        if self._stream is None:
            return None
        column = self._stream.column(name)
        with contextlib.suppress(pa.ArrowException):
            column.validate()  # lengths fit buffers
            if _checksum(column) == self._checksums.get(name):
                return column
        log.warning("%s: the copy of column %s for reading single rows is damaged; reading the other", self.path, name)
        return None

    def _unpacked(self, name: str) -> pa.ChunkedArray:
        dictionaries = [name] if name in self._coded else None
        try:
            with pq.ParquetFile(self.path, read_dictionary=dictionaries, page_checksum_verification=True) as parquet:
                same = (parquet.metadata.num_rows, parquet.metadata.metadata or {}) == (self.rows, self.metadata)
                column = parquet.read(columns=[name]).column(0) if same else None
            if column is not None and len(column) != self.rows:
                raise ValueError(f"{len(column)} values of {self.rows}")
        except (pa.ArrowException, OSError, ValueError) as error:
            raise PipeError(
                f"cannot read column {name} ({error})", where=self.path, fix=f"run: {self._remake}"
            ) from error
        if column is None:  # its columns would be of other rows than those that have been read
            raise PipeError(
                "this file was written anew while it was being read", where=self.path, fix="run the same command again"
            )
        return column.unify_dictionaries()  # Parquet has one in each row group


def _with_dictionaries(table: pa.Table, coded: Sequence[str]) -> pa.Table:
    for name in coded:
        index = table.schema.get_field_index(name)
        table = table.set_column(index, name, table.column(name).dictionary_encode())
    return table.replace_schema_metadata(None).unify_dictionaries()


def _write_stream(file: pa.NativeFile, table: pa.Table) -> dict[str, int]:
    """Append `table` to the file; where it lies there."""
    file.write(bytes(-file.tell() % ALIGNMENT))
    start = file.tell()
    with pa.ipc.new_stream(file, table.schema) as stream:
        for first in range(0, len(table), GROUP_ROWS):  # a table of a thousand tars comes in a thousand chunks
            stream.write_table(table.slice(first, GROUP_ROWS).combine_chunks())
    return {"offset": start, "bytes": file.tell() - start}


def _open_stream(path: Path, offset: int, bytes: int) -> pa.Table:
    """The stream's table, whose buffers are the mapped file's pages."""
    with pa.memory_map(str(path)) as file:
        whole = file.read_buffer()
    return pa.ipc.open_stream(pa.BufferReader(whole.slice(offset, bytes))).read_all()


def _checksum(column: pa.ChunkedArray) -> int:
    """CRC-32C of all that Arrow reads of a column: lengths, offsets, values, dictionaries."""
    checksum = 0
    for chunk in column.chunks:
        checksum = google_crc32c.extend(checksum, np.array([len(chunk), chunk.null_count], "<i8"))
        coded = isinstance(chunk, pa.DictionaryArray)
        for buffer in [*chunk.buffers(), *(chunk.dictionary.buffers() if coded else [])]:
            checksum = google_crc32c.extend(checksum, buffer if buffer is not None else b"")
    return int(checksum)
