"""Starts for budgets where the relaxation misleads: which layers make their long step is tried out, not rounded.

A layer's hull has one step that is longer than the others: from 4 to 8 bits NormalFloat costs 3.6 bits a weight, its
other steps 0.002 to 0.9. The linear relaxation takes a part of one such step, which no configuration can do; its bound
is then out of reach, and so is a good allocation from where the walk was stopped. With the set of layers that make
their long step fixed, what remains has short steps only, and the walk of Sinha and Zoltners (1979) is nearly exact. So:
flip the layers whose long step is nearest to the relaxation's price, in all combinations, value each by its own
relaxation, and hand the best to `refine` with the price of its own last step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from coalora.search.checks import Bool, Float, Int
from coalora.search.hulls import Staircase

_FLIPS = 8  # long steps that are tried both ways: 256 combinations a budget
_SKIPS = 12  # times that the walk goes on behind a step that does not fit


@dataclass(frozen=True)
class Bands:
    """Hull steps of all layers by falling gain, apart from the long ones, with what the starts need of them.

    layer, cost, err (S,): layer, cost and (negative) error change of every short step; high (S,): whether it lies
    behind its layer's long step. low_cost, low_err, high_cost, high_err (N,): where a layer starts in either band;
    head (N,): hull index behind the long step; slope, length (N,): of the long step; path (N, H): of `hull_paths`.
    """

    layer: Int
    cost: Float
    err: Float
    high: Bool
    low_cost: Float
    low_err: Float
    high_cost: Float
    high_err: Float
    head: Int
    slope: Float
    length: Float
    path: Int


def find_bands(stairs: Staircase, path: Int, slope: Float) -> Bands:
    """Cut every layer's hull, given by `hull_paths`, at its longest step."""
    rows = np.arange(path.shape[0])
    cost, err = (np.take_along_axis(values, path, axis=1) for values in (stairs.cost, stairs.err))
    width = np.diff(cost, axis=1)
    real = slope < 0
    long = np.argmax(np.where(real, width, -1.0), axis=1) if slope.shape[1] else np.zeros(rows.size, dtype=np.int64)
    short = real & (np.arange(slope.shape[1]) != long[:, None])
    at = np.flatnonzero(short)
    at = at[np.argsort(slope.ravel()[at], kind="stable")]
    layer, step = np.divmod(at, max(slope.shape[1], 1))
    moves = real.any(axis=1)
    head = np.where(moves, long + 1, 0)
    return Bands(
        layer=layer,
        cost=width.ravel()[at],
        err=np.diff(err, axis=1).ravel()[at],
        high=step > long[layer],
        low_cost=cost[:, 0],
        low_err=err[:, 0],
        high_cost=cost[rows, head],
        high_err=err[rows, head],
        head=head,
        slope=np.where(moves, slope[rows, head - 1], 0.0) if slope.shape[1] else np.zeros(rows.size),
        length=cost[rows, head] - cost[rows, np.maximum(head - 1, 0)],
        path=path,
    )


def band_starts(bands: Bands, budget: float, price: float, count: int) -> tuple[Int, Float]:
    """The best starts for one budget.

    Args:
        bands: of the staircases.
        budget: largest total cost.
        price: error per cost at which the relaxation of the whole problem meets the budget.
        count: number of starts.

    Returns:
        Staircase positions (m, N), m <= count, each within the budget, and the price (m,) of each one's next step.
    """
    usual, flips = _long_steps(bands, price)
    pattern = (np.arange(2**flips.size)[:, None] >> np.arange(flips.size)) & 1
    sign = np.where(usual[flips], -1.0, 1.0)  # what a flip adds: the high band for the low one, or the reverse

    def start(low: Float, high: Float) -> Float:
        return np.asarray(np.where(usual, high, low).sum() + pattern @ (sign * (high - low)[flips]))

    first_cost = start(bands.low_cost, bands.high_cost)
    pattern = pattern[first_cost <= budget]
    if pattern.shape[0] == 0:
        return np.empty((0, bands.head.size), dtype=np.int64), np.empty(0)
    slack = budget - first_cost[first_cost <= budget]
    # All combinations open the same steps but for those of the flipped layers: sums of the usual steps, and what each
    # flip adds to them, in place of sums for every combination.
    opened = bands.high == usual[bands.layer]
    added = np.where(bands.layer == flips[:, None], np.where(opened, -1.0, 1.0), 0.0)
    spent, more_spent = _sums(opened * bands.cost), _sums(added * bands.cost)
    split = _splits(spent, more_spent, pattern, slack)
    rate: Float = np.zeros(slack.size)
    value = start(bands.low_err, bands.high_err)
    if bands.layer.size:
        value += _at(_sums(opened * bands.err), _sums(added * bands.err), pattern, split)
        # The first step that does not fit whole; behind the last step nothing is left to buy.
        last = np.minimum(split, bands.layer.size - 1)
        rate = np.where(split < bands.layer.size, -bands.err[last] / bands.cost[last], 0.0)
        value -= rate * (slack - _at(spent, more_spent, pattern, split))
    best = np.argsort(value, kind="stable")[:count]
    upper = np.tile(usual, (best.size, 1))
    upper[:, flips] ^= pattern[best].astype(np.bool_)
    positions = [
        _walk(bands, row, bands.high == row[bands.layer], float(slack[i])) for i, row in zip(best, upper, strict=True)
    ]
    return np.stack(positions), rate[best]


def _sums(steps: Float) -> Float:
    """Running sums (..., S + 1) of steps (..., S), from 0 on."""
    out = np.zeros((*steps.shape[:-1], steps.shape[-1] + 1))
    np.cumsum(steps, axis=-1, out=out[..., 1:])
    return out


def _at(usual: Float, more: Float, pattern: Int, index: Int) -> Float:
    """Sums (m,) of the first `index` (m,) steps: the usual ones (S + 1,) and what the flips add (F, S + 1)."""
    return np.asarray(usual[index] + (pattern * more[:, index].T).sum(axis=1))


def _splits(usual: Float, more: Float, pattern: Int, slack: Float) -> Int:
    """How many steps (m,) each combination can pay for: bisection, since its sums are never written out."""
    low: Int = np.zeros(slack.size, dtype=np.int64)
    high: Int = np.full(slack.size, usual.size - 1)
    while (low < high).any():
        middle = (low + high + 1) // 2
        fits = _at(usual, more, pattern, middle) <= slack
        low, high = np.where(fits, middle, low), np.where(fits, high, middle - 1)
    return low


def _long_steps(bands: Bands, price: float) -> tuple[Bool, Int]:
    """Layers (N,) above their long step in the relaxation, and those (F,) whose long step is nearest to `price`."""
    usual = -bands.slope > price
    with np.errstate(divide="ignore"):
        distance = np.abs(np.log(np.maximum(-bands.slope, 1e-300)) - np.log(max(price, 1e-300)))
    distance[bands.slope == 0] = np.inf
    # Long steps of different length on either side of the price: these are what can be exchanged.
    size = np.round(np.log2(np.maximum(bands.length, 1e-300)))
    flips: list[int] = []
    groups = [np.flatnonzero((size == s) & (usual == side)) for s in np.unique(size) for side in (False, True)]
    ranked = [group[np.argsort(distance[group], kind="stable")] for group in groups]
    for depth in range(_FLIPS):
        near = sorted((group[depth] for group in ranked if group.size > depth), key=lambda i: distance[i])
        flips += [int(i) for i in near if np.isfinite(distance[i])]
    return usual, np.array(flips[:_FLIPS], dtype=np.int64)


def _walk(bands: Bands, upper: Bool, open_: Bool, slack: float) -> Int:
    """Positions (N,): short steps by falling gain while they fit; a layer whose step does not fit stays behind."""
    at = np.flatnonzero(open_)
    taken = np.zeros(upper.size, dtype=np.int64)
    for _ in range(_SKIPS):
        spent = np.cumsum(bands.cost[at])
        fits = int(np.searchsorted(spent, slack, side="right"))
        np.add.at(taken, bands.layer[at[:fits]], 1)
        if fits == at.size:
            break
        slack -= float(spent[fits - 1]) if fits else 0.0
        rest = at[fits:]
        # Slack only falls: a layer is out from its first step on that costs more.
        dear = rest[bands.cost[rest] > slack]
        first = np.full(upper.size, bands.layer.size)
        np.minimum.at(first, bands.layer[dear], dear)
        at = rest[rest < first[bands.layer[rest]]]
    index = np.where(upper, bands.head, 0) + taken
    return bands.path[np.arange(upper.size), index]
