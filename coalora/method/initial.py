"""Configuration set of round 0: allocations at evenly spread budgets, or the set of an earlier run."""

from __future__ import annotations

from typing import Any

import numpy as np

from coalora.calibrate.tables import CalibrationTables
from coalora.configurations import SET_FORMAT, ConfigurationSet
from coalora.errors import CoaloraError
from coalora.recipes import InitialSetRecipe
from coalora.search.knapsack import allocate


def initial_set(tables: CalibrationTables, recipe: InitialSetRecipe) -> ConfigurationSet:
    """The allocations at `recipe.size` evenly spread budgets (50 in the paper); of equal ones the first.

    Raises:
        CoaloraError: budgets outside of what the choice space can reach, or choices that all cost the same.

    Example:
        >>> from coalora import InitialSetRecipe, initial_set
        >>> members = initial_set(tables, InitialSetRecipe(size=4))
        >>> bool((members.objectives(tables)[:, 1] <= tables.cost_range()[1]).all())
        True
    """
    least, most = tables.cost_range()
    unit = tables.cost_unit.unit
    if most - least <= 1e-9 * most:
        raise CoaloraError(
            f"Every configuration costs {least:.6g} {unit}: there is nothing to choose",
            remedy="Allow more choices where there is only one, or give latencies that differ",
        )
    low = recipe.min_budget if recipe.min_budget is not None else least
    high = recipe.max_budget if recipe.max_budget is not None else most
    if not least <= low < high <= most + 1e-9:
        raise CoaloraError(
            f"Initial budgets from {low:g} to {high:g} {unit} are not a rising range inside {least:.3f} to {most:.3f}, "
            "which the choice space can reach",
            remedy="Correct initial_set.min_budget and initial_set.max_budget",
        )
    # The smallest budget is met exactly; a rounding error below it must not make it infeasible.
    budgets = np.maximum(np.linspace(low, high, recipe.size), least)
    found = tables.expand(allocate(tables.search_err, tables.search_cost, budgets, allowed=tables.search_allowed))
    return ConfigurationSet.unmeasured(np.unique(found, axis=0)).sorted(tables)


def given_set(content: dict[str, Any], tables: CalibrationTables) -> ConfigurationSet:
    """The members of another run's set (`ConfigurationSet.to_dict`) as a start, without losses and rounds.

    The base model may be another one with the same layers, for example a later checkpoint of it.

    Raises:
        CoaloraError: the set does not fit the layers, the choice space or its rules, is damaged, or has fewer than
            two different members.
    """
    try:
        found = ConfigurationSet.from_dict({**content, "base_digest": tables.base_digest}, tables)
    except CoaloraError as error:
        raise CoaloraError(
            f"The initial set does not fit this run: {error.problem}",
            remedy="Use a set of the same base architecture, target_modules and choices, or set initial_set.file=null",
        ) from error
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        raise CoaloraError(
            f"The initial set is damaged ({error!r})", remedy=f"Use a file that was written in format {SET_FORMAT}"
        ) from error
    unique = np.unique(found.configurations, axis=0)
    if len(unique) < 2:
        raise CoaloraError(
            f"The initial set has {len(unique)} different configurations",
            remedy="Start with at least two, or set initial_set.file=null",
        )
    return ConfigurationSet.unmeasured(unique).sorted(tables)
