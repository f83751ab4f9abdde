"""Spend the slack that the hull walk leaves: the best combination of up to four changes, by meeting in the
middle.

The hull walk solves the linear relaxation of the multiple-choice knapsack up to one split step. Its
multiplier
lambda (error per cost at the budget) prices every other choice by its reduced cost r = d_err + lambda d_cost
>= 0, and the optimum differs from the walk only in choices of small r (Pisinger 1995, "A minimal algorithm
for the multiple-choice knapsack problem"). So: take the choices of smallest r in each of two disjoint halves
of the layers, form all single and double changes within each half, sort one half by cost, and look up the
best partner of every member of the other. The relaxation also bounds the optimum from below; budgets whose
bound is not yet met are started anew from `bands`.
"""

from __future__ import annotations

import numpy as np

from coalora.search.bands import band_starts, find_bands
from coalora.search.checks import Bool, Float, Int
from coalora.search.hulls import Staircase
from coalora.search.walk import Walk

CANDIDATES = 32  # choices kept in each half: 32 singles, 496 pairs
_STARTS = 2  # starts of `bands` that are refined
_CHUNK = 16  # budgets handled together: keeps the working set inside the cache


def refine(stairs: Staircase, walk: Walk, budgets: Float, tolerance: float) -> tuple[Int, Bool]:
    """Improve the walk of each budget; never makes one worse.

    Args:
        stairs: staircases of N layers, P positions.
        walk: where the hull walk stopped for each of the B budgets.
        budgets: (B,), in units of cost, rounding allowance included.
        tolerance: relative distance from the lower bound at which an allocation is good enough.

    Returns:
        Positions (B, N), total cost at most `budgets`; mask (B,) of those that are not proven to be within
        `tolerance`.
    """
    layers = np.arange(stairs.cost.shape[0])
    # Two ways of halving: changes that the first keeps on one side meet on two sides in the second.
    even, pairs = layers % 2 == 0, (layers // 2) % 2 == 0
    position = walk.position.copy()
    error = stairs.err[layers, position].sum(axis=1)

    def unproven() -> Bool:
        return (walk.price > 0) & (error - walk.bound > tolerance * np.abs(error))

    def attempt(rows: Int, starts: Int, price: Float, left: Bool) -> None:
        for chunk in range(0, rows.size, _CHUNK):
            part = slice(chunk, chunk + _CHUNK)
            new = _meet(stairs, starts[part], budgets[rows[part]], price[part], left)
            value = stairs.err[layers, new].sum(axis=1)
            fits = stairs.cost[layers, new].sum(axis=1) <= budgets[rows[part]]
            # One by one: a budget may have several starts.
            for b, found, total in zip(rows[part][fits], new[fits], value[fits], strict=True):
                if total < error[b]:
                    position[b], error[b] = found, total

    rows = np.flatnonzero(unproven())
    attempt(rows, position[rows], walk.price[rows], even)
    rows = np.flatnonzero(unproven())
    if rows.size:
        bands = find_bands(stairs, walk.path, walk.slope)
        found = [band_starts(bands, float(budgets[b]), float(walk.price[b]), _STARTS) for b in rows]
        owner = np.repeat(rows, [len(price) for _, price in found])
        starts, price = (np.concatenate(part) for part in zip(*found, strict=True))
        attempt(owner, starts, price, pairs)
    return position, unproven()


def _meet(stairs: Staircase, position: Int, budgets: Float, price: Float, left: Bool) -> Int:
    slack = budgets - stairs.cost[np.arange(left.size), position].sum(axis=1)
    halves = [_changes(stairs, position, price, np.flatnonzero(side)) for side in (left, ~left)]
    (d_cost, d_err, d_moves), (x_cost, x_err, x_moves) = halves
    order = np.argsort(d_cost, axis=1, kind="stable")
    d_cost = np.take_along_axis(d_cost, order, axis=1)
    d_err = np.take_along_axis(d_err, order, axis=1)
    lowest = np.minimum.accumulate(d_err, axis=1)
    out = position.copy()
    for b in range(position.shape[0]):
        reach = np.searchsorted(d_cost[b], slack[b] - x_cost[b], side="right")
        total = np.where(reach > 0, x_err[b] + lowest[b, reach - 1], np.inf)
        x = int(np.argmin(total))
        if total[x] == np.inf:
            continue
        d = int(np.argmax(d_err[b] == lowest[b, reach[x] - 1]))
        for moves, chosen in ((d_moves, int(order[b, d])), (x_moves, x)):
            layers, columns = moves
            for candidate in _PAIRS[chosen]:
                if candidate < CANDIDATES:
                    out[b, layers[b, candidate]] = columns[b, candidate]
    return out


# Combination i changes the two candidates _PAIRS[i]; the index CANDIDATES stands for "no change".
_FIRST, _SECOND = np.triu_indices(CANDIDATES + 1, k=1)
_PAIRS = np.concatenate([np.stack([_FIRST, _SECOND], axis=1), [[CANDIDATES, CANDIDATES]]])


def _changes(stairs: Staircase, position: Int, price: Float, half: Int) -> tuple[Float, Float, tuple[Int, Int]]:
    """Cost and error change (B, Q) of every combination of at most two of the best changes in the layers
    `half`.
    """
    B, T = position.shape[0], CANDIDATES
    # One column more than the candidates: index T is "no change".
    cost, err = np.full((B, T + 1), np.inf), np.full((B, T + 1), np.inf)
    cost[:, T], err[:, T] = 0.0, 0.0
    layers, columns = np.full((B, T + 1), -1), np.zeros((B, T + 1), dtype=np.int64)
    if half.size:
        P = stairs.cost.shape[1]
        c, e = stairs.cost[half], stairs.err[half]
        now = position[:, half]
        own = np.arange(half.size)
        level = e[None] + price[:, None, None] * c[None]
        level -= (e[own, now] + price[:, None] * c[own, now])[:, :, None]
        np.put_along_axis(level, now[:, :, None], np.inf, axis=2)
        flat = level.reshape(B, -1)
        k = min(T, flat.shape[1])
        best = np.argpartition(flat, k - 1, axis=1)[:, :k]
        at, column = best // P, best % P
        mine = np.take_along_axis(now, at, axis=1)
        real = np.isfinite(np.take_along_axis(flat, best, axis=1))
        cost[:, :k] = np.where(real, c[at, column] - c[at, mine], np.inf)
        err[:, :k] = np.where(real, e[at, column] - e[at, mine], np.inf)
        layers[:, :k], columns[:, :k] = half[at], column
    # A layer cannot change twice; the last combination, (T, T), is to change nothing.
    first, second = _PAIRS[:, 0], _PAIRS[:, 1]
    both = cost[:, first] + cost[:, second], err[:, first] + err[:, second]
    clash = (layers[:, first] == layers[:, second]) & (first != second)
    return np.where(clash, np.inf, both[0]), np.where(clash, np.inf, both[1]), (layers, columns)
