"""Every budget stays covered after the filter."""

from __future__ import annotations

import numpy as np
import pytest

from coalora.errors import CoaloraError
from coalora.search.pareto import is_non_dominated
from coalora.search.segments import segment_filter, segment_index


def test_every_segment_with_members_keeps_its_own_non_dominated_ones() -> None:
    rng = np.random.default_rng(0)
    Y = np.stack([rng.random(300), rng.uniform(2, 8, 300)], axis=1)
    keep = segment_filter(Y, 40, (2.25, 7.25))
    segment = segment_index(Y[:, 1], 40, (2.25, 7.25))
    assert set(segment[keep]) == set(segment)
    for u in np.unique(segment):
        members = segment == u
        np.testing.assert_array_equal(keep[members], is_non_dominated(Y[members]))


def test_a_dominated_point_alone_in_its_segment_stays() -> None:
    Y = [[0.0, 1.0], [1.0, 2.9], [1.0, 1.2]]
    assert segment_filter(Y, 2, (1.0, 3.0)).tolist() == [True, True, False]


def test_costs_outside_the_range_belong_to_the_end_segments() -> None:
    cost = np.array([-1e300, 0.0, 0.999, 1.0, 3.999, 4.0, np.inf])
    assert segment_index(cost, 4, (0.0, 4.0)).tolist() == [0, 0, 0, 1, 3, 3, 3]


def test_of_equal_points_only_the_first_stays() -> None:
    assert segment_filter([[1.0, 1.0]] * 3, 5, (0.0, 2.0)).tolist() == [True, False, False]


@pytest.mark.parametrize(("n", "cost_range"), [(0, (0.0, 1.0)), (3, (1.0, 1.0)), (3, (0.0, np.inf))])
def test_bad_segments_are_refused(n: int, cost_range: tuple[float, float]) -> None:
    with pytest.raises(CoaloraError):
        segment_filter([[0.0, 0.0]], n, cost_range)
