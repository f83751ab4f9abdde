"""Exact expected hypervolume improvement when the second objective, the cost, is known for certain.

With the non-dominated set by rising cost b_1 < ... < b_K (losses l_1 > ... > l_K), reference (r1, r2), s_0 =
r1, s_k = l_k, e_0 = -inf, e_k = b_k, e_{K+1} = r2, a candidate of cost b and loss N(mu, sigma^2) gains

    EHVI = sum_k w_k sigma h(z_k),   w_k = max(0, e_{k+1} - max(e_k, b)),   z_k = (s_k - mu) / sigma,

h(z) = phi(z) + z Phi(z): on each strip of cost the improvement is an ordinary expected improvement over the
staircase. Emmerich et al. (2011) give the two-sided form; log h is evaluated as in LogEI (Ament et al. 2023),
so that candidates far from improving still rank, which hill climbing needs.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import erfcx

from coalora.errors import CoaloraError
from coalora.search.checks import Float, as_point
from coalora.search.pareto import sorted_front

_LOG_SQRT_2PI = 0.5 * math.log(2.0 * math.pi)
_SQRT_HALF_PI = math.sqrt(0.5 * math.pi)
# Below this the erfcx form loses digits to cancellation (relative eps z^2) and the series is exact to 1e-13.
_FAR = -100.0
# Above this h(z) = z to 1e-24, and erfcx would overflow further on.
_NEAR = 10.0


def log_h(z: ArrayLike) -> Float:
    """log(phi(z) + z Phi(z)) elementwise, accurate for every z."""
    z = np.asarray(z, dtype=np.float64)
    x = np.clip(z, _FAR, _NEAR)
    # h(z) = phi(z) (1 + z Phi(z) / phi(z)), and erfcx is Phi / phi without the underflow.
    out = -0.5 * x * x - _LOG_SQRT_2PI + np.log1p(x * _SQRT_HALF_PI * erfcx(x * -math.sqrt(0.5)))
    near = z > _NEAR
    if near.any():
        out[near] = np.log(z[near])
    far = z < _FAR
    if far.any():
        x = z[far]
        u = 1.0 / (x * x)
        out[far] = -0.5 * x * x - _LOG_SQRT_2PI + np.log(u) + np.log1p(-u * (3.0 - u * (15.0 - 105.0 * u)))
    return out


def log_ehvi(mean: ArrayLike, sigma: ArrayLike, cost: ArrayLike, front: ArrayLike, ref_point: ArrayLike) -> Float:
    """Logarithm of the expected gain in hypervolume of each candidate.

    Args:
        mean, sigma: predicted loss (m,) and its standard deviation (m,), sigma >= 0; sigma = 0 means certain.
        cost: cost (m,) of the candidates, known exactly.
        front: observed points (n, 2): loss, cost; dominated ones and those beyond `ref_point` are ignored; n
            may be 0.
        ref_point: (loss, cost), both minimised.

    Returns:
        (m,): log of loss times cost; -inf where no gain is possible (cost at or beyond the reference, or a
        certain loss that is dominated).

    Raises:
        CoaloraError: wrong shapes, NaN, or a negative sigma.

    Example:
        >>> from coalora import log_ehvi
        >>> front = [[2.0, 3.0], [1.0, 4.0]]
        >>> log_ehvi([1.5, 3.0], [0.1, 0.1], [3.5, 3.5], front, ref_point=[4.0, 5.0]).round(2).tolist()
        [-1.39, -58.55]
    """
    mu, sd, b = (np.asarray(v, dtype=np.float64) for v in (mean, sigma, cost))
    if mu.ndim != 1 or mu.shape != sd.shape or mu.shape != b.shape:
        raise CoaloraError(f"mean, sigma and cost have the shapes {mu.shape}, {sd.shape} and {b.shape}, not all (m,)")
    if np.isnan(mu).any() or np.isnan(b).any() or not (sd >= 0).all():
        raise CoaloraError("There is NaN in mean or cost, or a sigma that is no number of at least 0")
    r = as_point(ref_point, name="ref_point")
    Y = sorted_front(front, r)
    s = np.concatenate([r[:1], Y[:, 0]])
    edges = np.concatenate([[-np.inf], Y[:, 1], r[1:]])
    out = np.full(mu.shape, -np.inf)
    rows = np.flatnonzero(b < r[1])
    if rows.size == 0:
        return out
    mu, sd, b = mu[rows], sd[rows], b[rows]
    # Candidate i sees only the strips that end beyond its cost: first_i .. n, laid out one after the other.
    first = np.searchsorted(edges[1:], b, side="right")
    count = s.size - first
    starts = np.concatenate([[0], np.cumsum(count)[:-1]])
    strips = np.arange(count.sum()) + np.repeat(first - starts, count)
    width = edges[1:][strips] - np.maximum(edges[strips], np.repeat(b, count))
    gap, spread = s[strips] - np.repeat(mu, count), np.repeat(sd, count)
    certain = sd == 0.0
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        terms = np.log(width)
        if certain.any():
            fixed = np.repeat(certain, count)
            terms[fixed] += np.log(np.maximum(gap[fixed], 0.0))
            terms[~fixed] += log_h(gap[~fixed] / spread[~fixed])
        else:
            terms += log_h(gap / spread)
        top = np.maximum.reduceat(terms, starts)
        top[top == -np.inf] = 0.0
        total = np.log(np.add.reduceat(np.exp(terms - np.repeat(top, count)), starts))
        out[rows] = top + total + np.where(certain, 0.0, np.log(sd))
    return out
