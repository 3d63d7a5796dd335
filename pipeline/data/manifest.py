"""The manifest: one row per sample. The row's number is the sample's address everywhere (cache row = manifest row).

A Parquet file of the columns in `SCHEMA`; its metadata says where the sources lie and what was wrong with them. It
also holds its rows uncompressed (`mapped`), which is what is read where there are millions of them.
A sample is identified by (source, key), since keys repeat between sources. Offsets are bytes in the source, so that
any row's image and caption can be read with one seek; -1 where there is nothing to seek to.

    status ok               the image decodes and there is a usable caption
    image_missing           no image of this key (or, from a table, no such file)
    image_broken            cut, or not decodable
    image_too_large         more bytes or pixels than `samples` accepts
    caption_missing         neither text nor JSON holds a caption
    caption_empty           there is one, with nothing printable in it
    caption_undecodable     there is one, not in UTF-8
    caption_too_large       there is one, longer than any caption
    key_repeated            an earlier row of the same source has this key (the only rows whose identity is not unique)
    duplicate_of_val        a training row whose image is a validation row's: not trained on
    duplicate_of_train      a validation row whose image was a training row's before it was added: not validated on

What concerns a whole source (cut, not a tar, empty) has no row; it stands among the metadata's issues. A usable row may
have a reason too: what was wrong with the part of it that is not needed.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.data.mapped import MappedTable, write_mapped
from pipeline.errors import PipeError

VERSION = 1
METADATA_KEY = b"dinorankclip.manifest"
CHECKSUM = "crc32c"  # among the metadata: of all the rest of them
OK = "ok"
VAL = "val"
VAL_PREFIX = "val:"  # names of data.val_source's files, which may be called like data.source's

SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("source", pa.string()),
        ("key", pa.string()),
        ("image_offset", pa.int64()),
        ("image_bytes", pa.int64()),
        ("caption_offset", pa.int64()),
        ("caption_bytes", pa.int64()),
        ("captions", pa.list_(pa.string())),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("sha256", pa.string()),
        ("split", pa.string()),
        ("status", pa.string()),
        ("reason", pa.string()),
    ]
)
_REPEATING = ("source", "split", "status", "reason")  # few values: read as dictionaries
_IDENTITY = ("row", "source", "key", "sha256")
_HASHED_ROWS = 16_384  # at a time: their text stays in the CPU's cache, and far below Arrow's 2 GiB


@dataclass(frozen=True)
class ManifestRow:
    """One sample; see the module's text. width, height: pixels as stored, 0 where unknown."""

    row: int
    source: str
    key: str
    image_offset: int
    image_bytes: int
    caption_offset: int
    caption_bytes: int
    width: int
    height: int
    sha256: str
    split: str
    status: str
    reason: str


@dataclass(frozen=True)
class Source:
    """One file that rows come from, and what tells whether it is still the same.

    Args:
        name: relative to the root of data.source, with /; `val:` and relative to data.val_source's root.
        kind: "tar", or "table" (CSV, TSV).
        bytes, mtime_ns, sha256: of the file when it was indexed.
        rows: how many rows came from it.
    """

    name: str
    kind: Literal["tar", "table"]
    bytes: int
    mtime_ns: int
    sha256: str
    rows: int


@dataclass(frozen=True)
class Issue:
    """Something wrong that has no row: with a source, or (in summaries) with one key of it."""

    source: str
    key: str
    status: str
    reason: str


@dataclass(frozen=True)
class SplitRule:
    """How rows are split: the `fraction` of images whose SHA-256 is smallest, or a source of their own."""

    fraction: float
    val_source: bool


@dataclass(frozen=True)
class Metadata:
    """What the Parquet file says besides its rows."""

    root: str
    val_root: str | None
    rule: SplitRule
    sources: list[Source]
    issues: list[Issue] = field(default_factory=list)

    def to_json(self) -> str:
        values = {"version": VERSION, **asdict(self)}
        return _json(values | {CHECKSUM: google_crc32c.value(_json(values).encode())})

    @classmethod
    def from_json(cls, text: str, where: Path) -> Metadata:
        stored: dict[str, Any] = json.loads(text)
        if stored.get("version") != VERSION:
            raise PipeError(
                f"this manifest has version {stored.get('version')}, not {VERSION}", where=where, fix="run: pipe index"
            )
        # (Manifests of older versions have none.)
        if (checksum := stored.pop(CHECKSUM, None)) is not None and checksum != google_crc32c.value(
            _json(stored).encode()
        ):
            raise ValueError("its checksum does not fit")
        return cls(
            root=stored["root"],
            val_root=stored["val_root"],
            rule=SplitRule(**stored["rule"]),
            sources=[Source(**source) for source in stored["sources"]],
            issues=[Issue(**issue) for issue in stored["issues"]],
        )


def _json(values: Any) -> str:
    return json.dumps(values, ensure_ascii=False, sort_keys=True)


class Manifest:
    """A manifest file, opened. Columns stay in the file until they are used. Picklable: only its path travels.

    Rows and captions are read where they lie in the mapped file (`mapped`), whose pages all processes share. Of a
    manifest that was written without that part, each column that is asked for is read into memory.
    """

    def __init__(self, path: Path, table: MappedTable, metadata: Metadata) -> None:
        self.path, self.metadata, self._table = path, metadata, table

    def __reduce__(self) -> tuple[Any, ...]:
        return (read_manifest, (self.path,))

    def __len__(self) -> int:
        return self._table.rows

    @property
    def is_mapped(self) -> bool:
        """Whether all columns are read where they lie in the file; if not, writing the manifest anew makes it so."""
        return self._table.is_mapped

    @property
    def root(self) -> Path:
        """Where data.source's files lie."""
        return Path(self.metadata.root)

    @cached_property
    def source_table(self) -> dict[str, Source]:
        """Source name → what is known of the file."""
        return {source.name: source for source in self.metadata.sources}

    def source_path(self, name: str) -> Path:
        """The file of a source name."""
        if name.startswith(VAL_PREFIX) and self.metadata.val_root is not None:
            return Path(self.metadata.val_root) / name.removeprefix(VAL_PREFIX)
        return self.root / name

    def rows(self, split: Literal["train", "val"] | None = None, ok_only: bool = True) -> NDArray[np.int64]:
        """(n,) int64, ascending: row numbers of a split (None: both), the usable ones or all."""
        keep = np.ones(len(self), dtype=bool)
        if split is not None:
            keep &= self._equal("split", split)
        if ok_only:
            keep &= self._equal("status", OK)
        return np.flatnonzero(keep).astype(np.int64)

    def _equal(self, name: str, value: str) -> NDArray[np.bool_]:
        """(rows,) bool: where a column of few values has this one; no text is made into objects."""
        return np.asarray(pc.equal(self._table.column(name), value).fill_null(False).to_numpy(), dtype=bool)

    def column(self, name: str, rows: NDArray[np.int64] | None = None) -> NDArray[Any]:
        """(rows,) a column, or some rows of it, as a NumPy array (text as objects); not for captions."""
        return np.asarray(self._table.column(name).to_numpy()) if rows is None else self._table.take(name, rows)

    def sources(self) -> NDArray[np.object_]:
        """(rows,) the source name of each row."""
        return self.column("source")

    def record(self, row: int) -> ManifestRow:
        """One row; raises IndexError outside the manifest."""
        self._check(row)
        return ManifestRow(*(column[row].as_py() for column in self._record_columns))

    @cached_property
    def _record_columns(self) -> list[pa.ChunkedArray]:
        return [self._table.column(field.name) for field in fields(ManifestRow)]

    def captions(self, row: int) -> list[str]:
        """The row's usable captions, first the text file's; [] where there is none."""
        self._check(row)
        found: list[str] = self._table.column("captions")[row].as_py()
        return found

    def caption_counts(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many captions each of `rows` has: (n,)."""
        lengths: NDArray[np.int64] = pc.list_value_length(self._table.column("captions")).to_numpy()
        return lengths[rows]

    def fingerprint(self, rows: int | None = None) -> str:
        """SHA-256 over (row, source, key, image SHA-256) of the first `rows` rows (None: all).

        Never over captions or places, so that a cache stays valid when captions are added or the data moves; and a
        grown manifest can show that it begins as the old one did.
        """
        count = len(self) if rows is None else rows
        if count not in self._fingerprints:
            columns = {name: self._table.column(name) for name in _IDENTITY}
            digest = hashlib.sha256()
            for batch in pa.table(columns).slice(0, count).to_batches(max_chunksize=_HASHED_ROWS):
                digest.update(_identity_text(batch))
            self._fingerprints[count] = digest.hexdigest()
        return self._fingerprints[count]

    def split_sha256(self, rows: int | None = None) -> str:
        """SHA-256 over the splits of the first `rows` rows (None: all): which of them a run may train on."""
        count = len(self) if rows is None else rows
        return hashlib.sha256(self._equal("split", VAL)[:count].tobytes()).hexdigest()

    @cached_property
    def _fingerprints(self) -> dict[int, str]:
        return {}

    def summary(self) -> dict[str, dict[str, int]]:
        """split → status → number of rows; `train` and `val` are always there."""
        columns = pa.table({name: self._table.column(name) for name in ("split", "status")})
        counts = columns.group_by(["split", "status"]).aggregate([([], "count_all")])
        found: dict[str, dict[str, int]] = {"train": {}, "val": {}}
        for split, status, number in sorted(zip(*(column.to_pylist() for column in counts.columns), strict=True)):
            found.setdefault(split, {})[status] = number
        return found

    def _check(self, row: int) -> None:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a manifest of {len(self)} rows")


def _identity_text(batch: pa.RecordBatch) -> bytes | memoryview:
    """The columns `_IDENTITY` of each row as JSON's `["…", …], `, one after the other, whatever the batches.

    Arrow joins the columns fifteen times faster than `json` writes them; what `json` would escape is left to `json`.
    """
    row, *texts = (column.cast(pa.string()) for column in batch.columns)
    source, key, sha256 = texts
    joined = pc.binary_join_element_wise("[", row, ', "', source, '", "', key, '", "', sha256, '"], ', "")
    _, offsets, values = joined.buffers()
    start, end = np.frombuffer(offsets, np.int32)[[joined.offset, joined.offset + len(joined)]]
    text = np.frombuffer(values, np.uint8)[start:end]
    plain = text.min() >= ord(" ") and not (text == ord("\\")).any()
    if plain and joined.null_count == 0 and (text == ord('"')).sum() == 2 * len(texts) * len(joined):
        return text.data
    identities = list(zip(*(column.to_pylist() for column in batch.columns), strict=True))
    return f"{json.dumps(identities, ensure_ascii=False)[1:-1]}, ".encode()


def read_manifest(path: Path) -> Manifest:
    """Open a manifest.

    Raises:
        PipeError: there is none, or the file is not one of this version.
    """
    path = Path(path)
    if not path.is_file():
        raise PipeError("there is no manifest", where=path, fix="run: pipe index")
    try:
        table = MappedTable(path, _REPEATING)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise PipeError(f"cannot read this manifest ({error})", where=path, fix="run: pipe index") from error
    stored = table.metadata.get(METADATA_KEY)
    if stored is None or table.names != SCHEMA.names:
        raise PipeError("this file is not a manifest", where=path, fix="move it away and run: pipe index")
    try:
        metadata = Metadata.from_json(stored.decode("utf-8"), path)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise PipeError(
            f"what this manifest says of its sources is damaged ({type(error).__name__}: {error})",
            where=path,
            fix="restore it from a copy, or move it away and run: pipe index",
        ) from error
    return Manifest(path, table, metadata)


def write_manifest(path: Path, table: pa.Table, metadata: Metadata) -> None:
    """Write a table of `SCHEMA` atomically; its `row` column must count 0, 1, 2 ..."""
    rows = table.column("row").to_numpy()
    if not np.array_equal(rows, np.arange(len(rows))):
        raise ValueError("the manifest's rows must be numbered in order")
    labelled = table.cast(SCHEMA).replace_schema_metadata({METADATA_KEY: metadata.to_json().encode()})
    write_mapped(path, labelled, _REPEATING)
