"""Registry of search strategies: ways to choose the configurations that a round measures next.

A strategy proposes; the round (`coalora.method.search`) measures, merges and keeps. Other packages add strategies in
the entry point group ``coalora.strategies``, or name one ``module:attribute``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from coalora.registry import Registry
from coalora.search.checks import Bool, Float, Int

if TYPE_CHECKING:  # scipy takes longer to import than a list of names may take
    from coalora.search.surrogate import Surrogate


@dataclass(frozen=True)
class SearchState:
    """Knowledge before a round's proposals, and the number wanted; N counts layers, or groups of tied ones.

    Attributes:
        configurations: (n, N) int, the measured set.
        Y: (n, 2), loss and cost, both minimised.
        surrogate: fitted to these losses.
        cost: (N, K), summing over layers to the cost of a configuration.
        neighbours: (K, M) int, choices next to each choice, padded with -1.
        allowed: (N, K), the choices that each layer may take.
        ref_point: (loss, cost).
        n_candidates: configurations wanted.
        n_restarts, max_steps: climbs for each of them, and moves of a climb at most.
        seed: of the draws; another one in each round.
        progress: called with (found, wanted), or None.
    """

    configurations: Int
    Y: Float
    surrogate: Surrogate
    cost: Float
    neighbours: Int
    allowed: Bool
    ref_point: Float
    n_candidates: int
    n_restarts: int
    max_steps: int
    seed: int
    progress: Callable[[int, int], None] | None = None


class Strategy(ABC):
    """One way to propose; stateless.

    Attributes:
        keeps_all: whether every member stays in the set, also one that another dominates.
    """

    keeps_all: ClassVar[bool] = False

    @abstractmethod
    def propose(self, state: SearchState) -> tuple[Int, int]:
        """New configurations (q, N), q at most `n_candidates`, and how many the surrogate scored to find them."""


class EHVI(Strategy):
    """Hill climbing of the exact expected hypervolume improvement (`coalora.search.proposals.propose`)."""

    def propose(self, state: SearchState) -> tuple[Int, int]:
        from coalora.search.proposals import propose

        found = propose(
            state.surrogate,
            state.configurations,
            state.Y,
            state.cost,
            state.neighbours,
            state.ref_point,
            n_candidates=state.n_candidates,
            n_restarts=state.n_restarts,
            max_steps=state.max_steps,
            seed=state.seed,
            allowed=state.allowed,
            progress=state.progress,
        )
        return found.configurations, found.scored


class Random(Strategy):
    """As many random configurations: what a search must beat with the same number of evaluations."""

    def propose(self, state: SearchState) -> tuple[Int, int]:
        from coalora.search.proposals import extend_at_random

        found = extend_at_random(
            state.configurations,
            state.neighbours,
            len(state.cost),
            n_candidates=state.n_candidates,
            seed=state.seed,
            allowed=state.allowed,
        )
        return found, 0


class Frozen(Strategy):
    """Nothing new: the initial set stays as it is."""

    keeps_all: ClassVar[bool] = True

    def propose(self, state: SearchState) -> tuple[Int, int]:
        return np.empty((0, len(state.cost)), dtype=np.int64), 0


STRATEGIES: Registry[type[Strategy]] = Registry(
    "search strategy",
    "coalora.strategies",
    "coalora.search.strategies:Strategy",
    {"ehvi": EHVI, "random": Random, "frozen": Frozen},
)
