"""`pipe embed`: a folder of images, tars or tables, or a list of texts → embeddings as Parquet or npy.

1. which model, at which node   2. which parts (tars, tables, some thousand files)   3. one file of all of them, or in a
folder one file a part, of which those that are there already are kept   4. say what was skipped
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.console import Progress, log, progress
from pipeline.errors import PipeError
from pipeline.run_folder import code_version, sha256_file
from stages.which_model import Found, find_model

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.data.pictures import Part, Picture
    from pipeline.evaluation.embed import NodeEncoder
    from pipeline.evaluation.embedding_files import Writer

SAME = ("model_sha256", "node", "width", "captions")  # what makes a part's file one of this very job


@dataclass
class Job:
    """What stays the same over all parts. rows, skipped: so far."""

    encoder: NodeEncoder
    about: dict[str, Any]
    captions: bool
    batch_size: int
    rows: int = 0
    skipped: int = 0
    kept: int = 0


def run(
    config: Config | None,
    name: str,
    source: str | None,
    *,
    out: Path | None = None,
    node: str | None = None,
    captions: bool = False,
    texts: Path | None = None,
    batch_size: int = 256,
    overwrite: bool = False,
    as_json: bool = False,
) -> None:
    """Embed `source`, or the lines of `texts`, with the model `name` (a run, or a path).

    Raises:
        PipeError: no such model, node or source; something lies at `out`; not one image can be embedded.
    """
    if (source is None) == (texts is None):
        raise PipeError("name images or texts", where="pipe embed", fix="pipe embed RUN SOURCE, or RUN --texts FILE")
    if texts is not None and captions:
        raise PipeError("--captions are those of images", where="--texts", fix="leave one of the two out")
    found = find_model(name, config)
    target = out if out is not None else Path(f"{found.name}-{'texts' if texts else 'embeddings'}.parquet")
    refuse(target, captions=captions, overwrite=overwrite, texts=texts is not None)
    parts = [] if source is None else _parts(source)
    lines = [] if texts is None else read_lines(texts)
    started = time.monotonic()
    job = open_job(found, node, captions, batch_size)
    if texts is not None:
        embed_lines(job, lines, target)
    else:
        embed_parts(job, parts, target, overwrite)
    summary = {
        **{key: job.about[key] for key in ("model", "model_sha256", "node", "width")},
        "out": str(target),
        "rows": job.rows,
        "skipped": job.skipped,
        "kept": job.kept,
        "seconds": round(time.monotonic() - started, 3),
    }
    say(summary, "texts" if texts is not None else "images", target)
    if as_json:
        print(json.dumps(summary, indent=1, sort_keys=True))


def _parts(source: str) -> list[Part]:
    from pipeline.data.pictures import list_parts

    return list_parts(source)


def refuse(out: Path, *, captions: bool, overwrite: bool, texts: bool) -> None:
    """What can be said before a model is loaded."""
    from pipeline.evaluation.embedding_files import SUFFIXES

    if out.suffix in SUFFIXES:
        if out.is_dir():
            raise PipeError("this is a folder", where=out, fix="choose another --out")
        if out.exists() and not overwrite:
            raise PipeError("there is something already", where=out, fix="choose another --out, or add --overwrite")
        if captions and out.suffix == ".npy":
            raise PipeError("captions need a Parquet file", where=out, fix="write --out NAME.parquet")
        return
    if out.suffix or texts:
        fix = "write NAME.parquet or NAME.npy" + ("" if texts else ", or a folder's name without a dot")
        raise PipeError("--out is no file of embeddings", where=out, fix=fix)
    if out.exists() and not out.is_dir():
        raise PipeError("this is not a folder", where=out, fix="choose another --out")


def open_job(found: Found, node: str | None, captions: bool, batch_size: int) -> Job:
    """Load the model, once, onto the best device."""
    from pipeline.evaluation.embed import NodeEncoder
    from pipeline.evaluation.embeddings import Encoder, best_device
    from pipeline.models.dinorankclip import load

    model, preprocess, tokenizer = load(found.folder.path)
    encoder = NodeEncoder.of(Encoder(model, preprocess, tokenizer), node, best_device())
    if captions and not encoder.has_text:
        raise PipeError(f"texts have no node {encoder.node!r} in this model", where="--captions", fix="leave it out")
    about = {
        "model": found.name,
        "model_sha256": sha256_file(found.folder.weights),
        "node": encoder.node,
        "width": encoder.width,
        "captions": captions,
        "preprocess": preprocess.to_json(),
        "code_version": code_version(),
    }
    return Job(encoder, about, captions, batch_size)


# --- images -----------------------------------------------------------------------------------------------------------


def embed_parts(job: Job, parts: Sequence[Part], out: Path, overwrite: bool) -> None:
    """All parts into one file, or each into its own below a folder."""
    counts = [part.count for part in parts]
    known = None if None in counts else sum(count for count in counts if count is not None)
    with progress(f"embedding with {job.about['model']}", total=known, unit="images") as bar:
        if out.suffix:
            pictures = (picture for part in _named(parts, bar) for picture in part.pictures(job.captions))
            _write(job, out, pictures, job.about, bar)
        else:
            for part in _named(parts, bar):
                _write_part(job, part, out / f"{part.name}.parquet", overwrite, bar)
    if job.rows == 0:
        raise PipeError("not one image can be embedded", where=out, fix="see *.skipped.jsonl there")


def _named(parts: Sequence[Part], bar: Progress) -> Iterator[Part]:
    """Each part, when its turn comes, its name on the bar."""
    for number, part in enumerate(parts, start=1):
        bar.note(f"{part.name} ({number:,} of {len(parts):,})")
        yield part


def _write_part(job: Job, part: Part, path: Path, overwrite: bool, bar: Progress) -> None:
    about = job.about | {"part": part.state()}
    before = _kept(path, about, overwrite)
    if before is not None:
        job.rows, job.skipped, job.kept = job.rows + before["rows"], job.skipped + before["skipped"], job.kept + 1
        bar.advance(before["rows"] + before["skipped"])
        return
    _write(job, path, part.pictures(job.captions), about, bar)


def _kept(path: Path, about: Mapping[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """What a part's file of an earlier call holds, if it is of this job and of the same images.

    Raises:
        PipeError: it is of another model or node.
    """
    from pipeline.evaluation.embedding_files import about_of

    if overwrite or not path.exists():
        return None
    before = about_of(path)
    if before is None or any(before.get(key) != about[key] for key in SAME):
        raise PipeError(
            "these are embeddings of another model, node or kind",
            where=path,
            fix="choose another --out, or --overwrite",
        )
    if before.get("part") != about["part"]:
        log.warning("%s: its images changed since, they are embedded again", path)
        return None
    return before


def _write(job: Job, path: Path, pictures: Iterator[Picture], about: Mapping[str, Any], bar: Progress) -> None:
    from pipeline.evaluation.embed import embed
    from pipeline.evaluation.embedding_files import writing
    from pipeline.evaluation.embeddings import usable_cores

    options: dict[str, Any] = {"captions": job.captions, "batch_size": job.batch_size, "workers": usable_cores()}
    with writing(path, width=job.encoder.width, about=about, captions=job.captions) as writer:
        embed(job.encoder, pictures, writer, on_batch=bar.advance, **options)
        if path.suffix and writer.rows == 0 and "part" not in about:
            _refuse_nothing(writer)
        job.rows, job.skipped = job.rows + writer.rows, job.skipped + len(writer.skipped.lines)


def _refuse_nothing(writer: Writer) -> None:
    lines = writer.skipped.lines
    first = lines[0] if lines else {"source": "", "key": "", "problem": "nothing is there"}
    where = " ".join(text for text in (first["source"], first["key"]) if text)
    raise PipeError(f"not one image of {len(lines):,} can be embedded ({first['problem']})", where=where or "SOURCE")


# --- texts ------------------------------------------------------------------------------------------------------------


def read_lines(path: Path) -> list[str]:
    """The lines of a text file; an empty one is a text, too, so that row i stays line i."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise PipeError("there is no such file", where=path, fix="name a file with one text a line") from error
    except UnicodeDecodeError as error:
        raise PipeError("this file is not UTF-8", where=f"{path}, byte {error.start:,}", fix="convert it") from error
    lines = text.removesuffix("\n").split("\n") if text else []
    if not lines:
        raise PipeError("this file is empty", where=path, fix="write one text a line")
    return [line.removesuffix("\r") for line in lines]


def embed_lines(job: Job, lines: Sequence[str], out: Path) -> None:
    """One row a line."""
    from pipeline.evaluation.embedding_files import write_text_vectors

    write_text_vectors(out, lines, job.encoder.texts(lines, job.batch_size), job.about)
    job.rows = len(lines)


def say(summary: Mapping[str, Any], unit: str, out: Path) -> None:
    """The end of it, on one line, and what was skipped on another."""
    from pipeline.evaluation.embedding_files import beside

    log.info(
        "%s %s at node %s, %d numbers each, in %.1f s: %s",
        f"{summary['rows']:,}",
        unit,
        summary["node"],
        summary["width"],
        summary["seconds"],
        out,
    )
    if summary["kept"]:
        log.info("%d parts were there already", summary["kept"])
    if summary["skipped"]:
        listed = beside(out, "skipped") if out.suffix else out / "*.skipped.jsonl"
        log.warning("%s could not be read and have no row: see %s", f"{summary['skipped']:,}", listed)
