"""Methods are compared on one scale, which the benchmark and the space alone decide."""

from __future__ import annotations

import math

import numpy as np
import pytest

from coalora.data.benchmark import pad
from coalora.evaluate.compare import compare, guess_loss


def test_a_guess_is_uniform_among_classes_and_the_mean_of_values() -> None:
    rows = [[1], [2], [3], [4]]
    assert guess_loss(pad(rows, 0, [0, 1, 1, 0]), 3) == pytest.approx(math.log(3))
    assert guess_loss(pad(rows, 0), 320) == pytest.approx(math.log(320))
    values = [0.5, 1.0, 4.0, 4.5]
    assert guess_loss(pad(rows, 0, values), 1) == pytest.approx(np.mean((np.array(values) - np.mean(values)) ** 2))


def test_the_rectangle_between_perfect_and_guessed_is_the_unit() -> None:
    bits = np.array([2.0, 4.0])
    losses = {"half": np.array([1.0, 1.0]), "guess": np.array([2.0, 2.0]), "perfect": np.zeros(2)}
    found = compare(losses, bits, cost_range=(2.0, 6.0), guess_loss=2.0)
    assert found.values == pytest.approx({"half": 0.5, "guess": 0.0, "perfect": 1.0})
    assert (found.ideal, found.ref_point) == ((0.0, 2.0), (2.0, 6.0))
