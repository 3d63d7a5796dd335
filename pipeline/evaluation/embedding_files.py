"""Embeddings on disk, written as they come: a row group at a time, under another name until they are whole.

    NAME.parquet          source, key: string; embedding: fixed-size list of D float32, unit-norm
                          with captions: captions: list of string, text_embeddings: list of such lists, one a caption
    NAME.npy              (n, D) float32, beside NAME.keys.jsonl, {"source", "key"} a line, in the same order
    NAME.skipped.jsonl    {"source", "key", "problem"} a line: what has no row; only where there is any

What they are of stands as JSON in the Parquet file's metadata (KEY), and in the first line of no other file.
Legend: n rows, D width of the node, T captions of some rows.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.errors import PipeError
from pipeline.run_folder import replacing, write_bytes

KEY = b"dinorankclip.embeddings"
GROUP_ROWS = 4096
SUFFIXES = (".parquet", ".npy")

Floats = NDArray[np.float32]


@dataclass
class Rows:
    """Embedded samples: who they are, (n, D) vectors, and each one's captions with their vectors (T, D)."""

    samples: list[tuple[str, str]]
    vectors: Floats
    captions: list[tuple[str, ...]] | None = None
    text_vectors: Floats | None = None


@dataclass
class Skipped:
    """Samples without a row."""

    lines: list[dict[str, str]] = field(default_factory=list)

    def add(self, source: str, key: str, problem: str) -> None:
        self.lines.append({"source": source, "key": key, "problem": problem})


class Writer(Protocol):
    """What `writing` hands out."""

    rows: int
    skipped: Skipped

    def add(self, rows: Rows) -> None: ...


def beside(path: Path, what: str) -> Path:
    """NAME.keys.jsonl, NAME.skipped.jsonl."""
    return path.with_name(f"{path.stem}.{what}.jsonl")


@contextlib.contextmanager
def writing(path: Path, *, width: int, about: Mapping[str, Any], captions: bool = False) -> Iterator[Writer]:
    """A file of embeddings, there when the block ends well, with the list of what was skipped beside it.

    Raises:
        PipeError: the name ends in neither .parquet nor .npy; the disk refuses (nothing stays).
    """
    if path.suffix not in SUFFIXES:
        raise PipeError(f"embeddings are written as {' or '.join(SUFFIXES)}", where=path, fix="choose another --out")
    writer: _ParquetWriter | _NpyWriter
    with contextlib.ExitStack() as files:
        temporary = files.enter_context(replacing(path))
        if path.suffix == ".npy":  # its keys are renamed first: where the vectors are, they are
            keys = files.enter_context(replacing(beside(path, "keys")))
            writer = files.enter_context(contextlib.closing(_NpyWriter(temporary, keys, width)))
        else:
            writer = files.enter_context(contextlib.closing(_ParquetWriter(temporary, width, about, captions)))
        yield writer
        writer.finish()
        lines = writer.skipped.lines
        listed = beside(path, "skipped")
        if lines:
            write_bytes(listed, "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines).encode())
        else:
            listed.unlink(missing_ok=True)


def schema(width: int, captions: bool) -> pa.Schema:
    """Columns of a Parquet file of embeddings."""
    vector = pa.list_(pa.float32(), width)
    columns = [("source", pa.string()), ("key", pa.string()), ("embedding", vector)]
    if captions:
        columns += [("captions", pa.list_(pa.string())), ("text_embeddings", pa.list_(vector))]
    return pa.schema(columns)


def about_of(path: Path) -> dict[str, Any] | None:
    """What a Parquet file of embeddings says it is of; None where it is none, or damaged."""
    try:
        stored = (pq.read_metadata(path).metadata or {}).get(KEY)
    except (OSError, pa.ArrowException):
        return None
    return None if stored is None else json.loads(stored)


class _ParquetWriter:
    def __init__(self, path: Path, width: int, about: Mapping[str, Any], captions: bool) -> None:
        self.rows, self.skipped, self.about = 0, Skipped(), dict(about)
        self._schema = schema(width, captions)
        self._waiting: list[pa.RecordBatch] = []
        # Floats of embeddings do not repeat: a dictionary of them would only cost.
        self._file = pq.ParquetWriter(path, self._schema, use_dictionary=["source"], write_page_checksum=True)

    def add(self, rows: Rows) -> None:
        columns = [
            pa.array([source for source, _ in rows.samples], pa.string()),
            pa.array([key for _, key in rows.samples], pa.string()),
            _vectors(rows.vectors),
        ]
        if rows.captions is not None and rows.text_vectors is not None:
            ends = np.cumsum([0, *(len(texts) for texts in rows.captions)])
            texts = pa.array([list(texts) for texts in rows.captions], pa.list_(pa.string()))
            columns += [texts, pa.ListArray.from_arrays(pa.array(ends, pa.int32()), _vectors(rows.text_vectors))]
        self._waiting.append(pa.RecordBatch.from_arrays(columns, schema=self._schema))
        self.rows += len(rows.samples)
        if sum(batch.num_rows for batch in self._waiting) >= GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            table = pa.Table.from_batches(self._waiting)
            self._file.write_table(table, row_group_size=max(1, table.num_rows))
            self._waiting = []

    def finish(self) -> None:
        self._flush()
        about = self.about | {"rows": self.rows, "skipped": len(self.skipped.lines)}
        self._file.add_key_value_metadata({KEY: json.dumps(about, ensure_ascii=False, sort_keys=True)})

    def close(self) -> None:
        self._file.close()


def _vectors(values: Floats) -> pa.FixedSizeListArray:
    """(n, D) → n fixed-size lists."""
    flat = pa.array(np.ascontiguousarray(values, np.float32).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


class _NpyWriter:
    """An array of a length that is known only at the end: its header is written again then, in the room it has."""

    def __init__(self, path: Path, keys: Path, width: int) -> None:
        self.rows, self.skipped, self._width = 0, Skipped(), width
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115 (closed by close)
        self._keys = open(keys, "w", encoding="utf-8")  # noqa: SIM115
        self._header()
        self._size = self._file.tell()

    def _header(self) -> None:
        about = {"descr": "<f4", "fortran_order": False, "shape": (self.rows, self._width)}
        np.lib.format.write_array_header_1_0(self._file, about)

    def add(self, rows: Rows) -> None:
        self._file.write(np.ascontiguousarray(rows.vectors, "<f4").tobytes())
        for source, key in rows.samples:
            self._keys.write(json.dumps({"source": source, "key": key}, ensure_ascii=False) + "\n")
        self.rows += len(rows.samples)

    def finish(self) -> None:
        self._file.seek(0)
        self._header()
        if self._file.tell() != self._size:  # numpy leaves room for any number of rows
            raise AssertionError("the header of this .npy file has grown")

    def close(self) -> None:
        self._file.close()
        self._keys.close()


def write_text_vectors(path: Path, texts: Sequence[str], vectors: Floats, about: Mapping[str, Any]) -> None:
    """NAME.parquet with columns text, text_embedding, or NAME.npy alone; row i is line i.

    Raises:
        PipeError: another suffix.
    """
    if path.suffix not in SUFFIXES:
        raise PipeError(f"embeddings are written as {' or '.join(SUFFIXES)}", where=path, fix="choose another --out")
    with replacing(path) as temporary:
        if path.suffix == ".npy":
            with open(temporary, "wb") as file:
                np.save(file, np.ascontiguousarray(vectors, np.float32))
            return
        table = pa.table({"text": pa.array(list(texts), pa.string()), "text_embedding": _vectors(vectors)})
        stored = {KEY: json.dumps({**about, "rows": len(texts)}, ensure_ascii=False, sort_keys=True)}
        pq.write_table(table.replace_schema_metadata(stored), temporary, use_dictionary=False, write_page_checksum=True)
