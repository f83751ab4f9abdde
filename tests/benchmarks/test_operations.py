"""What a training step asks a GPU to launch: a number of operations, which needs no GPU to be counted."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks._models import SHAPES, build_small
from benchmarks._operations import beyond_the_base
from coalora.quant.space import ChoiceSpace
from coalora.recipes import AdapterRecipe

SPACE = ChoiceSpace("nf", scale_bits=[8], scale_dtype=["bf16"], block_size=[64], scale_block_size=[64])
THETA = AdapterRecipe(r=4, theta="all", compensation_rank=0, expert_bits=0, expert_start="zero")
RECIPES = [("shared", THETA), ("coa", THETA), ("coa", replace(THETA, expert_bits=3))]


@pytest.mark.parametrize("name", ["RoBERTa-large", "SmolLM2-135M"])
@pytest.mark.parametrize(("method", "recipe"), RECIPES)
def test_a_step_dispatches_at_most_seven_operations_a_layer_beyond_the_base_s(name, method, recipe) -> None:
    n, beyond = beyond_the_base(lambda: build_small(name), SPACE, method, recipe)
    assert n == {"RoBERTa-large": 144, "SmolLM2-135M": 210}[name]
    assert sum(beyond.values()) <= 7 * n
    assert name in SHAPES
    assert not any("_to_copy" in operation for operation, count in beyond.items() if count)
