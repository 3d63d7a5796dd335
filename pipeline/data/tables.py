"""A table of image paths and captions: CSV or TSV with a header. A row of the manifest is one image file.

Columns are found by name, whatever their case and order. Paths are relative to the table's folder. A path that comes
again adds its caption to the first (Flickr's tables name each image five times).
"""

from __future__ import annotations

import csv
import hashlib
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from pipeline.data.captions import collect_captions
from pipeline.data.manifest import Issue, Source
from pipeline.data.samples import MAX_IMAGE_BYTES
from pipeline.data.scan import IMAGE_MISSING, Sample, to_table, valid_utf8
from pipeline.errors import PipeError

IMAGE_COLUMNS = ("filepath", "image", "path", "image_path", "img_path", "filename", "file_name", "file", "image_name")
CAPTION_COLUMNS = ("title", "caption", "text", "captions", "sentence", "description", "comment")
DELIMITERS = (",", "\t", ";")
MAX_FIELD = 2**20
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


@dataclass
class Entry:
    """One image of a table and its captions; None stands for one that is not UTF-8."""

    path: str
    captions: list[str | None] = field(default_factory=list)


@dataclass
class Table:
    """A table, read: its images in order of first appearance, the file it came from, what was wrong with it."""

    source: Source
    entries: list[Entry]
    issues: list[Issue]


def read_table(name: str, path: Path) -> Table:
    """Read a CSV or TSV.

    Raises:
        PipeError: the file cannot be read, or its header names no column of images or none of captions.
    """
    entries: dict[str, Entry] = {}
    issues: list[Issue] = []
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            columns = _columns(file, path)
            rows = _Rows(file, columns)
            for fields in rows:
                where = fields[columns.image].strip() if columns.image < len(fields) else ""
                entry = entries.setdefault(where, Entry(where))
                entry.captions += [fields[columns.caption]] if columns.caption < len(fields) else []
            issues += [Issue(name, key, "quote_unpaired", reason) for key, reason in rows.problems]
        with open(path, "rb") as binary:
            digest = hashlib.file_digest(binary, "sha256").hexdigest()
        stat = path.stat()
    except OSError as error:
        raise PipeError(f"cannot read this table ({error.strerror})", where=path) from error
    if not entries:
        issues.append(Issue(name, "", "source_empty", "no row below the header"))
    source = Source(name, "table", stat.st_size, stat.st_mtime_ns, digest, len(entries))
    return Table(source, list(entries.values()), issues)


@dataclass(frozen=True)
class Columns:
    """Where a table has its image and its caption, how many columns there are, and what stands between them."""

    image: int
    caption: int
    count: int
    delimiter: str


def _columns(file: Iterator[str], path: Path) -> Columns:
    """By the first delimiter that makes known columns of the header."""
    header = next(file, "")
    order = sorted(DELIMITERS, key=lambda d: -header.count(d)) if path.suffix.lower() != ".tsv" else ["\t"]
    for delimiter in order:
        names = [name.strip().lower() for name in next(csv.reader([header], delimiter=delimiter), [])]
        image = next((names.index(n) for n in IMAGE_COLUMNS if n in names), None)
        caption = next((names.index(n) for n in CAPTION_COLUMNS if n in names), None)
        if image is not None and caption is not None:
            return Columns(image, caption, len(names), delimiter)
    raise PipeError(
        f"this table's header names no image or no caption column: {header.strip()[:120]!r}",
        where=path,
        fix=f"call them {IMAGE_COLUMNS[0]} and {CAPTION_COLUMNS[0]} (or {', '.join(IMAGE_COLUMNS[1:4])}; "
        f"{', '.join(CAPTION_COLUMNS[1:4])})",
    )


class _Rows:
    """The rows below a header.

    A quotation mark without its partner makes a CSV parser take everything up to the next mark for one caption. Such a
    line is taken as it stands, marks included, and reading goes on at the next; `problems` names it.

    Attributes:
        problems: (path of the image, what was wrong), for each such line.
    """

    def __init__(self, lines: Iterable[str], columns: Columns) -> None:
        self.columns = columns
        self.problems: list[tuple[str, str]] = []
        self._lines, self._again = iter(lines), deque[str]()
        self._taken: list[str] = []  # physical lines of the row being read
        self._number = 1  # of the last line whose row is finished; the header is line 1

    def __iter__(self) -> Iterator[list[str]]:
        csv.field_size_limit(MAX_FIELD)
        rows = self._reader()
        while True:
            try:
                fields = next(rows, None)
                broken = "it swallows other rows" if fields and self._swallowed() else ""
            except csv.Error as error:
                fields, broken = [], str(error)
            if fields is None:
                return
            if broken:
                fields = self._first_alone(broken)
                rows = self._reader()
            self._number += len(self._taken)
            self._taken = []
            if fields:
                yield fields

    def _reader(self) -> Iterator[list[str]]:
        return csv.reader(self._feed(), delimiter=self.columns.delimiter, strict=True)

    def _feed(self) -> Iterator[str]:
        while True:
            line = self._again.popleft() if self._again else next(self._lines, None)
            if line is None:
                return
            self._taken.append(line)
            yield line

    def _swallowed(self) -> bool:
        """Whether a later line of this row is a row by itself: as many columns, and an image's name in its place."""
        for line in self._taken[1:]:
            fields = self._literal(line)
            if len(fields) == self.columns.count and fields[self.columns.image].strip().lower().endswith(
                IMAGE_SUFFIXES
            ):
                return True
        return False

    def _first_alone(self, problem: str) -> list[str]:
        """The row's first line, literally; the others are read again."""
        self._again.extendleft(reversed(self._taken[1:]))
        del self._taken[1:]
        fields = self._literal(self._taken[0])
        key = valid_utf8(fields[self.columns.image].strip()) if self.columns.image < len(fields) else ""
        where = f'line {self._number + 1:,}: a " without its partner ({problem}); taken as it stands'
        self.problems.append((key, where))
        return fields

    def _literal(self, line: str) -> list[str]:
        fields = line.rstrip("\r\n").split(self.columns.delimiter)
        last = self.columns.count - 1
        if self.columns.caption == last and len(fields) > last:  # what follows can only be more of the caption
            fields[last:] = [self.columns.delimiter.join(fields[last:])]
        return fields


def scan_entries(entries: Sequence[Entry], folder: Path) -> pa.Table:
    """Rows (`scan.SCAN_SCHEMA`) of a table's images; paths are relative to `folder`."""
    return to_table([_sample(entry, folder) for entry in entries])


def _sample(entry: Entry, folder: Path) -> Sample:
    sample = Sample(valid_utf8(entry.path))
    if not entry.path or "\0" in entry.path:
        sample.mark(IMAGE_MISSING, "no path")
    elif "://" in entry.path:
        sample.mark(IMAGE_MISSING, "an address, not a file: download it, for example with img2dataset")
    elif sample.key != entry.path:
        sample.mark(IMAGE_MISSING, "the path is not UTF-8")
    else:
        _read_image(sample, folder / entry.path)
    sample.take_captions(collect_captions(entry.captions))
    return sample


def _read_image(sample: Sample, path: Path) -> None:
    try:
        with open(path, "rb") as file:
            sample.image_bytes = os.fstat(file.fileno()).st_size
            sample.image_offset = 0
            if not sample.refuse_size():
                sample.check_image(file.read(MAX_IMAGE_BYTES + 1))
    except OSError as error:
        sample.mark(IMAGE_MISSING, f"cannot read the file ({error.strerror})")
