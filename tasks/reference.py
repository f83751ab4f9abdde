"""Stage `reference`: an adapter fine-tuned for the configuration of one budget alone, and its score.

What configuration-aware training exists to replace: one run for each configuration. `qlora` starts the pair as LoRA
does (QLoRA, arXiv 2305.14314), `lq-lora` from the decomposition of the quantization error (LQ-LoRA, arXiv 2311.12023).
Both get the examples in the order of the other methods, and as many steps as asked for.
"""

from coalora.adapt.methods import METHODS
from coalora.evaluate.losses import measure_configurations
from coalora.recipes import TrainingRecipe
from coalora.train.loop import train
from pipeline.inputs.adapted import ModelInputs, reference_of
from pipeline.inputs.loaders import load_selected
from pipeline.progress import Progress
from pipeline.stages.checkpoints import place, tell
from pipeline.stages.runner import stage
from pipeline.store.store import Artifact, current_store

REFERENCE_SCORE = "score.json"


@stage("reference", tags=("gpu",))
def train_reference(
    *,
    model: ModelInputs,
    selection: Artifact,
    index: int,
    method: str,
    training: TrainingRecipe,
    steps: int,
    batch_size: int,
    reference: Artifact | None = None,
) -> Artifact:
    """`score.json`: validation loss and metrics of the adapter for budget number `index` of the selection."""
    configuration = load_selected(selection, model.measured)[index : index + 1]
    bits = model.measured.average_bits(configuration)
    scratch = place()
    with model.trainable(method, fresh=True) as adapted:
        if METHODS[method].start == "compensation":
            adapted.start_from_compensation(configuration[0])
        train(
            adapted,
            model.data.train,
            configuration,
            bits,
            training,
            steps=steps,
            total_steps=steps,
            seed=model.seed,
            compile=model.runtime.compile,
            progress=Progress(f"training {method} at {bits[0]:.2f} bits"),
            checkpoints=None if scratch is None else scratch.checkpoints(tell),
        )
        (found,) = measure_configurations(
            adapted,
            model.data.validation,
            configuration,
            batch_size=batch_size,
            reference=reference_of(model, reference),
        )
    content = {"method": method, "steps": steps, **vars(found)}
    return current_store().put_json("reference", {REFERENCE_SCORE: content}, {"loss": found.loss})
