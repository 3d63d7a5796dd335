"""Copying some rows, scales or views of a cache into a new store, a valid cache of its own, plain or compressed.

Row numbers stay: cache row = manifest row in the copy too, and it has as many rows. Those that are not copied are
absent (state 0), so that the copy serves the same manifest with `data.rows: cached`, and an extraction can fill it up.
Values that were cut off are counted by shard: those of a shard that is copied in part do not count.

The source may be remote or compressed. Every row's checksum is compared as it is read: damage is not copied. The copy
is made beside its place, in a folder whose name begins with a dot, and renamed into place when it is whole.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.cache import layout
from pipeline.cache.compress import CompressedWriter, Compression
from pipeline.cache.header import SmallArrays, header_contents, publish_header, read_small
from pipeline.cache.layout import RowArray
from pipeline.cache.locks import StoreLock
from pipeline.cache.part import Part
from pipeline.cache.reader import Cache, open_cache
from pipeline.cache.shards import index_bytes
from pipeline.cache.store import read_json
from pipeline.cache.writer import CacheWriter
from pipeline.console import progress
from pipeline.data.parallel import run_all
from pipeline.errors import PipeError
from pipeline.run_folder import sync_folder

BLOCK_BYTES = 8 * 2**20
ELSEWHERE = "choose another place for the copy"


@dataclass(frozen=True)
class Copied:
    """The new cache; how many rows with features it has, and how many were asked for but are not in the source."""

    cache: Cache
    rows: int
    absent: int


def copy_cache(
    source: str | Path,
    out: str | Path,
    *,
    rows: np.ndarray | None = None,
    scales: Sequence[str] | None = None,
    views: Sequence[str] | None = None,
    compress: Compression | None = None,
    workers: int | Literal["auto"] = "auto",
) -> Copied:
    """Copy `rows` (n,) int, `scales` and further `views` (None: all) of the cache at `source` into a new one at `out`.

    Args:
        source: a folder, or a URL as `open_cache` takes it.
        compress: how to compress the copy; None: not, so that an extraction can go on with it.

    Raises:
        PipeError: `out` exists; a row, scale or view that the source does not have; a damaged row; disk full (nothing
            stays).
    """
    cache, out = open_cache(source), Path(out)
    wanted = _wanted(cache, rows)
    attributes, small = _header(cache, _known("scale", cache, scales), _known("view", cache, views))
    if out.exists() or out.is_symlink():
        raise PipeError("there is something already", where=out, fix=ELSEWHERE)
    if around := next((f for f in out.absolute().resolve().parents if (f / layout.DIGEST).exists()), None):
        raise PipeError("this is inside a cache, of which it would be a stray part", where=around, fix=ELSEWHERE)
    _refuse_full_disk(cache, attributes, wanted, out, exact=compress is None)
    partial = out.absolute().parent / f".{out.name}.copying"
    lock = _fresh(partial)
    try:  # the lock is held to the end: another copy to this place would clear the folder first
        writer = _writer(partial, lock, attributes, small, compress)
        _copy_shards(cache, writer, wanted, workers)
        with contextlib.suppress(OSError):
            (partial / layout.TEMPORARY).rmdir()
        os.rename(partial, out)  # raises where somebody put a folder with files there meanwhile
        (out / layout.LOCK).unlink(missing_ok=True)
        sync_folder(out.absolute().parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise PipeError(f"cannot write the copy: {error.strerror}", where=out) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        lock.close()
    copied = open_cache(out)
    return Copied(copied, int((copied.state() == layout.OK).sum()), int((cache.state()[wanted] == layout.ABSENT).sum()))


def _wanted(cache: Cache, rows: np.ndarray | None) -> np.ndarray:
    """(R,) bool."""
    if rows is None:
        return np.ones(cache.rows, bool)
    outside = rows[(rows < 0) | (rows >= cache.rows)]
    if len(outside):
        raise PipeError(f"the cache has rows 0 to {cache.rows - 1:,}; asked for {outside[0]:,}", where=cache.path)
    wanted = np.zeros(cache.rows, bool)
    wanted[rows] = True
    if not (cache.state()[wanted] != layout.ABSENT).any():
        raise PipeError("none of these rows is in the cache", where=cache.path, fix="choose others")
    return wanted


def _known(kind: Literal["scale", "view"], cache: Cache, asked: Sequence[str] | None) -> list[str]:
    """The scales, or further views, asked for, in the order in which they are stored; views may be none."""
    known = cache.views if kind == "view" else [scale.name for scale in cache.scales]
    if asked is None:
        return known
    unknown = [name for name in asked if name not in known]
    if unknown or (not asked and kind == "scale"):
        has = ", ".join(known) or f"no further {kind}s"
        raise PipeError(f"no {kind} {', '.join(unknown) or 'asked for'}; the cache has {has}", where=cache.path)
    return [name for name in known if name in asked]


def _writer(
    path: Path, lock: StoreLock, attributes: dict[str, Any], small: SmallArrays, compress: Compression | None
) -> CacheWriter | CompressedWriter:
    """Set the new store up, and write to it."""
    contents = header_contents(attributes, small)
    if compress is None:
        publish_header(path, contents)
        return CacheWriter(path, lock, Part())
    arrays = {array.name: array for array in _arrays(attributes)}
    publish_header(path, compress.contents(contents, arrays, attributes["shard_rows"]))
    return CompressedWriter(path, lock, compress)


def _arrays(attributes: dict[str, Any]) -> list[RowArray]:
    scales = [layout.ScaleInfo(**scale) for scale in attributes["scales"]]
    return layout.row_arrays(scales, attributes["global_width"], attributes["views"])


def _header(cache: Cache, names: list[str], views: list[str]) -> tuple[dict[str, Any], SmallArrays]:
    """The attributes with only what concerns the scales `names` and the further `views`, and their small arrays."""
    attributes: dict[str, Any] = read_json(cache.path / layout.METADATA)["attributes"]

    def of_names(figures: dict[str, Any], *more: str) -> dict[str, Any]:
        return {name: value for name, value in figures.items() if name in {*names, *more}}

    attributes["scales"] = [scale for scale in attributes["scales"] if scale["name"] in names]
    attributes["fidelity"] = of_names(attributes["fidelity"])
    if "roi_cosine" in attributes:
        attributes["roi_cosine"] = of_names(attributes["roi_cosine"], layout.GLOBAL)
    losses = attributes["baseline_losses"]
    losses |= {kind: of_names(losses[kind], layout.GLOBAL) for kind in ("gram", "rkd") if kind in losses}
    if isinstance(of_teacher := attributes["teacher"].get("scales"), list):
        attributes["teacher"]["scales"] = [scale for scale in of_teacher if scale["name"] in names]
    attributes["views"], settings = views, attributes["settings"]
    if of_views := [view for view in settings.pop("views", []) if view["name"] in views]:
        settings["views"] = of_views
    kept = [layout.GLOBAL_MEAN, layout.CALIBRATION_ROWS, layout.HELDOUT_ROWS]
    for scale in (scale for scale in cache.scales if scale.name in names):
        kept.append(layout.gram_mean_name(scale.name))
        kept += [layout.basis_name(scale.name)] if (cache.path / layout.basis_name(scale.name)).is_dir() else []
        kept += [layout.steps_name(scale.name)] if scale.dtype == "int8" else []
    small: SmallArrays = {}
    for name in kept:
        values, document = read_small(cache.path, name), read_json(cache.path / name / layout.METADATA)
        small[name] = (values.astype(values.dtype.newbyteorder("<")), tuple(document["dimension_names"]))
    return attributes, small


def _refuse_full_disk(cache: Cache, attributes: dict[str, Any], wanted: np.ndarray, out: Path, *, exact: bool) -> None:
    """Say that it will not fit before hours of copying; how small a compressed copy gets, nobody knows before."""
    arrays = _arrays(attributes)
    state = np.where(wanted, cache.state(), layout.ABSENT)
    shards = len(np.unique(np.flatnonzero(state != layout.ABSENT) // cache.shard_rows))
    needed = int((state == layout.OK).sum()) * sum(array.row_bytes + 4 for array in arrays)
    needed += shards * len(arrays) * index_bytes(cache.shard_rows)
    folder = out.absolute().parent
    if not folder.is_dir():
        raise PipeError("there is no such folder", where=folder, fix="make it first")
    if exact and (free := shutil.disk_usage(folder).free) < needed:
        raise PipeError(f"the copy takes {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free", where=folder)


def _fresh(partial: Path) -> StoreLock:
    """An empty folder and its lock; what a copy that was killed left there goes. One that is at work is left alone."""
    try:
        partial.mkdir(exist_ok=True)
    except OSError as error:
        raise PipeError(f"cannot make the copy's folder: {error.strerror}", where=partial) from error
    lock = StoreLock(partial)
    if not lock.exclusive():
        raise PipeError(f"another copy is being made ({lock.holders()})", where=partial, fix="wait for it, or stop it")
    for entry in partial.iterdir():
        if entry.name != layout.LOCK:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    return lock


def _copy_shards(
    cache: Cache, writer: CacheWriter | CompressedWriter, wanted: np.ndarray, workers: int | Literal["auto"]
) -> None:
    """Write every shard in which a row was asked for; shards without one stay absent."""
    state = np.where(wanted, cache.state(), layout.ABSENT)
    todo = np.unique(np.flatnonzero(state != layout.ABSENT) // cache.shard_rows).tolist()
    # A CacheWriter takes one shard at a time; compressing is work that threads can share.
    writing = threading.Lock() if isinstance(writer, CacheWriter) else contextlib.nullcontext()
    # Whatever ends the copy is raised when all threads are at rest: none may write into a folder that is removed.
    failed: list[BaseException] = []
    at_work, rest = set[int](), threading.Condition()

    def copy(shard: int) -> int:
        with rest:
            if failed:
                return 0
            at_work.add(shard)
        try:
            return copy_shard(shard)
        except Exception as error:
            failed.append(error)
            return 0
        finally:
            with rest:
                at_work.discard(shard)
                rest.notify_all()

    def copy_shard(shard: int) -> int:
        rows = writer.rows_of(shard)
        here = state[rows.start : rows.stop]
        slots = np.flatnonzero(here == layout.OK)
        arrays = {array.name: _stored(cache, array, rows.start, len(here), slots) for array in writer.arrays}
        cut_off = _cut_off(cache, writer, shard, here)
        with writing:
            writer.write_shard(shard, arrays, here, cut_off)
        return len(slots)

    with progress("copying", total=int((state == layout.OK).sum()), unit="rows") as bar:
        try:
            run_all(copy, todo, workers=workers, scheduler="threads", on_done=bar.advance)
        except BaseException as error:  # Ctrl-C comes to this thread alone
            with rest:
                failed.append(error)
                rest.wait_for(lambda: not at_work)
            raise
        if failed:
            raise failed[0]


def _cut_off(cache: Cache, writer: CacheWriter | CompressedWriter, shard: int, state: np.ndarray) -> np.ndarray:
    """(n, L) values cut off in the rows of a shard that are copied, of the writer's scales; state (n,) of its rows.

    Where they are known of whole shards only, a shard in part has none, and a whole one all of them in its first row.
    """
    names = [scale.name for scale in cache.scales]
    known = cache.counts(shard)[:, [names.index(scale.name) for scale in writer.scales]]
    found = np.zeros((len(state), known.shape[1]), np.int64)
    if cache.counts_by_row:
        copied = state != layout.ABSENT
        found[copied] = known[: len(state)][copied]
    elif np.array_equal(state, cache.state()[shard * cache.shard_rows :][: len(state)]):
        found[0] = known[0]
    return found


def _stored(cache: Cache, array: RowArray, first: int, count: int, slots: np.ndarray) -> np.ndarray:
    """(count, ...) as stored, of the rows from `first` on; those not in `slots` (n,) are zeros.

    In blocks of a few MiB: no server takes too long for one.
    """
    values = np.zeros((count, *array.row_shape), array.dtype)
    step = max(1, BLOCK_BYTES // array.row_bytes)
    for start in range(0, len(slots), step):
        block = slots[start : start + step]
        values[block] = cache.source.gather(array, first + block, True)
    return values
