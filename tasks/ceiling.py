"""Stage `ceiling`: an adapter fine-tuned on the base in full precision, and its score.

Quantized models are held against it. It sees the examples in the order of the other methods, and as many steps.
"""

from pathlib import Path

import numpy as np

from coalora.evaluate.losses import measure_configurations
from coalora.evaluate.reference import Reference
from coalora.files import write_json, write_tensors
from coalora.models.switching.quantized import FULL_PRECISION
from coalora.recipes import TrainingRecipe
from coalora.train.loop import train
from pipeline.inputs.adapted import STATE, ModelInputs
from pipeline.progress import Progress
from pipeline.stages.checkpoints import place, tell
from pipeline.stages.runner import stage
from pipeline.store.store import Artifact, Scalar, current_store

CEILING = "score.json"
METHOD = "shared"  # one plain LoRA pair a layer
BITS = 16.0  # in the records of its steps


@stage("ceiling", tags=("gpu",))
def train_ceiling(*, model: ModelInputs, training: TrainingRecipe, steps: int, batch_size: int, own: bool) -> Artifact:
    """`score.json`: validation loss and metrics of the base in full precision with its own adapter, and its state.

    Args:
        own: whether it is the reference of KL divergence and agreement itself; else the base is.
    """
    configuration = np.full((1, len(model.measured.layers)), FULL_PRECISION)
    scratch = place()
    with model.trainable(METHOD, fresh=True) as adapted:
        state, _ = train(
            adapted,
            model.data.train,
            configuration,
            np.array([BITS]),
            training,
            steps=steps,
            total_steps=steps,
            seed=model.seed,
            compile=model.runtime.compile,
            progress=Progress("training in full precision"),
            checkpoints=None if scratch is None else scratch.checkpoints(tell),
        )
        pairs = [(A.weight.detach(), B.weight.detach()) for A, B in zip(adapted.lora_A, adapted.lora_B, strict=True)]
        reference = Reference(pairs, adapted.recipe.scale) if own else Reference()
        (found,) = measure_configurations(
            adapted, model.data.validation, configuration, batch_size=batch_size, reference=reference
        )

    def write(folder: Path) -> dict[str, Scalar]:
        write_tensors(folder / STATE, state.tensors, {"step": state.step, "method": METHOD})
        write_json(folder / CEILING, {"loss": found.loss, "metrics": found.metrics})
        return {"loss": found.loss, "step": steps}

    return current_store().put("ceiling", write)
