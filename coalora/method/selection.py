"""Choice for each asked budget, measured with the final adapter.

For a budget the best member that fits, the same filled up to the budget, and the allocation at the budget are measured;
the lowest loss wins, and of equal ones the cheaper. Only the split that guided the search is looked at: validation
examples are for reports.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from coalora.calibrate.tables import CalibrationTables
from coalora.configurations import ConfigurationSet
from coalora.search.budget import best_within, contenders


def select_budgets(
    measure: Callable[[np.ndarray, str], np.ndarray],
    members: ConfigurationSet,
    tables: CalibrationTables,
    budgets: Sequence[float],
) -> tuple[ConfigurationSet, ConfigurationSet]:
    """The members measured anew, and the configuration of every budget (in the order of `budgets`) with its loss.

    Args:
        measure: losses (n,) of configurations (n, N), such as a `LossMeter` of the final model; its second argument
            says which: "final set" or "budgets".
        budgets: in units of the tables' cost.

    Raises:
        CoaloraError: a budget below the cheapest configuration.

    Example:
        >>> from coalora import LossMeter, select_budgets
        >>> meter = LossMeter(model.adapted, model.split(search_texts), batch_size=8)
        >>> members, chosen = select_budgets(meter, model.members, tables, budgets=[3.0, 4.0])
        >>> bool((tables.average_bits(chosen.configurations) <= [3.0, 4.0]).all())
        True
    """
    members = members.with_losses(measure(members.configurations, "final set")).sorted(tables)
    known = {row.tobytes(): loss for row, loss in zip(members.configurations, members.losses, strict=True)}
    rivals = []
    for budget in budgets:
        given, allowed = (tables.search_cost, tables.search_err, budget), tables.search_allowed
        best = best_within(tables.of_groups(members.configurations), members.losses, *given, allowed=allowed)
        rivals.append(tables.expand(contenders(best, *given, allowed=allowed)))
    if not rivals:
        return members, members.take(np.arange(0))
    distinct = np.unique(np.concatenate(rivals), axis=0)
    new = np.array([row for row in distinct if row.tobytes() not in known], dtype=np.int64)
    new = new.reshape(-1, distinct.shape[1])
    known |= {row.tobytes(): loss for row, loss in zip(new, measure(new, "budgets"), strict=True)}
    chosen = [
        min(rows, key=lambda row: (known[row.tobytes()], tables.costs(row), tables.total_nbytes(row)))
        for rows in rivals
    ]
    selected = ConfigurationSet.unmeasured(np.stack(chosen), int(members.joined.max(initial=0)))
    return members, selected.with_losses(np.array([known[row.tobytes()] for row in chosen]))
