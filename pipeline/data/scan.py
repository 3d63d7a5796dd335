"""What reading one source gives: its rows before they are numbered and split, and what was wrong with it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from pipeline.data.captions import Captions
from pipeline.data.manifest import OK, SCHEMA, Issue, Source
from pipeline.data.samples import MAX_IMAGE_BYTES, ImageTooLarge, SampleError, decode_image

ASSIGNED_LATER = ("row", "source", "split")
SCAN_SCHEMA = pa.schema([column for column in SCHEMA if column.name not in ASSIGNED_LATER])

IMAGE_MISSING, IMAGE_BROKEN, IMAGE_TOO_LARGE = "image_missing", "image_broken", "image_too_large"
KEY_REPEATED = "key_repeated"


@dataclass
class Sample:
    """One row in the making; the columns of `SCAN_SCHEMA`."""

    key: str
    image_offset: int = -1
    image_bytes: int = 0
    caption_offset: int = -1
    caption_bytes: int = 0
    captions: list[str] = field(default_factory=list)
    width: int = 0
    height: int = 0
    sha256: str = ""
    status: str = OK
    reason: str = ""

    def mark(self, status: str, reason: str) -> None:
        """Add something that is wrong; the first problem gives the status."""
        self.status = status if self.status == OK else self.status
        self.add_reason(reason)

    def add_reason(self, reason: str) -> None:
        self.reason = f"{self.reason}; {reason}" if self.reason else reason

    def check_image(self, data: bytes) -> None:
        """Fill in size and hash from the image's bytes, decoding all of it."""
        if len(data) < self.image_bytes:
            self.mark(IMAGE_BROKEN, f"cut: {len(data):,} of {self.image_bytes:,} bytes are there")
            return
        self.sha256 = hashlib.sha256(data).hexdigest()
        try:
            self.width, self.height = decode_image(data).size
        except ImageTooLarge as error:
            self.mark(IMAGE_TOO_LARGE, str(error))
        except SampleError as error:
            self.mark(IMAGE_BROKEN, str(error))

    def refuse_size(self) -> bool:
        """Mark and tell an image of more bytes than we read; it gets no hash."""
        if self.image_bytes <= MAX_IMAGE_BYTES:
            return False
        self.mark(IMAGE_TOO_LARGE, f"{self.image_bytes:,} bytes, more than {MAX_IMAGE_BYTES:,}")
        return True

    def take_captions(self, captions: Captions) -> None:
        self.captions = captions.texts
        if captions.status:
            self.mark(captions.status, captions.reason)
        elif captions.reason:
            self.add_reason(captions.reason)


@dataclass
class Scan:
    """Of one source, or of a part of one: the file, its rows (`SCAN_SCHEMA`) and its issues."""

    source: Source
    rows: pa.Table
    issues: list[Issue] = field(default_factory=list)


def to_table(samples: Sequence[Sample]) -> pa.Table:
    """Columns of `SCAN_SCHEMA`: a few hundred bytes a row, where Python objects would take kilobytes."""
    columns: dict[str, list[Any]] = {name: [] for name in SCAN_SCHEMA.names}
    for sample in samples:
        for name, value in asdict(sample).items():
            columns[name].append(value)
    return pa.table(columns, schema=SCAN_SCHEMA)


def valid_utf8(name: str) -> str:
    """A file name as text that Parquet and JSON can hold; bytes that are not UTF-8 become \\xNN."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
