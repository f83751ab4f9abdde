"""Training steps of one round: the set of the round, its share of the steps, one schedule over all rounds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from coalora.adapt.adapted import AdaptedModel
from coalora.adapt.methods import METHODS
from coalora.calibrate.tables import CalibrationTables
from coalora.configurations import ConfigurationSet
from coalora.data.benchmark import Split
from coalora.recipes import TrainingRecipe
from coalora.train.loop import TrainingState, train


def train_round(
    adapted: AdaptedModel,
    split: Split,
    members: ConfigurationSet,
    tables: CalibrationTables,
    recipe: TrainingRecipe,
    *,
    round_index: int,
    rounds: int,
    seed: int,
    state: TrainingState | None = None,
    **options: Any,
) -> tuple[TrainingState, list[dict[str, float]]]:
    """Train on a round's set; returns the new state and a record of each step (step, loss, lr, bits, round).

    Args:
        split: examples to train on.
        rounds: search rounds of the whole run: the learning-rate schedule spans them all.
        state: where the round before stopped; None starts from the model as it is.
        options: `parallel`, `progress` and `checkpoints` of `coalora.train.loop.train`.

    A method that draws configurations its own way does so whatever the recipe says. One with nothing to learn (a
    language model without an adapter) returns an empty state.

    Raises:
        CoaloraError: as `coalora.train.loop.train`.
    """
    if not adapted.named_parameters():
        return TrainingState(), []
    if own := METHODS[adapted.method].sampling:
        recipe = replace(recipe, sampling=own)
    state, records = train(
        adapted,
        split,
        members.configurations,
        tables.average_bits(members.configurations),
        recipe,
        steps=recipe.round_steps if round_index else recipe.initial_steps,
        total_steps=recipe.total_steps(rounds),
        seed=seed,
        state=state,
        **options,
    )
    return state, [{**record, "round": round_index} for record in records]
