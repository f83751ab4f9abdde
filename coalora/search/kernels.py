"""Kernel of the surrogate: linear plus Matern-5/2 on inner products and squared distances, and its
derivatives.

Both enter divided by the number of layers N, so that amplitudes and lengthscale mean the same for every model
size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from coalora.search.checks import Float


@dataclass(frozen=True)
class Hyperparameters:
    """In units of standardised losses (variances) and root-mean-square feature distance (lengthscale).

    linear: prior variance of the linear part at unit features; residual: prior variance of the Matern part;
    lengthscale: distance over which the residual changes; noise: variance of an observation.
    """

    linear: float
    residual: float
    lengthscale: float
    noise: float


def matern52(squared_distance: Float, lengthscale: float) -> Float:
    """(1 + u + u^2/3) exp(-u), u = sqrt(5 d^2) / lengthscale, elementwise (Rasmussen and Williams 2006, eq.
    4.17).
    """
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


def log_vector(hyper: Hyperparameters) -> Float:
    """Logarithms (4,): linear, residual, lengthscale, noise."""
    return np.log([hyper.linear, hyper.residual, hyper.lengthscale, hyper.noise])


def from_log_vector(vector: Float) -> Hyperparameters:
    """Inverse of `log_vector`."""
    return Hyperparameters(*(math.exp(v) for v in vector))
