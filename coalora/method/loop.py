"""Loop of CoA-LoRA (arXiv 2509.25214): training on the initial set, then rounds of Pareto search and training."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coalora.adapt.adapted import AdaptedModel
from coalora.adapt.methods import METHODS
from coalora.calibrate.tables import CalibrationTables
from coalora.configurations import ConfigurationSet
from coalora.data.benchmark import Split
from coalora.evaluate.losses import LossMeter
from coalora.evaluate.reference import Reference
from coalora.files import digest
from coalora.method.search import search_round
from coalora.recipes import Compile, SearchRecipe, TrainingRecipe
from coalora.train.checkpoint import Checkpoint, Checkpoints
from coalora.train.loop import TrainingState, train


@dataclass
class Fitted:
    """Outcome of `fit`.

    Attributes:
        members: the set that the last steps were taken on, with the losses of the last search.
        state: parameters, AdamW's moments and the steps done.
        searches: a record of each search round (`search_round`).
        history: a record of each step: step, loss, lr, bits, round.

    Example:
        >>> len(model.fitted.history), model.fitted.searches[0]["round"]  # after fit(..., steps=4, rounds=1)
        (4, 1)
    """

    members: ConfigurationSet
    state: TrainingState = field(default_factory=TrainingState)
    searches: list[dict[str, Any]] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)


def fit(
    adapted: AdaptedModel,
    train_split: Split,
    search_split: Split,
    members: ConfigurationSet,
    tables: CalibrationTables,
    *,
    training: TrainingRecipe,
    search: SearchRecipe,
    seed: int,
    reference: Reference | None = None,
    progress: Callable[[str], Callable[..., None]] | None = None,
    checkpoint_dir: Path | str | None = None,
    compile: Compile = "none",
) -> Fitted:
    """Train `adapted` in place: `initial_steps` on `members`, then for each round a search and `round_steps`.

    Args:
        members: the set of round 0, such as `initial_set` makes it.
        search_split: examples that guide the search; nothing is trained on them.
        reference: whose KL divergence the search minimises in place of the task's loss.
        progress: makes a listener (done, total, **values) for what is named.
        checkpoint_dir: folder from which the same call, if it broke off, goes on with the same numbers bit for bit;
            training is not done again, searches are. What another call wrote there is left alone.
        compile: as of `coalora.train.loop.train`.

    The pipeline runs the same steps as cached stages, with the same numbers bit for bit.

    Example:
        >>> from coalora import InitialSetRecipe, SearchRecipe, TrainingRecipe, fit, initial_set
        >>> fitted = fit(
        ...     model.adapted, model.split(train_texts), model.split(search_texts),
        ...     initial_set(tables, InitialSetRecipe(size=3)), tables,
        ...     training=TrainingRecipe(initial_steps=2, batch_size=2), search=SearchRecipe(rounds=0), seed=0,
        ... )
        >>> fitted.state.step
        2
    """
    fitted = Fitted(members)
    tables.of_groups(members.configurations)  # refuses a set that breaks ties
    identity = _identity(adapted, train_split, tables, training, search.rounds, seed) if checkpoint_dir else ""
    for round_index in range(search.rounds + 1):
        label = f"round {round_index}"
        if round_index:
            fitted.members, record = search_round(
                LossMeter(
                    adapted,
                    search_split,
                    search.batch_size,
                    (lambda what, of=label: progress(f"search, {of}, {what} measured")) if progress else None,  # type: ignore[misc]
                    reference=reference,
                ),
                fitted.members,
                tables,
                search,
                round_index=round_index,
                seed=seed,
                ref_point=fitted.searches[0]["ref_point"] if fitted.searches else None,
                progress=progress(f"search, {label}, proposals") if progress else None,
            )
            fitted.searches.append(record)
        checkpoints, begin = None, fitted.state.step
        if checkpoint_dir:
            identity = digest([identity, fitted.members.configurations.tolist()])
            checkpoints = Checkpoints(Path(checkpoint_dir) / f"round-{round_index}-{identity[:16]}")
        fitted.state, records = train_round(
            adapted,
            train_split,
            fitted.members,
            tables,
            training,
            round_index=round_index,
            rounds=search.rounds,
            seed=seed,
            state=fitted.state if round_index else None,
            progress=progress(f"training, {label}") if progress else None,
            checkpoints=checkpoints,
            compile=compile,
        )
        if checkpoints and records:
            step = fitted.state.step
            checkpoints.save((begin, step), Checkpoint(step, fitted.state.tensors, records, []))
        fitted.history += records
    return fitted


def _identity(
    adapted: AdaptedModel, split: Split, tables: CalibrationTables, training: TrainingRecipe, rounds: int, seed: int
) -> str:
    """Digest of what decides the steps of a training, but for its configurations."""
    recipes = [adapted.method, adapted.recipe.to_dict(), training.to_dict(), tables.space.to_dict(), rounds, seed]
    found = hashlib.sha256(digest([tables.base_digest, recipes]).encode())
    for tensor in [*adapted.state_dict().values(), *(x for x in vars(split).values() if isinstance(x, Tensor))]:
        found.update(tensor.reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


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
        options: `parallel`, `progress`, `checkpoints` and `compile` of `coalora.train.loop.train`.

    A method that draws configurations its own way does so whatever the recipe says. One with nothing to learn (a
    language model without an adapter) returns an empty state.

    Raises:
        CoaloraError: as `coalora.train.loop.train`.
    """
    if not adapted.named_parameters():
        return TrainingState(), []
    recipe = METHODS[adapted.method].drawing(recipe)
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
