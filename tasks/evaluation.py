"""Stage `evaluate`: validation loss and metric of one method, for every member and every asked budget."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from coalora.adapt.adapted import Method
from coalora.evaluate.losses import measure_configurations, score
from coalora.files import write_json
from tasks.adapted import build_adapted
from tasks.engine import stage
from tasks.loaders import BaseModel, load_benchmark, load_selected, load_set, load_tables
from tasks.progress import Progress
from tasks.settings import AdapterSettings, RuntimeSettings
from tasks.store import Artifact, Scalar, Store

SCORES = "scores.json"


@stage("evaluate", tags=("gpu",))
def evaluate_method(
    *,
    base: Artifact,
    benchmark: Artifact,
    tables: Artifact,
    selection: Artifact,
    state: Artifact,
    method: Method,
    adapter: AdapterSettings,
    batch_size: int,
    runtime: RuntimeSettings,
    seed: int,
) -> Artifact:
    """`scores.json`: losses and metrics of `members` and `budgets`, and of the base in full precision."""
    data, measured = load_benchmark(benchmark), load_tables(tables)
    adapted = build_adapted(
        BaseModel(base), data, tables, method=method, adapter=adapter, runtime=runtime, seed=seed, state=state
    )
    members = load_set(selection, measured).configurations
    chosen = load_selected(selection, measured)
    # A budget's configuration is often a member as it is: what is equal is measured once.
    distinct, inverse = np.unique(np.concatenate([members, chosen]), axis=0, return_inverse=True)
    scores = measure_configurations(
        adapted,
        data.validation,
        distinct,
        batch_size=batch_size,
        progress=Progress(f"evaluating {method}"),
    )
    adapted.full_precision()
    full = score(adapted, data.validation, batch_size=batch_size)
    inverse = inverse.ravel()
    parts = {"members": inverse[: len(members)], "budgets": inverse[len(members) :]}
    content: dict[str, object] = {
        part: {
            "loss": [scores[i].loss for i in index],
            "metrics": {name: [scores[i].metrics[name] for i in index] for name in full.metrics},
        }
        for part, index in parts.items()
    }
    content |= {"method": method, "full_precision": vars(full)}

    def write(folder: Path) -> dict[str, Scalar]:
        write_json(folder / SCORES, content)
        return {"n_configurations": len(distinct)}

    return Store().put("scores", write)
