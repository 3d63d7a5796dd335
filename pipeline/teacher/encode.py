"""From features to a shard's stored numbers, and which rows of which shard there is work for.

Projection and quantisation happen where the features are, so that a GPU sends int8; a finished shard is written by a
thread while the next one is computed.

Legend: n rows of a shard, m decodable images of a batch, T tokens, C channels, K components.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.cache import layout
from pipeline.cache.codec import FLOAT16_MAX, LEVELS, ScaleCodec
from pipeline.cache.layout import ABSENT, GLOBAL, OK, UNDECODABLE
from pipeline.cache.reader import open_cache
from pipeline.cache.writer import CacheWriter
from pipeline.errors import PipeError
from pipeline.teacher.feed import FeatureBatch, Features, in_batches
from pipeline.teacher.teacher import Teacher


@dataclass(frozen=True)
class ShardWork:
    """What is to be done for one shard.

    Args:
        shard: its number.
        runs: (r,) int64 each: neighbouring rows to extract; a batch never holds rows of two runs.
        kept: (k,) int64: rows that stay as they are, because the cache had them all before it grew.
        extends: whether these are all that the shard holds, so that it stays readable while it is written again.
    """

    shard: int
    runs: tuple[np.ndarray, ...]
    kept: np.ndarray
    extends: bool

    @property
    def rows(self) -> int:
        return sum(len(run) for run in self.runs)

    def batches(self, size: int) -> list[np.ndarray]:
        """The rows to extract, in batches of at most `size`."""
        return [batch for run in self.runs for batch in in_batches(run, size)]


def work_to_do(
    writer: CacheWriter, limit: int | None = None, shards: Collection[int] | None = None
) -> Iterator[ShardWork]:
    """What is missing of the writer's part: of rows below `limit`, of `shards` (None: all).

    A shard in which the limit falls is written in part, and written again, whole, by a run that goes further.
    """
    segments = open_cache(writer.path).segments
    for index in writer.part.shards(writer.shards):
        rows = np.asarray(writer.rows_of(index), np.int64)
        if (shards is not None and index not in shards) or (limit is not None and rows[0] >= limit):
            continue
        if not writer.done(index) and (work := _work_in(writer, index, rows, segments, limit)).runs:
            yield work


def _work_in(
    writer: CacheWriter, index: int, rows: np.ndarray, segments: Sequence[int], limit: int | None
) -> ShardWork:
    """Segment by segment: what the shard holds whole is kept; else it is extracted, from its first row on.

    Where a limit would lose rows that are there (a copy of some), the shard is extracted whole.
    """
    there = writer.state_of(index) != ABSENT if writer.intact(index) else np.zeros(len(rows), bool)
    runs, kept = [], np.zeros(0, np.int64)
    for segment in np.split(rows, np.searchsorted(rows, segments[:-1])):
        wanted = segment if limit is None else segment[segment < limit]
        if len(wanted) and there[segment - rows[0]].all():
            kept = np.concatenate([kept, segment])
        elif len(wanted) and not (len(wanted) < len(segment) and there[wanted - rows[0]].all()):
            runs.append(wanted)
    lost = there.copy()
    lost[np.concatenate([kept, *runs]) - rows[0]] = False
    if runs and limit is not None and lost.any():
        return _work_in(writer, index, rows, segments, None)
    return ShardWork(index, tuple(runs), kept, extends=bool(len(kept)) and len(kept) == there.sum())


class ShardEncoder:
    """Collects the encoded rows of one shard at a time, and publishes them; a context manager."""

    def __init__(self, writer: CacheWriter, teacher: Teacher) -> None:
        self.writer = writer
        device = teacher.get_buffer("_mean").device
        self.codecs = {name: TensorCodec(codec, device) for name, codec in writer.codecs.items()}
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self.writing: Future[None] | None = None

    def __enter__(self) -> ShardEncoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(wait=True)

    def begin(self, work: ShardWork) -> None:
        """Start a shard: the rows that are kept are read back, all others are absent."""
        self.work, self.first = work, self.writer.rows_of(work.shard).start
        n = len(self.writer.rows_of(work.shard))
        self.arrays = {a.name: np.zeros((n, *a.row_shape), a.dtype) for a in self.writer.arrays}
        self.state = np.full(n, ABSENT, np.uint8)
        self.saturated = np.zeros((n, len(self.codecs)), np.int64)  # values cut off, by row and scale
        if len(work.kept):
            self._keep(work)

    def _keep(self, work: ShardWork) -> None:
        cache = open_cache(self.writer.path, verify=True)
        kept_state = self.writer.state_of(work.shard)[work.kept - self.first]
        self.state[work.kept - self.first] = kept_state
        ok = work.kept[kept_state == OK]
        for array in cache.arrays:  # of all views
            self.arrays[array.name][ok - self.first] = cache.source.gather(array, ok, True)
        counts, places = cache.counts(work.shard), work.kept - self.first
        if cache.counts_by_row:
            self.saturated[places] = counts[places]
        else:  # known of the whole shard only
            self.saturated[places[0]] = counts[0]

    def add(self, batch: FeatureBatch) -> None:
        """Encode one batch, every view of it: y = Vᵀx, quantised."""
        places = batch.rows - self.first
        self.state[places] = np.where(batch.ok, OK, UNDECODABLE)
        places = places[batch.ok]
        if not len(places):
            return
        self._encode(batch.features, places, "")
        for view, (features, geometry) in batch.views.items():
            self._encode(features, places, layout.view_name(view, ""))
            self.arrays[layout.view_name(view, layout.GEOMETRY)][places] = geometry

    def _encode(self, features: Features, places: np.ndarray, prefix: str) -> None:
        for scale, (name, codec) in enumerate(self.codecs.items()):
            values, token_steps, saturated = codec.encode(features[name])
            self.arrays[prefix + name][places] = values.cpu().numpy()
            if token_steps is not None:
                self.arrays[prefix + layout.steps_name(name)][places] = token_steps.cpu().numpy()
            self.saturated[places, scale] += saturated
        self.arrays[prefix + GLOBAL][places] = to_float16(features[GLOBAL])[0].cpu().numpy()

    def publish(self) -> None:
        """Hand the shard to the writing thread, after the one before has been written.

        Raises:
            PipeError: the one before could not be.
        """
        self.finish()
        shard, extends = self.work.shard, self.work.extends
        self.writing = self.pool.submit(
            self.writer.write_shard, shard, self.arrays, self.state, self.saturated, extends=extends
        )

    def finish(self) -> None:
        """Wait until what was handed over has been written; raises as `publish` does."""
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()


class TensorCodec:
    """`ScaleCodec.encode` on a device, bit by bit the same numbers for the same coefficients."""

    def __init__(self, codec: ScaleCodec, device: torch.device) -> None:
        self.dtype = codec.dtype
        self.basis = None if codec.basis is None else torch.from_numpy(np.array(codec.basis)).to(device)
        self.steps = None if codec.steps is None else torch.from_numpy(np.array(codec.steps)).to(device)

    def encode(self, features: Tensor) -> tuple[Tensor, Tensor | None, np.ndarray]:
        """features (m, T, C) float32 → values (m, T, K), per-token steps (m, T) for int8_token, how many were
        cut off in each image (m,)."""
        coefficients = features if self.basis is None else features @ self.basis
        if self.dtype == "float16":
            values, beyond = to_float16(coefficients)
            return values, None, beyond
        if self.dtype == "int8_token":
            token_steps = coefficients.abs().amax(dim=-1) / LEVELS
            divisor = torch.where(token_steps > 0, token_steps, 1.0)[..., None]
            return _to_int8(coefficients / divisor)[0], token_steps, np.zeros(len(features), np.int64)
        assert self.steps is not None
        values, beyond = _to_int8(coefficients / self.steps)
        return values, None, beyond


def to_float16(values: Tensor) -> tuple[Tensor, np.ndarray]:
    """As `codec.to_float16`, counted by image: values (m, ...), what lies beyond float16's range is cut and counted
    (m,); PipeError for what is not finite."""
    beyond = _beyond(values, FLOAT16_MAX)
    return values.clamp(-FLOAT16_MAX, FLOAT16_MAX).half(), beyond


def _to_int8(levels: Tensor) -> tuple[Tensor, np.ndarray]:
    levels = levels.round_()  # ties to even
    beyond = _beyond(levels, LEVELS)
    return (levels.clamp_(-LEVELS, LEVELS) if beyond.any() else levels).to(torch.int8), beyond


def _beyond(values: Tensor, most: float) -> np.ndarray:
    """(m,) how many of each image lie outside ±most. One look at the extremes usually answers that, and whether all are
    finite."""
    low, high = (float(extreme) for extreme in torch.aminmax(values))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise PipeError("the teacher's features are not finite", fix="run the teacher in float32 or bf16")
    if -most <= low and high <= most:
        return np.zeros(len(values), np.int64)
    return (values.abs() > most).flatten(1).sum(1).cpu().numpy()
