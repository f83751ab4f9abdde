"""Stage `evaluate`: the shards of a method put together."""

from collections.abc import Sequence

import numpy as np

from coalora.errors import CoaloraError
from coalora.files import read_json
from pipeline.inputs.loaders import load_set, load_tables
from pipeline.stages.runner import stage
from pipeline.store.store import Artifact, current_store
from tasks.evaluate_shard import SHARD, distinct_configurations

SCORES = "scores.json"


@stage("evaluate")
def evaluate_method(*, tables: Artifact, selection: Artifact, method: str, shards: list[Artifact]) -> Artifact:
    """`scores.json`: losses and metrics of `members` and `budgets`, and of the base in full precision."""
    measured = load_tables(tables)
    distinct, inverse = distinct_configurations(selection, measured)
    parts = [read_json(current_store().path(shard) / SHARD) for shard in shards]
    content = {"method": method} | merge_shards(parts, inverse, len(load_set(selection, measured)), len(distinct))
    seconds = round(sum(float(shard.meta.get("seconds") or 0) for shard in shards), 3)
    meta = {"n_configurations": len(distinct), "shard_seconds": seconds}
    return current_store().put_json("scores", {SCORES: content}, meta)


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
        found = ", ".join(f"{part['start']} to {part['start'] + len(part['scores'])}" for part in parts) or "none"
        raise CoaloraError(
            f"Shards {found} do not cover the configurations 0 to {n_distinct} once each",
            remedy="Evaluate again with --refresh evaluate-shard",
        )
    full = parts[0]["full_precision"]
    dealt = {"members": inverse[:n_members], "budgets": inverse[n_members:]}
    return {"full_precision": full} | {
        name: {
            "loss": [rows[i]["loss"] for i in index],
            "blocks": [rows[i].get("blocks", ()) for i in index],
            "metrics": {metric: [rows[i]["metrics"][metric] for i in index] for metric in full["metrics"]},
        }
        for name, index in dealt.items()
    }
