"""The configuration for a budget: measured members before predictions."""

from __future__ import annotations

import numpy as np
import pytest

from coalora.errors import CoaloraError
from coalora.search.budget import best_within, contenders

RNG = np.random.default_rng(0)
N, K = 6, 5
COST = np.sort(RNG.uniform(1, 8, (N, K)), axis=1) / N
ERR = -np.sort(-RNG.uniform(0, 1, (N, K)), axis=1)  # more bits, less error


def cost(configurations: np.ndarray) -> np.ndarray:
    return COST[np.arange(N), configurations].sum(-1)


def test_the_member_of_lowest_loss_that_fits_is_taken_as_it_is() -> None:
    members = RNG.integers(0, K, (20, N))
    losses = RNG.uniform(size=20)
    budget = float(np.median(cost(members)))
    fits = cost(members) <= budget
    best = best_within(members, losses, COST, ERR, budget)
    assert (best == members[fits][np.argmin(losses[fits])]).all()


def test_a_member_exactly_at_the_budget_fits() -> None:
    member = np.full(N, 2)
    assert (best_within(member[None], [1.0], COST, ERR, float(cost(member))) == member).all()


def test_where_no_member_fits_the_allocation_answers() -> None:
    budget = float(cost(np.zeros(N, dtype=int)))
    best = best_within(np.full((1, N), K - 1), [0.1], COST, ERR, budget)
    assert (best == 0).all()


def test_below_the_cheapest_configuration_is_refused() -> None:
    with pytest.raises(CoaloraError, match="budget"):
        best_within(np.zeros((1, N), dtype=int), [0.1], COST, ERR, 0.5 * float(cost(np.zeros(N, dtype=int))))


@pytest.mark.parametrize("losses", [[np.nan], [0.1, 0.2]])
def test_losses_must_be_measured_and_one_for_each_member(losses: list[float]) -> None:
    with pytest.raises(CoaloraError, match="Losses"):
        best_within(np.zeros((1, N), dtype=int), losses, COST, ERR, 8.0)


def test_contenders_fit_and_hold_the_best_its_filling_and_the_allocation() -> None:
    best = np.zeros(N, dtype=np.int64)
    budget = float(cost(best)) + 2.0
    found = contenders(best, COST, ERR, budget)
    assert (cost(found) <= budget + 1e-9).all()
    assert any((row == best).all() for row in found)
    errors = ERR[np.arange(N), found].sum(-1)
    assert errors.min() < ERR[np.arange(N), best].sum()
    assert len(np.unique(found, axis=0)) == len(found)


def test_members_and_contenders_keep_to_what_layers_may_take() -> None:
    allowed = np.ones((N, K), dtype=bool)
    allowed[0, 3:] = False
    good, bad = np.full(N, 2), np.full(N, 3)
    members, losses = np.stack([bad, good]), [0.1, 0.9]
    assert (best_within(members, losses, COST, ERR, 99.0) == bad).all()
    best = best_within(members, losses, COST, ERR, 99.0, allowed=allowed)
    assert (best == good).all()
    assert allowed[np.arange(N), contenders(best, COST, ERR, 99.0, allowed=allowed)].all()
    assert allowed[np.arange(N), best_within(bad[None], [0.1], COST, ERR, 99.0, allowed=allowed)].all()
