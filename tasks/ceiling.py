"""Stage `ceiling`: an adapter fine-tuned on the base in full precision, and its score.

Quantized models are held against it. It sees the examples in the order of the other methods, and as many steps.
"""

import numpy as np

from coalora.evaluate.losses import measure_configurations
from coalora.models.switching.quantized import FULL_PRECISION
from coalora.recipes import TrainingRecipe
from coalora.train.loop import train
from pipeline.inputs.adapted import ModelInputs
from pipeline.progress import Progress
from pipeline.stages.checkpoints import place, tell
from pipeline.stages.runner import stage
from pipeline.store.store import Artifact, current_store

CEILING = "score.json"
METHOD = "shared"  # one plain LoRA pair a layer
BITS = 16.0  # in the records of its steps


@stage("ceiling", tags=("gpu",))
def train_ceiling(*, model: ModelInputs, training: TrainingRecipe, steps: int, batch_size: int) -> Artifact:
    """`score.json`: validation loss and metrics of the base in full precision with its own adapter."""
    configuration = np.full((1, len(model.measured.layers)), FULL_PRECISION)
    scratch = place()
    with model.trainable(METHOD, fresh=True) as adapted:
        train(
            adapted,
            model.data.train,
            configuration,
            np.array([BITS]),
            training,
            steps=steps,
            total_steps=steps,
            seed=model.seed,
            progress=Progress("training in full precision"),
            checkpoints=None if scratch is None else scratch.checkpoints(tell),
        )
        (found,) = measure_configurations(adapted, model.data.validation, configuration, batch_size=batch_size)
    content = {"loss": found.loss, "metrics": found.metrics}
    return current_store().put_json("ceiling", {CEILING: content}, {"loss": found.loss, "step": steps})
