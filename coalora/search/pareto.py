"""Non-dominated points: those that no other point matches in all objectives and beats in one.

The two-objective case, the one the search uses, is a sort and a running minimum (Kung, Luccio and Preparata
1975); more objectives fall back on comparing all pairs. Everything is minimised.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from coalora.search.checks import Bool, Float, as_objectives


def is_non_dominated(Y: ArrayLike, *, deduplicate: bool = True) -> Bool:
    """Mask of the non-dominated points, all objectives minimised.

    Args:
        Y: objectives (n, m), m >= 2; infinities are allowed.
        deduplicate: of equal non-dominated points keep only the first (BoTorch's default); False keeps all.

    Returns:
        Mask (n,). O(n log n) for m = 2, O(n^2 m) otherwise.

    Raises:
        CoaloraError: `Y` is not (n, m) or contains NaN.
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
