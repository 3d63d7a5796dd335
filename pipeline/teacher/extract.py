"""Stage one: the frozen teacher looks at every image once, and what it saw is stored.

Calibrate (once, before any row is written), then shard by shard: decode, forward, project, quantise, write. A finished
shard is never touched again; a stop, by a signal or by power, costs the shards at hand.

Several processes, on one or several machines, may each write a part of the shards; whoever comes first calibrates.

Batches are cut within a shard, from its first row on, so that which images share a batch never depends on where an
earlier run stopped: on the same machine a resumed cache is bit-identical to an undisturbed one. Where the manifest has
grown, the rows that its last shard had before are kept as they are, and batches begin anew after them.

`limit` extracts exactly the first rows. The store has its full shape all the same; the shard in which the limit falls
is written in part, and written again, whole, by a run that goes further. The calibration does not depend on the limit.

Legend: n rows of a shard.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from pipeline.cache import layout
from pipeline.cache.header import CacheFit, recorded_settings
from pipeline.cache.layout import ABSENT, OK, UNDECODABLE, CacheIdentity, StoredDtype
from pipeline.cache.part import Part
from pipeline.cache.reader import Cache, open_cache
from pipeline.cache.writer import CacheWriter
from pipeline.console import Progress, log, progress
from pipeline.data.geometry import ViewSpec
from pipeline.data.manifest import Manifest
from pipeline.data.samples import SampleReader
from pipeline.data.views import Kind, View
from pipeline.errors import Stopped
from pipeline.signals import stop_on_signals
from pipeline.teacher.calibration import Features, calibrate, choose_rows
from pipeline.teacher.encode import ShardEncoder, work_to_do
from pipeline.teacher.feed import Feed, Precision, in_batches
from pipeline.teacher.teacher import Teacher

POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Settings:
    """How features become stored rows.

    Args:
        view: geometry of the images; its size is the teacher's.
        pca: components kept a scale; None keeps all channels.
        dtype: int8 (a step a component), int8_token (a step a token) or float16.
        calibration_rows: at most this many training rows are fitted on.
        seed: of the choice of calibration rows, and of the further views.
        batch_size: images a forward on a GPU, and read ahead together.
        workers: decoding threads; "auto": one a core.
        precision: of the forward; "auto": the cache's where there is one, else bfloat16 on a GPU, float32 on a CPU.
        shard_rows: rows a shard; None: by bytes, 512 to 4,096.
        compile: whether the network is compiled first (torch.compile): minutes before the first row, then faster.
        views: further views of each image to look at and store, with their geometry.
    """

    view: Kind = "crop"
    pca: int | None = 256
    dtype: StoredDtype = "int8"
    calibration_rows: int = 8192
    seed: int = 0
    batch_size: int = 256
    workers: int | Literal["auto"] = "auto"
    precision: Precision | Literal["auto"] = "auto"
    shard_rows: int | None = None
    compile: bool = False
    views: tuple[ViewSpec, ...] = ()


@dataclass(frozen=True)
class Extraction:
    """What a finished extraction did: the cache, rows written by this run, and the seconds its shards took."""

    cache: Cache
    rows: int
    seconds: float


def extract(
    manifest: Manifest,
    teacher: Teacher,
    out: Path,
    settings: Settings | None = None,
    *,
    limit: int | None = None,
    part: Part | None = None,
    shards: Collection[int] | None = None,
    device: torch.device | str | None = None,
) -> Extraction:
    """Write the teacher's features of every manifest row to the cache at `out`, or go on with the one there.

    Args:
        limit: only the first rows.
        part: only every count-th shard, while other processes write the others.
        shards: only those of these shards that are not done (a repair).
        device: default the first GPU, else the CPU. The teacher is moved there.

    Raises:
        PipeError: the cache there is of something else (the field is named), too few usable rows, disk full, ...
        Stopped: SIGTERM or SIGINT arrived; finished shards are kept.
    """
    settings = settings or Settings()
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    precision = _precision(out, settings.precision, device)
    teacher = teacher.to(device)
    if settings.compile:
        teacher.compile_network()
    view = View(settings.view, teacher.image_size)
    feed = Feed(
        SampleReader(manifest, verify=True),
        teacher,
        view,
        workers=settings.workers,
        precision=precision,
        views=settings.views,
        seed=settings.seed,
    )
    identity = identify(manifest, teacher, settings, precision)
    log.info("teacher %s on %s in %s, %d decoding threads", teacher.name, device, precision, feed.threads)
    part = part or Part()
    with stop_on_signals() as stop:
        fit: Callable[[], CacheFit] = lambda: _fit(manifest, feed, settings, out.absolute().parent, stop)  # noqa: E731
        with _set_up(out, identity, fit, settings.shard_rows, part, stop) as writer:
            rows, seconds = _write_shards(writer, feed, settings.batch_size, limit, shards, stop)
    if feed.failed:
        log.warning("%d images could not be decoded", len(feed.failed))
    return Extraction(open_cache(out), rows, seconds)


def identify(manifest: Manifest, teacher: Teacher, settings: Settings, precision: Precision) -> CacheIdentity:
    """What the cache will be a cache of; whatever changes the stored numbers is in it."""
    return CacheIdentity(
        rows=len(manifest),
        scales=teacher.scales,
        global_width=teacher.global_width,
        teacher={**teacher.describe(), "view": settings.view},
        view={"kind": settings.view, "size": teacher.image_size},
        manifest_fingerprint=manifest.fingerprint(),
        settings={
            "dtype": settings.dtype,
            "pca": settings.pca,
            "calibration_rows": settings.calibration_rows,
            "seed": settings.seed,
            "precision": precision,
            **({"compile": True} if settings.compile else {}),
            **({"views": [spec.to_json() for spec in settings.views]} if settings.views else {}),
        },
        prefix_fingerprint=manifest.fingerprint,
    )


def _precision(out: Path, asked: Precision | Literal["auto"], device: torch.device) -> Precision:
    if asked != "auto":
        return asked
    if (out / layout.DIGEST).exists():  # half a cache in one precision and half in another would be neither
        stored: Precision | None = recorded_settings(out).get("precision")  # the writer checks all of them
        if stored is not None:
            return stored
    return "bfloat16" if device.type == "cuda" else "float32"


def _fit(manifest: Manifest, feed: Feed, settings: Settings, folder: Path, stop: Callable[[], bool]) -> CacheFit:
    """One look at the calibration's rows."""
    calibration, heldout = choose_rows(manifest.rows("train"), settings.calibration_rows, settings.seed)
    with progress("calibrating", total=len(calibration) + len(heldout), unit="rows") as bar:

        def stream(rows: np.ndarray) -> Iterator[tuple[np.ndarray, Features]]:
            with closing(feed(in_batches(rows, settings.batch_size), base_only=True)) as batches:
                for batch in batches:
                    if stop():
                        raise Stopped("in the calibration, which will start anew")
                    bar.advance(len(batch.rows))
                    if batch.ok.any():
                        yield batch.rows[batch.ok], {k: v.cpu().numpy() for k, v in batch.features.items()}

        return calibrate(
            stream,
            calibration,
            heldout,
            widths=feed.teacher.widths,
            pca=settings.pca,
            dtype=settings.dtype,
            folder=folder,
            crops=lambda row, boxes: {k: v.cpu().numpy() for k, v in feed.crops(row, boxes).items()},
            seed=settings.seed,
        )


def _set_up(
    out: Path,
    identity: CacheIdentity,
    fit: Callable[[], CacheFit],
    shard_rows: int | None,
    part: Part,
    stop: Callable[[], bool],
) -> CacheWriter:
    """The cache's writer: one process calibrates and creates the store, the others wait until it is there."""
    waiting = False
    while (writer := CacheWriter.create(out, identity, fit, shard_rows=shard_rows, part=part)) is None:
        if not waiting:
            log.info("waiting for another process to calibrate")
        waiting = True
        if stop():
            raise Stopped("before anything was extracted")
        time.sleep(POLL_SECONDS)
    return writer


def _write_shards(
    writer: CacheWriter,
    feed: Feed,
    batch_size: int,
    limit: int | None,
    shards: Collection[int] | None,
    stop: Callable[[], bool],
) -> tuple[int, float]:
    """Extract and publish what is missing; returns how many rows that was and the seconds it took."""
    todo = list(work_to_do(writer, limit, shards))
    total, started = sum(work.rows for work in todo), time.monotonic()
    batches = (batch for work in todo for batch in work.batches(batch_size))
    with (
        progress("extracting", total=total, unit="rows") as bar,
        closing(feed(batches)) as stream,
        ShardEncoder(writer, feed.teacher) as encoder,
    ):
        for work in todo:
            encoder.begin(work)
            for _ in work.batches(batch_size):
                encoder.add(batch := next(stream))
                bar.advance(len(batch.rows))
                if stop():
                    encoder.finish()
                    raise Stopped(_so_far(writer))
            encoder.publish()
            _note_failures(bar, feed)
        encoder.finish()
    return total, time.monotonic() - started


def _so_far(writer: CacheWriter) -> str:
    stored = int((open_cache(writer.path).state() != ABSENT).sum())
    return f"extraction with {stored:,} of {writer.rows:,} rows stored"


def _note_failures(bar: Progress, feed: Feed) -> None:
    if feed.failed:
        bar.note(f"{len(feed.failed)} undecodable")


def summary(cache: Cache) -> dict[str, Any]:
    """Figures of a cache, JSON-able: rows by state, bytes a stored image, fidelity, baselines, saturated values.

    Raises:
        PipeError: there is no cache at its path any more.
    """
    state = cache.state()
    return {
        "rows": {
            "ok": int((state == OK).sum()),
            "undecodable": int((state == UNDECODABLE).sum()),
            "absent": int((state == ABSENT).sum()),
        },
        "bytes_per_image": sum(array.row_bytes for array in cache.arrays),
        "explained": {scale.name: scale.explained for scale in cache.scales},
        "fidelity": cache.fidelity,
        "roi_cosine": cache.roi_cosine,
        "views": cache.views,
        "baselines": cache.baseline_losses,
        "saturated": cache.saturated,
    }
