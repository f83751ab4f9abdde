"""Hypervolume against BoTorch's, and its normalization."""

from __future__ import annotations

import numpy as np
import pytest

from coalora.errors import CoaloraError
from coalora.search.hypervolume import hypervolume, normalized_hypervolume
from tests.coalora import oracles


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
