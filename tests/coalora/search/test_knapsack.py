"""Allocation against an exact solver, on random and on quantization-like tables."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_matrix
from scipy.spatial import ConvexHull

from coalora.errors import CoaloraError
from coalora.search import knapsack
from coalora.search.knapsack import allocate, fill, hull_paths, staircase, walk_hulls


def _tables(kind: str, seed: int, N: int = 24, K: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """err, cost (N, K): uniform noise, or NormalFloat-like errors of layers that differ in size and
    sensitivity.
    """
    rng = np.random.default_rng(seed)
    if kind == "random":
        return rng.random((N, K)), rng.random((N, K))
    fields = list(itertools.product((2, 3, 4, 8), (2, 3, 4, 8), (16, 32, 64), (16, 64, 256), (16, 32, 16)))
    picked = [fields[i] for i in rng.choice(len(fields), K, replace=False)]
    bits = np.array([b + b0 / B0 + b1 / (B0 * B1) for b, b0, B0, B1, b1 in picked])
    base = np.array([4.0**-b * (1 + 0.6 * 2.0**-b0) * (1 + 0.2 * np.log2(B0)) for b, b0, B0, _, _ in picked])
    size = rng.choice([1.0, 1.0, 4.0], size=(N, 1))
    err = np.exp(rng.normal(size=(N, 1))) * base * np.exp(0.05 * rng.normal(size=(N, K)))
    cost = size * bits
    return err, np.rint(1e5 * cost).astype(np.int64) if kind == "integer" else cost / size.sum()


def _exact(err: np.ndarray, cost: np.ndarray, budget: float, scale: float) -> float:
    N, K = err.shape
    one = coo_matrix((np.ones(N * K), (np.repeat(np.arange(N), K), np.arange(N * K))))
    limits = [LinearConstraint(one, 1, 1), LinearConstraint(cost.ravel()[None], -np.inf, budget)]
    # Scaled to an optimum near 1000: the solver's absolute tolerances must not decide.
    solved = milp(
        err.ravel() * (1e3 / scale),
        integrality=np.ones(N * K),
        bounds=Bounds(0, 1),
        constraints=limits,
        options={"mip_rel_gap": 1e-4, "time_limit": 60},
    )
    return float(solved.mip_dual_bound) * scale / 1e3


@pytest.mark.parametrize("kind", ["random", "structured", "integer"])
@pytest.mark.parametrize("seed", [0, 1])
def test_total_error_is_within_a_thousandth_of_the_exact_optimum(kind: str, seed: int) -> None:
    err, cost = _tables(kind, seed)
    low, high = cost.min(axis=1).sum(), cost.max(axis=1).sum()
    budgets = low + (high - low) * np.array([0.7, 0.03, 0.3])
    found = allocate(err, cost, budgets)
    rows = np.arange(err.shape[0])
    assert (cost[rows, found].sum(axis=1) <= budgets * (1 + 1e-11)).all()
    for C, budget in zip(found, budgets, strict=True):
        total = err[rows, C].sum()
        assert total <= _exact(err, cost, budget, total) * 1.0012  # 0.1 % and the solver's own gap


def test_a_long_step_that_does_not_fit_is_exchanged_for_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    # 96 layers of size 1 or 4, whose choices jump from 4.5 to 8 bits. A step of a large layer is too dear for what is
    # left at these budgets, and a part of one is what the relaxation would take.
    rng = np.random.default_rng(0)
    N = 96
    bits = np.array([2.0, 2.1, 3.0, 3.1, 4.0, 4.1, 4.3, 4.5, 8.0, 8.1, 8.2, 8.5])
    size = np.where(np.arange(N) % 3 == 2, 4.0, 1.0)[:, None]
    err = np.exp(0.7 * rng.normal(size=(N, 1))) * 4.0**-bits * np.exp(0.03 * rng.normal(size=(N, bits.size)))
    cost = size * bits / size.sum()
    rows = np.arange(N)
    budgets = np.linspace(5.6, 7.1, 4)
    found = allocate(err, cost, budgets)
    assert (cost[rows, found].sum(axis=1) <= budgets * (1 + 1e-11)).all()
    stairs = staircase(cost, err)
    walk = walk_hulls(stairs, budgets)
    monkeypatch.setattr(knapsack, "_WORK", 2**17)  # the oracle: a beam of thousands of partial configurations a layer
    wide = [knapsack.solve_core(stairs, walk.position[b], budgets[b], walk.price[b], 0.0) for b in range(4)]
    distance = err[rows, found].sum(axis=1) / stairs.err[rows, wide].sum(axis=1) - 1
    assert np.sort(distance)[-2] < 1e-3
    assert distance.max() < 5e-3


def test_extreme_budgets_give_the_cheapest_and_the_most_accurate() -> None:
    err, cost = _tables("structured", 3)
    rows = np.arange(err.shape[0])
    cheapest, best = allocate(err, cost, [cost.min(axis=1).sum(), 1e9])
    np.testing.assert_array_equal(cost[rows, cheapest], cost.min(axis=1))
    np.testing.assert_array_equal(err[rows, best], err.min(axis=1))


def test_a_configuration_always_fits_its_own_cost() -> None:
    err, cost = _tables("structured", 4)
    first = allocate(err, cost, np.linspace(3, 7, 20))
    totals = cost[np.arange(24), first].sum(axis=1)
    again = allocate(err, cost, totals)
    rows = np.arange(24)
    assert (err[rows, again].sum(axis=1) <= err[rows, first].sum(axis=1) * (1 + 1e-3)).all()


@pytest.mark.parametrize(("N", "K"), [(1, 1), (1, 7), (3, 1), (2, 5)])
def test_tiny_tables_equal_enumeration(N: int, K: int) -> None:
    rng = np.random.default_rng(N * 10 + K)
    err, cost = rng.random((N, K)), rng.random((N, K))
    everything = np.array(list(itertools.product(range(K), repeat=N)))
    rows = np.arange(N)
    totals, errors = cost[rows, everything].sum(axis=1), err[rows, everything].sum(axis=1)
    for budget in np.quantile(totals, [0.0, 0.3, 0.7, 1.0]):
        got = err[rows, allocate(err, cost, budget)[0]].sum()
        assert got <= errors[totals <= budget].min() * (1 + 1e-3)


def test_order_of_budgets_does_not_matter() -> None:
    err, cost = _tables("structured", 5)
    budgets = np.linspace(3.5, 7, 9)
    shuffle = np.random.default_rng(0).permutation(9)
    np.testing.assert_array_equal(allocate(err, cost, budgets)[shuffle], allocate(err, cost, budgets[shuffle]))


def test_budget_below_the_smallest_is_refused_with_the_smallest() -> None:
    err, cost = _tables("structured", 0)
    with pytest.raises(CoaloraError, match=f"{cost.min(axis=1).sum():.6g}"[:6]):
        allocate(err, cost, [5.0, 1.0])


@pytest.mark.parametrize("bad", [np.full((2, 3), np.nan), np.zeros((3, 2)), np.zeros(3)])
def test_bad_tables_are_refused(bad: np.ndarray) -> None:
    with pytest.raises(CoaloraError):
        allocate(bad, np.ones((2, 3)), 5.0)


def test_a_hull_path_is_the_falling_part_of_the_convex_hull() -> None:
    rng = np.random.default_rng(0)
    cost, err = rng.random(200), rng.random(200)
    stairs = staircase(cost[None], err[None])
    got = stairs.index[0, hull_paths(stairs)[0][0]]
    assert (np.diff(cost[got]) > 0).all()
    assert (np.diff(err[got]) < 0).all()
    vertices = set(ConvexHull(np.stack([cost, err], axis=1)).vertices)
    assert set(got) <= vertices
    slopes = np.diff(err[got]) / np.diff(cost[got])
    for start, slope in zip(got, slopes, strict=False):
        assert (err >= err[start] + slope * (cost - cost[start]) - 1e-12).all()
    assert got[0] == np.argmin(cost)
    assert got[-1] == np.argmin(err)


def test_fill_only_improves_and_leaves_no_single_upgrade() -> None:
    err, cost = _tables("structured", 6)
    rows = np.arange(24)
    start = allocate(err, cost, 3.5)[0]
    kept = start.copy()
    filled = fill(start, err, cost, 4.5)
    np.testing.assert_array_equal(start, kept)
    slack = 4.5 - cost[rows, filled].sum()
    assert slack >= -1e-11
    assert err[rows, filled].sum() < err[rows, start].sum()
    fits = cost - cost[rows, filled][:, None] <= slack
    assert not (fits & (err < err[rows, filled][:, None])).any()


def test_fill_takes_free_improvements_and_refuses_what_exceeds_the_budget() -> None:
    err, cost = np.array([[2.0, 1.0, 0.5]]), np.array([[1, 1, 3]])
    assert fill([0], err, cost, 1).tolist() == [1]
    assert fill([0], err, cost, 3).tolist() == [2]
    with pytest.raises(CoaloraError, match="more than the budget"):
        fill([2], err, cost, 2)


@pytest.mark.parametrize("seed", range(4))
def test_only_allowed_choices_are_taken_and_the_best_of_them(seed: int) -> None:
    rng = np.random.default_rng(seed)
    N, K = 4, 6
    err, cost = rng.random((N, K)), rng.random((N, K))
    allowed = rng.random((N, K)) < 0.5
    allowed[np.arange(N), rng.integers(0, K, N)] = True
    rows = np.arange(N)
    everything = np.array(list(itertools.product(*(np.flatnonzero(row) for row in allowed))))
    totals, errors = cost[rows, everything].sum(axis=1), err[rows, everything].sum(axis=1)
    budgets = np.quantile(totals, [0.0, 0.2, 0.5, 1.0])
    found = allocate(err, cost, budgets, allowed=allowed)
    assert allowed[rows, found].all()
    for C, budget in zip(found, budgets, strict=True):
        assert err[rows, C].sum() <= errors[totals <= budget * (1 + 1e-12)].min() * (1 + 1e-3)


def test_fill_takes_allowed_upgrades_only_and_refuses_a_start_that_is_not_allowed() -> None:
    err, cost = np.array([[2.0, 1.0, 0.5]]), np.array([[1, 2, 3]])
    allowed = np.array([[True, True, False]])
    assert fill([0], err, cost, 3, allowed=allowed).tolist() == [1]
    with pytest.raises(CoaloraError, match="allowed"):
        fill([2], err, cost, 3, allowed=allowed)


@pytest.mark.parametrize("allowed", [[[True, True], [False, False]], [[True, True]], [[1, 1], [1, 1]]])
def test_a_layer_without_a_choice_and_masks_of_another_form_are_refused(allowed: list[list[bool]]) -> None:
    with pytest.raises(CoaloraError, match="choice"):
        allocate([[1.0, 2.0], [1.0, 2.0]], [[2.0, 1.0], [2.0, 1.0]], 5.0, allowed=allowed)
