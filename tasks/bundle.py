"""Stage `bundle`: what adapts to any budget, without the base model."""

from pathlib import Path

from coalora.configurations import ConfigurationSet
from coalora.export.bundle import Bundle
from coalora.files import read_json
from pipeline.inputs.adapted import ModelInputs, parameters
from pipeline.inputs.loaders import SELECTED, load_input_statistics, load_set
from pipeline.stages.runner import stage
from pipeline.store.store import Artifact, Scalar, current_store


@stage("bundle")
def make_bundle(
    *, model: ModelInputs, selection: Artifact, state: Artifact, quantized: bool, adapter_dtype: str
) -> Artifact:
    """Shared pair, theta, head, compensation, tables, final set and, where asked, all quantized weights."""
    measured, data = model.measured, model.data
    # What was measured for the asked budgets answers other budgets as well as a member does.
    members, chosen = load_set(selection, measured), read_json(current_store().path(selection) / SELECTED)
    merged = members.merge(ConfigurationSet.from_dict(chosen, measured)).distinct().sorted(measured)
    recipe, factors = model.adapter.resolved(data.task), None
    if recipe.compensation_rank:
        with model.adapted("coa", state) as adapted:
            factors = adapted.compensation.factors(merged.configurations) if adapted.compensation else None
    bundle = Bundle(
        measured, merged, parameters(state), recipe, data.task, base_model=model.source.address,
        num_labels=data.num_labels, seed=model.seed, dtype=model.runtime.dtype, adapter_dtype=adapter_dtype,
        compensation=factors,
        statistics=load_input_statistics(model.tables, measured),
    )  # fmt: skip

    def write(folder: Path) -> dict[str, Scalar]:
        bundle.save(folder, quantized=quantized)
        return {"n_members": len(bundle.members)}

    return current_store().put("bundle", write)
