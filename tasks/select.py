"""Stage `select`: the final set measured with the final adapter, and the configuration of each asked budget.

Selection looks at the search split alone; validation examples are only ever reported on.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from coalora.configurations import ConfigurationSet
from coalora.evaluate.losses import score_configurations
from coalora.files import write_json
from coalora.search.budget import best_within, contenders
from pipeline.inputs.adapted import build_adapted
from pipeline.inputs.loaders import SELECTED, SET, BaseModel, load_benchmark, load_set, load_tables
from pipeline.orchestration.progress import Progress
from pipeline.settings.sections import AdapterSettings, RuntimeSettings
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
    adapter: AdapterSettings,
    batch_size: int,
    budgets: list[float],
    runtime: RuntimeSettings,
    seed: int,
) -> Artifact:
    """`configurations.json`: the members with their losses. `selected.json`: a configuration for each budget.

    For each budget the best member that fits, the same filled up to the budget, and the allocation at the budget are
    measured; the lowest loss wins, and of equal ones the cheaper.
    """
    data, measured = load_benchmark(benchmark), load_tables(tables)
    adapted = build_adapted(
        BaseModel(base), data, tables, method="coa", adapter=adapter, runtime=runtime, seed=seed, state=state
    )

    def measure(found: np.ndarray, label: str) -> np.ndarray:
        losses, _ = score_configurations(adapted, data.search, found, batch_size=batch_size, progress=Progress(label))
        return losses

    members = load_set(configurations, measured)
    members = ConfigurationSet(
        members.configurations, measure(members.configurations, "final set"), members.joined
    ).sorted(measured)
    known = {row.tobytes(): loss for row, loss in zip(members.configurations, members.losses, strict=True)}
    rivals = []
    for budget in budgets:
        best = best_within(
            members.configurations,
            members.losses,
            measured.search_cost,
            measured.err,
            budget,
            allowed=measured.allowed,
        )
        rivals.append(contenders(best, measured.search_cost, measured.err, budget, allowed=measured.allowed))
    new = np.unique(np.concatenate(rivals), axis=0)
    new = np.array([row for row in new if row.tobytes() not in known], dtype=np.int64).reshape(-1, new.shape[1])
    known |= {row.tobytes(): loss for row, loss in zip(new, measure(new, "budgets"), strict=True)}
    chosen = np.stack(
        [
            min(rows, key=lambda row: (known[row.tobytes()], measured.costs(row), measured.total_nbytes(row)))
            for rows in rivals
        ]
    )
    selected = ConfigurationSet(
        chosen,
        np.array([known[row.tobytes()] for row in chosen]),
        members.joined.max(initial=0).repeat(len(chosen)),
    )

    def write(folder: Path) -> dict[str, Scalar]:
        write_json(folder / SET, members.to_dict(measured))
        write_json(folder / SELECTED, selected.to_dict(measured) | {"budgets": budgets})
        distinct = np.unique(np.concatenate([members.configurations, chosen]), axis=0)
        return {"n_members": len(members), "n_distinct": len(distinct)}

    return Store().put("selection", write)
