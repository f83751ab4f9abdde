"""Moves are exactly the listed coordinate changes."""

from __future__ import annotations

import numpy as np
import pytest

from coalora.errors import CoaloraError
from coalora.search.neighbours import enumerate_moves

TABLE = np.array([[1, -1], [0, 2], [1, -1]])


def test_moves_are_the_listed_neighbours_of_every_layer() -> None:
    layers, choices = enumerate_moves([0, 1, 2], TABLE)
    assert list(zip(layers.tolist(), choices.tolist(), strict=True)) == [(0, 1), (1, 0), (1, 2), (2, 1)]


def test_forbidden_choices_and_staying_are_no_moves() -> None:
    layers, choices = enumerate_moves([1, 1], [[0, 1], [1, 0], [2, 2]], allowed=[[False, True, True], [True] * 3])
    assert (layers.tolist(), choices.tolist()) == ([1], [0])


@pytest.mark.parametrize(
    ("configuration", "table", "allowed"),
    [([3], TABLE, None), ([0], [[7]], None), ([0], [[0.5]], None), ([0], TABLE, [True])],
)
def test_bad_indices_and_shapes_are_refused(configuration: object, table: object, allowed: object) -> None:
    with pytest.raises(CoaloraError):
        enumerate_moves(configuration, table, allowed)  # type: ignore[arg-type]
