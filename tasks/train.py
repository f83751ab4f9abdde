"""Stage `train`: steps of one method on one configuration set, going on from where an earlier stage stopped."""

from pathlib import Path

from coalora.files import write_json, write_tensors
from coalora.recipes import TrainingRecipe
from pipeline.inputs.adapted import HISTORY, STATE, ModelInputs
from pipeline.inputs.steps import take_steps
from pipeline.stages.runner import stage
from pipeline.store.store import Artifact, Scalar, current_store


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
    tensors, step, records = take_steps(model, configurations, previous, method, training, rounds, round_index)

    def write(folder: Path) -> dict[str, Scalar]:
        write_tensors(folder / STATE, tensors, {"step": step, "method": method})
        write_json(folder / HISTORY, records)
        return {"step": step, "loss": records[-1]["loss"] if records else None}

    return current_store().put("training-state", write)
