"""L2-regularised multinomial logistic regression by L-BFGS: the estimator of the probes.

    J(W, b) = (1 / n) Σ_i [ log Σ_c exp(z_ic) − z_i,y_i ] + ‖W‖² / (2 C n),      z_i = W x_i + b,   b not penalised

which is scikit-learn's objective (its C, divided by n·C), and gives its accuracy (tested); the reason for our own is
the path: 45 values of C, each started from its neighbour's solution. Legend: n rows, D width, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

Matrix = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Classifier:
    """`weights` (K, D) float64, `bias` (K,) float64."""

    weights: Matrix
    bias: Matrix

    def scores(self, features: NDArray[np.floating]) -> Matrix:
        """(n, D) → (n, K)."""
        return features.astype(np.float64) @ self.weights.T + self.bias

    def predict(self, features: NDArray[np.floating]) -> Ints:
        """(n, D) → (n,) class numbers; ties go to the lower number."""
        return np.argmax(self.scores(features), axis=1)


def fit(
    features: NDArray[np.floating],
    labels: Ints,
    classes: int,
    *,
    c: float,
    start: Classifier | None = None,
    tolerance: float = 1e-8,
    max_iterations: int = 1000,
) -> Classifier:
    """The minimiser of J.

    Args:
        features: (n, D), labels: (n,) in [0, classes); a class without rows keeps a low bias and is not predicted.
        c: inverse strength of the penalty, scikit-learn's C.
        start: where to start (the neighbour on the path).
        tolerance: stop where no entry of the gradient of J exceeds it.
    """
    x = features.astype(np.float64)
    n, d = x.shape
    shape = (classes, d + 1)
    rows = np.arange(n)
    # Two classes: scikit-learn fits one weight vector w = w_1 − w_0, which is ours at half the penalty.
    penalty = 1.0 / (c * n) * (2.0 if classes == 2 else 1.0)

    def objective(flat: Matrix) -> tuple[float, Matrix]:
        parameters = flat.reshape(shape)
        weights = parameters[:, :d]
        z = x @ weights.T
        z += parameters[:, d]
        z -= z.max(axis=1, keepdims=True)
        own = z[rows, labels]
        np.exp(z, out=z)
        total = z.sum(axis=1)
        value = float(np.mean(np.log(total) - own)) + 0.5 * penalty * float(np.vdot(weights, weights))
        z /= total[:, None]
        z[rows, labels] -= 1.0
        z /= n
        gradient = np.empty(shape)
        np.matmul(z.T, x, out=gradient[:, :d])
        gradient[:, :d] += penalty * weights
        gradient[:, d] = z.sum(axis=0)
        return value, gradient.ravel()

    first = np.zeros(shape) if start is None else np.column_stack([start.weights, start.bias])
    options = {"maxiter": max_iterations, "maxfun": 4 * max_iterations, "gtol": tolerance, "ftol": 0.0, "maxcor": 10}
    found = minimize(objective, first.ravel(), jac=True, method="L-BFGS-B", options=options)
    parameters = found.x.reshape(shape)
    return Classifier(parameters[:, :d].copy(), parameters[:, d].copy())


def path(
    features: NDArray[np.floating], labels: Ints, classes: int, *, cs: Iterable[float], tolerance: float
) -> Iterator[Classifier]:
    """Solutions along ascending C, each started from the one before (strong penalty first: its solution is near 0)."""
    start: Classifier | None = None
    for c in cs:
        start = fit(features, labels, classes, c=c, start=start, tolerance=tolerance)
        yield start
