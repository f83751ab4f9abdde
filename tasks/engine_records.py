"""What the runners of `tasks.engine` note about a call: the plan, the record of its artifact, its name in the UI."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect.results import ResultStore

from tasks.artifacts import Artifact
from tasks.stage import Stage


@dataclass(frozen=True)
class StageRecord:
    """What one `run` did. `cached`: the function did not run; `rebuilt`: it ran as its files were damaged."""

    stage: str
    key: str
    cached: bool
    rebuilt: bool
    seconds: float
    artifact: Artifact


@dataclass(frozen=True)
class Plan:
    """A call before it runs. `reuse`: the whole record that answers it; `damaged`: there was one that is not whole."""

    stage: Stage
    key: str
    call: dict[str, Any]
    results: ResultStore
    reuse: Artifact | None
    damaged: bool
    started: float
    executions: list[str] = field(default_factory=list)  # filled when the function really runs


# Stages and methods as people call them: what the UI shows.
_STAGES = {
    "base": "prepare base model",
    "benchmark": "prepare benchmark",
    "calibrate": "calibrate layers",
    "cost": "price choices",
    "initial-set": "initial configuration set",
    "search": "Pareto search",
    "select": "choose configurations for the budgets",
    "evaluate-shard": "evaluate",
    "evaluate": "collect scores of",
    "reference": "train for one budget alone:",
    "harness": "evaluate on harness tasks:",
    "bundle": "bundle",
    "result": "put results together",
    # Tasks for their effect outside, `Runner.call`.
    "version-set": "version the set with DVC",
    "remove-stale-sets": "remove sets of rounds that are no more",
    "track-round": "log the set to MLflow",
    "track-run": "log results to MLflow",
    "track-training": "log the curve of",
    "register": "register in MLflow",
    "write-run-folder": "write the run folder",
    "show-round": "show the Pareto front",
    "show-result": "show the result",
}
_METHODS = {"coa": "CoA-LoRA", "shared": "Shared-LoRA", "none": "no adapter", "paper": "CoA-LoRA as in the paper"}


def run_name(stage: str, call: Mapping[str, Any]) -> str:
    """What the run page calls a task run: the stage in words, and what tells its runs apart."""
    name = _STAGES.get(stage, stage)
    if "method" in call:
        name += f" {_METHODS.get(call['method'], call['method'])}"
    details = []
    if "round_index" in call:
        details.append(f"round {call['round_index']}")
    if "start" in call:
        details.append(f"configurations {call['start'] + 1} to {call['stop']}")
    if "index" in call:
        details.append(f"budget {call['index'] + 1}")
    return ", ".join([name, *details])


def recorded_artifact(results: ResultStore, key: str) -> Artifact | None:
    """The record at `key`; None for none, a half-written one, or one of another version of `Artifact`."""
    if not results.exists(key):
        return None
    result = results.read(key).result
    return result if isinstance(result, Artifact) else None


def write_record(results: ResultStore, key: str, artifact: Artifact) -> None:
    """As `ResultStore.write`, but atomic: that one truncates the old record before it writes the new one."""
    record = results.create_result_record(artifact, key=key)
    target = Path(str(record.metadata.storage_key))
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{uuid.uuid4().hex}.part")
    try:
        part.write_bytes(record.serialize())
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
