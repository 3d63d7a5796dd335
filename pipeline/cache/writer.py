"""Writing a teacher cache: the header once, then whole shards, each assembled in memory and published atomically.

Every file is written under `.tmp/`, synced, renamed into place, and its folder synced. A shard's `state` chunk is the
last of its files: state 1 implies published data, and a shard without it is written again by the next extraction.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cache import layout
from pipeline.cache.codec import ScaleCodec
from pipeline.cache.header import CacheFit, build_header, clear_unfinished, refuse_foreign, write_header
from pipeline.cache.layout import CacheIdentity, ScaleInfo
from pipeline.cache.reader import Cache, open_cache
from pipeline.cache.shards import CRC_BYTES, assemble_shard, index_bytes, read_state, with_crc
from pipeline.cache.store import publish, take_lock
from pipeline.errors import PipeError
from pipeline.run_folder import sync_folder


class CacheWriter:
    """The one writer of a cache. Use `create` or `resume`, then `write_shard` for each of `missing`; a context manager.

    Attributes:
        path, rows, shard_rows, shards: the store and its sizes (`shards` is their count).
        codecs: scale → the codec that the store was set up with; encode with these, also after a resume.
    """

    def __init__(self, path: Path, lock: int) -> None:
        self._lock: int | None = lock
        cache = open_cache(path)
        self.path, self.rows, self.shard_rows, self.shards = path, cache.rows, cache.shard_rows, cache.shards
        self.arrays, self.scales = cache.arrays, cache.scales
        self.codecs = {s.name: _stored_codec(cache, s) for s in cache.scales}
        shutil.rmtree(path / layout.TEMPORARY, ignore_errors=True)  # left by a writer that was killed; the lock is ours

    @classmethod
    def resume(cls, path: str | Path, identity: CacheIdentity) -> CacheWriter | None:
        """Go on with the cache at `path`; None where none has been set up (calibrate, then `create`).

        Raises:
            PipeError: the cache there is of something else (the field is named), or another process writes to it.
        """
        path = Path(path)
        if not (path / layout.DIGEST).exists():
            return None
        lock = take_lock(path)
        try:
            _refuse_other(open_cache(path), identity)
            return cls(path, lock)
        except BaseException:
            os.close(lock)
            raise

    @classmethod
    def create(
        cls, path: str | Path, identity: CacheIdentity, fit: CacheFit, *, shard_rows: int | None = None
    ) -> CacheWriter:
        """Set a cache up (all metadata, `digest.json` last), or resume the one that is there, which then keeps its fit.

        Args:
            shard_rows: rows a shard; default by bytes, 512 to 4,096.

        Raises:
            PipeError: as `resume`; also where the folder holds something that is not a cache, or cannot be written.
        """
        path = Path(path)
        resumed = cls.resume(path, identity)
        if resumed is not None:
            return resumed
        header, small = build_header(identity, fit, shard_rows)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PipeError(f"cannot make the cache's folder: {error.strerror}", where=path) from error
        refuse_foreign(path)
        lock = take_lock(path)
        try:
            if (path / layout.DIGEST).exists():  # set up by another process since we looked
                _refuse_other(open_cache(path), identity)
            else:
                clear_unfinished(path)
                write_header(path, header, small)
            return cls(path, lock)
        except BaseException:
            os.close(lock)
            raise

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the next writer in."""
        if self._lock is not None:
            with contextlib.suppress(OSError):
                (self.path / layout.TEMPORARY).rmdir()
            os.close(self._lock)
            self._lock = None

    def rows_of(self, index: int) -> range:
        """Manifest rows of shard `index`; the last shard has fewer."""
        if not 0 <= index < self.shards:
            raise IndexError(f"shard {index} of {self.shards}")
        return range(index * self.shard_rows, min((index + 1) * self.shard_rows, self.rows))

    def done(self, index: int) -> bool:
        """Whether every row of the shard has been dealt with and all its files are there, whole."""
        try:
            state = read_state(self.path, index, self.shard_rows)
        except PipeError:
            return False
        if state is None or (state[: len(self.rows_of(index))] == layout.ABSENT).any():
            return False
        ok = int((state == layout.OK).sum())
        for array in self.arrays:
            file = array.file(self.path, index)
            least = ok * (array.row_bytes + CRC_BYTES) + index_bytes(self.shard_rows)
            if not file.exists() or file.stat().st_size < least:
                return False
        return True

    @property
    def finished(self) -> list[int]:
        return [index for index in range(self.shards) if self.done(index)]

    @property
    def missing(self) -> list[int]:
        return [index for index in range(self.shards) if not self.done(index)]

    @property
    def saturated(self) -> dict[str, int]:
        """Values cut off so far, by scale, over all written shards (kept in the store, so a crash loses none)."""
        return open_cache(self.path).saturated

    def write_shard(
        self,
        index: int,
        arrays: Mapping[str, np.ndarray],
        state: np.ndarray,
        saturated: Mapping[str, int] | None = None,
    ) -> None:
        """Publish one whole shard.

        Args:
            arrays: scale → (n, T, K) in the stored dtype, "<scale>_steps" (n, T) float32 for int8_token scales,
                "global" (n, C) float16, with n = len(rows_of(index)). Rows whose state is not 1 are not stored.
            state: (n,) uint8.
            saturated: values cut off in this shard, by scale.

        Raises:
            ValueError: names, shapes or dtypes are not the store's.
            PipeError: a float is not finite, or the disk refuses (what was finished before stays whole).
        """
        if self._lock is None:
            raise ValueError("this writer is closed")
        state = self._checked(index, arrays, state)
        present = np.zeros(self.shard_rows, bool)
        present[: len(state)] = state == layout.OK
        state_file = self.path / layout.chunk_path(layout.STATE, index, 1)
        if state_file.exists():  # a shard written in part before: while it is replaced, it promises nothing
            state_file.unlink()
            sync_folder(state_file.parent)
        for array in self.arrays:
            values = np.ascontiguousarray(arrays[array.name], array.dtype)
            publish(self.path, array.file(self.path, index), *assemble_shard(values, present))
        counts = np.array([(saturated or {}).get(scale.name, 0) for scale in self.scales], "<i8")
        publish(self.path, self.path / layout.chunk_path(layout.SATURATED, index, 2), with_crc(counts.tobytes()))
        padded = np.zeros(self.shard_rows, np.uint8)
        padded[: len(state)] = state
        publish(self.path, state_file, with_crc(padded.tobytes()))

    def _checked(self, index: int, arrays: Mapping[str, np.ndarray], state: np.ndarray) -> np.ndarray:
        n = len(self.rows_of(index))
        state = np.asarray(state, np.uint8)
        if state.shape != (n,) or (state > layout.UNDECODABLE).any():
            raise ValueError(f"state must be ({n},) of 0, 1, 2 for shard {index}")
        if set(arrays) != {array.name for array in self.arrays}:
            raise ValueError(f"expected arrays {[a.name for a in self.arrays]}, got {sorted(arrays)}")
        for array in self.arrays:
            values = arrays[array.name]
            if values.shape != (n, *array.row_shape) or values.dtype != array.dtype:
                raise ValueError(
                    f"{array.name}: {values.dtype} {values.shape}, expected {array.dtype} {(n, *array.row_shape)}"
                )
            if array.dtype.kind == "f":
                broken = np.flatnonzero((state == layout.OK) & ~np.isfinite(values).reshape(n, -1).all(axis=1))
                if len(broken):
                    row = self.rows_of(index)[int(broken[0])]
                    raise PipeError(
                        f"the teacher's features of {len(broken)} rows are not finite",
                        where=f"{array.name}, row {row}",
                        fix="run the teacher in float32 or bf16",
                    )
        return state


def _refuse_other(cache: Cache, identity: CacheIdentity) -> None:
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
    for side in (asked, found):  # by hub name or from a file: it is the weights' own hash that counts
        side["teacher"] = {key: value for key, value in side["teacher"].items() if key != "weights"}
    difference = layout.first_difference(asked, found, whole=True)
    if difference:
        raise PipeError(
            f"the cache there is of something else: {difference}",
            where=cache.path,
            fix="move it away, or use the settings it was made with",
        )


def _stored_codec(cache: Cache, scale: ScaleInfo) -> ScaleCodec:
    return ScaleCodec(scale.dtype, scale.width, cache.basis(scale.name), cache.steps[scale.name], scale.explained)
