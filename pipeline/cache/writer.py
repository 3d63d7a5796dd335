"""Writing a teacher cache: the header once, then whole shards, each assembled in memory and published atomically.

Every file is written under `.tmp/`, synced, renamed into place, and its folder synced. A shard's `state` chunk is the
last of its files: state 1 implies published data, and a shard without it is written again by the next extraction.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from pipeline.cache import counts, layout
from pipeline.cache.codec import ScaleCodec
from pipeline.cache.header import (
    CacheFit,
    build_header,
    clear_unfinished,
    refuse_foreign,
    write_header,
)
from pipeline.cache.layout import CacheIdentity, ScaleInfo
from pipeline.cache.locks import StoreLock
from pipeline.cache.part import Part
from pipeline.cache.reader import Cache, open_cache
from pipeline.cache.seals import SEALS, write_seals
from pipeline.cache.shards import CRC_BYTES, assemble_shard, index_bytes, read_state, with_crc
from pipeline.cache.sharing import busy, share
from pipeline.cache.store import publish
from pipeline.errors import PipeError
from pipeline.run_folder import sync_folder


class CacheWriter:
    """Writes shards of a cache. Use `create` or `resume`, then `write_shard` for each of `missing`; a context manager.

    Several writers may share a cache, each with a part of its shards; one that another process writes is refused.

    Attributes:
        path, rows, shard_rows, shards: the store and its sizes (`shards` is their count).
        part: which shards are this writer's.
        codecs: scale → the codec that the store was set up with; encode with these, also after a resume.
    """

    def __init__(self, path: Path, lock: StoreLock, part: Part) -> None:
        cache = open_cache(path)
        self.path, self.rows, self.shard_rows, self.shards = path, cache.rows, cache.shard_rows, cache.shards
        self.arrays, self.scales, self.part = cache.arrays, cache.scales, part
        self.codecs = {s.name: stored_codec(cache, s) for s in cache.scales}
        self.counting = cache.counting
        self._sealed = (path / SEALS / layout.METADATA).exists()  # caches of older writers have no seals
        if (held := lock.claim(part.shards(self.shards))) is not None:
            raise busy(path, lock, f"writing shard {held} of this cache")
        self._lock: StoreLock | None = lock

    @classmethod
    def resume(cls, path: str | Path, identity: CacheIdentity, part: Part | None = None) -> CacheWriter | None:
        """Go on with the cache at `path`; None where none has been set up (calibrate, then `create`).

        A cache of the first rows of the same manifest is made larger.

        Raises:
            PipeError: the cache there is of something else (the field is named), or another process writes its shards.
        """
        path, part = Path(path), part or Part()
        if not (path / layout.DIGEST).exists():
            return None
        lock = StoreLock(path, "" if part.whole else str(part))
        try:
            share(path, lock, identity)
            return cls(path, lock, part)
        except BaseException:
            lock.close()
            raise

    @classmethod
    def create(
        cls,
        path: str | Path,
        identity: CacheIdentity,
        fit: CacheFit | Callable[[], CacheFit],
        *,
        shard_rows: int | None = None,
        part: Part | None = None,
    ) -> CacheWriter | None:
        """Set a cache up (all metadata, `digest.json` last), or resume the one that is there, which then keeps its fit.

        Args:
            fit: what was fitted, or a function that fits it; called while no other process can set the cache up.
            shard_rows: rows a shard; default by bytes, 512 to 4,096.
            part: which shards to write.

        Returns:
            None where another process is setting the cache up and this one is only a part: wait, and call again.

        Raises:
            PipeError: as `resume`; also where the folder holds something that is not a cache, or cannot be written.
        """
        path, part = Path(path), part or Part()
        resumed = cls.resume(path, identity, part)
        if resumed is not None:
            return resumed
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PipeError(f"cannot make the cache's folder: {error.strerror}", where=path) from error
        refuse_foreign(path)
        lock = StoreLock(path, "" if part.whole else str(part))
        try:
            if not lock.exclusive():
                if part.whole:
                    raise busy(path, lock, "setting this cache up")
                lock.close()
                return None
            if not (path / layout.DIGEST).exists():  # else set up by another process since we looked
                clear_unfinished(path)
                header, small = build_header(identity, fit() if callable(fit) else fit, shard_rows)
                write_header(path, header, small)
            share(path, lock, identity)
            return cls(path, lock, part)
        except BaseException:
            lock.close()
            raise

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the next writer in."""
        if self._lock is not None:
            if self._lock.exclusive():  # another writer may be about to put a file there
                with contextlib.suppress(OSError):
                    (self.path / layout.TEMPORARY).rmdir()
            self._lock.close()
            self._lock = None

    def rows_of(self, index: int) -> range:
        """Manifest rows of shard `index`; the last shard has fewer."""
        if not 0 <= index < self.shards:
            raise IndexError(f"shard {index} of {self.shards}")
        return range(index * self.shard_rows, min((index + 1) * self.shard_rows, self.rows))

    def done(self, index: int) -> bool:
        """Whether every row of the shard has been dealt with and all its files are there, whole."""
        return not (self.state_of(index) == layout.ABSENT).any() and self.intact(index)

    def intact(self, index: int) -> bool:
        """Whether the files of all rows that the shard's state promises are there, and none is cut short."""
        ok = int((self.state_of(index) == layout.OK).sum())
        for array in self.arrays:
            file = array.file(self.path, index)
            least = ok * (array.row_bytes + CRC_BYTES) + index_bytes(self.shard_rows)
            if not file.exists() or file.stat().st_size < least:
                return False
        return True

    def state_of(self, index: int) -> np.ndarray:
        """(n,) uint8, the state of the shard's rows; all absent where it is not written, or damaged."""
        n = len(self.rows_of(index))
        try:
            state = read_state(self.path, index, self.shard_rows)
        except PipeError:
            state = None
        return np.full(n, layout.ABSENT, np.uint8) if state is None else state[:n]

    @property
    def finished(self) -> list[int]:
        """Shards of the whole cache that are done, whoever wrote them."""
        return [index for index in range(self.shards) if self.done(index)]

    @property
    def missing(self) -> list[int]:
        """Shards of this writer's part that are not done."""
        return [index for index in self.part.shards(self.shards) if not self.done(index)]

    @property
    def saturated(self) -> dict[str, int]:
        """Values cut off so far, by scale, over all written shards (kept in the store, so a crash loses none)."""
        return open_cache(self.path).saturated

    def write_shard(
        self,
        index: int,
        arrays: Mapping[str, np.ndarray],
        state: np.ndarray,
        saturated: np.ndarray | None = None,
        *,
        extends: bool = False,
    ) -> None:
        """Publish one whole shard. May be called from another thread, one call at a time.

        Args:
            arrays: scale → (n, T, K) in the stored dtype, "<scale>_steps" (n, T) float32 for int8_token scales,
                "global" (n, C) float16, with n = len(rows_of(index)). Rows whose state is not 1 are not stored.
            state: (n,) uint8.
            saturated: (n, L) int, values cut off in each row, by scale in their order.
            extends: the rows that the shard holds already are among `arrays`, byte for byte; they stay readable
                throughout. Else the shard promises nothing while it is replaced.

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
        if state_file.exists() and not extends:
            state_file.unlink()
            sync_folder(state_file.parent)
        checksums = {}
        for array in self.arrays:
            values = np.ascontiguousarray(arrays[array.name], array.dtype)
            chunks, chunk_index = assemble_shard(values, present)
            publish(self.path, array.file(self.path, index), chunks, chunk_index)
            checksums[array.name] = chunks[:, -CRC_BYTES:].tobytes()
        none = np.zeros((len(state), len(self.scales)), np.int64)
        counts_bytes = counts.chunk(none if saturated is None else saturated, self.counting)
        publish(self.path, self.path / layout.chunk_path(layout.SATURATED, index, 2), counts_bytes)
        padded = np.zeros(self.shard_rows, np.uint8)
        padded[: len(state)] = state
        state_bytes = with_crc(padded.tobytes())
        if self._sealed:
            write_seals(self.path, index, self.arrays, checksums, counts_bytes, state_bytes)
        publish(self.path, state_file, state_bytes)

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


def stored_codec(cache: Cache, scale: ScaleInfo) -> ScaleCodec:
    """The basis and steps that a scale of an existing cache was written with, for more rows of it."""
    return ScaleCodec(scale.dtype, scale.width, cache.basis(scale.name), cache.steps[scale.name], scale.explained)
