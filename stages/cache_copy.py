"""`pipe cache copy`: some rows, scales or views of a teacher cache as a cache of its own, plain or compressed."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np

from pipeline.cache.compress import Codec, Compression
from pipeline.config import Config
from pipeline.data.manifest import Manifest
from pipeline.errors import PipeError
from stages.cache import manifest_of

NO_VIEWS = "none"


def copy(
    source: Path,
    out: Path,
    config: Config | None,
    *,
    rows: str | None = None,
    rows_file: Path | None = None,
    split: str | None = None,
    scales: str | None = None,
    views: str | None = None,
    compress: str | None = None,
    level: int | None = None,
) -> None:
    """Copy some rows, scales or views of the cache at `source` to `out`, and print what the copy has.

    Args:
        rows: "A-B", both included; several by commas.
        rows_file: a row number a line.
        split: rows of this split of the manifest.
        scales, views: names, by commas; "none" of further views.
        compress: "blosc" or "zstd".
        level: of the compression.

    Raises:
        PipeError: `out` exists, rows, scales or views are not there, more than one choice of rows, ...
    """
    from pipeline.cache.copy import copy_cache

    if sum(choice is not None for choice in (rows, rows_file, split)) > 1:
        raise PipeError("more than one choice of rows", fix="give one of --rows, --rows-file and --split")
    chosen = None
    if rows is not None:
        chosen = parse_rows(rows)
    elif rows_file is not None:
        chosen = _read_rows(rows_file)
    elif split is not None:
        chosen = _rows_of_split(split, manifest_of(source, config))
    how = _compression(compress, level)
    kept = [] if views == NO_VIEWS else _names(views)
    copied = copy_cache(source, out, rows=chosen, scales=_names(scales), views=kept, compress=how)
    absent = f"; {copied.absent:,} of the rows asked for are not in {source}" if copied.absent else ""
    print(f"copied {copied.rows:,} rows to {out}, digest {copied.cache.digest}{absent}")


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",")]


def _compression(codec: str | None, level: int | None) -> Compression | None:
    if codec is None:
        if level is not None:
            raise PipeError("--level is that of a compression", fix="add --compress blosc or --compress zstd")
        return None
    given = {} if level is None else {"level": level}
    return Compression(cast(Codec, codec), **given)


def parse_rows(text: str) -> np.ndarray:
    """`0-99,500` → the rows (n,) int64, both ends included."""
    parts = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        last = last or first
        if not (first.isdecimal() and last.isdecimal()) or int(last) < int(first):
            raise PipeError("rows are given as A-B, both included, or several such by commas", where=repr(part))
        parts.append(np.arange(int(first), int(last) + 1))
    return np.concatenate(parts)


def _read_rows(file: Path) -> np.ndarray:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PipeError(f"cannot read the list of rows: {error}", where=file) from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.strip() and not line.strip().isdecimal():
            raise PipeError(f"line {number} is not a row number", where=file, fix="one number a line")
        rows += [int(line)] if line.strip() else []
    if not rows:
        raise PipeError("this list has no rows", where=file)
    return np.array(rows, np.int64)


def _rows_of_split(split: str, manifest: Manifest | None) -> np.ndarray:
    if manifest is None:
        raise PipeError("splits are in the manifest, and there is none", fix="name a config with --config")
    if split not in ("train", "val"):
        raise PipeError("there is no such split", where=repr(split), fix="--split train or --split val")
    return manifest.rows("val" if split == "val" else "train", ok_only=False)
