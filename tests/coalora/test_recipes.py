"""Recipes: one declaration of every hyperparameter, which refuses what does not fit and survives JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields, replace

import pytest

from coalora.config import CoaLoraConfig
from coalora.errors import CoaloraError
from coalora.quant.space import ChoiceSpace
from coalora.recipes import AdapterRecipe, Objective, Recipe, SearchRecipe, TrainingRecipe


def recipes(base: type[Recipe] = Recipe) -> list[type[Recipe]]:
    return [found for kind in base.__subclasses__() for found in (kind, *recipes(kind))]


@pytest.mark.parametrize("kind", recipes(), ids=lambda kind: kind.__name__)
def test_every_field_says_what_it_is(kind: type[Recipe]) -> None:
    assert kind.__doc__
    for field in fields(kind):
        assert field.metadata["title"], field.name
        assert field.metadata["description"].partition(" [")[0].endswith("."), field.name


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        (AdapterRecipe, {"r": 0}, "AdapterRecipe.r is 0. Set it to an integer, at least 1, at most 4096."),
        (AdapterRecipe, {"r": True}, "AdapterRecipe.r is True. Set it to an integer, at least 1, at most 4096."),
        (AdapterRecipe, {"r": 4.0}, "AdapterRecipe.r is 4.0. Set it to an integer, at least 1, at most 4096."),
        (AdapterRecipe, {"lora_dropout": 1.0}, "lora_dropout is 1.0. Set it to a number, at least 0, below 1."),
        (AdapterRecipe, {"theta": "some"}, "theta is 'some'. Set it to 'all' or 'others' or 'none'."),
        (AdapterRecipe, {"expert_bits": 9}, "expert_bits is 9. Set it to an integer, at least 0, at most 8, or None."),
        (AdapterRecipe, {"rank_pattern": {"q": 0}}, "rank_pattern gives 'q' the rank 0."),
        (Objective, {"distillation": 1.5}, "distillation is 1.5."),
        (Objective, {"temperature": 0.0}, "temperature is 0.0. Set it to a number, above 0, at most 1000."),
        (Objective, {"hidden": float("inf")}, "hidden is inf."),
        (TrainingRecipe, {"objective": {}}, "objective is {}. Set it to a Objective."),
        (TrainingRecipe, {"gradient_checkpointing": 1}, "gradient_checkpointing is 1. Set it to True or False."),
        (CoaLoraConfig, {"seed": -1}, "CoaLoraConfig.seed is -1. Set it to an integer, at least 0, below 2147483648."),
    ],
)
def test_values_that_do_not_fit_are_refused(kind: type[Recipe], wrong: dict[str, object], message: str) -> None:
    with pytest.raises(CoaloraError) as caught:
        kind(**wrong)
    assert message in str(caught.value)


def test_what_an_adapter_leaves_open_is_what_won_for_its_task() -> None:
    def parts(task: str, **given: object) -> tuple[object, ...]:
        recipe = AdapterRecipe(**given).resolved(task)
        return recipe.compensation_rank, recipe.expert_bits, recipe.expert_start, recipe.theta

    assert parts("language-modeling") == (0, 3, "compensation", "others")
    assert parts("classification") == (0, 0, "zero", "others")
    asked = {"compensation_rank": 8, "expert_bits": 2, "theta": "none", "expert_start": "compensation"}
    assert parts("classification", **asked) == (8, 2, "compensation", "none")
    assert AdapterRecipe().resolved("classification").resolved("language-modeling").expert_bits == 0  # decided once


def test_a_config_holds_the_adapter_at_the_top_and_survives_json() -> None:
    config = CoaLoraConfig(
        r=8,
        rank_pattern={"mlp.*": 4},
        choices=ChoiceSpace("nf", bits=[2, 3]),
        training=TrainingRecipe(lr=0.01, objective=Objective(0.5)),
        search=SearchRecipe(rounds=1),
        target_modules=["q_proj"],
        device="cpu",
    )
    assert CoaLoraConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.adapter == AdapterRecipe(r=8, rank_pattern={"mlp.*": 4})
    assert replace(config, seed=3).seed == 3


@pytest.mark.parametrize("data", [{"rank": 8}, {"training": {"learning_rate": 1.0}}])
def test_unknown_keys_are_refused_with_the_known_ones(data: dict[str, object]) -> None:
    with pytest.raises(CoaloraError, match=r"has no field '(rank|learning_rate)'\. Choose among .*\b(r|lr),"):
        CoaLoraConfig.from_dict(data)


def test_recipes_are_read_without_torch_or_pydantic() -> None:
    code = "import sys, coalora.config; print({'torch', 'pydantic', 'transformers', 'numpy'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
