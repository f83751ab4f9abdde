"""Stage `train`: steps of one method on one configuration set, going on from where an earlier stage stopped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from coalora.adapt.methods import METHODS
from coalora.files import write_json, write_tensors
from coalora.recipes import TrainingRecipe
from coalora.train.loop import train
from coalora.train.parallel import Parallel, post, spawn
from pipeline.inputs.adapted import HISTORY, STATE, ModelInputs, load_state, release_models
from pipeline.inputs.loaders import load_set
from pipeline.progress import Progress
from pipeline.stages.checkpoints import Place, place, tell
from pipeline.stages.runner import stage
from pipeline.store.current import current_store
from pipeline.store.store import Artifact, Scalar


@stage("train", tags=("gpu",))
def train_round(
    *,
    model: ModelInputs,
    configurations: Artifact,
    previous: Artifact | None,
    method: str,
    training: TrainingRecipe,
    rounds: int,
    round_index: int,
) -> Artifact:
    """Parameters and optimizer state after this round's steps.

    Args:
        previous: state of the round before; None starts afresh.
        method: as in `AdaptedModel`; `paper` draws configurations uniformly, as the paper does.
        rounds: search rounds of the whole run: the learning-rate schedule spans them all.
    """
    inputs = (model, configurations, previous, method, training, rounds, round_index)
    progress = Progress(f"training {method}, round {round_index}")

    def listen(kind: str, content: Any) -> None:
        if kind == "progress":
            progress(content[0], content[1], **content[2])
        else:
            tell(content)

    if model.runtime.processes > 1:
        release_models()  # each process loads its own
        found = dict(spawn(run_steps, model.runtime.processes, *inputs, place(), on_message=listen))
    else:
        found = run_steps(*inputs, place(), progress)
    step, records = found.pop("step"), found.pop("records")

    def write(folder: Path) -> dict[str, Scalar]:
        write_tensors(folder / STATE, found, {"step": step, "method": method})
        write_json(folder / HISTORY, [{**record, "round": round_index} for record in records])
        return {"step": step, "loss": records[-1]["loss"] if records else None}

    return current_store().put("training-state", write)


def run_steps(
    model: ModelInputs,
    configurations: Artifact,
    previous: Artifact | None,
    method: str,
    training: TrainingRecipe,
    rounds: int,
    round_index: int,
    scratch: Place | None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The steps of one round in this process, alone or as one of `runtime.processes`, of which the first tells of them.

    Returns:
        The state's tensors by name, and `step` and `records`.
    """
    with model.trainable(method, fresh=previous is None) as adapted:
        if not adapted.named_parameters():
            # A language model without adapter: nothing to learn, and the stage says so by an empty state.
            return {"step": 0, "records": []}
        members = load_set(configurations, model.measured)
        if own := METHODS[method].sampling:
            training = replace(training, sampling=own)
        runtime = model.runtime
        among = Parallel.from_environment(runtime.process_configurations) if runtime.processes > 1 else Parallel()
        state, records = train(
            adapted,
            model.data.train,
            members.configurations,
            model.measured.average_bits(members.configurations),
            training,
            steps=training.initial_steps if round_index == 0 else training.round_steps,
            seed=model.seed,
            total_steps=training.total_steps(rounds),
            state=None if previous is None else load_state(previous),
            parallel=among,
            progress=(progress or _post_progress) if among.rank == 0 else None,
            checkpoints=None if scratch is None else scratch.checkpoints(tell if progress else _post_words(among.rank)),
        )
    return {**state.tensors, "step": state.step, "records": records}


def _post_progress(done: int, total: int, **values: float) -> None:
    post("progress", [done, total, values])


def _post_words(rank: int) -> Callable[[str], None]:
    """All processes read the checkpoint, one speaks of it."""
    return lambda words: post("words", words) if rank == 0 else None
