"""Notes of a runner about a call: its plan, the record of its artifact, its name in the UI."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect.filesystems import LocalFileSystem
from prefect.results import ResultStore

from coalora.adapt.methods import METHODS
from pipeline.faults import disk_faults
from pipeline.stages.stage import Pool, Stage
from pipeline.store.artifacts import Artifact
from pipeline.store.locks import Lock


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
    """A call before it runs.

    Attributes:
        reuse: the record that answers it, its artifact whole.
        damaged: there was one that is not whole.
        lock: held while the function runs; None where a record answers.
        pool: where the function runs; None for here.
        executions: filled when the function really runs.
    """

    stage: Stage
    key: str
    call: dict[str, Any]
    results: ResultStore
    reuse: Artifact | None
    damaged: bool
    started: float
    lock: Lock | None = None
    pool: Pool | None = None
    executions: list[str] = field(default_factory=list)

    @property
    def elsewhere(self) -> bool:
        """Whether the function runs on a cluster, whose workers have GPUs of their own."""
        return getattr(self.pool, "address", None) is not None

    def release(self) -> None:
        """Let others have the key."""
        if self.lock is not None:
            self.lock.release()


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


def run_name(stage: str, call: Mapping[str, Any]) -> str:
    """What the run page calls a task run: the stage in words, and what tells its runs apart."""
    name = _STAGES.get(stage, stage)
    if "method" in call:
        name += f" {METHODS[call['method']].label}"
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
    if not isinstance(results.result_storage, LocalFileSystem):  # a storage block of the user's
        results.persist_result_record(record)
        return
    target = Path(str(record.metadata.storage_key))
    part = target.with_name(f".{uuid.uuid4().hex}.part")
    with disk_faults(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(record.serialize())
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)
