"""Pareto sets of (loss, cost): non-dominated points, hypervolume, and the cut into segments of cost.

Everything is minimised. Non-dominated are points that no other matches in all objectives and beats in one; for two
objectives that is a sort and a running minimum (Kung, Luccio and Preparata 1975), more fall back on comparing all
pairs. The hypervolume is the area that a set dominates up to a reference point (Zitzler and Thiele 1999). Segments
keep every budget covered: each keeps its own non-dominated members (CoA-LoRA, arXiv 2509.25214, Pareto-based
configuration search, U = 40). Without the cut, one lucky low-cost configuration would empty the whole range above it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from coalora.errors import CoaloraError
from coalora.search.checks import Bool, Float, as_objectives, as_point


def is_non_dominated(Y: ArrayLike, *, deduplicate: bool = True) -> Bool:
    """Mask of the non-dominated points, all objectives minimised.

    Args:
        Y: objectives (n, m), m >= 2; infinities are allowed.
        deduplicate: of equal non-dominated points keep only the first (BoTorch's default); False keeps all.

    Returns:
        Mask (n,). O(n log n) for m = 2, O(n^2 m) otherwise.

    Raises:
        CoaloraError: `Y` is not (n, m) or contains NaN.

    Example:
        >>> from coalora import is_non_dominated
        >>> is_non_dominated([[2.0, 3.0], [1.0, 4.0], [2.0, 4.0]]).tolist()
        [True, True, False]
    """
    points = as_objectives(Y, n_objectives=None)
    n = points.shape[0]
    if n == 0:
        return np.zeros(0, dtype=np.bool_)
    keep = _two_objectives(points) if points.shape[1] == 2 else _all_pairs(points)
    if deduplicate:
        kept = np.flatnonzero(keep)
        _, first = np.unique(points[kept], axis=0, return_index=True)
        keep = np.zeros(n, dtype=np.bool_)
        keep[kept[first]] = True
    return keep


def _two_objectives(points: Float) -> Bool:
    order = np.lexsort((points[:, 0], points[:, 1]))
    loss, cost = points[order, 0], points[order, 1]
    # Lowest loss at a strictly lower cost: the running minimum at the end of the previous group of equal
    # costs.
    group = np.cumsum(np.concatenate([[False], cost[1:] != cost[:-1]]))
    starts = np.flatnonzero(np.concatenate([[True], cost[1:] != cost[:-1]]))
    lowest_in_group = loss[starts]
    running = np.minimum.accumulate(lowest_in_group)
    below = np.concatenate([[np.inf], running[:-1]])
    good = (loss == lowest_in_group[group]) & ((loss < below[group]) | (group == 0))
    keep = np.zeros(points.shape[0], dtype=np.bool_)
    keep[order] = good
    return keep


def _all_pairs(points: Float) -> Bool:
    keep = np.ones(points.shape[0], dtype=np.bool_)
    for i, point in enumerate(points):
        keep[i] = not ((points <= point).all(axis=1) & (points < point).any(axis=1)).any()
    return keep


def sorted_front(Y: ArrayLike, ref_point: ArrayLike) -> Float:
    """Non-dominated members of `Y` (n, 2) strictly better than `ref_point`, by rising cost, so falling loss: (k, 2)."""
    points, reference = as_objectives(Y), as_point(ref_point, name="ref_point")
    points = points[(points < reference).all(axis=1)]
    points = points[is_non_dominated(points)]
    return points[np.argsort(points[:, 1])]


def hypervolume(Y: ArrayLike, ref_point: ArrayLike) -> float:
    """Area between the set and `ref_point`, in units of loss times cost.

    Args:
        Y: points (n, 2): loss, cost. Points that do not beat `ref_point` in both add nothing; n = 0 gives 0.
        ref_point: (loss, cost), worse than every point that should count.

    Raises:
        CoaloraError: wrong shapes, or NaN.

    Example:
        >>> from coalora import hypervolume
        >>> hypervolume([[2.0, 3.0], [1.0, 4.0], [9.0, 9.0]], ref_point=[4.0, 5.0])
        5.0
    """
    front = sorted_front(Y, ref_point)
    reference = as_point(ref_point, name="ref_point")
    widths = np.diff(front[:, 1], append=reference[1])
    return float(((reference[0] - front[:, 0]) * widths).sum())


def normalized_hypervolume(Y: ArrayLike, ideal: ArrayLike, ref_point: ArrayLike) -> float:
    """Hypervolume as a fraction, 0 to 1, of the rectangle between `ideal` and `ref_point`.

    `ideal` is the point (lowest loss, lowest cost) that nothing can beat; points beyond it are clipped to it.
    A number without its `ideal` and `ref_point` says nothing: report all three.

    Raises:
        CoaloraError: wrong shapes, NaN, or `ideal` not strictly below `ref_point` in both.
    """
    low, high = as_point(ideal, name="ideal"), as_point(ref_point, name="ref_point")
    if not (low < high).all():
        raise CoaloraError(f"ideal {ideal!r} is not strictly below ref_point {ref_point!r} in both objectives")
    return hypervolume(np.maximum(as_objectives(Y), low), high) / float(np.prod(high - low))


def segment_filter(Y: ArrayLike, n_segments: int, cost_range: tuple[float, float]) -> Bool:
    """Mask (n,) of the points that are non-dominated within their own segment of cost.

    Args:
        Y: points (n, 2): loss, cost, both minimised.
        n_segments: U, the number of equal parts of `cost_range`.
        cost_range: (low, high) in units of cost, cut into [a, b); points outside count to the first or last segment.

    Returns:
        Mask (n,): every segment that has a member keeps at least one; of equal points the first stays.

    Raises:
        CoaloraError: wrong shapes, NaN, or a bad `n_segments` or `cost_range`.
    """
    points, (low, high) = as_objectives(Y), cost_range
    if n_segments < 1:
        raise CoaloraError(f"n_segments is {n_segments}", remedy="Set it to at least 1")
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        raise CoaloraError(f"cost_range is {cost_range}", remedy="Give two finite rising numbers, (low, high)")
    position = np.clip((points[:, 1] - low) / (high - low), 0.0, 1.0)
    segment = np.minimum((position * n_segments).astype(np.int64), n_segments - 1)
    keep = np.zeros(points.shape[0], dtype=np.bool_)
    for u in np.unique(segment):
        members = np.flatnonzero(segment == u)
        keep[members] = is_non_dominated(points[members])
    return keep
