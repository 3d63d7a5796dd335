"""Sums over rows from which the figures of `stats` follow: moments, histograms, cosines between tokens and images.

Legend: n rows of a block, T tokens, K components, C width of `global`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.cache import codec
from pipeline.cache.codec import LEVELS
from pipeline.cache.layout import ScaleInfo

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
