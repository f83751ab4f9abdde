"""Round of Pareto search: members measured anew, candidates proposed, measured and merged, segments filtered.

Members are measured in each round because the adapter has trained on since: their old losses no longer compare. The
reference point is fixed by the first round, so that hypervolumes of all rounds compare.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from coalora.calibrate.tables import CalibrationTables
from coalora.configurations import ConfigurationSet
from coalora.recipes import SearchRecipe
from coalora.search.pareto import hypervolume, is_non_dominated, segment_filter
from coalora.search.strategies import STRATEGIES, SearchState
from coalora.search.surrogate import Surrogate


def search_round(
    measure: Callable[[np.ndarray, str], np.ndarray],
    members: ConfigurationSet,
    tables: CalibrationTables,
    recipe: SearchRecipe,
    *,
    round_index: int,
    seed: int,
    ref_point: ArrayLike | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[ConfigurationSet, dict[str, Any]]:
    """The set of the next round, and the round's record.

    Args:
        measure: losses (n,) of configurations (n, N), such as a `LossMeter` of the model as it is trained by now; its
            second argument says which: "set" or "candidates".
        members: the set that the model was trained on.
        round_index: from 1 on; noted in the members that join.
        ref_point: (loss, cost) of the record of an earlier round; None takes this round's `reference_point`.
        progress: told of proposals, (found, wanted).

    Returns:
        The kept members, and a JSON-able record: `ref_point`, `front` (loss, cost), `hypervolume_before` and `_after`,
        counts of members, candidates and evaluations, and the surrogate's mean error.

    Example:
        >>> from coalora import InitialSetRecipe, SearchRecipe, initial_set, search_round
        >>> members = initial_set(tables, InitialSetRecipe(size=3))
        >>> def measure(configurations, what):  # in place of a model
        ...     return 1 + tables.err[range(len(tables.layers)), configurations].sum(-1)
        >>> found, record = search_round(measure, members, tables, SearchRecipe(), round_index=1, seed=0)
        >>> record["hypervolume_after"] > record["hypervolume_before"]
        True
    """
    members = members.with_losses(measure(members.configurations, "set"))
    Y = members.objectives(tables)
    reference = reference_point(Y, tables) if ref_point is None else np.asarray(ref_point)
    measured, allowed = tables.of_groups(members.configurations), tables.search_allowed
    surrogate = Surrogate.fit(tables.search_err, measured, members.losses, seed=seed)
    strategy = STRATEGIES[recipe.strategy]()
    proposed, scored = strategy.propose(
        SearchState(
            measured,
            Y,
            surrogate,
            tables.search_cost,
            tables.space.neighbours(recipe.delta, allowed),
            allowed,
            reference,
            n_candidates=recipe.candidates,
            n_restarts=recipe.restarts,
            max_steps=recipe.max_steps,
            seed=seed * 1_000_003 + round_index,
            progress=progress,
        )
    )
    n = len(proposed)
    joining = ConfigurationSet.unmeasured(tables.expand(proposed), round_index)
    if n:
        predicted, _ = surrogate.predict(proposed)
        joining = joining.with_losses(measure(joining.configurations, "candidates"))
    kept = members.merge(joining).sorted(tables)
    if not strategy.keeps_all:
        kept = kept.take(np.flatnonzero(segment_filter(kept.objectives(tables), recipe.segments, tables.cost_range())))
    after = kept.objectives(tables)
    return kept, {
        "round": round_index,
        "strategy": recipe.strategy,
        "ref_point": reference.tolist(),
        "n_members": len(kept),
        "n_candidates": n,
        "n_accepted": int((kept.joined == round_index).sum()),
        "scored": scored,
        "surrogate_error": float(np.abs(predicted - joining.losses).mean()) if n else None,
        "hypervolume_before": hypervolume(Y, reference),
        "hypervolume_after": hypervolume(after, reference),
        "front": after[is_non_dominated(after)].tolist(),
        "evaluations": len(members) + n,
    }


def reference_point(Y: np.ndarray, tables: CalibrationTables) -> np.ndarray:
    """(loss, cost) that every member improves on: the worst loss of Y (n, 2) plus a tenth of its range, and a hundredth
    above the space's largest cost: a point at the reference's own cost would count for nothing."""
    low, high = Y[:, 0].min(), Y[:, 0].max()
    return np.array([high + 0.1 * (high - low), tables.cost_range()[1] * 1.01])
