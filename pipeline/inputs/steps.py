"""Training steps of a round on what is behind artifacts, in this process or in `runtime.processes` of their own.

Each of several processes loads its own model, and not Prefect; the first tells the caller of progress and checkpoints.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from coalora.method.loop import train_round
from coalora.recipes import TrainingRecipe
from coalora.train.parallel import Parallel, post, spawn
from pipeline.inputs.adapted import ModelInputs, load_state, release_models
from pipeline.inputs.loaders import load_set
from pipeline.progress import Progress
from pipeline.stages.checkpoints import Place, place, tell
from pipeline.store.artifacts import Artifact


def take_steps(
    model: ModelInputs,
    configurations: Artifact,
    previous: Artifact | None,
    method: str,
    training: TrainingRecipe,
    rounds: int,
    round_index: int,
) -> tuple[dict[str, Tensor], int, list[dict[str, float]]]:
    """Tensors of the state after the steps, its step, and a record of each step; arguments as of stage `train`."""
    progress = Progress(f"training {method}, round {round_index}")
    round_of = (model, configurations, previous, method, training, rounds, round_index)

    def listen(kind: str, content: Any) -> None:
        if kind == "progress":
            progress(content[0], content[1], **content[2])
        else:
            tell(content)

    if model.runtime.processes > 1:
        release_models()  # each process loads its own
        found = dict(spawn(_take, model.runtime.processes, round_of, place(), on_message=listen))
    else:
        found = _take(round_of, place(), progress)
    step, records = found.pop("step"), found.pop("records")
    return found, step, records


def _take(round_of: tuple[Any, ...], scratch: Place | None, progress: Progress | None = None) -> dict[str, Any]:
    """The steps in this process, alone or as one of several: tensors of the state by name, `step` and `records`."""
    model, configurations, previous, method, training, rounds, round_index = round_of
    runtime = model.runtime
    with model.trainable(method, fresh=previous is None) as adapted:
        among = Parallel.from_environment(runtime.process_configurations) if runtime.processes > 1 else Parallel()
        state, records = train_round(
            adapted,
            model.data.train,
            load_set(configurations, model.measured),
            model.measured,
            training,
            round_index=round_index,
            rounds=rounds,
            seed=model.seed,
            state=None if previous is None else load_state(previous),
            parallel=among,
            compile=runtime.compile,
            progress=(progress or _post_progress) if among.rank == 0 else None,
            checkpoints=None if scratch is None else scratch.checkpoints(tell if progress else _post_words(among.rank)),
        )
    return {**state.tensors, "step": state.step, "records": records}


def _post_progress(done: int, total: int, **values: float) -> None:
    post("progress", [done, total, values])


def _post_words(rank: int) -> Callable[[str], None]:
    """All processes read the checkpoint, one speaks of it."""
    return partial(post, "words") if rank == 0 else lambda words: None
