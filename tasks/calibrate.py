"""Stage `calibrate`: input statistics of the target layers, and the error and size of every choice."""

from __future__ import annotations

from pathlib import Path

from coalora.calibrate.statistics import collect_statistics, save_statistics
from coalora.calibrate.tables import calibration_tables, error_table
from coalora.errors import CoaloraError
from coalora.models.targets import find_target_layers
from pipeline.inputs.choices import choices_of
from pipeline.inputs.loaders import STATISTICS, TABLES, BaseModel, load_benchmark
from pipeline.orchestration.progress import Progress
from pipeline.settings.sections import CalibrationSettings, ChoiceSettings, RuntimeSettings
from pipeline.stages.runner import stage
from pipeline.store.store import Artifact, Scalar, Store


@stage("calibrate", tags=("gpu",))
def calibrate(
    *,
    base: Artifact,
    benchmark: Artifact,
    target_modules: list[str] | None,
    calibration: CalibrationSettings,
    choices: ChoiceSettings,
    runtime: RuntimeSettings,
    seed: int,
) -> Artifact:
    """Calibration tables (`tables.safetensors`) and input statistics (`statistics.safetensors`)."""
    source, data = BaseModel(base), load_benchmark(benchmark)
    if calibration.n_samples > len(data.train):
        raise CoaloraError(
            "calibration reads training examples",
            got=f"calibration.n_samples {calibration.n_samples}",
            expected=f"at most {len(data.train)}",
            remedy="lower calibration.n_samples",
        )
    model = source.load(data, runtime, seed=seed)
    layers = find_target_layers(model, target_modules)
    space, allowed = choices_of(choices, layers)
    statistics = collect_statistics(
        model,
        layers,
        data.train.head(calibration.n_samples),
        batch_size=calibration.batch_size,
        hessians=calibration.hessians or space.needs_statistics,
        progress=Progress("input statistics"),
    )
    weights = [layer.matrix(model.get_submodule(layer.name).get_parameter("weight")) for layer in layers]
    err = error_table(
        weights, statistics, space, allowed=allowed, progress=Progress(f"errors of {len(space)} choices by layer")
    )
    tables = calibration_tables(layers, space, err, source.digest, allowed)

    def write(folder: Path) -> dict[str, Scalar]:
        tables.save(folder / TABLES)
        save_statistics(folder / STATISTICS, layers, statistics)
        low, high = tables.bits_range()
        return {"n_layers": len(layers), "n_weights": tables.n_weights, "min_bits": low, "max_bits": high}

    return Store().put("calibration", write)
