"""Gaussian process that predicts the loss of an adapted configuration from its per-layer errors.

HIGGS (Malinovskii et al., NAACL 2025): the loss is close to linear in per-layer quantization errors. So the prior is
a linear kernel on these errors plus a Matern-5/2 residual, with one amplitude each, one lengthscale and a noise; an
ARD kernel over hundreds of coordinates could not be identified from some hundred evaluations. Inner products and
squared distances are divided by the number of layers N, so that amplitudes and lengthscale mean the same for every
model size; they are fitted by maximum marginal likelihood (Rasmussen and Williams 2006, section 5.4.1). A neighbour
that differs in one layer changes every inner product and distance by a rank-one term: scoring it costs O(n) kernel
arithmetic instead of O(nN).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg import LinAlgError, cho_solve, cholesky, lapack, solve_triangular
from scipy.optimize import minimize

from coalora.errors import CoaloraError
from coalora.search.checks import Float, Int, as_configurations, as_losses, as_table


class Hyperparameters(NamedTuple):
    """In units of standardised losses (variances) and root-mean-square feature distance (lengthscale).

    linear: prior variance of the linear part at unit features; residual: prior variance of the Matern part;
    lengthscale: distance over which the residual changes; noise: variance of an observation.
    """

    linear: float
    residual: float
    lengthscale: float
    noise: float


def matern52(squared_distance: Float, lengthscale: float) -> Float:
    """(1 + u + u^2/3) exp(-u), u = sqrt(5 d^2) / lengthscale, elementwise (Rasmussen and Williams 2006, eq. 4.17)."""
    # In place: the search calls this on some hundred thousand elements at every step.
    u = np.maximum(squared_distance, 0.0)
    u *= 5.0 / lengthscale**2
    np.sqrt(u, out=u)
    out = u * (1.0 / 3.0)
    out += 1.0
    out *= u
    out += 1.0
    # Single precision: 1e-7 relative to the residual's amplitude, far below any noise, at a third of the time. The
    # hyperparameters' likelihood keeps double precision.
    decay = np.negative(u, dtype=np.float32, casting="same_kind")
    out *= np.exp(decay, out=decay)
    return out


def covariance(inner: Float, squared_distance: Float, hyper: Hyperparameters) -> Float:
    """Prior covariance from x.x' / N and |x - x'|^2 / N, elementwise; without noise."""
    out = matern52(squared_distance, hyper.lengthscale)
    out *= hyper.residual
    out += hyper.linear * inner
    return out


def covariance_gradient(inner: Float, squared_distance: Float, hyper: Hyperparameters) -> tuple[Float, ...]:
    """Derivatives of `covariance` by the logarithms of linear, residual and lengthscale."""
    u = np.sqrt(5.0 * np.maximum(squared_distance, 0.0)) / hyper.lengthscale
    decay = np.exp(-u)
    return (
        hyper.linear * inner,
        hyper.residual * (1.0 + u * (1.0 + u / 3.0)) * decay,
        hyper.residual * (u * u * (1.0 + u) / 3.0) * decay,
    )


_MIN_NOISE = 1e-6
_LOW = np.log([1e-6, 1e-6, 0.05, _MIN_NOISE])
_HIGH = np.log([1e5, 1e2, 20.0, 1.0])


def negative_log_likelihood(vector: Float, inner: Float, squared_distance: Float, y: Float) -> tuple[float, Float]:
    """-log p(y) and its gradient by the log hyperparameters `vector` (4,); inner and squared_distance (n, n),
    y (n,).

    Where the covariance is numerically singular the value is +inf-like (1e25) with a zero gradient.
    """
    hyper = Hyperparameters(*map(math.exp, vector))
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
    inner: Float, squared_distance: Float, y: Float, *, noise: float | None, n_restarts: int, rng: np.random.Generator
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
    start = np.log([1.0 / spread, 0.1, min(max(typical, 0.1), 10.0), 1e-3])
    low, high = _LOW.copy(), _HIGH.copy()
    if noise is not None:
        low[3] = high[3] = math.log(max(noise, 1e-10))
    if n < 3:
        return Hyperparameters(*map(math.exp, np.clip(start, low, high)))
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
    return Hyperparameters(*map(math.exp, np.clip(best.x, low, high)))


# Kernel elements worked on at a time: their few temporaries stay in the second-level cache, and below the size from
# which every allocation is new memory from the system.
_BLOCK = 12_800


@dataclass(frozen=True)
class Surrogate:
    """Fitted process; build it with `Surrogate.fit`.

    features (N, K): table of standardised errors; X (n, N): features of the training configurations; y (n,):
    standardised losses; whitener (n, n): inverse transpose of the lower Cholesky factor of their covariance
    (noise included); alpha (n,): the covariance's inverse times y; loss = loss_mean + loss_scale * y.
    """

    features: Float
    X: Float
    y: Float
    hyper: Hyperparameters
    loss_mean: float
    loss_scale: float
    whitener: Float
    alpha: Float

    @staticmethod
    def fit(
        feature_table: ArrayLike,
        configurations: ArrayLike,
        losses: ArrayLike,
        *,
        noise: float | None = None,
        seed: int,
        n_restarts: int = 2,
    ) -> Surrogate:
        """Fit to evaluated configurations.

        Args:
            feature_table: (N, K), error of every choice in every layer; any unit, each layer is standardised:
                centered on the training configurations, scaled by its spread over the choices.
            configurations: (n, N) int, n >= 1.
            losses: (n,), finite.
            noise: known variance of a loss, in squared units of loss; None fits it.
            seed: of the restarts of the hyperparameter search.
            n_restarts: number of these restarts.

        Raises:
            CoaloraError: wrong shapes, indices out of range, no configuration, non-finite losses or negative
                noise.

        Example:
            >>> from coalora import Surrogate
            >>> err = [[9.0, 3.0, 1.0], [4.0, 2.0, 1.0]]  # two layers, three choices
            >>> surrogate = Surrogate.fit(err, [[0, 0], [1, 1], [2, 2]], [14.0, 6.0, 3.0], seed=0)
            >>> mean, sigma = surrogate.predict([[2, 0]])
            >>> bool(3 < mean[0] < 14), bool(sigma[0] > 0)
            (True, True)
        """
        table = as_table(feature_table, name="feature_table")
        C, loss = _training_data(table, configurations, losses)
        if C.shape[0] == 0:
            raise CoaloraError("There is no evaluated configuration to fit a surrogate to")
        if noise is not None and not (np.isfinite(noise) and noise >= 0):
            raise CoaloraError(f"noise is {noise}", remedy="Give a variance, at least 0, or None to fit it")
        layers = np.arange(table.shape[0])
        center = table[layers, C].mean(axis=0)
        scale = table.std(axis=1)
        features = (table - center[:, None]) / np.where(scale > 0, scale, 1.0)[:, None]
        mean, spread = float(loss.mean()), float(loss.std())
        spread = spread if spread > 1e-12 * max(1.0, abs(mean)) else 1.0
        X, y = features[layers, C], (loss - mean) / spread
        inner, distance = _products(X, X)
        hyper = fit_hyperparameters(
            inner,
            distance,
            y,
            noise=None if noise is None else noise / spread**2,
            n_restarts=n_restarts,
            rng=np.random.default_rng(seed),
        )
        whitener, alpha = _factorise(inner, distance, y, hyper)
        return Surrogate(features, X, y, hyper, mean, spread, whitener, alpha)

    def predict(self, configurations: ArrayLike) -> tuple[Float, Float]:
        """Mean (m,) and standard deviation (m,) of the noise-free loss of configurations (m, N).

        Raises:
            CoaloraError: wrong shape or indices out of range.
        """
        N, K = self.features.shape
        C = as_configurations(configurations, (N, K), name="configurations")
        x = self.features[np.arange(N), C]
        inner, distance = _products(x, self.X)
        return self._posterior(inner, distance, (x * x).sum(axis=1) / N)

    def predict_moves(self, configuration: ArrayLike, layers: ArrayLike, choices: ArrayLike) -> tuple[Float, Float]:
        """Mean and standard deviation (M,) of the neighbours of a configuration (N,): move i sets layer
        `layers[i]` to `choices[i]`. Equal to `predict` of the written-out neighbours, at O(n) kernel
        arithmetic each.

        Raises:
            CoaloraError: wrong shapes or indices out of range.
        """
        N, K = self.features.shape
        C = as_configurations([np.asarray(configuration)], (N, K), name="configuration")[0]
        layer, choice = np.asarray(layers, dtype=np.int64), np.asarray(choices, dtype=np.int64)
        if layer.ndim != 1 or layer.shape != choice.shape:
            raise CoaloraError(f"layers and choices have the shapes {layer.shape} and {choice.shape}, not both (m,)")
        if layer.size == 0:
            return np.empty(0), np.empty(0)
        if min(layer.min(), choice.min()) < 0 or layer.max() >= N or choice.max() >= K:
            raise CoaloraError("A move is out of range", remedy=f"Name layers below {N} and choices below {K}")
        x = self.features[np.arange(N), C]
        inner, distance = _products(x[None], self.X)
        step = (self.features[layer, choice] - x[layer]) / N
        # |x + d e_l - x_i|^2 = |x - x_i|^2 + 2 d (x_l - x_il) + d^2, and (x + d e_l).x_i = x.x_i + d x_il
        shift = step * (2.0 * x[layer] + step * N)
        # Rows of one layer are shared by its moves: gather from a contiguous transpose.
        columns = np.ascontiguousarray(self.X.T)
        out = np.empty((2, layer.size))
        rows = max(1, _BLOCK // self.X.shape[0])
        for begin in range(0, layer.size, rows):
            part = slice(begin, begin + rows)
            moved = columns[layer[part]]
            moved *= step[part, None]
            squared = distance + shift[part, None]
            squared -= moved
            squared -= moved
            moved += inner
            out[:, part] = self._posterior(moved, squared, x @ x / N + shift[part])
        return out[0], out[1]

    def condition_on(self, configurations: ArrayLike, losses: ArrayLike) -> Surrogate:
        """The same process, hyperparameters and standardisation, with further (or imagined) observations.

        Args:
            configurations: (q, N) int.
            losses: (q,), in units of loss.

        Raises:
            CoaloraError: wrong shapes, indices out of range, non-finite losses.
        """
        C, loss = _training_data(self.features, configurations, losses)
        X = np.concatenate([self.X, self.features[np.arange(self.features.shape[0]), C]])
        y = np.concatenate([self.y, (loss - self.loss_mean) / self.loss_scale])
        inner, distance = _products(X, X)
        whitener, alpha = _factorise(inner, distance, y, self.hyper)
        return replace(self, X=X, y=y, whitener=whitener, alpha=alpha)

    def _posterior(self, inner: Float, distance: Float, norm: Float) -> tuple[Float, Float]:
        """From products with the training points (m, n) and |x|^2 / N (m,)."""
        cross = covariance(inner, distance, self.hyper)
        mean = self.loss_mean + self.loss_scale * (cross @ self.alpha)
        # A product with the inverse factor: twice the operations of a triangular solve, in half of its time, and rows
        # stay contiguous for the sum of squares.
        whitened = cross @ self.whitener
        prior = self.hyper.linear * norm + self.hyper.residual
        variance = prior - np.einsum("mn,mn->m", whitened, whitened)
        return mean, self.loss_scale * np.sqrt(np.maximum(variance, 0.0))


def _training_data(table: Float, configurations: ArrayLike, losses: ArrayLike) -> tuple[Int, Float]:
    C = as_configurations(configurations, (table.shape[0], table.shape[1]), name="configurations")
    return C, as_losses(losses, len(C))


def _products(a: Float, b: Float) -> tuple[Float, Float]:
    """a.b / N and |a - b|^2 / N for rows of a (m, N) and b (n, N): two (m, n)."""
    N = a.shape[1]
    inner = a @ b.T
    distance = (a * a).sum(axis=1)[:, None] + (b * b).sum(axis=1) - 2.0 * inner
    return inner / N, np.maximum(distance, 0.0) / N


def _factorise(inner: Float, distance: Float, y: Float, hyper: Hyperparameters) -> tuple[Float, Float]:
    K = covariance(inner, distance, hyper)
    jitter = 0.0
    while True:
        try:
            factor = cholesky(K + (hyper.noise + jitter) * np.eye(y.size), lower=True, check_finite=False)
            whitener = solve_triangular(factor, np.eye(y.size), lower=True, check_finite=False).T
            return np.ascontiguousarray(whitener), cho_solve((factor, True), y, check_finite=False)
        except LinAlgError:
            # Equal configurations with almost no noise: the smallest power of ten that makes it definite.
            jitter = max(10.0 * jitter, 1e-12 * float(np.trace(K)) / y.size)
