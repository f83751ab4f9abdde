"""Dynamic programming over the core of one knapsack: the choices that could still beat an allocation in hand.

With multiplier lambda, a configuration of reduced cost rho = sum_l (err + lambda cost - min_k(err + lambda
cost)) has an error of at least `bound + rho` within the budget. So a choice, or a partial configuration,
whose rho exceeds the gap between the allocation in hand and the bound is never needed (Pisinger 1995). Layers
are added one by one, coarse before fine; when partial configurations outgrow the beam, each slice of cost
keeps the one of lowest rho.
"""

from __future__ import annotations

import numpy as np

from coalora.search.checks import Float, Int
from coalora.search.hulls import Staircase

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
