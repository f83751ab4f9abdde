"""Best-improvement hill climbing over coordinate neighbours, each step scoring all of them exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from coalora.search.checks import Bool, Float, Int, table_sum
from coalora.search.neighbours import enumerate_moves
from coalora.search.surrogate import Surrogate


@dataclass(frozen=True)
class Climb:
    """Where a climb ended: the configuration (N,), its log EHVI (-inf: nothing new and improving was found),
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
    """Mask (m,) of the moves whose result is one of `known` (n, N): only those at distance one can be
    reached.
    """
    differs = known != here
    near = np.flatnonzero(differs.sum(axis=1) == 1)
    at = differs[near].argmax(axis=1)
    width = 1 + max(int(choices.max(initial=0)), int(known.max(initial=0)))
    return np.isin(layers * width + choices, at * width + known[near, at])
