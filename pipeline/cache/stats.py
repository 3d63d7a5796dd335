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

Legend: n rows of a block, T tokens, K components, C width of `global`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from pipeline.cache import codec, layout
from pipeline.cache.codec import LEVELS
from pipeline.cache.layout import ScaleInfo
from pipeline.cache.reader import Cache
from pipeline.console import progress
from pipeline.data.parallel import usable_cores
from pipeline.errors import PipeError

CHAINS = 16
BLOCK_BYTES = 16 * 2**20  # of float64 coefficients
CUMULATIVE = (1, 8, 32, 64, 128)
EPS = 1e-12


@dataclass
class ScaleSums:
    """Running sums of one scale, float64."""

    first: np.ndarray  # Σ y (K,)
    second: np.ndarray  # Σ y yᵀ (K, K)
    histogram: np.ndarray | None  # (K, 256) counts of q + 128, int8 types only
    tokens: int = 0
    norm: float = 0.0
    norm_square: float = 0.0
    cosine: float = 0.0
    cosine_square: float = 0.0
    pairs: int = 0

    @classmethod
    def zeros(cls, scale: ScaleInfo) -> ScaleSums:
        k = scale.components
        histogram = None if scale.dtype == "float16" else np.zeros((k, 256), np.int64)
        return cls(np.zeros(k), np.zeros((k, k)), histogram)

    def add_rows(self, stored: np.ndarray, steps: np.ndarray | None) -> None:
        """stored (n, T, K) as in the cache, steps as `codec.dequantise` takes them."""
        y = codec.dequantise(stored, steps).astype(np.float64)
        n, tokens, k = y.shape
        flat = y.reshape(-1, k)
        norms = np.linalg.norm(y, axis=-1)
        self.first += flat.sum(axis=0)
        self.second += flat.T @ flat
        self.tokens += n * tokens
        self.norm += float(norms.sum())
        self.norm_square += float((norms**2).sum())
        if tokens > 1:
            unit = y / np.maximum(norms, EPS)[..., None]
            cosines = unit @ unit.swapaxes(1, 2)  # (n, T, T)
            diagonal = np.einsum("ntt->nt", cosines)
            self.cosine += float(cosines.sum() - diagonal.sum())
            self.cosine_square += float((cosines**2).sum() - (diagonal**2).sum())
            self.pairs += n * tokens * (tokens - 1)
        if self.histogram is not None:
            levels = stored.reshape(-1, k).astype(np.int64) + (128 + 256 * np.arange(k))
            self.histogram += np.bincount(levels.ravel(), minlength=256 * k).reshape(k, 256)

    def add(self, other: ScaleSums) -> None:
        self.first += other.first
        self.second += other.second
        if self.histogram is not None and other.histogram is not None:
            self.histogram += other.histogram
        for name in ("tokens", "norm", "norm_square", "cosine", "cosine_square", "pairs"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def figures(self, cut_off: int | None) -> dict[str, Any]:
        """JSON-able. `cut_off`: values that were cut off in the whole cache; None where only some rows were read."""
        mean, second = self.first / self.tokens, self.second / self.tokens
        energy = np.diag(second) / max(float(np.trace(second)), np.finfo(np.float64).tiny)
        k = len(energy)
        cosine = self.cosine / self.pairs if self.pairs else None
        return {
            "tokens": self.tokens,
            "norm_mean": self.norm / self.tokens,
            "norm_std": _std(self.norm, self.norm_square, self.tokens),
            "mean_norm": float(np.linalg.norm(mean)),
            "mean": mean.tolist(),
            "std": np.sqrt(np.clip(np.diag(second) - mean**2, 0, None)).tolist(),
            "energy": energy.tolist(),
            "cumulative": {str(m): float(energy[:m].sum()) for m in sorted({*(c for c in CUMULATIVE if c < k), k})},
            "effective_rank": effective_rank(second),
            "effective_rank_centred": effective_rank(second - np.outer(mean, mean)),
            "token_cosine_mean": cosine,
            "token_cosine_std": _std(self.cosine, self.cosine_square, self.pairs) if self.pairs else None,
            "at_limit": None if self.histogram is None else _at_limit(self.histogram),
            "levels": None if self.histogram is None else _levels(self.histogram),
            "cut_off": cut_off,
        }


@dataclass
class GlobalSums:
    """Running sums of `global`, float64."""

    unit: np.ndarray  # Σ ĝ (C,)
    rows: int = 0
    norm: float = 0.0
    norm_square: float = 0.0

    def add_rows(self, stored: np.ndarray) -> None:
        """stored (n, C) float16."""
        g = stored.astype(np.float64)
        norms = np.linalg.norm(g, axis=-1)
        self.unit += (g / np.maximum(norms, EPS)[:, None]).sum(axis=0)
        self.add(GlobalSums(np.zeros_like(self.unit), len(g), float(norms.sum()), float((norms**2).sum())))

    def add(self, other: GlobalSums) -> None:
        self.unit += other.unit
        self.rows += other.rows
        self.norm += other.norm
        self.norm_square += other.norm_square

    def figures(self) -> dict[str, Any]:
        """JSON-able; the cosine between images only where there are two."""
        n = self.rows
        return {
            "norm_mean": self.norm / n,
            "norm_std": _std(self.norm, self.norm_square, n),
            "image_cosine_mean": (float(self.unit @ self.unit) - n) / (n * (n - 1)) if n > 1 else None,
        }


@dataclass
class Sums:
    """Of one chain of shards."""

    scales: dict[str, ScaleSums]
    of_global: GlobalSums
    rows: int = field(default=0)

    @classmethod
    def zeros(cls, cache: Cache) -> Sums:
        return cls({s.name: ScaleSums.zeros(s) for s in cache.scales}, GlobalSums(np.zeros(cache.global_width)))

    def add_rows(self, cache: Cache, rows: np.ndarray) -> None:
        """Read rows (n,) int64 block by block; their checksums are compared."""
        widest = max(s.tokens * max(s.tokens, s.components) for s in cache.scales)
        block = max(1, BLOCK_BYTES // (8 * widest))
        for start in range(0, len(rows), block):
            raw = cache.read_raw(rows[start : start + block], verify=True)
            for scale in cache.scales:
                steps = raw.get(layout.steps_name(scale.name), cache.steps[scale.name])
                self.scales[scale.name].add_rows(raw[scale.name], steps)
            self.of_global.add_rows(raw[layout.GLOBAL])
        self.rows += len(rows)

    def add(self, other: Sums) -> None:
        for name, sums in self.scales.items():
            sums.add(other.scales[name])
        self.of_global.add(other.of_global)
        self.rows += other.rows


def cache_stats(
    cache: Cache, *, rows: int | None = None, seed: int = 0, workers: int | Literal["auto"] = "auto"
) -> dict[str, Any]:
    """Figures of all rows with features, or of a random `rows` of them (chosen by `seed`); JSON-able.

    Returns:
        {"rows": how many were read, "of": how many there are, "scales": {name: figures}, "global": figures}.

    Raises:
        PipeError: there are no rows, or one is damaged.
    """
    there = np.flatnonzero(cache.state() == layout.OK)
    if not len(there):
        raise PipeError("no row of this cache has features yet", where=cache.path, fix="run: pipe extract-teacher")
    sampled = rows is not None and rows < len(there)
    chosen = np.sort(np.random.default_rng(seed).choice(there, rows, replace=False)) if sampled else there
    sums = _sum_up(cache, chosen, workers)
    cut_off = cache.saturated
    return {
        "rows": sums.rows,
        "of": len(there),
        "seed": seed if sampled else None,
        "scales": {name: of.figures(None if sampled else cut_off[name]) for name, of in sums.scales.items()},
        "global": sums.of_global.figures(),
    }


def _sum_up(cache: Cache, rows: np.ndarray, workers: int | Literal["auto"]) -> Sums:
    """The sums over `rows`, ascending, shard by shard in sixteen chains."""
    import dask
    from dask.callbacks import Callback
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    shards = np.split(rows, np.flatnonzero(np.diff(rows // cache.shard_rows)) + 1)

    def step(so_far: Sums | None, of_shard: int) -> Sums:
        found = Sums.zeros(cache) if so_far is None else so_far
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
    total = Sums.zeros(cache)
    for sums in found:
        total.add(sums)
    return total


def effective_rank(moment: np.ndarray) -> float:
    """exp of the entropy of a second moment's eigenvalues (K, K) → 1 to K."""
    eigenvalues = np.clip(np.linalg.eigvalsh(moment), 0, None)
    share = eigenvalues / max(float(eigenvalues.sum()), np.finfo(np.float64).tiny)
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum()))


def _std(total: float, square: float, count: int) -> float:
    return float(max(square / count - (total / count) ** 2, 0.0) ** 0.5)


def _at_limit(histogram: np.ndarray) -> float:
    """Share of the values that are -127 or 127: those that were cut off, and those that just fit."""
    return float((histogram[:, 128 - LEVELS].sum() + histogram[:, 128 + LEVELS].sum()) / histogram.sum())


def _levels(histogram: np.ndarray) -> dict[str, float]:
    """exp of the entropy of each component's histogram (K, 256): mean, least and most over components."""
    share = histogram / histogram.sum(axis=1, keepdims=True)
    entropy = -(share * np.log(np.where(share > 0, share, 1))).sum(axis=1)
    levels = np.exp(entropy)
    return {"mean": float(levels.mean()), "least": float(levels.min()), "most": float(levels.max())}


def stats_lines(stats: dict[str, Any]) -> list[str]:
    """The same as text, for people; the spectrum as cumulative shares."""
    of = f" of {stats['of']:,} (a random choice)" if stats["rows"] < stats["of"] else ""
    lines = [
        f"rows  {stats['rows']:,}{of}",
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
    return [*lines, "", f"global      norm {_pm(found['norm_mean'], found['norm_std'])}{cosine}"]


def _pm(mean: float, std: float) -> str:
    return f"{mean:.3f} ± {std:.3f}"
