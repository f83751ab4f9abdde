"""Initial set: budgets that the choice space has."""

from __future__ import annotations

import numpy as np
import pytest

from coalora.calibrate.tables import calibration_tables
from coalora.errors import CoaloraError
from coalora.method.initial import initial_set
from coalora.models.targets import TargetLayer
from coalora.quant.space import ChoiceSpace
from coalora.recipes import InitialSetRecipe


def _tables(bits: list[int]):
    layers = [TargetLayer(f"block.{i}.q_proj", "q_proj", i, (16, 64), False) for i in range(3)]
    space = ChoiceSpace("int", bits=bits, group_size=[64], mode=["sym"])
    return calibration_tables(layers, space, np.repeat(4.0 ** -space.nominal_bits[None], 3, 0), "0" * 64)


def test_it_spans_what_the_choices_reach() -> None:
    tables = _tables([2, 4])
    members = initial_set(tables, InitialSetRecipe(size=4))
    bits = tables.average_bits(members.configurations)
    assert (bits.min(), bits.max()) == tables.bits_range()


@pytest.mark.parametrize(
    ("bits", "recipe", "problem"),
    [
        ([4], InitialSetRecipe(), "Every configuration costs 4.25 bits: there is nothing to choose"),
        (
            [2, 4],
            InitialSetRecipe(min_budget=1.0),
            "Initial budgets from 1 to 4.25 bits are not a rising range",
        ),
        ([2, 4], InitialSetRecipe(min_budget=4.0, max_budget=3.0), "from 4 to 3 bits are not a rising range"),
    ],
)
def test_budgets_that_there_are_not_are_refused(bits: list[int], recipe: InitialSetRecipe, problem: str) -> None:
    with pytest.raises(CoaloraError, match=problem):
        initial_set(_tables(bits), recipe)
