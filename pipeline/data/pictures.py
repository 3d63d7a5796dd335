"""Images in the order in which they lie, for work that passes over all of them once: no manifest, nothing decoded here.

    a folder of tars, one tar, a CSV or TSV, a glob or brace range of them    as `pipe index` takes them
    a folder of images, with its sub-folders; one image; a glob of images     keys are paths relative to what is fixed

What is wrong with one sample stands in its `problem`; nothing is left out without a word.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.captions import collect_captions
from pipeline.data.samples import MAX_IMAGE_BYTES, SampleError
from pipeline.data.scan import valid_utf8
from pipeline.data.sources import TAR_SUFFIXES, SourceFile, expand, expand_braces
from pipeline.data.tables import IMAGE_SUFFIXES, read_table
from pipeline.data.tars import IMAGE_KINDS, captions_of, read_groups
from pipeline.errors import PipeError

LOOSE_IN_PART = 8192  # images that are files of their own, in one part
_VARIES = re.compile(r"[*?\[{]")


@dataclass(frozen=True)
class Picture:
    """One sample: who it is, its encoded image (`read`, which may raise SampleError), and its captions if asked for."""

    source: str
    key: str
    read: Callable[[], bytes]
    captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """Pictures that are read one after the other: those of a tar or a table, or some thousand files.

    Args:
        name: relative, with /; no two parts of a source share it.
        state: a digest that changes when the part's files do; reads no image.
        pictures: opens and walks it; the flag asks for captions.
        count: how many pictures, where that is known beforehand.
    """

    name: str
    state: Callable[[], str]
    pictures: Callable[[bool], Iterator[Picture]]
    count: int | None = None


def list_parts(source: str) -> list[Part]:
    """The parts of a source, in order; files that a range names but that are not there are parts with a problem.

    Raises:
        PipeError: there is nothing of the kind, or a folder with both tars and images.
    """
    if "://" in source:
        raise PipeError("only local files can be read", where=source, fix="copy or mount the data first")
    path = Path(source).expanduser().absolute()
    if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES:
        return _loose(path.parent, [path])
    if path.is_dir():
        images = _images_below(path)
        tars = any(p.suffix.lower() in TAR_SUFFIXES for p in path.iterdir())
        if images and tars:
            raise PipeError("this folder holds both tars and images", where=path, fix=f"write {path}/*.tar, or a glob")
        if images:
            return _loose(path, images)
    elif _VARIES.search(str(path)) and not path.exists():
        root, images = _images_of(path)
        if images:
            return _loose(root, images)
    found = expand(source)
    parts = [_table_part(file) if file.kind == "table" else _tar_part(file) for file in found.files]
    absent = [_absent_part(issue.source, issue.reason) for issue in found.issues]
    return sorted(parts + absent, key=lambda part: part.name)


def _images_below(folder: Path) -> list[Path]:
    found: list[Path] = []
    for here, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(here, name) for name in files if _is_image(name)]
    return found


def _images_of(pattern: Path) -> tuple[Path, list[Path]]:
    """(what is fixed, images) of a glob or brace range."""
    root = Path(*itertools.takewhile(lambda part: not _VARIES.search(part), pattern.parts))
    found = {Path(p) for text in expand_braces(str(pattern)) for p in glob.glob(text, recursive=True)}
    return root, [p for p in found if _is_image(p.name) and p.is_file()]


def _is_image(name: str) -> bool:
    return name[0] != "." and name.lower().endswith(IMAGE_SUFFIXES)


# --- files of their own -----------------------------------------------------------------------------------------------


def _loose(root: Path, files: Sequence[Path]) -> list[Part]:
    names = sorted(file.relative_to(root).as_posix() for file in files)
    starts = range(0, len(names), LOOSE_IN_PART)
    return [_loose_part(root, f"images-{n:05d}", names[at : at + LOOSE_IN_PART]) for n, at in enumerate(starts)]


def _loose_part(root: Path, name: str, files: Sequence[str]) -> Part:
    def pictures(captions: bool) -> Iterator[Picture]:
        for file in files:
            yield Picture(root.name, valid_utf8(file), _reading(root / file))

    return Part(name, lambda: _state(*(root / file for file in files)), pictures, len(files))


def _reading(path: Path) -> Callable[[], bytes]:
    def read() -> bytes:
        try:
            with open(path, "rb") as file:
                return file.read(MAX_IMAGE_BYTES + 1)
        except OSError as error:
            raise SampleError(f"cannot read the file ({error.strerror})") from error

    return read


def _state(*files: Path) -> str:
    """Of names, sizes and times of change; of a file that is not there its name alone."""
    digest = hashlib.sha256()
    for file in files:
        try:
            stat = file.stat()
            digest.update(f"{file.name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
        except OSError:
            digest.update(f"{file.name}\0\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


# --- tars and tables --------------------------------------------------------------------------------------------------


def _failing(reason: str) -> Callable[[], bytes]:
    def read() -> bytes:
        raise SampleError(reason)

    return read


def _absent_part(name: str, reason: str) -> Part:
    return Part(name, lambda: "absent", lambda captions: iter([Picture(name, "", _failing(reason))]), 1)


def _table_part(file: SourceFile) -> Part:
    def pictures(captions: bool) -> Iterator[Picture]:
        table = read_table(file.name, file.path)
        for entry in table.entries:
            address = "://" in entry.path or not entry.path or "\0" in entry.path
            read = _failing("no path of a file") if address else _reading(file.path.parent / entry.path)
            texts = collect_captions(entry.captions).texts if captions else ()
            yield Picture(file.name, valid_utf8(entry.path), read, tuple(texts))

    return Part(file.name, lambda: _state(file.path), pictures)


def _tar_part(file: SourceFile) -> Part:
    def pictures(captions: bool) -> Iterator[Picture]:
        """Bytes are read here, in the tar's order, and not by whoever decodes them."""
        try:
            with open(file.path, "rb") as tar:
                groups, problems = read_groups(tar)
                for group in groups:
                    texts = tuple(captions_of(group, tar)) if captions else ()
                    place = next((group.parts[kind] for kind in group.parts if kind in IMAGE_KINDS), None)
                    if place is None:
                        read = _failing(group.note or "no image")
                    else:
                        tar.seek(place[0])
                        read = _whole(tar.read(min(place[1], MAX_IMAGE_BYTES + 1)), place[1])
                    yield Picture(file.name, group.key, read, texts)
        except OSError as error:
            problems = [("", error.strerror or str(error))]
        for _, reason in problems:
            yield Picture(file.name, "", _failing(reason))

    return Part(file.name, lambda: _state(file.path), pictures)


def _whole(data: bytes, size: int) -> Callable[[], bytes]:
    if len(data) < min(size, MAX_IMAGE_BYTES + 1):
        return _failing(f"cut: {len(data):,} of {size:,} bytes are there")
    return lambda: data
