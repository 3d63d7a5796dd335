"""Becoming one of a cache's writers: the cache must be of what is asked for, and nobody else may be changing it."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.cache import layout
from pipeline.cache.header import finish_growth, grow_header
from pipeline.cache.layout import CacheIdentity
from pipeline.cache.locks import StoreLock
from pipeline.cache.reader import Cache, open_cache
from pipeline.errors import PipeError

SETTLING_SECONDS = 20.0  # how long another process may hold a cache alone: growing rewrites its metadata


def share(path: Path, lock: StoreLock, identity: CacheIdentity) -> None:
    """Become one of the writers of a cache that has been set up: tidy and grow it if nobody else is at it."""
    deadline = time.monotonic() + SETTLING_SECONDS
    while not (alone := lock.exclusive()) and not lock.shared():  # another one holds it alone, for a moment
        if time.monotonic() > deadline:
            raise busy(path, lock, "changing this cache")
        time.sleep(0.02)
    if alone:
        finish_growth(path)
    cache = open_cache(path)
    if not cache.plain:
        raise PipeError(
            "this cache is a compressed copy, and rows are written to plain ones", where=path, fix="move it away"
        )
    if _refuse_other(cache, identity):
        if not alone:
            raise busy(path, lock, "writing to this cache, which has to be made larger")
        grow_header(path, identity)
    if alone:
        shutil.rmtree(path / layout.TEMPORARY, ignore_errors=True)  # left by writers that were killed
        lock.shared()


def busy(path: Path, lock: StoreLock, what: str) -> PipeError:
    """The error of who comes second; `what` the other one is doing: "writing shard 3 of this cache"."""
    return PipeError(
        f"another extraction is {what} ({lock.holders()})",
        where=path,
        fix="wait for it to end, or stop it; it can be resumed",
    )


def _refuse_other(cache: Cache, identity: CacheIdentity) -> bool:
    """Whether the cache is to grow to `identity`; PipeError where it is of something else."""
    found: dict[str, Any] = {
        "rows": cache.rows,
        "scales": [asdict(scale.spec) for scale in cache.scales],
        "global_width": cache.global_width,
        "teacher": cache.teacher,
        "view": cache.view,
        "manifest_fingerprint": cache.manifest_fingerprint,
        "settings": cache.settings,
    }
    asked = identity.to_json()
    prefix = identity.prefix_fingerprint
    grows = identity.rows > cache.rows and prefix is not None and prefix(cache.rows) == cache.manifest_fingerprint
    for side in (asked, found):  # by hub name or from a file: it is the weights' own hash that counts
        side["teacher"] = {key: value for key, value in side["teacher"].items() if key != "weights"}
        if grows:
            del side["rows"], side["manifest_fingerprint"]
    difference = layout.first_difference(asked, found, whole=True)
    if difference:
        raise PipeError(
            f"the cache there is of something else: {difference}",
            where=cache.path,
            fix="move it away, or use the settings it was made with",
        )
    return grows
