"""Keep every budget covered: cut the cost range into segments, each keeps its own non-dominated members.

CoA-LoRA (arXiv 2509.25214), Pareto-based configuration search, U = 40 segments. Without the cut, one lucky
low-cost configuration would empty the whole range above it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from coalora.errors import CoaloraError
from coalora.search.checks import Bool, Float, Int, as_objectives
from coalora.search.pareto import is_non_dominated


def segment_index(cost: Float, n_segments: int, cost_range: tuple[float, float]) -> Int:
    """Segment (n,) of every cost (n,): [low, high) cut in equal parts; costs outside belong to the end
    segments.

    Raises:
        CoaloraError: `n_segments` < 1, or `cost_range` is not two finite rising numbers.
    """
    low, high = cost_range
    if n_segments < 1:
        raise CoaloraError("n_segments must be positive", got=n_segments)
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        raise CoaloraError("cost_range must be two finite rising numbers", got=cost_range, expected="(low, high)")
    position = np.clip((np.asarray(cost) - low) / (high - low), 0.0, 1.0)
    return np.minimum((position * n_segments).astype(np.int64), n_segments - 1)


def segment_filter(Y: ArrayLike, n_segments: int, cost_range: tuple[float, float]) -> Bool:
    """Mask (n,) of the points that are non-dominated within their own segment of cost.

    Args:
        Y: points (n, 2): loss, cost, both minimised.
        n_segments: U, the number of equal parts of `cost_range`.
        cost_range: (low, high) in units of cost; points outside count to the first or last segment.

    Returns:
        Mask (n,): every segment that has a member keeps at least one; of equal points the first stays.

    Raises:
        CoaloraError: wrong shapes, NaN, or a bad `n_segments` or `cost_range`.
    """
    points = as_objectives(Y)
    segment = segment_index(points[:, 1], n_segments, cost_range)
    keep = np.zeros(points.shape[0], dtype=np.bool_)
    for u in np.unique(segment):
        members = np.flatnonzero(segment == u)
        keep[members] = is_non_dominated(points[members])
    return keep
