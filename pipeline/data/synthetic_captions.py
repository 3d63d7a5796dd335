"""Synthetic captions: what a captioning model says of each manifest row's image, in a file beside the manifest.

A Parquet file of the columns in `SCHEMA`, a row for every row that the manifest had; its metadata says by whom the
captions were made, and of which manifest. It also holds its rows uncompressed (`mapped`), so that training reads single
captions from pages that all its processes share.

    status ok           there is a caption
    empty               the model said nothing that could be printed
    undecodable         the image cannot be decoded, or is another than when it was indexed
    refused             the image decodes, but the model's processor does not take it
    absent              nobody has captioned this row yet

Legend: n rows that the manifest had when the file was written.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.data.manifest import Manifest
from pipeline.data.mapped import MappedTable, write_mapped
from pipeline.errors import PipeError

FORMAT, VERSION = "dinorankclip-captions", 1
METADATA_KEY = b"dinorankclip.captions"
CHECKSUM = "crc32c"  # among the metadata: of all the rest of it
COMMAND = "pipe caption"
ANEW = f"run: {COMMAND} --overwrite"
OK, EMPTY, UNDECODABLE, REFUSED, ABSENT = "ok", "empty", "undecodable", "refused", "absent"

SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("status", pa.string()),
        ("caption", pa.string()),  # null unless status is ok
        ("reason", pa.string()),
    ]
)
_REPEATING = ("status", "reason")


@dataclass(frozen=True)
class CaptionerIdentity:
    """Who made captions. Two that agree in all but `name` and `information` are the same.

    Args:
        name: as it was given; of a path only the last part, so that the folder may move.
        architecture: the network's class.
        files_sha256: over the names and SHA-256 of its configuration, weights, tokenizer and processor files.
        prompt: what the model was asked; None: nothing.
        precision: of the network's numbers.
        generation: max_new_tokens and num_beams; nothing is sampled.
        information: versions of libraries, batch size: what may move a caption by rounding alone.
    """

    name: str
    architecture: str
    files_sha256: str
    prompt: str | None
    precision: str
    generation: dict[str, int]
    information: dict[str, Any] = field(default_factory=dict)

    def difference(self, stored: CaptionerIdentity) -> str | None:
        """What differs between this captioner and a stored one, in a clause; None where nothing does."""
        if self.files_sha256 != stored.files_sha256 or self.architecture != stored.architecture:
            if self.name != stored.name:
                return f"the captioner was {stored.name} and is {self.name}"
            hashes = f"SHA-256 {stored.files_sha256[:12]}… and {self.files_sha256[:12]}…"
            return f"the files of captioner {self.name} were others ({hashes})"
        ours, theirs = asdict(self) | self.generation, asdict(stored) | stored.generation
        for key in ("prompt", "precision", *sorted(self.generation | stored.generation)):
            if ours.get(key) != theirs.get(key):
                return f"{key} was {theirs.get(key)!r} and is {ours.get(key)!r}"
        return None


@dataclass(frozen=True)
class CaptionsMetadata:
    """What the file says besides its rows: whose captions, and the manifest's rows and their fingerprint."""

    captioner: CaptionerIdentity
    rows: int
    fingerprint: str

    @classmethod
    def of(cls, captioner: CaptionerIdentity, manifest: Manifest) -> CaptionsMetadata:
        return cls(captioner, len(manifest), manifest.fingerprint())

    def to_json(self) -> str:
        values = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return _json(values | {CHECKSUM: google_crc32c.value(_json(values).encode())})

    @classmethod
    def from_json(cls, text: str) -> CaptionsMetadata:
        """Raises ValueError, LookupError or TypeError where this is none, or damaged."""
        stored: dict[str, Any] = json.loads(text)
        if (stored.get("format"), stored.get("version")) != (FORMAT, VERSION):
            raise ValueError(f"{stored.get('format')} version {stored.get('version')}, not {FORMAT} {VERSION}")
        if stored.pop(CHECKSUM) != google_crc32c.value(_json(stored).encode()):
            raise ValueError("its checksum does not fit")
        return cls(CaptionerIdentity(**stored["captioner"]), stored["rows"], stored["fingerprint"])

    def fits(self, manifest: Manifest) -> bool:
        """Whether the manifest begins with the rows that these captions are of."""
        return self.rows <= len(manifest) and manifest.fingerprint(self.rows) == self.fingerprint


def _json(values: Any) -> str:
    return json.dumps(values, ensure_ascii=False, sort_keys=True)


class SyntheticCaptions:
    """A file of captions, opened. Picklable: only path and metadata travel, and the mapped pages are shared.

    Args:
        rows: how many rows the manifest has now; those beyond the file's are without a caption.

    Attributes:
        metadata: by whom and of what.
    """

    def __init__(self, path: Path, table: MappedTable, metadata: CaptionsMetadata, rows: int) -> None:
        self.path, self.metadata, self._table, self._rows = path, metadata, table, rows

    def __reduce__(self) -> tuple[Any, ...]:
        return (_reopen, (self.path, self.metadata.to_json(), self._rows))

    def __len__(self) -> int:
        """How many rows the file has; the manifest may have grown since."""
        return self._table.rows

    @property
    def identity(self) -> CaptionerIdentity:
        """Who made them."""
        return self.metadata.captioner

    def caption(self, row: int) -> str | None:
        """The row's caption; None where there is none. Raises IndexError outside the manifest."""
        if not 0 <= row < self._rows:
            raise IndexError(f"row {row} of a manifest of {self._rows} rows")
        if row >= len(self):
            return None
        found: str | None = self._captions[row].as_py()
        return found

    def missing(self, rows: NDArray[np.int64]) -> int:
        """How many of `rows` (k,) have no caption."""
        inside = rows[rows < len(self)]
        return len(rows) - int(self._there[inside].sum())

    def without(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Of `rows` (k,): whose turn has not come yet, and which the captioner failed at. (k,) bool each."""
        known = rows < len(self)
        inside = np.where(known, rows, 0)
        absent = ~known | self._absent[inside]
        return absent, ~absent & ~self._there[inside]

    def counts(self) -> dict[str, int]:
        """Status → number of rows of the file."""
        counted = self._table.column("status").value_counts()
        return {entry["values"].as_py(): entry["counts"].as_py() for entry in counted}

    def rows_to_table(self) -> pa.Table:
        """All rows, as a table of `SCHEMA`, in memory."""
        return pa.table({name: self._table.column(name).cast(SCHEMA.field(name).type) for name in SCHEMA.names})

    @cached_property
    def _captions(self) -> pa.ChunkedArray:
        return self._table.column("caption")

    @cached_property
    def _there(self) -> NDArray[np.bool_]:
        """(n,) bool: where there is a caption."""
        return np.asarray(pc.is_valid(self._captions).to_numpy(), dtype=bool)

    @cached_property
    def _absent(self) -> NDArray[np.bool_]:
        """(n,) bool: where nobody has tried yet."""
        return np.asarray(pc.equal(self._table.column("status"), ABSENT).to_numpy(), dtype=bool)


def open_captions(path: Path, manifest: Manifest) -> SyntheticCaptions:
    """Open the captions of `manifest`, or of the first rows that it had before it grew.

    Raises:
        PipeError: there are none, the file is damaged, or it is of another manifest.
    """
    path = Path(path)
    if not path.is_file():
        raise PipeError("there are no synthetic captions", where=path, fix=f"run: {COMMAND}")
    found = _open(path, len(manifest))
    if not found.metadata.fits(manifest):
        raise PipeError("these captions were made of another manifest", where=path, fix=ANEW)
    return found


def _open(path: Path, rows: int) -> SyntheticCaptions:
    try:
        table = MappedTable(path, _REPEATING, remake=f"{COMMAND} --overwrite")
        if METADATA_KEY not in table.metadata:
            raise ValueError("nothing in it says so")
        metadata = CaptionsMetadata.from_json(table.metadata[METADATA_KEY].decode("utf-8"))
        if (table.names, table.rows) != (SCHEMA.names, metadata.rows):
            raise ValueError(f"it has {table.rows} rows of {', '.join(table.names)}")
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PipeError(
            f"this is no file of synthetic captions, or damaged ({type(error).__name__}: {reason})",
            where=path,
            fix=f"restore it from a copy, or {ANEW}",
        ) from error
    return SyntheticCaptions(path, table, metadata, rows)


def _reopen(path: Path, metadata: str, rows: int) -> SyntheticCaptions:
    """In another process, where the manifest was compared already: the file must be the same one, or say the same."""
    found = _open(path, rows)
    if found.metadata != CaptionsMetadata.from_json(metadata):
        raise PipeError("this file was written anew meanwhile", where=path, fix="run the same command again")
    return found


def write_captions(path: Path, table: pa.Table, metadata: CaptionsMetadata) -> None:
    """Write a table of `SCHEMA` atomically; its `row` column must count 0, 1, 2 ... to `metadata.rows`."""
    if not np.array_equal(table.column("row").to_numpy(), np.arange(metadata.rows)):
        raise ValueError("the rows of captions must be the manifest's, in order")
    labelled = table.cast(SCHEMA).replace_schema_metadata({METADATA_KEY: metadata.to_json().encode()})
    write_mapped(path, labelled, _REPEATING)
