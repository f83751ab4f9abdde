"""One choice per layer for the least total error within a budget: a multiple-choice knapsack, for all budgets
at once.

The lower convex hulls of the layers, merged by slope, give the optimum of the linear relaxation at every
budget in one pass (Sinha and Zoltners 1979); `refine` then spends the slack, from better starts (`bands`) where
the relaxation rounds badly; small problems go through a dynamic program (`core`). HIGGS (Malinovskii et al., NAACL
2025) shows that the loss is close to linear in per-layer errors, which makes the sum of errors the right
objective. LQ-LoRA (Guo et al., ICLR 2024) hands the same problem to an integer programming solver.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from coalora.errors import CoaloraError
from coalora.search.checks import Float, Int, as_allowed, as_configurations, as_table, is_allowed, table_sum
from coalora.search.core import solve_core
from coalora.search.hulls import lower_hull, staircase
from coalora.search.refine import refine
from coalora.search.walk import walk_hulls

# Up to so many layers the dynamic program of `core` still has room to better what `bands` found; beyond, a beam of
# affordable size finds less than that.
_CORE_LAYERS = 64

__all__ = ["allocate", "fill", "lower_hull", "within"]


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
    err: ArrayLike,
    cost: ArrayLike,
    budgets: ArrayLike,
    *,
    allowed: ArrayLike | None = None,
    tolerance: float = 9e-4,
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
    """
    errors = as_table(err, name="err")
    costs = as_table(cost, name="cost", shape=errors.shape)
    mask = as_allowed(allowed, errors.shape)
    wanted = np.atleast_1d(np.asarray(budgets, dtype=np.float64))
    if wanted.ndim != 1 or np.isnan(wanted).any():
        raise CoaloraError("budgets must be numbers", got=budgets, expected="(B,)")
    limits = np.atleast_1d(within(wanted, cost))
    # Infinitely dear and bad: dominated by whatever is allowed, so never on a staircase.
    stairs = staircase(np.where(mask, costs, np.inf), np.where(mask, errors, np.inf))
    smallest = float(stairs.cost[:, 0].sum())
    if wanted.size and limits.min() < smallest:
        raise CoaloraError(
            "a budget must reach the cheapest configuration",
            got=float(wanted.min()),
            expected=f"at least {smallest:.12g}",
            remedy="raise the budget, or allow cheaper choices",
        )
    walk = walk_hulls(stairs, limits)
    position, unproven = refine(stairs, walk, limits, tolerance)
    if errors.shape[0] <= _CORE_LAYERS:
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
            "a configuration to be filled must take allowed choices",
            got=f"others in {int((~mask[np.arange(C.size), C]).sum())} layers",
            remedy="use allocate() with the same `allowed`",
        )
    limit = float(within(budget, cost))
    slack = limit - float(table_sum(costs, C))
    if slack < 0:
        raise CoaloraError(
            "the configuration must fit the budget",
            got=f"cost {table_sum(costs, C):.12g}",
            expected=f"at most {budget:.12g}",
            remedy="use allocate() for this budget",
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
