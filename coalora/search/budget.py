"""Configuration for an asked budget.

What is measured beats what is predicted: a member's loss is known, with the adapter that was trained on it, while a
configuration that only looks better by its layers' errors may do worse, because the adapter has never met it. So the
answer is the best measured member that fits; `contenders` names what is worth measuring beside it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from coalora.search.checks import Int, as_allowed, as_configurations, as_losses, as_table, is_allowed, table_sum
from coalora.search.knapsack import allocate, fill, within


def best_within(
    configurations: ArrayLike,
    losses: ArrayLike,
    cost_table: ArrayLike,
    err_table: ArrayLike,
    budget: float,
    *,
    allowed: ArrayLike | None = None,
) -> Int:
    """Configuration (N,) for a budget: the member of lowest loss that fits; the allocation where none does.

    Args:
        configurations: the set (n, N) int; n may be 0.
        losses: (n,), measured losses of the set.
        cost_table: (N, K), summing over layers to the cost of a configuration, e.g. average bits.
        err_table: (N, K), per-layer errors that stand in for the loss where nothing was measured.
        budget: largest allowed cost.
        allowed: bool (N, K), the choices that a layer may take; None allows all. Members that take others are passed
            over.

    Raises:
        CoaloraError: wrong shapes, non-finite losses, a layer without a choice, or a budget below the cheapest
            allowed configuration.
    """
    err = as_table(err_table, name="err_table")
    cost = as_table(cost_table, name="cost_table", shape=err.shape)
    C = as_configurations(configurations, (err.shape[0], err.shape[1]), name="configurations")
    loss = as_losses(losses, len(C))
    mask = as_allowed(allowed, err.shape)
    fits = np.flatnonzero((table_sum(cost, C) <= within(budget, cost_table)) & is_allowed(mask, C))
    if fits.size == 0:
        return allocate(err, cost_table, budget, allowed=mask)[0]
    return C[fits[np.argmin(loss[fits])]]


def contenders(
    best: Int, cost_table: ArrayLike, err_table: ArrayLike, budget: float, *, allowed: ArrayLike | None = None
) -> Int:
    """Configurations (m, N), m at most 3, to measure for a budget: `best` (N,), `best` with what is left of the budget
    spent on it, and the allocation of least total error; all of them take choices of `allowed` (N, K) only.

    Raises:
        CoaloraError: as `fill` and `allocate`; `best` itself must be allowed and fit.
    """
    filled = fill(best, err_table, cost_table, budget, allowed=allowed)
    allocated = allocate(err_table, cost_table, budget, allowed=allowed)[0]
    return np.unique(np.stack([best, filled, allocated]), axis=0)
