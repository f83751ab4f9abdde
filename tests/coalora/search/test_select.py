"""The configuration for an asked budget fits, and is the best member topped up."""

from __future__ import annotations

import numpy as np
import pytest

from coalora.errors import CoaloraError
from coalora.search.select import select_configuration

ERR = np.array([[4.0, 2.0, 1.0], [8.0, 4.0, 2.0]])
COST = np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
SET = np.array([[0, 1], [1, 0], [2, 2]])
LOSS = np.array([0.5, 0.4, 0.1])


def test_the_member_of_lowest_loss_that_fits_is_taken() -> None:
    assert select_configuration(SET, LOSS, COST, ERR, 3.0).tolist() == [1, 0]
    assert select_configuration(SET, LOSS, COST, ERR, 6.0).tolist() == [2, 2]


def test_what_is_left_of_the_budget_is_spent() -> None:
    assert select_configuration(SET, LOSS, COST, ERR, 4.0).tolist() == [1, 1]


def test_where_no_member_fits_the_budget_is_allocated() -> None:
    assert select_configuration(SET, LOSS, COST, ERR, 2.0).tolist() == [0, 0]
    assert select_configuration(np.empty((0, 2), dtype=int), [], COST, ERR, 3.0).tolist() == [0, 1]


def test_impossible_budget_and_failed_losses_are_refused() -> None:
    with pytest.raises(CoaloraError, match="at least 2"):
        select_configuration(SET, LOSS, COST, ERR, 1.9)
    with pytest.raises(CoaloraError):
        select_configuration(SET, [0.1, np.nan, 0.2], COST, ERR, 4.0)
