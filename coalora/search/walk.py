"""The greedy walk along the merged hull steps of all layers, for every budget in one pass (Sinha and Zoltners
1979).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from coalora.search.checks import Float, Int
from coalora.search.hulls import Staircase, hull_paths

_WINDOW = 512  # steps looked at behind the split step
_SKIPS = 16  # layers that may be skipped because their next step does not fit


@dataclass(frozen=True)
class Walk:
    """Where the walk stops: position (B, N) on the staircases, within the budget; bound (B,), a lower bound of
    the optimal error; price (B,), error per cost at the budget, 0 where every layer has its lowest error; path,
    slope: the hulls, as of `hull_paths`."""

    position: Int
    bound: Float
    price: Float
    path: Int
    slope: Float


def walk_hulls(stairs: Staircase, budgets: Float) -> Walk:
    """Hull steps of all layers by falling gain per cost, as far as each budget (B,) carries, then those that
    still fit.

    Every budget must reach the cheapest configuration. The bound is the optimum of the linear relaxation.
    """
    path, slope = hull_paths(stairs)
    N, width = slope.shape
    layers = np.arange(N)
    vertex_cost = np.take_along_axis(stairs.cost, path, axis=1)
    vertex_err = np.take_along_axis(stairs.err, path, axis=1)
    flat = slope.ravel()
    real = np.flatnonzero(flat < 0)
    # Stable: equal slopes keep the steps of a layer in their order.
    order = real[np.argsort(flat[real], kind="stable")]
    layer, cost = order // max(width, 1), np.diff(vertex_cost, axis=1).ravel()[order]
    walked = vertex_cost[:, 0].sum() + np.cumsum(cost)
    taken = np.searchsorted(walked, budgets, side="right")
    vertex = _steps_by_layer(taken, layer, N)
    price = np.zeros(budgets.size)
    split = taken < order.size
    price[split] = -flat[order[taken[split]]]
    slack = budgets - vertex_cost[layers, vertex].sum(axis=1)
    bound = vertex_err[layers, vertex].sum(axis=1) - price * slack
    vertex += _skipping(slack, taken, layer, cost, N)
    return Walk(path[layers, vertex], bound, price, path, slope)


def _steps_by_layer(taken: Int, layer: Int, N: int) -> Int:
    """Number of steps (B, N) that each layer makes within the first `taken` (B,) steps of `layer` (S,)."""
    rising = np.argsort(taken, kind="stable")
    owner = np.searchsorted(taken[rising], np.arange(layer.size), side="right")
    counts = np.zeros((taken.size + 1, N), dtype=np.int64)
    np.add.at(counts, (owner, layer), 1)
    out = np.empty((taken.size, N), dtype=np.int64)
    out[rising] = np.cumsum(counts[:-1], axis=0)
    return out


def _skipping(slack: Float, taken: Int, layer: Int, cost: Float, N: int) -> Int:
    """Further steps (B, N) behind the split: a layer whose step does not fit is left out, the others walk
    on.
    """
    extra = np.zeros((taken.size, N), dtype=np.int64)
    if layer.size == 0:
        return extra
    at = taken[:, None] + np.arange(min(_WINDOW, layer.size))
    active = at < layer.size
    at = np.minimum(at, layer.size - 1)
    who, price = layer[at], cost[at]
    rows = np.arange(taken.size)
    for _ in range(_SKIPS):
        over = active & (np.cumsum(np.where(active, price, 0.0), axis=1) > slack[:, None])
        first = np.argmax(over, axis=1)
        if not over[rows, first].any():
            break
        blocked = over[rows, first][:, None] & (who == who[rows, first][:, None])
        active &= ~(blocked & (np.arange(at.shape[1]) >= first[:, None]))
    active &= np.cumsum(np.where(active, price, 0.0), axis=1) <= slack[:, None]
    b, column = np.nonzero(active)
    np.add.at(extra, (b, who[b, column]), 1)
    return extra
