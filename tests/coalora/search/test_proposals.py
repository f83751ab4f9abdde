"""Proposals: neighbours, climbs, batches and random extension."""

from __future__ import annotations

import numpy as np
import pytest

from coalora.errors import CoaloraError
from coalora.search.pareto import hypervolume
from coalora.search.proposals import Proposal, as_neighbour_table, climb, enumerate_moves, extend_at_random, propose
from coalora.search.surrogate import Surrogate

TABLE = np.array([[1, -1], [0, 2], [1, -1]])


def test_moves_are_the_listed_neighbours_of_every_layer() -> None:
    layers, choices = enumerate_moves(np.arange(3), TABLE)
    assert list(zip(layers.tolist(), choices.tolist(), strict=True)) == [(0, 1), (1, 0), (1, 2), (2, 1)]


def test_forbidden_choices_and_staying_are_no_moves() -> None:
    table, allowed = np.array([[0, 1], [1, 0], [2, 2]]), np.array([[False, True, True], [True] * 3])
    layers, choices = enumerate_moves(np.array([1, 1]), table, allowed)
    assert (layers.tolist(), choices.tolist()) == ([1], [0])


@pytest.mark.parametrize("table", [[[7]], [[0.5]], [0, -1]])
def test_bad_neighbours_are_refused(table: object) -> None:
    with pytest.raises(CoaloraError):
        as_neighbour_table(table)  # type: ignore[arg-type]


N, K = 16, 5
RNG = np.random.default_rng(0)
SENSITIVITY = np.exp(RNG.normal(size=(N, 1)))
BITS = np.array([2.0, 3.0, 4.0, 5.0, 8.0])
ERR = SENSITIVITY * 4.0**-BITS
COST = np.tile(BITS / N, (N, 1))
NEIGHBOURS = np.array([[1, -1], [0, 2], [1, 3], [2, 4], [3, -1]])
REF = np.array([3.0, 8.5])


def _evaluate(C: np.ndarray) -> np.ndarray:
    rows = np.arange(N)
    return np.stack([1.0 + 2.0 * ERR[rows, C].sum(axis=1), COST[rows, C].sum(axis=1)], axis=1)


def _start(n: int = 20) -> tuple[np.ndarray, np.ndarray, Surrogate]:
    C = np.random.default_rng(1).integers(0, K, (n, N))
    Y = _evaluate(C)
    return C, Y, Surrogate.fit(ERR, C, Y[:, 0], seed=0)


def _propose(n_candidates: int = 6, seed: int = 0, **changes: object) -> Proposal:
    C, Y, surrogate = _start()
    arguments = {"n_candidates": n_candidates, "n_restarts": 4, "max_steps": 40, "seed": seed} | changes
    return propose(surrogate, C, Y, COST, NEIGHBOURS, REF, **arguments)  # type: ignore[arg-type]


def test_proposals_raise_the_hypervolume_more_than_random_neighbours_of_the_front() -> None:
    C, Y, _ = _start()
    proposal = _propose()
    before = hypervolume(Y, REF)
    gain = hypervolume(np.concatenate([Y, _evaluate(proposal.configurations)]), REF) - before
    assert gain > 0
    rng = np.random.default_rng(2)
    for _ in range(10):
        chance = C[rng.integers(0, C.shape[0], 6)].copy()
        for row in chance:
            layers, choices = enumerate_moves(row, NEIGHBOURS)
            i = rng.integers(layers.size)
            row[layers[i]] = choices[i]
        assert gain > hypervolume(np.concatenate([Y, _evaluate(chance)]), REF) - before


def test_proposals_are_new_distinct_and_spread_over_cost() -> None:
    C, _, _ = _start()
    proposal = _propose(8)
    assert proposal.configurations.shape == (8, N)
    assert len({tuple(row) for row in np.concatenate([C, proposal.configurations])}) == 28
    np.testing.assert_allclose(proposal.cost, _evaluate(proposal.configurations)[:, 1], atol=1e-12)
    assert np.ptp(proposal.cost) > 1.0
    assert np.isfinite(proposal.log_ehvi).all()
    assert proposal.scored > proposal.steps > 0


def test_rounds_of_search_come_close_to_the_exact_front() -> None:
    C, Y, surrogate = _start()
    for seed in range(3):
        found = propose(
            surrogate, C, Y, COST, NEIGHBOURS, REF, n_candidates=6, n_restarts=4, max_steps=60, seed=seed
        ).configurations
        C = np.concatenate([C, found])
        Y = _evaluate(C)
        surrogate = Surrogate.fit(ERR, C, Y[:, 0], seed=0)
    # Convex hulls are exact here: the merged greedy walk visits optimal configurations.
    state, best = np.zeros(N, dtype=int), []
    while True:
        best.append(state.copy())
        rows = np.flatnonzero(state < K - 1)
        if rows.size == 0:
            break
        rate = (ERR[rows, state[rows]] - ERR[rows, state[rows] + 1]) / (
            COST[rows, state[rows] + 1] - COST[rows, state[rows]]
        )
        state[rows[np.argmax(rate)]] += 1
    exact = hypervolume(_evaluate(np.array(best)), REF)
    assert hypervolume(Y, REF) > 0.95 * exact


def test_same_seed_same_proposals_other_seed_other_ones() -> None:
    # One short climb each: long ones of any seed end in the same optimum here.
    one, same, other = (_propose(4, seed, n_restarts=1, max_steps=2).configurations for seed in (5, 5, 6))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


def test_cost_bounds_are_kept_and_impossible_ones_give_no_proposal() -> None:
    cost = _propose(4, cost_bounds=(3.0, 4.0)).cost
    assert ((cost >= 3.0) & (cost <= 4.0)).all()
    assert cost.size > 0
    assert _propose(4, cost_bounds=(20.0, 30.0)).configurations.shape == (0, N)


def test_proposals_and_climbs_keep_to_what_layers_may_take() -> None:
    C, _, surrogate = _start()
    allowed = np.random.default_rng(3).random((N, K)) < 0.5
    allowed[:, 2] = True
    rows = np.arange(N)
    # Every member takes some forbidden choice: starts and offspring have to be repaired.
    assert not allowed[rows, C].all(axis=1).any()
    found = _propose(6, allowed=allowed).configurations
    assert found.shape == (6, N)
    assert allowed[rows, found].all()
    start = np.full(N, 2)
    end = climb(surrogate, start, C, COST, NEIGHBOURS, lambda m, s, c: -m, max_steps=99, allowed=allowed)
    assert end.steps > 0
    assert allowed[rows, end.configuration].all()


def test_a_layer_without_any_choice_is_refused() -> None:
    allowed = np.ones((N, K), dtype=bool)
    allowed[5] = False
    with pytest.raises(CoaloraError, match="left without a choice"):
        _propose(1, allowed=allowed)


def test_progress_counts_every_candidate() -> None:
    seen: list[tuple[int, int]] = []
    _propose(3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_climb_ends_where_no_new_neighbour_is_better() -> None:
    C, _, surrogate = _start()

    def score(mean: np.ndarray, sigma: np.ndarray, cost: np.ndarray) -> np.ndarray:
        return -mean - 0.5 * cost

    end = climb(surrogate, C[0], C, COST, NEIGHBOURS, score, max_steps=500)
    layers, choices = enumerate_moves(end.configuration, NEIGHBOURS)
    assert 0 < end.steps < 500
    for layer, choice in zip(layers, choices, strict=True):
        other = end.configuration.copy()
        other[layer] = choice
        if (other == C).all(axis=1).any():
            continue
        mean, _ = surrogate.predict(other[None])
        assert -mean[0] - 0.5 * _evaluate(other[None])[0, 1] <= end.log_ehvi + 1e-9


def test_a_climb_never_ends_on_a_known_configuration() -> None:
    C, _, surrogate = _start()
    layers, choices = enumerate_moves(C[0], NEIGHBOURS)
    known = np.tile(C[0], (layers.size + 1, 1))
    known[np.arange(layers.size), layers] = choices
    end = climb(surrogate, C[0], known, COST, NEIGHBOURS, lambda m, s, c: -m, max_steps=10)
    assert end.log_ehvi == -np.inf


@pytest.mark.parametrize("change", [{"n_candidates": 0}, {"n_restarts": 0}, {"max_steps": 0}, {"cost_bounds": (4, 3)}])
def test_numbers_out_of_range_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(CoaloraError):
        _propose(**change)  # type: ignore[arg-type]


def test_mismatched_tables_are_refused() -> None:
    C, Y, surrogate = _start()
    for cost, table, points in (
        (COST[:3], NEIGHBOURS, Y),
        (COST, NEIGHBOURS[:3] % 3, Y),
        (COST, NEIGHBOURS, Y[:2]),
    ):
        with pytest.raises(CoaloraError):
            propose(surrogate, C, points, cost, table, REF, n_candidates=1, n_restarts=1, max_steps=1, seed=0)


SET = np.array([[0, 0, 0, 0], [2, 2, 2, 2]])


def test_an_extension_is_new_distinct_allowed_and_decided_by_its_seed() -> None:
    allowed = np.ones((4, 3), dtype=bool)
    allowed[0, 1] = False
    found = extend_at_random(SET, TABLE, 4, n_candidates=10, seed=1, allowed=allowed)
    assert len({tuple(row) for row in np.concatenate([SET, found])}) == 12
    assert allowed[np.arange(4), found].all()
    again = extend_at_random(SET, TABLE, 4, n_candidates=10, seed=1, allowed=allowed)
    np.testing.assert_array_equal(found, again)
    assert (found != extend_at_random(SET, TABLE, 4, n_candidates=10, seed=2, allowed=allowed)).any()


def test_a_space_that_is_used_up_gives_fewer_and_a_forbidden_set_is_refused() -> None:
    assert len(extend_at_random([[0], [1]], TABLE, 1, n_candidates=5, seed=0)) == 1
    allowed = np.array([[False, True, False]])
    with pytest.raises(CoaloraError, match="allowed"):
        extend_at_random([[0]], TABLE, 1, n_candidates=1, seed=0, allowed=allowed)
