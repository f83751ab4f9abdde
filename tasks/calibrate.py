"""Stage `calibrate`: input statistics of the target layers, and the error and size of every choice."""

from dataclasses import replace
from pathlib import Path

import torch

from coalora.calibrate import calibrate as method
from coalora.calibrate.statistics import save_statistics
from coalora.models.targets import find_target_layers
from coalora.recipes import CalibrationRecipe
from pipeline.inputs.choices import choices_of
from pipeline.inputs.loaders import TABLES, BaseModel, load_benchmark
from pipeline.progress import Progress
from pipeline.settings.sections import ChoiceSettings, RuntimeSettings
from pipeline.stages.checkpoints import place
from pipeline.stages.runner import stage
from pipeline.store.store import Artifact, Scalar, current_store


@stage("calibrate", tags=("gpu",))
def calibrate(
    *,
    base: Artifact,
    benchmark: Artifact,
    target_modules: list[str] | str | None,
    calibration: CalibrationRecipe,
    choices: ChoiceSettings,
    runtime: RuntimeSettings,
    seed: int,
) -> Artifact:
    """Calibration tables (`tables.safetensors`), input statistics (`statistics.safetensors`) and, where rounding takes
    long, all weights under all choices (`quantized.safetensors`)."""
    source, data = BaseModel(base), load_benchmark(benchmark)
    # Packed layers need not fit the device in full precision: blocks are brought there one after the other.
    beside = replace(runtime, device="cpu") if runtime.weights == "packed" else runtime
    model = source.load(data, beside, seed=seed)
    layers = find_target_layers(model, target_modules)
    space, allowed = choices_of(choices, layers)
    tables, statistics = method.calibrate(
        model, layers, data.train, space, calibration, base_digest=source.digest, allowed=allowed,
        tie=choices.tie, tokenizer=source.tokenizer(), device=torch.device(runtime.device),
        checkpoint_dir=scratch.folder if (scratch := place()) else None,
        rest_dtype=getattr(source.config(), "dtype", None), progress=Progress,
    )  # fmt: skip

    def write(folder: Path) -> dict[str, Scalar]:
        tables.save(folder / TABLES)
        save_statistics(folder, layers, statistics, space)
        low, high = tables.bits_range()
        return {"n_layers": len(layers), "n_weights": tables.n_weights, "min_bits": low, "max_bits": high}

    return current_store().put("calibration", write)
