"""Hyperparameters of the surrogate by maximum marginal likelihood (Rasmussen and Williams 2006, section
5.4.1).
"""

from __future__ import annotations

import math

import numpy as np
from scipy.linalg import lapack
from scipy.optimize import minimize

from coalora.search.checks import Float
from coalora.search.kernels import Hyperparameters, covariance_gradient, from_log_vector, log_vector

_MIN_NOISE = 1e-6
_LOW = np.log([1e-6, 1e-6, 0.05, _MIN_NOISE])
_HIGH = np.log([1e5, 1e2, 20.0, 1.0])


def negative_log_likelihood(vector: Float, inner: Float, squared_distance: Float, y: Float) -> tuple[float, Float]:
    """-log p(y) and its gradient by the log hyperparameters `vector` (4,); inner and squared_distance (n, n),
    y (n,).

    Where the covariance is numerically singular the value is +inf-like (1e25) with a zero gradient.
    """
    hyper = from_log_vector(vector)
    parts = covariance_gradient(inner, squared_distance, hyper)
    n = y.size
    K = parts[0] + parts[1]
    K[np.diag_indices(n)] += hyper.noise
    factor, failed = lapack.dpotrf(K, lower=1)
    if failed:
        return 1e25, np.zeros(4)
    half, _ = lapack.dpotri(factor, lower=1)
    inverse = np.tril(half) + np.tril(half, -1).T
    alpha = inverse @ y
    value = 0.5 * float(y @ alpha) + float(np.log(np.diag(factor)).sum()) + 0.5 * n * math.log(2 * math.pi)
    inverse -= np.outer(alpha, alpha)
    gradient = [0.5 * float(np.vdot(inverse, part)) for part in parts]
    return value, np.array([*gradient, 0.5 * hyper.noise * float(np.trace(inverse))])


def fit_hyperparameters(
    inner: Float,
    squared_distance: Float,
    y: Float,
    *,
    noise: float | None,
    n_restarts: int,
    rng: np.random.Generator,
) -> Hyperparameters:
    """Best of L-BFGS-B from one data-scaled start and `n_restarts` perturbations of it.

    Args:
        inner, squared_distance: (n, n), x.x' / N and |x - x'|^2 / N.
        y: standardised losses (n,).
        noise: variance of an observation, in units of `y`; None fits it, within 1e-6 and 1.
        n_restarts: additional starts, drawn from `rng`.
    """
    n = y.size
    off_diagonal = squared_distance[np.triu_indices(n, 1)]
    typical = math.sqrt(float(np.median(off_diagonal))) if n > 1 else 1.0
    spread = max(float(np.mean(np.diag(inner))), 1e-3)
    start = log_vector(Hyperparameters(1.0 / spread, 0.1, min(max(typical, 0.1), 10.0), 1e-3))
    low, high = _LOW.copy(), _HIGH.copy()
    if noise is not None:
        low[3] = high[3] = math.log(max(noise, 1e-10))
    if n < 3:
        return from_log_vector(np.clip(start, low, high))
    starts = [start] + [start + rng.normal(0.0, [1.0, 1.5, 1.0, 2.0]) for _ in range(n_restarts)]
    results = [
        minimize(
            negative_log_likelihood,
            np.clip(point, low, high),
            args=(inner, squared_distance, y),
            jac=True,
            method="L-BFGS-B",
            bounds=list(zip(low, high, strict=True)),
            options={"maxiter": 40, "ftol": 1e-6},
        )
        for point in starts
    ]
    best = min(results, key=lambda result: float(result.fun))
    return from_log_vector(np.clip(best.x, low, high))
