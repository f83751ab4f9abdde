"""The filter against BoTorch's, ties and duplicates included."""

from __future__ import annotations

import numpy as np
import pytest

from coalora.errors import CoaloraError
from coalora.search.pareto import is_non_dominated
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
