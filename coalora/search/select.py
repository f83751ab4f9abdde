"""Which configuration to use at an asked budget: the best member that fits, topped up to the budget."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from coalora.errors import CoaloraError
from coalora.search.allocation import allocate, fill, within
from coalora.search.checks import Int, as_configurations, as_table, table_sum


def select_configuration(
    configurations: ArrayLike, losses: ArrayLike, cost_table: ArrayLike, err_table: ArrayLike, budget: float
) -> Int:
    """Configuration (N,) for a budget.

    The member of lowest loss among those that fit, with what is left of the budget spent by `fill`; where no
    member fits, the allocation of least total error at this budget.

    Args:
        configurations: the set (n, N) int; n may be 0.
        losses: (n,), measured losses of the set.
        cost_table: (N, K), summing over layers to the cost of a configuration, e.g. average bits.
        err_table: (N, K), per-layer errors that stand in for the loss where nothing was measured.
        budget: largest allowed cost.

    Raises:
        CoaloraError: wrong shapes, non-finite losses, or a budget below the cheapest possible configuration.
    """
    err = as_table(err_table, name="err_table")
    cost = as_table(cost_table, name="cost_table", shape=err.shape)
    C = as_configurations(configurations, (err.shape[0], err.shape[1]), name="configurations")
    loss = np.asarray(losses, dtype=np.float64)
    if loss.shape != (C.shape[0],) or not np.isfinite(loss).all():
        raise CoaloraError("losses must be finite, one per configuration", got=loss.shape, expected=(C.shape[0],))
    fits = np.flatnonzero(table_sum(cost, C) <= within(budget, cost_table))
    if fits.size == 0:
        return allocate(err, cost_table, budget)[0]
    return fill(C[fits[np.argmin(loss[fits])]], err, cost_table, budget)
