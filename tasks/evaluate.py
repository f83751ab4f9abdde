"""Stages `evaluate-shard` and `evaluate`: validation loss and metrics of one method, for every member and budget.

The distinct configurations among both are cut into shards of `evaluation.shard_size`. Each shard is a stage of its
own, so that an evaluation that was killed goes on behind its last finished shard; `evaluate` only puts them together.
A configuration's scores do not depend on what was measured before it: any cut gives the same numbers, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from coalora.calibrate.tables import CalibrationTables
from coalora.errors import CoaloraError
from coalora.evaluate.losses import Score, measure_configurations, score
from coalora.files import read_json, write_json
from coalora.recipes import AdapterRecipe
from pipeline.inputs.loaders import load_benchmark, load_selected, load_set, load_tables
from pipeline.inputs.resident import resident_model
from pipeline.orchestration.progress import Progress
from pipeline.settings.sections import RuntimeSettings
from pipeline.stages.runner import stage
from pipeline.store.store import Artifact, Scalar, Store

SCORES = "scores.json"
SHARD = "shard.json"


def shard_bounds(selection: Artifact, shard_size: int) -> list[tuple[int, int]]:
    """(start, stop) of the shards of a selection's distinct configurations."""
    n = int(selection.meta["n_distinct"] or 0)
    return [(start, min(start + shard_size, n)) for start in range(0, n, shard_size)]


def distinct_configurations(selection: Artifact, measured: CalibrationTables) -> tuple[np.ndarray, np.ndarray]:
    """Distinct configurations (n, N) among members and budgets, and which of them each member and budget has.

    A budget's configuration is often a member as it is: what is equal is measured once.
    """
    both = np.concatenate([load_set(selection, measured).configurations, load_selected(selection, measured)])
    distinct, inverse = np.unique(both, axis=0, return_inverse=True)
    return distinct, inverse.ravel()


@stage("evaluate-shard", tags=("gpu",))
def evaluate_shard(
    *,
    base: Artifact,
    benchmark: Artifact,
    tables: Artifact,
    selection: Artifact,
    state: Artifact,
    method: str,
    adapter: AdapterRecipe,
    batch_size: int,
    start: int,
    stop: int,
    runtime: RuntimeSettings,
    seed: int,
) -> Artifact:
    """`shard.json`: scores of the distinct configurations `start` to `stop` of a selection.

    The first shard measures the base in full precision as well.
    """
    data, measured = load_benchmark(benchmark), load_tables(tables)
    rows = distinct_configurations(selection, measured)[0][start:stop]
    full: Score | None = None
    with resident_model(
        data,
        base=base,
        benchmark=benchmark,
        tables=tables,
        state=state,
        method=method,
        adapter=adapter,
        runtime=runtime,
        seed=seed,
    ) as adapted:
        label = f"evaluating {method}, configurations {start + 1} to {stop} of {selection.meta['n_distinct']}"
        scores = measure_configurations(adapted, data.validation, rows, batch_size=batch_size, progress=Progress(label))
        if start == 0:
            adapted.full_precision()
            full = score(adapted, data.validation, batch_size=batch_size)

    def write(folder: Path) -> dict[str, Scalar]:
        content = {"start": start, "scores": [vars(s) for s in scores], "full_precision": full and vars(full)}
        write_json(folder / SHARD, content)
        return {"n_configurations": len(rows)}

    return Store().put("scores-shard", write)


@stage("evaluate")
def evaluate_method(*, tables: Artifact, selection: Artifact, method: str, shards: list[Artifact]) -> Artifact:
    """`scores.json`: losses and metrics of `members` and `budgets`, and of the base in full precision."""
    measured = load_tables(tables)
    distinct, inverse = distinct_configurations(selection, measured)
    parts = [read_json(Store().path(shard) / SHARD) for shard in shards]
    content = {"method": method} | merge_shards(parts, inverse, len(load_set(selection, measured)), len(distinct))

    def write(folder: Path) -> dict[str, Scalar]:
        write_json(folder / SCORES, content)
        seconds = sum(float(shard.meta.get("seconds") or 0) for shard in shards)
        return {"n_configurations": len(distinct), "shard_seconds": round(seconds, 3)}

    return Store().put("scores", write)


def merge_shards(parts: Sequence[dict], inverse: np.ndarray, n_members: int, n_distinct: int) -> dict[str, object]:
    """Scores of the distinct configurations, dealt out to members and budgets.

    Args:
        parts: contents of `shard.json`, in any order.
        inverse: (n_members + n_budgets,) as from `distinct_configurations`.

    Raises:
        CoaloraError: the shards do not cover every distinct configuration once.
    """
    parts = sorted(parts, key=lambda part: part["start"])
    rows = [row for part in parts for row in part["scores"]]
    starts = np.cumsum([0] + [len(part["scores"]) for part in parts])
    if len(rows) != n_distinct or [part["start"] for part in parts] != starts[:-1].tolist():
        raise CoaloraError(
            "shards cover every configuration once",
            got=", ".join(f"{part['start']} to {part['start'] + len(part['scores'])}" for part in parts) or "none",
            expected=f"0 to {n_distinct}",
        )
    full = parts[0]["full_precision"]
    dealt = {"members": inverse[:n_members], "budgets": inverse[n_members:]}
    return {"full_precision": full} | {
        name: {
            "loss": [rows[i]["loss"] for i in index],
            "metrics": {metric: [rows[i]["metrics"][metric] for i in index] for metric in full["metrics"]},
        }
        for name, index in dealt.items()
    }
