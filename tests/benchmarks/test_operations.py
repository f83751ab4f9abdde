"""What a training step asks a GPU to launch: a number of operations, which needs no GPU to be counted."""

from __future__ import annotations

import pytest

from benchmarks._models import SHAPES, build_small
from benchmarks._operations import beyond_the_base
from coalora.adapt.recipe import AdapterRecipe
from coalora.quant.space import ChoiceSpace

SPACE = ChoiceSpace("nf", scale_bits=[8], scale_dtype=["bf16"], block_size=[64], scale_block_size=[64])
RECIPES = [("shared", AdapterRecipe(r=4)), ("coa", AdapterRecipe(r=4)), ("coa", AdapterRecipe(r=4, expert_bits=3))]


@pytest.mark.parametrize("name", ["RoBERTa-large", "SmolLM2-135M"])
@pytest.mark.parametrize(("method", "recipe"), RECIPES)
def test_a_step_dispatches_at_most_seven_operations_a_layer_beyond_the_base_s(name, method, recipe) -> None:
    n, beyond = beyond_the_base(lambda: build_small(name), SPACE, method, recipe)
    assert n == {"RoBERTa-large": 144, "SmolLM2-135M": 210}[name]
    assert sum(beyond.values()) <= 7 * n
    assert name in SHAPES
    assert not any("_to_copy" in operation for operation, count in beyond.items() if count)
