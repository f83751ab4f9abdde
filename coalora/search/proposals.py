"""Configurations to evaluate next: hill climbing of the exact expected hypervolume improvement, and random extension.

Every coordinate neighbour (one layer, one listed move) is scored, so a step is the best one there is: no gradients of
a discrete space, no sampling. Starts are members of the non-dominated set and the best of random crossovers and
perturbations of members. A batch is filled one by one: each proposal is believed to have its predicted loss (kriging
believer, Ginsbourger et al. 2010), which moves the front and removes the uncertainty around it, so that the next one
goes elsewhere. Random extension is what a search must beat with the same number of evaluations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from coalora.errors import CoaloraError
from coalora.search.checks import (
    Bool,
    Float,
    Int,
    as_allowed,
    as_configurations,
    as_objectives,
    as_point,
    as_table,
    is_allowed,
    table_sum,
)
from coalora.search.ehvi import log_ehvi
from coalora.search.pareto import is_non_dominated
from coalora.search.surrogate import Surrogate


def as_neighbour_table(neighbour_table: ArrayLike) -> Int:
    """`neighbour_table` as int64 (K, M), entries -1 (padding) or 0 to K-1. Raises CoaloraError otherwise."""
    table = np.asarray(neighbour_table)
    if table.ndim != 2 or not np.issubdtype(table.dtype, np.integer):
        raise CoaloraError(
            f"neighbour_table has the type {table.dtype} and the shape {table.shape}",
            remedy="Give integers, one row per choice, (K, M), -1 where a choice has fewer neighbours",
        )
    if table.size and (table.min() < -1 or table.max() >= table.shape[0]):
        raise CoaloraError(
            f"neighbour_table goes from {table.min()} to {table.max()}",
            remedy=f"Give indices of choices, or -1 for none: -1 to {table.shape[0] - 1}",
        )
    return table.astype(np.int64)


def enumerate_moves(configuration: Int, neighbour_table: Int, allowed: Bool | None = None) -> tuple[Int, Int]:
    """All single-coordinate moves from a configuration, layer by layer in the order of the table.

    Args:
        configuration: C (N,), the choice of every layer.
        neighbour_table: (K, M), the choices next to each choice, -1 where there are fewer than M.
        allowed: (N, K), the choices that a layer may take; None allows all.

    Returns:
        layers (m,), choices (m,): move i sets `configuration[layers[i]] = choices[i]`; staying is no move.
    """
    options = neighbour_table[configuration]
    layers, columns = np.nonzero((options >= 0) & (options != configuration[:, None]))
    choices = options[layers, columns]
    if allowed is None:
        return layers, choices
    good = allowed[layers, choices]
    return layers[good], choices[good]


@dataclass(frozen=True)
class Climb:
    """End of a climb: the configuration (N,), its log EHVI (-inf: nothing new and improving was found),
    predicted loss and cost; moves made and configurations scored."""

    configuration: Int
    log_ehvi: float
    mean: float
    cost: float
    steps: int
    scored: int


def climb(
    surrogate: Surrogate,
    start: Int,
    known: Int,
    cost_table: Float,
    neighbour_table: Int,
    score: Callable[[Float, Float, Float], Float],
    max_steps: int,
    allowed: Bool | None = None,
) -> Climb:
    """Climb `score` from `start` (N,) until no neighbour is better or `max_steps` moves are made.

    Args:
        known: evaluated configurations (n, N): passed over, though a climb may start from one.
        cost_table: (N, K); neighbour_table: (K, M), as in `enumerate_moves`.
        score: mean, sigma, cost (m,) -> value (m,), -inf for what must not be proposed.
        allowed: (N, K), the choices that a layer may take; None allows all. `start` must keep to it.
    """
    here = start.copy()
    cost = float(table_sum(cost_table, here))
    mean, sigma = surrogate.predict(here[None])
    value = float(score(mean, sigma, np.array([cost]))[0])
    loss = float(mean[0])
    if (known == here).all(axis=1).any():
        value = -np.inf
    steps, scored = 0, 1
    while steps < max_steps:
        layers, choices = enumerate_moves(here, neighbour_table, allowed)
        new = ~_leads_to(here, layers, choices, known)
        layers, choices = layers[new], choices[new]
        if layers.size == 0:
            break
        means, sigmas = surrogate.predict_moves(here, layers, choices)
        costs = cost + cost_table[layers, choices] - cost_table[layers, here[layers]]
        values = score(means, sigmas, costs)
        scored += layers.size
        best = int(np.argmax(values))
        if not values[best] > value:
            break
        here[layers[best]] = choices[best]
        # Summed anew: differences of differences would drift over a long climb.
        cost = float(table_sum(cost_table, here))
        value, loss = float(values[best]), float(means[best])
        steps += 1
    return Climb(here, value, loss, cost, steps, scored)


def _leads_to(here: Int, layers: Int, choices: Int, known: Int) -> Bool:
    """Mask (m,) of the moves whose result is one of `known` (n, N): only those at distance one can be reached."""
    differs = known != here
    near = np.flatnonzero(differs.sum(axis=1) == 1)
    at = differs[near].argmax(axis=1)
    width = 1 + max(int(choices.max(initial=0)), int(known.max(initial=0)))
    return np.isin(layers * width + choices, at * width + known[near, at])


_POOL = 16  # random configurations drawn for each start that is kept


@dataclass(frozen=True)
class Proposal:
    """configurations (q, N); log_ehvi (q,), each at the time it was chosen; cost (q,); steps and scored: moves made and
    configurations scored in all climbs together. q is below the number asked for only when the climbs ran out of
    configurations that are new, within bounds and able to improve."""

    configurations: Int
    log_ehvi: Float
    cost: Float
    steps: int
    scored: int


def propose(
    surrogate: Surrogate,
    configurations: ArrayLike,
    Y: ArrayLike,
    cost_table: ArrayLike,
    neighbour_table: ArrayLike,
    ref_point: ArrayLike,
    *,
    n_candidates: int,
    n_restarts: int,
    max_steps: int,
    seed: int,
    cost_bounds: tuple[float, float] | None = None,
    allowed: ArrayLike | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Proposal:
    """Propose configurations by their expected gain in hypervolume.

    Args:
        surrogate: fitted to the losses of `configurations`.
        configurations: evaluated set (n, N) int, n >= 1; none of it is proposed again.
        Y: its loss and cost (n, 2), both minimised.
        cost_table: (N, K); the cost of C is sum_l cost_table[l, C_l], in the units of Y[:, 1].
        neighbour_table: (K, M) int, choices next to each choice, padded with -1.
        ref_point: (loss, cost).
        n_candidates: q, size of the batch.
        n_restarts: climbs per candidate.
        max_steps: longest climb.
        seed: of the starts.
        cost_bounds: (lowest, highest) cost of a proposal; None leaves the reference point as the only bound.
        allowed: bool (N, K), the choices that a layer may take; None allows all. Members that take others inform the
            surrogate, but a climb starts from them only after such choices became the allowed one of nearest cost.
        progress: called with (candidates found, n_candidates) after each.

    Raises:
        CoaloraError: wrong shapes, indices out of range, numbers that must be positive, bounds that do not rise, or a
            layer without a choice.

    Example:
        >>> from coalora import Surrogate, propose
        >>> err, bits = [[9.0, 3.0, 1.0], [4.0, 2.0, 1.0]], [[2.0, 3.0, 4.0], [2.0, 3.0, 4.0]]
        >>> C, Y = [[0, 0], [2, 2]], [[13.0, 4.0], [2.0, 8.0]]
        >>> proposal = propose(
        ...     Surrogate.fit(err, C, [13.0, 2.0], seed=0), C, Y, bits, [[1, -1], [0, 2], [1, -1]], [14.0, 9.0],
        ...     n_candidates=2, n_restarts=2, max_steps=5, seed=0,
        ... )
        >>> proposal.configurations.shape
        (2, 2)
    """
    cost = as_table(cost_table, name="cost_table", shape=surrogate.features.shape)
    known = as_configurations(configurations, (cost.shape[0], cost.shape[1]), name="configurations")
    mask = as_allowed(allowed, cost.shape)
    points, reference = as_objectives(Y), as_point(ref_point, name="ref_point")
    table = as_neighbour_table(neighbour_table)
    if table.shape[0] != cost.shape[1]:
        raise CoaloraError(f"neighbour_table has {table.shape[0]} rows for {cost.shape[1]} choices")
    if known.shape[0] == 0 or points.shape[0] != known.shape[0]:
        raise CoaloraError(
            f"Y has {points.shape[0]} rows for {known.shape[0]} configurations",
            remedy="Give one for each, at least one",
        )
    for name, value in (("n_candidates", n_candidates), ("n_restarts", n_restarts), ("max_steps", max_steps)):
        if value < 1:
            raise CoaloraError(f"{name} is {value}", remedy="Set it to at least 1")
    low, high = cost_bounds if cost_bounds is not None else (-np.inf, np.inf)
    if not low <= high:
        raise CoaloraError(f"cost_bounds {cost_bounds} do not rise", remedy="Give (lowest, highest)")

    rng = np.random.default_rng(seed)
    chosen: list[Climb] = []
    steps = scored = 0
    for done in range(n_candidates):

        def score(mean: Float, sigma: Float, total: Float, front: Float = points) -> Float:
            value = log_ehvi(mean, sigma, total, front, reference)
            return np.where((total >= low) & (total <= high), value, -np.inf)

        starts, drawn = _starts(surrogate, known, points, cost, table, mask, score, n_restarts, rng)
        climbs = [climb(surrogate, start, known, cost, table, score, max_steps, mask) for start in starts]
        steps, scored = steps + sum(c.steps for c in climbs), scored + drawn + sum(c.scored for c in climbs)
        best = max(climbs, key=lambda c: c.log_ehvi)
        if best.log_ehvi == -np.inf:
            break
        chosen.append(best)
        surrogate = surrogate.condition_on(best.configuration[None], [best.mean])
        known = np.concatenate([known, best.configuration[None]])
        points = np.concatenate([points, [[best.mean, best.cost]]])
        if progress is not None:
            progress(done + 1, n_candidates)
    return Proposal(
        configurations=np.array([c.configuration for c in chosen], dtype=np.int64).reshape(-1, cost.shape[0]),
        log_ehvi=np.array([c.log_ehvi for c in chosen]),
        cost=np.array([c.cost for c in chosen]),
        steps=steps,
        scored=scored,
    )


def _starts(
    surrogate: Surrogate,
    known: Int,
    points: Float,
    cost: Float,
    table: Int,
    allowed: Bool,
    score: Callable[[Float, Float, Float], Float],
    n_restarts: int,
    rng: np.random.Generator,
) -> tuple[list[Int], int]:
    """Half of the starts (at least one) are non-dominated members, the rest the best of a random pool; and its size."""
    front = _repaired(known[is_non_dominated(points)], cost, allowed)
    members = front[rng.permutation(front.shape[0])[: (n_restarts + 1) // 2]]
    wanted = n_restarts - members.shape[0]
    if wanted == 0:
        return list(members), 0
    pool = np.stack([offspring(front, table, allowed, rng) for _ in range(_POOL * wanted)])
    value = score(*surrogate.predict(pool), table_sum(cost, pool))
    best = np.argsort(-value, kind="stable")[:wanted]
    return [*members, *pool[best]], pool.shape[0]


def _repaired(configurations: Int, cost: Float, allowed: Bool) -> Int:
    """Configurations (m, N) with every choice that is not allowed replaced by the allowed one of nearest cost."""
    if is_allowed(allowed, configurations).all():
        return configurations
    distance = np.abs(cost[:, :, None] - cost[:, None, :])
    nearest = np.argmin(np.where(allowed[:, None, :], distance, np.inf), axis=2)
    out = np.where(allowed, np.arange(cost.shape[1]), nearest)[np.arange(cost.shape[0]), configurations]
    return np.unique(out, axis=0)


def offspring(front: Int, table: Int, allowed: Bool, rng: np.random.Generator) -> Int:
    """Uniform crossover of two members, then random moves in about one to a quarter of the layers."""
    mother, father = front[rng.integers(front.shape[0], size=2)]
    child = np.where(rng.random(mother.size) < rng.random(), mother, father)
    layers, choices = enumerate_moves(child, table, allowed)
    if layers.size:
        picked = rng.choice(layers.size, size=int(rng.integers(1, max(2, mother.size // 4 + 1))))
        child[layers[picked]] = choices[picked]
    return child


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
        raise CoaloraError("No member of the set takes allowed choices alone", remedy="Allocate a set for these rules")
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
