"""From what a user writes as data.source to a sorted list of files.

A folder of tars, one tar, a CSV or TSV, a glob, or a brace range such as `{00000..00331}` (or a list, `{a,b}`).
"""

from __future__ import annotations

import glob
import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.data.manifest import VAL_PREFIX, Issue
from pipeline.errors import PipeError

TAR_SUFFIXES = (".tar",)
TABLE_SUFFIXES = (".csv", ".tsv")
MOST_FILES = 1_000_000
_BRACES = re.compile(r"\{([^{}]*)\}")
_MAGIC = re.compile(r"[*?\[{]")


@dataclass(frozen=True)
class SourceFile:
    """One file to read: `name` is what the manifest calls it."""

    name: str
    path: Path
    kind: Literal["tar", "table"]


@dataclass(frozen=True)
class Expanded:
    """The files of a source, sorted by name; the folder names are relative to; files of a range that are not there."""

    root: Path
    files: list[SourceFile]
    issues: list[Issue]


def expand(source: str, *, validation: bool = False) -> Expanded:
    """List the files of a source.

    Args:
        validation: the source is data.val_source; its names get a prefix, since they may be called like others.

    Raises:
        PipeError: there is nothing of the kind.
    """
    if "://" in source:
        raise PipeError("only local files can be indexed", where=source, fix="copy or mount the data first")
    path = Path(source).expanduser().absolute()
    prefix = VAL_PREFIX if validation else ""
    root: Path
    missing: list[Path] = []
    if path.is_dir():
        root, found = path, _tars_of(path)
    elif path.is_file():
        root, found = path.parent, [path]
    elif _MAGIC.search(str(path)):
        root, found, missing = _matches(path)
    else:
        raise PipeError("the data source does not exist", where=path, fix="correct data.source (or data.val_source)")
    files = [SourceFile(prefix + _relative(file, root), file, _kind(file)) for file in found]
    issues = [Issue(prefix + _relative(f, root), "", "source_missing", "no such file in the range") for f in missing]
    return Expanded(root, sorted(files, key=lambda f: f.name), sorted(issues, key=lambda i: i.source))


def _kind(path: Path) -> Literal["tar", "table"]:
    return "table" if path.suffix.lower() in TABLE_SUFFIXES else "tar"


def _relative(path: Path, root: Path) -> str:
    name = path.relative_to(root).as_posix()
    try:
        name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PipeError("this file's name is not UTF-8", where=repr(name), fix="rename it") from error
    if name.startswith(VAL_PREFIX):
        raise PipeError(f"names that begin with {VAL_PREFIX} stand for data.val_source's", where=path, fix="rename it")
    return name


def _tars_of(folder: Path) -> list[Path]:
    """The folder's own tars; never those of its sub-folders, which are as often other splits as parts of this one."""
    found = [p for p in folder.iterdir() if p.suffix.lower() in TAR_SUFFIXES and p.is_file() and p.name[0] != "."]
    if found:
        return found
    below = sorted({str(p.parent.relative_to(folder)) for p in folder.glob("*/*.tar")})
    tables = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in TABLE_SUFFIXES)
    packed = sorted(p.name for p in folder.iterdir() if re.search(r"\.(tgz|tar\.\w+)$", p.name))
    if below:
        fix = f"choose one of its folders ({', '.join(below[:4])}), or all: {folder}/*/*.tar"
    elif tables:
        fix = f"to index a table, name it: {folder / tables[0]}"
    elif packed:
        fix = f"unpack compressed tars first ({packed[0]})"
    else:
        fix = "data.source takes a folder of tars, a glob, a brace range, a tar, a CSV or a TSV"
    raise PipeError("no tars in this folder", where=folder, fix=fix)


def _matches(pattern: Path) -> tuple[Path, list[Path], list[Path]]:
    """(root, files, missing) of a glob or brace range; root is the folder above the first part that varies."""
    fixed = itertools.takewhile(lambda part: not _MAGIC.search(part), pattern.parts)
    root = Path(*fixed)
    found: set[Path] = set()
    missing: list[Path] = []
    for text in expand_braces(str(pattern)):
        if not re.search(r"[*?\[]", text):
            (found.add if Path(text).is_file() else missing.append)(Path(text))
            continue
        paths = [Path(p) for p in glob.glob(text, recursive=True)]
        found.update(p for p in paths if p.suffix.lower() in TAR_SUFFIXES + TABLE_SUFFIXES and p.is_file())
    if not found:
        raise PipeError("no tar or table matches", where=pattern, fix="correct data.source (or data.val_source)")
    return root, list(found), missing


def expand_braces(text: str) -> list[str]:
    """`{08..10}` → 08, 09, 10; `{a,b}` → a, b; several braces give all combinations."""
    choices: list[list[str]] = []
    total, end = 1, 0
    for match in _BRACES.finditer(text):
        values = _values(match.group(1), text)
        choices += [[text[end : match.start()]], values]
        total, end = total * len(values), match.end()
        if total > MOST_FILES:
            raise PipeError(f"this range names more than {MOST_FILES:,} files", where=text)
    return ["".join(parts) for parts in itertools.product(*choices, [text[end:]])]


def _values(inside: str, text: str) -> list[str]:
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if ends is None:
        if "," in inside:
            return inside.split(",")
        raise PipeError("braces hold a range or a list", where=text, fix="write {00000..00331} or {a,b}")
    first, last = ends.groups()
    if int(last) < int(first):
        raise PipeError("this range counts down", where=text, fix=f"write {{{last}..{first}}}")
    if int(last) - int(first) >= MOST_FILES:
        raise PipeError(f"this range names more than {MOST_FILES:,} files", where=text)
    width = len(first) if first.startswith("0") or len(first) == len(last) else 0
    return [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
