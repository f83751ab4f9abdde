"""Stage `reference`: an adapter fine-tuned for the configuration of one budget alone, and its score.

What configuration-aware training exists to replace: one run for each configuration. `qlora` starts the pair as LoRA
does (QLoRA, arXiv 2305.14314), `lq-lora` from the decomposition of the quantization error (LQ-LoRA, arXiv 2311.12023).
Both get the examples in the order of the other methods, and as many steps as asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coalora.adapt.methods import METHODS
from coalora.evaluate.losses import measure_configurations
from coalora.files import write_json
from coalora.recipes import AdapterRecipe, TrainingRecipe
from coalora.train.loop import train
from pipeline.inputs.adapted import build_adapted
from pipeline.inputs.loaders import BaseModel, load_benchmark, load_selected, load_tables
from pipeline.orchestration.progress import Progress
from pipeline.settings.sections import RuntimeSettings
from pipeline.stages.checkpoints import place, tell
from pipeline.stages.runner import stage
from pipeline.store.store import Artifact, Scalar, Store

REFERENCE_SCORE = "score.json"


@stage("reference", tags=("gpu",))
def train_reference(
    *,
    base: Artifact,
    benchmark: Artifact,
    tables: Artifact,
    selection: Artifact,
    index: int,
    method: str,
    adapter: AdapterRecipe,
    training: TrainingRecipe,
    steps: int,
    batch_size: int,
    runtime: RuntimeSettings,
    seed: int,
) -> Artifact:
    """`score.json`: validation loss and metric of the adapter for budget number `index` of the selection."""
    data, measured = load_benchmark(benchmark), load_tables(tables)
    configuration = load_selected(selection, measured)[index : index + 1]
    adapted = build_adapted(
        BaseModel(base),
        data,
        tables,
        method=method,
        adapter=adapter,
        runtime=runtime,
        seed=seed,
    )
    if METHODS[method].start == "compensation":
        adapted.start_from_compensation(configuration[0])
    bits = measured.average_bits(configuration)
    scratch = place()
    train(
        adapted,
        data.train,
        configuration,
        bits,
        training,
        steps=steps,
        total_steps=steps,
        seed=seed,
        progress=Progress(f"training {method} at {bits[0]:.2f} bits"),
        checkpoints=None if scratch is None else scratch.checkpoints(tell),
    )
    (found,) = measure_configurations(adapted, data.validation, configuration, batch_size=batch_size)
    content: dict[str, Any] = {"method": method, "steps": steps, "loss": found.loss, "metric": found.metric}

    def write(folder: Path) -> dict[str, Scalar]:
        write_json(folder / REFERENCE_SCORE, content)
        return {"loss": content["loss"], "metric": content["metric"]}

    return Store().put("reference", write)
