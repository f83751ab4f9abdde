"""Non-dominated points, hypervolume and segments against definitions and other implementations."""

from __future__ import annotations

import numpy as np
import pytest

from coalora.errors import CoaloraError
from coalora.search.pareto import hypervolume, is_non_dominated, normalized_hypervolume, segment_filter
from tests.coalora import oracles
from tests.coalora.oracles import Oracle, non_dominated


@pytest.mark.oracles
@pytest.mark.parametrize("m", [2, 3])
@pytest.mark.parametrize("deduplicate", [True, False])
@pytest.mark.parametrize("levels", [4, 1000])
def test_mask_equals_botorch_with_ties_and_duplicates(oracle: Oracle, m: int, deduplicate: bool, levels: int) -> None:
    rng = np.random.default_rng(levels + m)
    for n in (1, 2, 7, 60):
        Y = rng.integers(0, levels, (n, m)).astype(float)
        expected = oracle(non_dominated, Y, deduplicate)
        np.testing.assert_array_equal(is_non_dominated(Y, deduplicate=deduplicate), expected)


def test_infinite_loss_never_dominates_a_finite_one() -> None:
    assert is_non_dominated([[np.inf, 2.0], [1.0, 2.0], [np.inf, 1.0]]).tolist() == [False, True, True]


def test_empty_set_gives_an_empty_mask() -> None:
    assert is_non_dominated(np.empty((0, 2))).shape == (0,)


@pytest.mark.parametrize("Y", [[[np.nan, 1.0]], [1.0, 2.0], [[1.0]]])
def test_nan_and_wrong_shapes_are_refused(Y: list) -> None:
    with pytest.raises(CoaloraError):
        is_non_dominated(Y)


@pytest.mark.oracles
@pytest.mark.parametrize("seed", range(5))
def test_area_equals_botorch_with_points_beyond_the_reference(oracle: oracles.Oracle, seed: int) -> None:
    Y = np.random.default_rng(seed).random((40, 2)) + 0.1
    reference = np.array([0.8, 0.9])
    expected = oracle(oracles.hypervolume, Y[(reference > Y).all(axis=1)], reference)
    assert hypervolume(Y, reference) == pytest.approx(expected, rel=1e-12)


def test_one_point_spans_its_rectangle_and_none_spans_nothing() -> None:
    assert hypervolume([[1.0, 2.0]], [3.0, 5.0]) == 6.0
    assert hypervolume(np.empty((0, 2)), [3.0, 5.0]) == 0.0
    assert hypervolume([[3.0, 0.0]], [3.0, 5.0]) == 0.0


def test_normalized_area_is_one_at_the_ideal_and_clips_beyond_it() -> None:
    assert normalized_hypervolume([[0.0, 2.0]], [0.0, 2.0], [1.0, 8.0]) == 1.0
    assert normalized_hypervolume([[-5.0, 0.0]], [0.0, 2.0], [1.0, 8.0]) == 1.0
    assert normalized_hypervolume([[0.5, 5.0]], [0.0, 2.0], [1.0, 8.0]) == pytest.approx(0.25)


def test_ideal_above_the_reference_is_refused() -> None:
    with pytest.raises(CoaloraError, match="strictly below"):
        normalized_hypervolume([[0.0, 0.0]], [1.0, 0.0], [1.0, 1.0])


def test_every_segment_with_members_keeps_its_own_non_dominated_ones() -> None:
    rng = np.random.default_rng(0)
    Y = np.stack([rng.random(300), rng.uniform(2, 8, 300)], axis=1)
    keep = segment_filter(Y, 40, (2.25, 7.25))
    segment = np.digitize(Y[:, 1], np.linspace(2.25, 7.25, 41)[1:-1])
    assert set(segment[keep]) == set(segment)
    for u in np.unique(segment):
        members = segment == u
        np.testing.assert_array_equal(keep[members], is_non_dominated(Y[members]))


def test_a_dominated_point_alone_in_its_segment_stays() -> None:
    Y = [[0.0, 1.0], [1.0, 2.9], [1.0, 1.2]]
    assert segment_filter(Y, 2, (1.0, 3.0)).tolist() == [True, True, False]


def test_costs_outside_the_range_belong_to_the_end_segments() -> None:
    cost = np.array([-1e300, 0.0, 0.999, 1.0, 3.999, 4.0, np.inf])
    # Of equal losses the cheapest of a segment stays.
    kept = segment_filter(np.stack([np.ones(7), cost], axis=1), 4, (0.0, 4.0))
    assert cost[kept].tolist() == [-1e300, 1.0, 3.999]


def test_of_equal_points_only_the_first_stays() -> None:
    assert segment_filter([[1.0, 1.0]] * 3, 5, (0.0, 2.0)).tolist() == [True, False, False]


@pytest.mark.parametrize(("n", "cost_range"), [(0, (0.0, 1.0)), (3, (1.0, 1.0)), (3, (0.0, np.inf))])
def test_bad_segments_are_refused(n: int, cost_range: tuple[float, float]) -> None:
    with pytest.raises(CoaloraError):
        segment_filter([[0.0, 0.0]], n, cost_range)
