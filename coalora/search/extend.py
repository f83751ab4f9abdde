"""Random extension of a configuration set: what a search must beat with the same number of evaluations."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from coalora.errors import CoaloraError
from coalora.search.checks import Int, as_allowed, as_configurations, is_allowed
from coalora.search.neighbours import as_neighbour_table
from coalora.search.propose import offspring

_TRIES = 50  # draws for each configuration asked for, before the space counts as used up


def extend_at_random(
    configurations: ArrayLike,
    neighbour_table: ArrayLike,
    n_layers: int,
    *,
    n_candidates: int,
    seed: int,
    allowed: ArrayLike | None = None,
) -> Int:
    """New configurations (q, N): crossovers of two random members, then random moves in up to a quarter of the layers.

    Args:
        configurations: the set (n, N), n >= 1.
        neighbour_table: (K, M), as in `propose`.
        n_layers: N.
        n_candidates: q; fewer are returned where the space has no more.
        seed: of the draws.
        allowed: bool (N, K), the choices that a layer may take; None allows all.

    Raises:
        CoaloraError: wrong shapes, or no member that takes allowed choices only.
    """
    table = as_neighbour_table(neighbour_table)
    mask = as_allowed(allowed, (n_layers, table.shape[0]))
    known = as_configurations(configurations, (n_layers, table.shape[0]), name="configurations")
    parents = known[is_allowed(mask, known)]
    if parents.shape[0] == 0:
        raise CoaloraError("an extension needs members that take allowed choices", got=0, expected="at least one")
    rng = np.random.default_rng(seed)
    seen = {tuple(row) for row in known.tolist()}
    found: list[Int] = []
    for _ in range(_TRIES * n_candidates):
        if len(found) == n_candidates:
            break
        child = offspring(parents, table, mask, rng)
        if tuple(child.tolist()) not in seen:
            seen.add(tuple(child.tolist()))
            found.append(child)
    return np.array(found, dtype=np.int64).reshape(-1, n_layers)
