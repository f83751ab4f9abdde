"""One choice per layer for the least total error within a budget: a multiple-choice knapsack, for all budgets at once.

The lower convex hulls of the layers, merged by slope, give the optimum of the linear relaxation at every budget in
one pass (`walk_hulls`; Sinha and Zoltners 1979). Where the relaxation rounds a long step badly, `refine` starts anew
from `band_starts`; where all layers together have few choices, a dynamic program follows (`solve_core`). HIGGS
(Malinovskii et al., NAACL 2025) shows that the loss is close to linear in per-layer errors, which makes the sum of
errors the right objective. LQ-LoRA (Guo et al., ICLR 2024) hands the same problem to an integer programming solver.

What each part is worth, as the worst excess error over the best that is known: 144 layers x 432 choices of
NormalFloat, 50 budgets: 3.7 % for the walk alone, .08 % with band starts (50 ms), .5 % with the dynamic program in
their place (0.4 s). 28 layers x 4 choices, 30 budgets: 7 % for the walk, 6 % with band starts, 0 with the dynamic
program. 24 layers x 60 choices of two sizes: 62 %, 16 %, .3 % (`python -m benchmarks.allocation` compares with a wide
beam).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from coalora.errors import CoaloraError
from coalora.search.checks import Bool, Float, Int, as_allowed, as_configurations, as_table, is_allowed, table_sum


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


_FLIPS = 8  # long steps that are tried both ways: 256 combinations a budget
_BAND_SKIPS = 12  # times that the walk goes on behind a step that does not fit


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
        _walk_bands(bands, row, bands.high == row[bands.layer], float(slack[i]))
        for i, row in zip(best, upper, strict=True)
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


def _walk_bands(bands: Bands, upper: Bool, open_: Bool, slack: float) -> Int:
    """Positions (N,): short steps by falling gain while they fit; a layer whose step does not fit stays behind."""
    at = np.flatnonzero(open_)
    taken = np.zeros(upper.size, dtype=np.int64)
    for _ in range(_BAND_SKIPS):
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


_STARTS = 2  # best starts of `bands` whose own error is looked at


def refine(stairs: Staircase, walk: Walk, budgets: Float, tolerance: float) -> tuple[Int, Bool]:
    """Improve the walk of each budget from `band_starts`; never makes one worse.

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
    position = walk.position.copy()
    error = stairs.err[layers, position].sum(axis=1)

    def unproven() -> Bool:
        return (walk.price > 0) & (error - walk.bound > tolerance * np.abs(error))

    bands = find_bands(stairs, walk.path, walk.slope)
    for b in np.flatnonzero(unproven()):
        starts, _ = band_starts(bands, float(budgets[b]), float(walk.price[b]), _STARTS)
        for start in starts:
            total = stairs.err[layers, start].sum()
            if stairs.cost[layers, start].sum() <= budgets[b] and total < error[b]:
                position[b], error[b] = start, total
    return position, unproven()


_WORK = 32768  # partial configurations kept in all layers together: about 30 ms


def solve_core(stairs: Staircase, position: Int, budget: float, price: float, tolerance: float) -> Int:
    """Best allocation for one budget, up to `tolerance`.

    Args:
        stairs: staircases of N layers, P positions.
        position: allocation in hand (N,), within the budget.
        budget: largest total cost, rounding allowance included.
        price: lambda > 0 at which the linear relaxation meets the budget.
        tolerance: relative improvement below which a better allocation is not looked for.

    Returns:
        Positions (N,): `position` itself when nothing better was found. Exact up to `tolerance` while there
        are at most _WORK / N partial configurations, else a beam search.
    """
    layers = np.arange(position.size)
    level = stairs.err + price * stairs.cost
    lowest = level.min(axis=1)
    reduced = level - lowest[:, None]
    in_hand = float(stairs.err[layers, position].sum())
    bound = float(lowest.sum()) - price * budget
    gap = in_hand * (1.0 - tolerance) - bound
    if gap <= 0:
        return position
    core = reduced <= gap
    base = np.argmin(level, axis=1)
    shift = np.where(core, stairs.cost - stairs.cost[layers, base][:, None], 0.0)
    # Coarse moves first: the fine ones of the last layers then fill what is left of the budget.
    open_layers = np.flatnonzero(core.sum(axis=1) > 1)
    open_layers = open_layers[np.argsort(-np.abs(shift[open_layers]).max(axis=1), kind="stable")]
    slack = budget - float(stairs.cost[layers, base].sum())
    # Later layers can save at most this much: a state that is further over the budget can never come back.
    saving = np.append(-np.cumsum(shift[open_layers].min(axis=1)[::-1])[::-1], 0.0)
    spent, rho = np.zeros(1), np.zeros(1)
    beam = _WORK // position.size + 1
    trail: list[tuple[Int, Int]] = []
    for step, layer in enumerate(open_layers):
        options = np.flatnonzero(core[layer])
        spent_all = (spent[:, None] + shift[layer, options]).ravel()
        rho_all = (rho[:, None] + reduced[layer, options]).ravel()
        alive = np.flatnonzero((rho_all <= gap) & (spent_all <= slack + saving[step + 1]))
        alive = alive[_thin(spent_all[alive], rho_all[alive], gap, beam)]
        spent, rho = spent_all[alive], rho_all[alive]
        trail.append((alive // options.size, options[alive % options.size]))
    fits = np.flatnonzero(spent <= slack)
    if not fits.size:
        return position
    state = int(fits[np.argmin(rho[fits] - price * spent[fits])])
    out = base.copy()
    for layer, (parent, choice) in zip(open_layers[::-1], trail[::-1], strict=True):
        out[layer] = choice[state]
        state = int(parent[state])
    better = stairs.err[layers, out].sum() < in_hand and stairs.cost[layers, out].sum() <= budget
    return out if better else position


def _thin(spent: Float, rho: Float, gap: float, beam: int) -> Int:
    """States (indices) worth extending: all of them, or the lowest rho in each of `beam` equal slices of
    cost.
    """
    width = float(np.ptp(spent)) if spent.size else 0.0
    if spent.size <= beam:
        return np.arange(spent.size)
    scale = (beam - 1) / width if width > 0 else 0.0
    slice_ = np.floor((spent - spent.min()) * scale)
    # One key sorts by slice, then by rho, which the gap bounds.
    order = np.argsort(slice_ + 0.999 * rho / gap)
    return order[np.concatenate([[True], np.diff(slice_[order]) > 0])]


# Up to so many choices of all layers together (staircases) the dynamic program has room to better what bands found;
# beyond, a beam of affordable size finds less than that.
_CORE_CHOICES = 8192


def within(budget: Float | float, cost: ArrayLike) -> Float:
    """Budget plus the allowance for rounding: nothing for integer costs, one part in 10^12 for floating-point
    ones.

    Sums of the same costs in another order differ in the last digits, and a configuration must fit its own
    cost.
    """
    limit = np.asarray(budget, dtype=np.float64)
    if np.issubdtype(np.asarray(cost).dtype, np.integer):
        return limit
    return np.asarray(limit + 1e-12 * np.abs(limit))


def allocate(
    err: ArrayLike, cost: ArrayLike, budgets: ArrayLike, *, allowed: ArrayLike | None = None, tolerance: float = 9e-4
) -> Int:
    """Configurations of least total error for every budget.

    Args:
        err: error (N, K) of every choice in every layer; any unit, but the same in all layers.
        cost: cost (N, K), whole numbers (stored bits) or floating point (bits divided by the number of
            weights).
        budgets: (B,) or a single number: the largest allowed sum of costs, in units of `cost`.
        allowed: bool (N, K), the choices that a layer may take; None allows all.
        tolerance: relative distance from the optimum that is good enough. Budgets where the linear relaxation
            proves this distance take one fast pass, the others a second one.

    Returns:
        Configurations (B, N), int64: each costs at most its budget (floating-point costs: up to rounding,
        1e-12 relative). Not proven optimal: docs/search.md has the measured distances from exact solvers.

    Raises:
        CoaloraError: shapes differ, entries are not finite, a layer is left without a choice, or a budget is below
            the cheapest configuration.

    Example:
        >>> from coalora import allocate
        >>> err = [[9.0, 3.0, 1.0], [4.0, 2.0, 1.0]]  # two layers, three choices
        >>> bits = [[2.0, 3.0, 4.0], [2.0, 3.0, 4.0]]
        >>> allocate(err, bits, [4.0, 5.0, 7.0]).tolist()
        [[0, 0], [1, 0], [2, 1]]
    """
    errors = as_table(err, name="err")
    costs = as_table(cost, name="cost", shape=errors.shape)
    mask = as_allowed(allowed, errors.shape)
    wanted = np.atleast_1d(np.asarray(budgets, dtype=np.float64))
    if wanted.ndim != 1 or np.isnan(wanted).any():
        raise CoaloraError(f"budgets are {budgets!r}", remedy="Give numbers, (B,)")
    limits = np.atleast_1d(within(wanted, cost))
    # Infinitely dear and bad: dominated by whatever is allowed, so never on a staircase.
    stairs = staircase(np.where(mask, costs, np.inf), np.where(mask, errors, np.inf))
    smallest = float(stairs.cost[:, 0].sum())
    if wanted.size and limits.min() < smallest:
        raise CoaloraError(
            f"A budget of {wanted.min():.12g} is below the cheapest configuration, {smallest:.12g}",
            remedy="Raise the budget, or allow cheaper choices",
        )
    walk = walk_hulls(stairs, limits)
    position, unproven = refine(stairs, walk, limits, tolerance)
    if stairs.cost.size <= _CORE_CHOICES:
        for b in np.flatnonzero(unproven):
            position[b] = solve_core(stairs, position[b], float(limits[b]), float(walk.price[b]), tolerance)
    return stairs.index[np.arange(errors.shape[0]), position]


def fill(
    configuration: ArrayLike, err: ArrayLike, cost: ArrayLike, budget: float, *, allowed: ArrayLike | None = None
) -> Int:
    """Top a configuration up to a budget: take upgrades, best error decrease per cost first, until none fits.

    Args:
        configuration: C (N,), costing at most `budget`.
        err, cost: tables (N, K), as in `allocate`.
        budget: the largest allowed sum of costs.
        allowed: bool (N, K), the choices that a layer may take; None allows all.

    Returns:
        Configuration (N,), a new array: total error and unused budget never rise, and no single change that
        lowers the error fits any more.

    Raises:
        CoaloraError: shapes differ, or the configuration alone exceeds the budget or takes a choice that is not
            allowed.
    """
    errors = as_table(err, name="err")
    costs = as_table(cost, name="cost", shape=errors.shape)
    C = as_configurations([np.asarray(configuration)], (errors.shape[0], errors.shape[1]), name="configuration")[0]
    mask = as_allowed(allowed, errors.shape)
    if not is_allowed(mask, C):
        raise CoaloraError(
            f"The configuration takes choices that are not allowed in {(~mask[np.arange(C.size), C]).sum()} layers",
            remedy="Use allocate() with the same `allowed`",
        )
    limit = float(within(budget, cost))
    slack = limit - float(table_sum(costs, C))
    if slack < 0:
        raise CoaloraError(
            f"The configuration costs {table_sum(costs, C):.12g}, more than the budget {budget:.12g}",
            remedy="Use allocate() for this budget",
        )
    layers = np.arange(C.size)
    # A change that is useless or too dear now stays so after any upgrade: look only at these from here on.
    reachable = costs <= (costs[layers, C] + slack)[:, None]
    at, choice = np.nonzero(mask & reachable & (errors < errors[layers, C][:, None]))
    target_err, target_cost = errors[at, choice], costs[at, choice]
    while True:
        d_err = target_err - errors[at, C[at]]
        d_cost = target_cost - costs[at, C[at]]
        useful = (d_err < 0) & (d_cost <= slack)
        if not useful.any():
            return C
        # A change that lowers the error and costs nothing comes before any that has to be paid.
        free = useful & (d_cost <= 0)
        if free.any():
            pick = int(np.argmin(np.where(free, d_err, np.inf)))
        else:
            pick = int(np.argmin(np.divide(d_err, d_cost, out=np.full(d_err.shape, np.inf), where=useful)))
        C[at[pick]] = choice[pick]
        slack = limit - float(table_sum(costs, C))
