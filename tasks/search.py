"""Stage `search`: a round of Pareto search."""

from __future__ import annotations

from pathlib import Path

from coalora.evaluate.losses import LossMeter
from coalora.files import read_json, write_json
from coalora.method import search as method
from coalora.recipes import AdapterRecipe, SearchRecipe
from pipeline.inputs.adapted import build_adapted
from pipeline.inputs.loaders import ROUND, SET, BaseModel, load_benchmark, load_set, load_tables
from pipeline.orchestration.progress import Progress
from pipeline.settings.sections import RuntimeSettings
from pipeline.stages.checkpoints import Memo
from pipeline.stages.runner import stage
from pipeline.store.store import Artifact, Scalar, Store


@stage("search", tags=("gpu",))
def search_round(
    *,
    base: Artifact,
    benchmark: Artifact,
    tables: Artifact,
    configurations: Artifact,
    state: Artifact,
    adapter: AdapterRecipe,
    search: SearchRecipe,
    round_index: int,
    runtime: RuntimeSettings,
    seed: int,
) -> Artifact:
    """The set of the next round: members measured anew, candidates proposed, measured and merged, segments filtered."""
    data, measured = load_benchmark(benchmark), load_tables(tables)
    adapted = build_adapted(
        BaseModel(base), data, tables, method="coa", adapter=adapter, runtime=runtime, seed=seed, state=state
    )
    before = Store().path(configurations) / ROUND
    label = f"search, round {round_index}"
    meter = LossMeter(
        adapted, data.search, search.batch_size, lambda what: Progress(f"{label}, {what} measured"), memo=Memo
    )
    kept, record = method.search_round(
        meter,
        load_set(configurations, measured),
        measured,
        search,
        round_index=round_index,
        seed=seed,
        ref_point=read_json(before)["ref_point"] if before.is_file() else None,
        progress=Progress(f"{label}, proposals"),
    )

    def write(folder: Path) -> dict[str, Scalar]:
        write_json(folder / SET, kept.to_dict(measured))
        write_json(folder / ROUND, record)
        names = ("round", "n_members", "n_accepted", "hypervolume_before", "hypervolume_after")
        return {name: record[name] for name in names}

    return Store().put("configuration-set", write)
