"""Configurations to evaluate next: hill climbing of the exact expected hypervolume improvement.

Every coordinate neighbour is scored, so a step is the best one there is: no gradients of a discrete space, no
sampling. Starts are members of the non-dominated set and the best of random crossovers and perturbations of
members. A batch is filled one by one: each proposal is believed to have its predicted loss (kriging believer,
Ginsbourger et al. 2010), which moves the front and removes the uncertainty around it, so that the next one
goes elsewhere.
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
from coalora.search.climb import Climb, climb
from coalora.search.ehvi import log_ehvi
from coalora.search.neighbours import as_neighbour_table, enumerate_moves
from coalora.search.pareto import is_non_dominated
from coalora.search.surrogate import Surrogate

_POOL = 16  # random configurations drawn for each start that is kept


@dataclass(frozen=True)
class Proposal:
    """configurations (q, N); log_ehvi (q,), each at the time it was chosen; cost (q,); steps and scored:
    moves made and configurations scored in all climbs together. q is below the number asked for only when the
    climbs ran out of configurations that are new, within bounds and able to improve."""

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
        CoaloraError: wrong shapes, indices out of range, numbers that must be positive, bounds that do not
            rise, or a layer without a choice.
    """
    cost = as_table(cost_table, name="cost_table", shape=surrogate.features.shape)
    known = as_configurations(configurations, (cost.shape[0], cost.shape[1]), name="configurations")
    mask = as_allowed(allowed, cost.shape)
    points, reference = as_objectives(Y), as_point(ref_point, name="ref_point")
    table = as_neighbour_table(neighbour_table)
    if table.shape[0] != cost.shape[1]:
        raise CoaloraError("neighbour_table must have one row per choice", got=table.shape[0], expected=cost.shape[1])
    if known.shape[0] == 0 or points.shape[0] != known.shape[0]:
        raise CoaloraError("Y must have one row per configuration, and at least one", got=points.shape[0])
    for name, value in (("n_candidates", n_candidates), ("n_restarts", n_restarts), ("max_steps", max_steps)):
        if value < 1:
            raise CoaloraError(f"{name} must be positive", got=value)
    low, high = cost_bounds if cost_bounds is not None else (-np.inf, np.inf)
    if not low <= high:
        raise CoaloraError("cost_bounds must rise", got=cost_bounds, expected="(lowest, highest)")

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
        belief = np.array([best.mean])
        surrogate = surrogate.condition_on(best.configuration[None], belief)
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
    """Half of the starts (at least one) are non-dominated members, the rest the best of a random pool; and
    its size.
    """
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
