"""A table of image paths and captions: CSV or TSV with a header. A row of the manifest is one image file.

Columns are found by name, whatever their case and order. Paths are relative to the table's folder. A path that comes
again adds its caption to the first (Flickr's tables name each image five times).
"""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Iterator, Sequence
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
            image, caption, rows = _columns(file, path)
            try:
                for fields in rows:
                    if fields:
                        where = fields[image].strip() if image < len(fields) else ""
                        entry = entries.setdefault(where, Entry(where))
                        entry.captions += [fields[caption]] if caption < len(fields) else []
            except csv.Error as error:
                after = f'after {len(entries):,} images: is there a " without its partner?'
                issues.append(Issue(name, "", "source_cut", f"{error}, {after}"))
        with open(path, "rb") as binary:
            digest = hashlib.file_digest(binary, "sha256").hexdigest()
        stat = path.stat()
    except OSError as error:
        raise PipeError(f"cannot read this table ({error.strerror})", where=path) from error
    if not entries:
        issues.append(Issue(name, "", "source_empty", "no row below the header"))
    source = Source(name, "table", stat.st_size, stat.st_mtime_ns, digest, len(entries))
    return Table(source, list(entries.values()), issues)


def _columns(file: Iterator[str], path: Path) -> tuple[int, int, Iterator[list[str]]]:
    """(image column, caption column, the rows) by the first delimiter that makes known columns of the header."""
    csv.field_size_limit(MAX_FIELD)
    header = next(file, "")
    order = sorted(DELIMITERS, key=lambda d: -header.count(d)) if path.suffix.lower() != ".tsv" else ["\t"]
    for delimiter in order:
        names = [name.strip().lower() for name in next(csv.reader([header], delimiter=delimiter), [])]
        image = next((names.index(n) for n in IMAGE_COLUMNS if n in names), None)
        caption = next((names.index(n) for n in CAPTION_COLUMNS if n in names), None)
        if image is not None and caption is not None:
            return image, caption, csv.reader(file, delimiter=delimiter)
    raise PipeError(
        f"this table's header names no image or no caption column: {header.strip()[:120]!r}",
        where=path,
        fix=f"call them {IMAGE_COLUMNS[0]} and {CAPTION_COLUMNS[0]} (or {', '.join(IMAGE_COLUMNS[1:4])}; "
        f"{', '.join(CAPTION_COLUMNS[1:4])})",
    )


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
