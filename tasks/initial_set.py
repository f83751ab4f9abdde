"""Stage `initial-set`: the configuration set of round 0."""

from __future__ import annotations

import numpy as np

from coalora.calibrate.tables import CalibrationTables
from coalora.configurations import ConfigurationSet
from coalora.errors import CoaloraError
from coalora.search.allocation import allocate
from pipeline.inputs.loaders import load_tables, put_set
from pipeline.settings.sections import InitialSetSettings
from pipeline.stages.runner import stage
from pipeline.store.store import Artifact


@stage("initial-set")
def initial_set(*, tables: Artifact, initial: InitialSetSettings) -> Artifact:
    """The set of round 0: allocations at evenly spread budgets (50 in the paper's setting)."""
    measured = load_tables(tables)
    low, high = initial_range(measured, initial)
    budgets = np.linspace(low, high, initial.size)
    # The smallest budget is met exactly; a rounding error below it must not make it infeasible.
    found = np.unique(
        allocate(
            measured.err,
            measured.search_cost,
            np.maximum(budgets, measured.cost_range()[0]),
            allowed=measured.allowed,
        ),
        axis=0,
    )
    members = ConfigurationSet(found, np.full(len(found), np.nan), np.zeros(len(found), dtype=np.int64)).sorted(
        measured
    )
    return put_set(members, measured, {"round": 0})


def initial_range(measured: CalibrationTables, initial: InitialSetSettings) -> tuple[float, float]:
    """Smallest and largest budget of the initial set: as asked, inside what the space can do."""
    space_low, space_high = measured.cost_range()
    low = initial.min_budget if initial.min_budget is not None else space_low
    high = initial.max_budget if initial.max_budget is not None else space_high
    if not space_low <= low < high <= space_high + 1e-9:
        raise CoaloraError(
            "the initial budgets lie inside the choice space",
            got=f"{low} to {high} {measured.cost_unit.unit}",
            expected=f"{space_low:.3f} to {space_high:.3f}, rising",
            remedy="correct initial_set.min_budget and initial_set.max_budget",
        )
    return low, high
