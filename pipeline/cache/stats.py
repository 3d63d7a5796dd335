"""Moments and spectra of a cache's coefficients, in one pass over the rows; memory does not depend on their number.

With y a token's coefficients (float32 as training reads them), û = y / ‖y‖, M = E[y yᵀ] over all tokens of all images:

    energy        M_kk / tr M, the share of each component: the spectrum in the basis as stored
    erank         exp(−Σ p ln p) of p = λ / Σλ, λ the eigenvalues: of M, and of M − E[y] E[y]ᵀ. This is the effective
                  rank of Roy and Vetterli (EUSIPCO 2007), which they take of singular values, here of a second moment
    token cosine  ⟨û_s, û_t⟩ over the pairs s ≠ t of one image: mean and standard deviation over all pairs of all images
    levels        of an int8 component: exp of the entropy of its histogram, 1 to 255; mean over components
    image cosine  of `global`: mean over all pairs of different images, (‖Σ ĝ‖² − n) / (n (n − 1))

Dask runs sixteen chains, whose shards add to one sum each; the sums of the chains are added in order, so that the
figures do not depend on the number of cores.

Legend: n rows of a block, T tokens, K components.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from pipeline.cache import layout
from pipeline.cache.info import cut_off, view_bytes
from pipeline.cache.moments import GlobalSums, ScaleSums
from pipeline.cache.reader import Cache
from pipeline.console import progress
from pipeline.data.geometry import BASE
from pipeline.data.parallel import usable_cores
from pipeline.errors import PipeError

CHAINS = 16
BLOCK_BYTES = 16 * 2**20  # of float64 coefficients


@dataclass
class Sums:
    """Of one chain of shards."""

    scales: dict[str, ScaleSums]
    of_global: GlobalSums
    view: str | None = None
    rows: int = 0
    geometry: np.ndarray = field(default_factory=lambda: np.zeros(3))  # Σ width, height, flip of a further view

    @classmethod
    def zeros(cls, cache: Cache, view: str | None) -> Sums:
        scales = {s.name: ScaleSums.zeros(s) for s in cache.scales}
        return cls(scales, GlobalSums(np.zeros(cache.global_width)), view)

    def add_rows(self, cache: Cache, rows: np.ndarray) -> None:
        """Read rows (n,) int64 block by block; their checksums are compared."""
        widest = max(s.tokens * max(s.tokens, s.components) for s in cache.scales)
        block = max(1, BLOCK_BYTES // (8 * widest))
        for start in range(0, len(rows), block):
            raw = cache.read_raw(rows[start : start + block], view=self.view, verify=True)
            for scale in cache.scales:
                steps = raw.get(layout.steps_name(scale.name), cache.steps[scale.name])
                self.scales[scale.name].add_rows(raw[scale.name], steps)
            self.of_global.add_rows(raw[layout.GLOBAL])
            if self.view is not None:
                box = raw[layout.GEOMETRY].astype(np.float64)
                self.geometry += np.append(box[:, 2:4] - box[:, :2], box[:, 4:], axis=1).sum(axis=0)
        self.rows += len(rows)

    def add(self, other: Sums) -> None:
        for name, sums in self.scales.items():
            sums.add(other.scales[name])
        self.of_global.add(other.of_global)
        self.rows += other.rows
        self.geometry += other.geometry


def cache_stats(
    cache: Cache,
    *,
    rows: int | None = None,
    seed: int = 0,
    view: str | None = None,
    workers: int | Literal["auto"] = "auto",
) -> dict[str, Any]:
    """Figures of all rows with features, or of a random `rows` of them (chosen by `seed`); JSON-able.

    Args:
        view: one of the further views; None: the base view.

    Returns:
        {"rows": how many were read, "of": how many there are, "view": its name, "bytes": that a row has in each view,
        "scales": {name: figures}, "global": figures, "geometry": mean width and height of the boxes in pixels, and the
        share that is mirrored; None for the base view}.

    Raises:
        PipeError: there are no rows, no such view, or a row is damaged.
    """
    there = np.flatnonzero(cache.state() == layout.OK)
    if not len(there):
        raise PipeError("no row of this cache has features yet", where=cache.path, fix="run: pipe extract-teacher")
    sampled = rows is not None and rows < len(there)
    chosen = np.sort(np.random.default_rng(seed).choice(there, rows, replace=False)) if sampled else there
    sums = _sum_up(cache, chosen, view, workers)
    limits = {} if sampled else cut_off(cache)  # of all views together
    geometry = dict(zip(("width_mean", "height_mean", "mirrored"), (sums.geometry / sums.rows).tolist(), strict=True))
    return {
        "rows": sums.rows,
        "of": len(there),
        "seed": seed if sampled else None,
        "view": BASE if view is None else view,
        "bytes": view_bytes(cache),
        "scales": {name: of.figures(limits.get(name)) for name, of in sums.scales.items()},
        "global": sums.of_global.figures(),
        "geometry": None if view is None else geometry,
    }


def _sum_up(cache: Cache, rows: np.ndarray, view: str | None, workers: int | Literal["auto"]) -> Sums:
    """The sums over `rows`, ascending, shard by shard in sixteen chains."""
    import dask
    from dask.callbacks import Callback
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    shards = np.split(rows, np.flatnonzero(np.diff(rows // cache.shard_rows)) + 1)

    def step(so_far: Sums | None, of_shard: int) -> Sums:
        found = Sums.zeros(cache, view) if so_far is None else so_far
        found.add_rows(cache, shards[of_shard])
        return found

    chains: list[Any] = [None] * min(CHAINS, len(shards))
    for number in range(len(shards)):
        before = chains[number % len(chains)]
        chains[number % len(chains)] = dask.delayed(step)(before, number, dask_key_name=f"shard-{number}")
    count = min(usable_cores() if workers == "auto" else workers, len(chains))
    options: dict[str, Any] = {"scheduler": "threads", "num_workers": count} if count > 1 else {"scheduler": "sync"}
    with progress("measuring", total=len(rows), unit="rows") as bar:

        def done(key: Any, result: Any, graph: Any, state: Any, worker: Any) -> None:
            bar.advance(len(shards[int(str(key).removeprefix("shard-"))]))

        with Callback(posttask=done), threadpool_limits(1):
            found = dask.compute(*chains, optimize_graph=False, **options)
    total = Sums.zeros(cache, view)
    for sums in found:
        total.add(sums)
    return total


def stats_lines(stats: dict[str, Any]) -> list[str]:
    """The same as text, for people; the spectrum as cumulative shares."""
    of = f" of {stats['of']:,} (a random choice)" if stats["rows"] < stats["of"] else ""
    sizes = ", ".join(f"{name} {count:,}" for name, count in stats["bytes"].items())
    lines = [
        f"rows  {stats['rows']:,}{of}, view {stats['view']}; bytes of a row by view: {sizes}",
        "",
        "scale       norm             rank  centred  token cosine     levels  limit",
    ]
    for name, found in stats["scales"].items():
        cosine = (
            "-" if found["token_cosine_mean"] is None else _pm(found["token_cosine_mean"], found["token_cosine_std"])
        )
        levels = "-" if found["levels"] is None else f"{found['levels']['mean']:.0f}"
        limit = "-" if found["at_limit"] is None else f"{100 * found['at_limit']:.3f} %"
        lines.append(
            f"{name:<10}  {_pm(found['norm_mean'], found['norm_std']):<15}  {found['effective_rank']:>4.0f}  "
            f"{found['effective_rank_centred']:>7.0f}  {cosine:<15}  {levels:>6}  {limit}"
        )
    lines += ["", "share of the energy in the first components"]
    for name, found in stats["scales"].items():
        shares = "  ".join(f"{count}: {share:.4f}" for count, share in found["cumulative"].items())
        lines.append(f"{name:<10}  {shares}")
    found = stats["global"]
    between = found["image_cosine_mean"]
    cosine = "" if between is None else f", cosine between images {between:.4f}"
    if (box := stats["geometry"]) is not None:
        size = f"{box['width_mean']:.1f} x {box['height_mean']:.1f} pixels on average"
        lines += ["", f"geometry    {size}, {100 * box['mirrored']:.1f} % mirrored"]
    return [*lines, "", f"global      norm {_pm(found['norm_mean'], found['norm_std'])}{cosine}"]


def _pm(mean: float, std: float) -> str:
    return f"{mean:.3f} ± {std:.3f}"
