"""The loop of `pipe caption`: decode, caption, publish a part, until every row has been looked at; then join the parts.

A batch is always all rows of a block of `batch_size` neighbouring manifest rows, cut at its multiples, whichever of
them are asked for; captions of the others are thrown away. So which images share a batch never depends on limit, split,
or where an earlier run stopped, and a resumed file equals an undisturbed one. Where the manifest has grown, the rows
that its last block had before keep their captions.

A killed run costs the captions since the last part; one stopped by a signal, those of the batch at hand at most.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from pipeline.captioning.captioner import Captioner, Refused
from pipeline.captioning.parts import CaptionParts, join
from pipeline.console import log, progress
from pipeline.data.captions import collect_captions
from pipeline.data.decoding import Decoder
from pipeline.data.manifest import Manifest
from pipeline.data.samples import SampleReader
from pipeline.data.synthetic_captions import (
    ABSENT,
    EMPTY,
    OK,
    REFUSED,
    SCHEMA,
    UNDECODABLE,
    CaptionsMetadata,
    SyntheticCaptions,
    open_captions,
    write_captions,
)
from pipeline.errors import PipeError, Stopped
from pipeline.signals import stop_on_signals

PART_ROWS = 4_096
PART_SECONDS = 60.0  # what a killed run may cost
AHEAD = 1  # batches decoded while a GPU writes captions, which takes far longer; they are whole images
SAID_NOTHING = "the model said nothing"


@dataclass(frozen=True)
class Captioning:
    """What a finished run did: the captions that are there now, rows captioned by this run, and its seconds."""

    captions: SyntheticCaptions
    rows: int
    seconds: float


def caption(
    manifest: Manifest,
    captioner: Captioner,
    out: Path,
    parts_folder: Path,
    *,
    split: Literal["all", "train"] = "all",
    limit: int | None = None,
    overwrite: bool = False,
    workers: int | Literal["auto"] = "auto",
) -> Captioning:
    """Caption the manifest's rows that have none in `out`, or go on with what an earlier run left in `parts_folder`.

    Args:
        split: all rows, or those of the training split alone.
        limit: only the first rows.
        overwrite: captions of another captioner or manifest are thrown away; those of this one are kept.
        workers: decoding threads; "auto": one a core.

    Raises:
        PipeError: what is there is of another captioner or manifest (the difference is named), or damaged; another
            process is captioning; disk full ...
        Stopped: SIGTERM or SIGINT arrived; what is finished is kept.
    """
    with stop_on_signals() as stop, CaptionParts(parts_folder) as parts:
        metadata = CaptionsMetadata.of(captioner.identity, manifest)
        kept = _kept(out, parts, metadata, manifest, overwrite=overwrite)
        done = _done(kept, len(manifest))
        todo = _todo(manifest, done, split, limit)
        log.info("%s rows to caption, %s were looked at before", f"{todo.sum():,}", f"{done.sum():,}")
        started = time.monotonic()
        if todo.any():
            captioner.load()
            log.info("captioner %s (%s) on %s", captioner.name, captioner.architecture, captioner.device)
            decoder = Decoder(SampleReader(manifest, verify=True), workers)
            with _Pending(parts, metadata) as pending:
                _caption_rows(todo, captioner, decoder, pending, stop, done=int(done.sum()))
        seconds = time.monotonic() - started
        if parts.files() or not kept:
            tables = kept + [parts.read(path)[0] for path in parts.files()]
            write_captions(out, join(tables, len(manifest)), metadata)
        parts.clear()
    return Captioning(open_captions(out, manifest), int(todo.sum()), seconds)


def _kept(
    out: Path, parts: CaptionParts, metadata: CaptionsMetadata, manifest: Manifest, *, overwrite: bool
) -> list[pa.Table]:
    """What is there of these captions: the finished file's rows, then the parts'. With `overwrite`, parts of others are
    removed and a finished file of others is left until it is replaced."""
    tables = []
    for path in [*([out] if out.exists() else []), *parts.files()]:
        try:
            if path == out:
                found = open_captions(out, manifest)
                table, stored = found.rows_to_table(), found.metadata
            else:
                table, stored = parts.read(path)
            _refuse_others(stored, metadata, manifest, path)
            tables.append(table)
        except PipeError as error:
            if not overwrite:
                raise
            log.info("overwriting: %s", error.what)
            if path != out:
                path.unlink()
    return tables


def _refuse_others(stored: CaptionsMetadata, ours: CaptionsMetadata, manifest: Manifest, path: Path) -> None:
    if difference := ours.captioner.difference(stored.captioner):
        raise PipeError(
            f"the captions there are of another kind: {difference}",
            where=path,
            fix="go on as they were begun, or throw them away with --overwrite",
        )
    if not stored.fits(manifest):
        raise PipeError(
            "the captions there were made of another manifest", where=path, fix="throw them away with --overwrite"
        )


def _done(kept: list[pa.Table], rows: int) -> np.ndarray:
    """(rows,) bool: was looked at."""
    done = np.zeros(rows, bool)
    for table in kept:
        done[table.column("row").to_numpy()[pc.not_equal(table.column("status"), ABSENT).to_numpy()]] = True
    return done


def _todo(manifest: Manifest, done: np.ndarray, split: Literal["all", "train"], limit: int | None) -> np.ndarray:
    """(rows,) bool: to be captioned in this run."""
    todo = np.zeros(len(manifest), bool)
    todo[manifest.rows("train" if split == "train" else None, ok_only=False)] = True
    todo[len(manifest) if limit is None else limit :] = False
    return todo & ~done


def blocks_of(todo: np.ndarray, size: int) -> list[np.ndarray]:
    """All rows of each block of `size` in which `todo` (rows,) bool is true anywhere."""
    numbers = np.unique(np.flatnonzero(todo) // size)
    return [np.arange(number * size, min((number + 1) * size, len(todo))) for number in numbers.tolist()]


def _caption_rows(
    todo: np.ndarray,
    captioner: Captioner,
    decoder: Decoder,
    pending: _Pending,
    stop: Callable[[], bool],
    *,
    done: int,
) -> None:
    blocks = blocks_of(todo, captioner.settings.batch_size)
    ahead = 0 if captioner.device.type == "cpu" else AHEAD
    counts: Counter[str] = Counter()
    with (
        progress("captioning", total=int(todo.sum()), unit="rows") as bar,
        closing(decoder(blocks, decoder.reader.image, ahead=ahead)) as batches,
    ):
        for rows, images in batches:
            looked_at = [entry for entry in _look(captioner, rows, images, decoder.failed) if todo[entry["row"]]]
            pending.add(looked_at)
            counts.update(entry["status"] for entry in looked_at)
            bar.advance(len(looked_at))
            bar.note(", ".join(f"{counts[status]:,} {status}" for status in sorted(counts) if status != OK))
            if stop():
                raise Stopped(f"captioning with {done + counts.total():,} of {done + int(todo.sum()):,} rows looked at")


def _look(
    captioner: Captioner, rows: np.ndarray, images: list[Image.Image | None], failed: dict[int, str]
) -> list[dict[str, Any]]:
    """What a batch gave: a value for each column of `SCHEMA`, for each row."""
    usable = [image for image in images if image is not None]
    answers = iter(captioner(usable) if usable else [])
    return [
        {"row": row, **(_undecodable(failed[row]) if image is None else _answered(next(answers)))}
        for row, image in zip(rows.tolist(), images, strict=True)
    ]


def _undecodable(reason: str) -> dict[str, str | None]:
    return {"status": UNDECODABLE, "caption": None, "reason": reason}


def _answered(answer: str | Refused) -> dict[str, str | None]:
    if isinstance(answer, Refused):
        return {"status": REFUSED, "caption": None, "reason": answer.reason}
    usable = collect_captions([answer]).texts  # what the manifest takes for a caption
    if not usable:
        return {"status": EMPTY, "caption": None, "reason": SAID_NOTHING}
    return {"status": OK, "caption": usable[0], "reason": ""}


class _Pending:
    """Rows that are not yet published. However the work ends, short of being killed, they are."""

    def __init__(self, parts: CaptionParts, metadata: CaptionsMetadata) -> None:
        self._parts, self._metadata = parts, metadata
        self._rows: list[dict[str, Any]] = []
        self._since = time.monotonic()

    def __enter__(self) -> _Pending:
        return self

    def __exit__(self, *_: object) -> None:
        self._publish()

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Take rows in; publish them all where they are many, or the last part was long ago."""
        self._rows += rows
        if len(self._rows) >= PART_ROWS or time.monotonic() - self._since >= PART_SECONDS:
            self._publish()

    def _publish(self) -> None:
        if self._rows:
            self._parts.write(pa.Table.from_pylist(self._rows, SCHEMA), self._metadata)
        self._rows, self._since = [], time.monotonic()
