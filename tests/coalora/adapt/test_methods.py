"""Methods: what the adapted model makes of each description."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coalora.adapt.methods import METHODS, Method
from coalora.recipes import TrainingRecipe


def test_they_are_listed_as_tables_have_them() -> None:
    assert list(METHODS) == ["none", "shared", "paper", "coa", "qlora", "lq-lora"]
    assert [name for name, method in METHODS.items() if method.over == "budget"] == ["qlora", "lq-lora"]


@pytest.mark.parametrize("name", list(METHODS))
def test_what_follows_the_choices_has_a_pair_to_follow_with(name: str) -> None:
    method: Method = METHODS[name]
    assert method.has_lora or (method.theta == "none" and not method.follows_choices)
    assert method.over == "budget" or method.start == "peft"


def test_a_method_draws_its_own_way_whatever_the_recipe_says() -> None:
    recipe = TrainingRecipe().resolved("fine-tune")
    assert METHODS["coa"].drawing(recipe) == recipe
    assert METHODS["paper"].drawing(recipe) == replace(recipe, sampling="uniform", paired=False)
    adaptive = Method("adaptive", sampling="adaptive").drawing(recipe)  # which has no pairs
    assert (adaptive.sampling, adaptive.paired) == ("adaptive", False)
