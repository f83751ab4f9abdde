"""Stage `select`: the final set measured with the final adapter, and the configuration of each asked budget."""

from __future__ import annotations

from pathlib import Path

from coalora.evaluate.losses import LossMeter
from coalora.files import write_json
from coalora.method import selection as method
from coalora.recipes import AdapterRecipe
from pipeline.inputs.adapted import build_adapted
from pipeline.inputs.loaders import SELECTED, SET, BaseModel, load_benchmark, load_set, load_tables
from pipeline.orchestration.progress import Progress
from pipeline.settings.sections import RuntimeSettings
from pipeline.stages.checkpoints import Memo
from pipeline.stages.runner import stage
from pipeline.store.store import Artifact, Scalar, Store


@stage("select", tags=("gpu",))
def select_budgets(
    *,
    base: Artifact,
    benchmark: Artifact,
    tables: Artifact,
    configurations: Artifact,
    state: Artifact,
    adapter: AdapterRecipe,
    batch_size: int,
    budgets: list[float],
    runtime: RuntimeSettings,
    seed: int,
) -> Artifact:
    """`configurations.json`: the members with their losses. `selected.json`: a configuration for each budget."""
    data, measured = load_benchmark(benchmark), load_tables(tables)
    adapted = build_adapted(
        BaseModel(base), data, tables, method="coa", adapter=adapter, runtime=runtime, seed=seed, state=state
    )
    meter = LossMeter(adapted, data.search, batch_size, Progress, memo=Memo)
    members, selected = method.select_budgets(meter, load_set(configurations, measured), measured, budgets)

    def write(folder: Path) -> dict[str, Scalar]:
        write_json(folder / SET, members.to_dict(measured))
        write_json(folder / SELECTED, selected.to_dict(measured) | {"budgets": budgets})
        return {"n_members": len(members), "n_distinct": len(members.merge(selected).distinct())}

    return Store().put("selection", write)
