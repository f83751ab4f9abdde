"""Area dominated by a set of (loss, cost) points up to a reference point, both minimised (Zitzler and Thiele
1999).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from coalora.errors import CoaloraError
from coalora.search.checks import Float, as_objectives, as_point
from coalora.search.pareto import is_non_dominated


def sorted_front(Y: ArrayLike, ref_point: ArrayLike) -> Float:
    """Non-dominated members of `Y` (n, 2) strictly better than `ref_point`, by rising cost (so falling loss):
    (k, 2).
    """
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
        raise CoaloraError("ideal must be strictly below ref_point in both objectives", got=(ideal, ref_point))
    return hypervolume(np.maximum(as_objectives(Y), low), high) / float(np.prod(high - low))
