"""From teacher features to stored numbers and back: uncentred PCA, quantisation, and how faithful the result is.

The basis diagonalises the *uncentred* second moment M = E[x xᵀ] (our reading), so the mean direction is a component
like any other and inner products of the coefficients y = Vᵀx are those of the projected features V Vᵀ x: norms, cosines
and Gram matrices can be taken of the coefficients; nobody ever un-projects.

Legend: n images, T tokens, C the teacher's width, K components.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipeline.cache.layout import StoredDtype
from pipeline.errors import PipeError

LEVELS = 127  # int8 uses -127..127: symmetric, so that negating a feature negates what is stored
FLOAT16_MAX = 65504.0
BLOCK_TOKENS = 16384  # bounds the float64 copy of a batch
EPS = 1e-6


class SecondMoment:
    """Streaming M = (1 / tokens) Σ x xᵀ in float64; memory C² whatever the number of rows."""

    def __init__(self, width: int) -> None:
        self.sum = np.zeros((width, width), np.float64)
        self.tokens = 0

    def update(self, features: np.ndarray) -> None:
        """Add `features` (n, T, C) or (n, C), any float dtype."""
        flat = features.reshape(-1, self.sum.shape[0])
        for start in range(0, len(flat), BLOCK_TOKENS):
            block = flat[start : start + BLOCK_TOKENS].astype(np.float64)
            self.sum += block.T @ block
        self.tokens += len(flat)

    @property
    def matrix(self) -> np.ndarray:
        """(C, C) float64."""
        if self.tokens == 0:
            raise PipeError("no calibration features were seen", fix="the manifest needs at least one usable row")
        return self.sum / self.tokens


def fit_basis(moment: SecondMoment, components: int | None) -> tuple[np.ndarray | None, float]:
    """The leading eigenvectors V of the second moment, largest first.

    Signs are fixed: the entry of largest magnitude of each column is positive. K = min(components, C).

    Returns:
        (V (C, K) float32, Σ_{k<=K} λ_k / Σ λ), or (None, 1.0) for `components` None: every channel is kept as it is.
    """
    if components is None:
        return None, 1.0
    matrix = moment.matrix
    if not np.isfinite(matrix).all():
        raise PipeError("the teacher's features are not finite", fix="run the teacher in float32 or bf16")
    eigenvalues, vectors = np.linalg.eigh(matrix)  # ascending
    eigenvalues = np.clip(eigenvalues[::-1], 0, None)
    basis = vectors[:, ::-1][:, : min(components, len(matrix))]
    largest = np.take_along_axis(basis, np.abs(basis).argmax(axis=0)[None], axis=0)
    basis = basis * np.where(largest < 0, -1.0, 1.0)
    explained = eigenvalues[: basis.shape[1]].sum() / max(eigenvalues.sum(), np.finfo(np.float64).tiny)
    return np.ascontiguousarray(basis, np.float32), float(explained)


class ComponentMaxima:
    """Streaming max |y_k| over calibration coefficients; gives one step per component."""

    def __init__(self, components: int) -> None:
        self.maxima = np.zeros(components, np.float32)

    def update(self, coefficients: np.ndarray) -> None:
        """Add `coefficients` (n, T, K) float32."""
        flat = np.abs(coefficients).reshape(-1, len(self.maxima))
        self.maxima = np.maximum(self.maxima, flat.max(axis=0, initial=0))

    def steps(self) -> np.ndarray:
        """(K,) float32: max|y_k| / 127. A component that never moved takes the smallest step of the others."""
        moved = self.maxima > 0
        idle = self.maxima[moved].min() if moved.any() else np.float32(LEVELS)
        steps: np.ndarray = np.where(moved, self.maxima, idle).astype(np.float32) / np.float32(LEVELS)
        return np.maximum(steps, np.finfo(np.float32).tiny)  # the smallest maxima, divided, would become a step of zero


@dataclass(frozen=True, eq=False)
class Stored:
    """Encoded rows: values (n, T, K), per-token steps (n, T) float32 for int8_token, how many values were cut off."""

    values: np.ndarray
    token_steps: np.ndarray | None
    saturated: int


@dataclass(frozen=True, eq=False)
class ScaleCodec:
    """How one scale's features become stored numbers.

    Args:
        dtype: "int8" (one step per component), "int8_token" (one per token) or "float16".
        width: C.
        basis: (C, K) float32, or None to keep every channel.
        steps: (K,) float32, for "int8" only; None until calibration has seen the coefficients.
        explained: share of the second moment that the basis keeps.
    """

    dtype: StoredDtype
    width: int
    basis: np.ndarray | None = None
    steps: np.ndarray | None = None
    explained: float = 1.0

    @property
    def components(self) -> int:
        return self.width if self.basis is None else int(self.basis.shape[1])

    def with_steps(self, steps: np.ndarray) -> ScaleCodec:
        """The same codec with `steps` (K,) from `ComponentMaxima`."""
        return replace(self, steps=np.asarray(steps, np.float32))

    def project(self, features: np.ndarray) -> np.ndarray:
        """y = Vᵀx: features (n, T, C) → coefficients (n, T, K) float32."""
        features = np.asarray(features, np.float32)
        return features if self.basis is None else features @ self.basis

    def quantise(self, coefficients: np.ndarray) -> Stored:
        """q = clip(rint(y / step), ±127), ties to even; coefficients (n, T, K) float32.

        Raises:
            PipeError: a coefficient is NaN or infinite.
        """
        if not np.isfinite(coefficients).all():
            raise PipeError("the teacher's features are not finite", fix="run the teacher in float32 or bf16")
        if self.dtype == "float16":
            values, saturated = to_float16(coefficients)
            return Stored(values, None, saturated)
        if self.dtype == "int8_token":
            token_steps = np.abs(coefficients).max(axis=-1).astype(np.float32) / np.float32(LEVELS)
            divisor = np.where(token_steps > 0, token_steps, np.float32(1))[..., None]
            values, _ = _to_int8(coefficients / divisor)
            return Stored(values, token_steps, 0)
        if self.steps is None:
            raise ValueError("int8 needs the steps of a calibration: use with_steps")
        values, saturated = _to_int8(coefficients / self.steps)
        return Stored(values, None, saturated)

    def encode(self, features: np.ndarray) -> Stored:
        """`quantise(project(features))`."""
        return self.quantise(self.project(features))

    def dequantise(self, values: np.ndarray, token_steps: np.ndarray | None = None) -> np.ndarray:
        """Stored values (n, T, K) → coefficients float32."""
        return dequantise(values, token_steps if self.dtype == "int8_token" else self.steps)


def dequantise(values: np.ndarray, steps: np.ndarray | None = None) -> np.ndarray:
    """values (n, T, K) int8 or float16 → float32; `steps`: (K,) per component, (n, T) per token, None for float16."""
    coefficients = values.astype(np.float32)
    if steps is not None:
        coefficients *= steps if steps.ndim == 1 else steps[..., None]
    return coefficients


def to_float16(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Round to float16; what lies beyond its range is cut to ±65,504 and counted, never stored as infinity."""
    beyond = int(np.count_nonzero(np.abs(values) > FLOAT16_MAX))
    return np.clip(values, -FLOAT16_MAX, FLOAT16_MAX).astype(np.float16), beyond


def _to_int8(levels: np.ndarray) -> tuple[np.ndarray, int]:
    rounded = np.rint(levels)
    saturated = int(np.count_nonzero(np.abs(rounded) > LEVELS))
    return np.clip(rounded, -LEVELS, LEVELS).astype(np.int8), saturated


class Fidelity:
    """What is lost against the raw teacher, on rows that the calibration has not seen.

    With x a raw token and x̂ = V y its stored coefficients in the teacher's space: cosine ⟨x, x̂⟩ / ‖x‖‖x̂‖ (mean, and
    the 1 % quantile over all tokens), relative L2 √(Σ‖x − x̂‖² / Σ‖x‖²). With S and Ŝ the cosine Gram matrices of the
    raw tokens and of the stored coefficients of one image: mean |Ŝ − S| and its root mean square.
    Only this measure un-projects; targets are always used as coefficients.
    """

    def __init__(self) -> None:
        self.cosines: list[np.ndarray] = []
        self.error = self.energy = self.gram_abs = self.gram_square = 0.0
        self.gram_entries = self.images = 0

    def update(self, features: np.ndarray, coefficients: np.ndarray, basis: np.ndarray | None) -> None:
        """features (n, T, C) raw float32, coefficients (n, T, K) dequantised, basis (C, K) or None."""
        for x, y in zip(np.asarray(features, np.float64), np.asarray(coefficients, np.float64), strict=True):
            restored = y if basis is None else y @ basis.T.astype(np.float64)
            x_unit, y_unit = _unit(x), _unit(y)
            self.cosines.append((x_unit * _unit(restored)).sum(axis=-1).astype(np.float32))
            self.error += float(((x - restored) ** 2).sum())
            self.energy += float((x**2).sum())
            difference = y_unit @ y_unit.T - x_unit @ x_unit.T
            self.gram_abs += float(np.abs(difference).sum())
            self.gram_square += float((difference**2).sum())
            self.gram_entries += difference.size
            self.images += 1

    def result(self) -> dict[str, Any]:
        """JSON-able figures; at least one image must have been seen."""
        if not self.images:
            raise PipeError("no held-out rows to measure fidelity on", fix="use fewer calibration rows")
        cosines = np.concatenate(self.cosines)
        return {
            "images": self.images,
            "cosine_mean": float(cosines.mean(dtype=np.float64)),
            "cosine_worst_1pct": float(np.quantile(cosines, 0.01)),
            "gram_mean_abs": self.gram_abs / self.gram_entries,
            "gram_rms": (self.gram_square / self.gram_entries) ** 0.5,
            "relative_l2": (self.error / max(self.energy, np.finfo(np.float64).tiny)) ** 0.5,
        }


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), EPS)
