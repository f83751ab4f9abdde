"""Per-layer trade-offs between cost and error: the staircase of useful choices and its lower convex hull.

All layers at once: one sort of the table, then gift wrapping in which every layer takes its steepest descent
together, so the Python loop runs over hull vertices (tens), not over layers or choices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from coalora.errors import CoaloraError
from coalora.search.checks import Float, Int


@dataclass(frozen=True)
class Staircase:
    """Choices worth taking in each layer, by rising cost and strictly falling error; rows padded on the
    right.

    index (N, P): the choice; cost (N, P): +inf in the padding; err (N, P): the row's last value in the
    padding.
    """

    index: Int
    cost: Float
    err: Float


def staircase(cost: Float, err: Float) -> Staircase:
    """Undominated choices of every layer, from tables cost, err (N, K); of equal choices the first stays."""
    order = np.lexsort((err, cost), axis=-1)
    c = np.take_along_axis(cost, order, axis=1)
    e = np.take_along_axis(err, order, axis=1)
    keep = np.ones(e.shape, dtype=np.bool_)
    keep[:, 1:] = e[:, 1:] < np.minimum.accumulate(e, axis=1)[:, :-1]
    count = keep.sum(axis=1)
    slots = np.arange(count.max())
    rows, columns = np.nonzero(keep)
    position = np.zeros((cost.shape[0], count.max()), dtype=np.int64)
    position[rows, (np.cumsum(keep, axis=1) - 1)[rows, columns]] = columns
    last = position[np.arange(cost.shape[0]), count - 1]
    padding = slots >= count[:, None]
    position = np.where(padding, last[:, None], position)
    return Staircase(
        index=np.take_along_axis(order, position, axis=1),
        cost=np.where(padding, np.inf, np.take_along_axis(c, position, axis=1)),
        err=np.take_along_axis(e, position, axis=1),
    )


def hull_paths(stairs: Staircase) -> tuple[Int, Float]:
    """Lower convex hull of every layer's staircase.

    Returns:
        path (N, H): staircase positions of the hull vertices by rising cost, the last one repeated as
        padding;
        slope (N, H-1): error change per cost of every step, negative and rising along a row; 0 in the
        padding.
    """
    c, e = stairs.cost, stairs.err
    rows = np.arange(c.shape[0])
    here: Int = np.zeros(c.shape[0], dtype=np.int64)
    path, slopes = [here], []
    while True:
        rise = c - c[rows, here][:, None]
        fall = e - e[rows, here][:, None]
        slope = np.divide(fall, rise, out=np.zeros_like(rise), where=rise > 0)
        # On a tie take the farthest point: reversed, argmin finds it first.
        steepest = c.shape[1] - 1 - np.argmin(slope[:, ::-1], axis=1)
        best = slope[rows, steepest]
        moves = best < 0
        if not moves.any():
            break
        here = np.where(moves, steepest, here)
        path.append(here)
        slopes.append(np.where(moves, best, 0.0))
    if not slopes:
        return path[0][:, None], np.empty((c.shape[0], 0))
    # Rounding may bend a hull by one unit in the last place; a merged sort must never swap two steps of a
    # layer.
    return np.stack(path, axis=1), np.maximum.accumulate(np.stack(slopes, axis=1), axis=1)


def lower_hull(cost: ArrayLike, err: ArrayLike) -> Int:
    """Choices on the lower convex hull of one layer's (cost, err) points, from the cheapest to the most
    accurate.

    Args:
        cost, err: (K,), finite.

    Returns:
        Indices (H,) by rising cost; error and steepness fall strictly along them.

    Raises:
        CoaloraError: other shapes, or non-finite entries.
    """
    c, e = np.asarray(cost, dtype=np.float64), np.asarray(err, dtype=np.float64)
    if c.ndim != 1 or c.shape != e.shape or c.size == 0 or not (np.isfinite(c).all() and np.isfinite(e).all()):
        raise CoaloraError("cost and err must be finite, one entry per choice", got=(c.shape, e.shape), expected="(K,)")
    stairs = staircase(c[None], e[None])
    path, _ = hull_paths(stairs)
    return stairs.index[0, path[0]]
