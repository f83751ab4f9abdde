"""Runs the stages of the pipeline, cached: inside a Prefect flow, or without any server.

A stage's result record (the small `Artifact`, as JSON) lies at the stage's key in Prefect's local result
storage. `PrefectRunner` lets Prefect read and write the records; `DirectRunner` does it through
`prefect.results.ResultStore`, without the API: what a flow has computed is reused by `dvc repro`, and the
other way round. A cache hit of Prefect's does not look at the files that the record refers to, so that both
hash the stored files before they trust a record, and rebuild what is damaged.
"""

from __future__ import annotations

import os
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

from prefect import Task
from prefect.context import FlowRunContext
from prefect.filesystems import LocalFileSystem
from prefect.results import ResultStore, get_result_store
from prefect.serializers import JSONSerializer
from prefect.settings import get_current_settings

from coalora.errors import CoaloraError
from tasks.artifacts import Artifact
from tasks.keys import artifacts_in
from tasks.progress import get_logger
from tasks.stage import Stage, executions_of_call, stage
from tasks.store import Store

T = TypeVar("T")

__all__ = ["DirectRunner", "PrefectRunner", "Runner", "Stage", "StageRecord", "stage"]


@dataclass(frozen=True)
class StageRecord:
    """What one `run` did. `cached`: the function did not run; `rebuilt`: it ran as its files were damaged."""

    stage: str
    key: str
    cached: bool
    rebuilt: bool
    seconds: float
    artifact: Artifact


class Runner(ABC):
    """Runs stages with caching; `history` lists what was done, in order.

    Args:
        store: where the artifacts' files are; `Store()` by default.
        retries: how often Prefect runs a failed stage again; None leaves it to the stage.
        timeout_seconds: Prefect's limit for one stage; None leaves it to the stage.
    """

    def __init__(
        self,
        store: Store | None = None,
        *,
        retries: int | None = None,
        timeout_seconds: float | None = None,
    ) -> None:
        self.store = store if store is not None else Store()
        self.history: list[StageRecord] = []
        limits = {"retries": retries, "timeout_seconds": timeout_seconds}
        self.task_options: dict[str, Any] = {k: v for k, v in limits.items() if v is not None}

    def run(self, stage: Stage, /, *, refresh: bool = False, **inputs: Any) -> Artifact:
        """The stage's artifact for these inputs: the recorded one if its files are whole, else a new one.

        What the function raises arrives unchanged, and nothing is recorded then.

        Args:
            refresh: compute again, whatever is recorded (Prefect's own `tasks.refresh_cache` counts too).

        Raises:
            TypeError: missing, unknown or unsupported inputs.
            CoaloraError: the stage has to run, and an artifact among its inputs is missing or damaged.
        """
        started = time.perf_counter()
        call = stage.bind(inputs)
        key = stage.key(call)
        results = self._result_store(stage)
        refresh = refresh or get_current_settings().tasks.refresh_cache
        recorded = None if refresh else _recorded(results, key)
        problems = self.store.verify(recorded) if recorded is not None else []
        if problems:
            get_logger().warning("%s: stored result is rebuilt: %s", stage.name, "; ".join(problems))
        reuse = recorded is not None and not problems
        if not reuse:
            self._require_inputs(stage, call)
        executions: list[str] = []
        token = executions_of_call.set(executions)
        try:
            artifact = self._execute(stage, key, call, results, recorded if reuse else None)
        finally:
            executions_of_call.reset(token)
        record = StageRecord(
            stage=stage.name,
            key=key,
            cached=not executions,
            rebuilt=bool(problems and executions),
            seconds=time.perf_counter() - started,
            artifact=artifact,
        )
        self.history.append(record)
        how = "reused" if record.cached else "rebuilt" if record.rebuilt else "computed"
        get_logger().info("%s: %s %s (%.1f s)", stage.name, how, artifact.digest[:12], record.seconds)
        return artifact

    def _require_inputs(self, stage: Stage, call: Mapping[str, Any]) -> None:
        for name, artifact in artifacts_in(call):
            if problems := self.store.verify(artifact):
                raise CoaloraError(
                    f"artifacts that stage {stage.name!r} reads are whole in the store",
                    got=f"{name}: {'; '.join(problems)}",
                    remedy="run the pipeline again from the start, which rebuilds them, or with --refresh",
                )

    @abstractmethod
    def call(self, task: Task[..., T], /, **inputs: Any) -> T:
        """Run a task for its effect outside (tracking, versioning, a report): never cached, idempotent by itself."""

    @abstractmethod
    def _result_store(self, stage: Stage) -> ResultStore:
        """Where the stage's records are."""

    @abstractmethod
    def _execute(
        self, stage: Stage, key: str, call: dict[str, Any], results: ResultStore, reuse: Artifact | None
    ) -> Artifact:
        """Return the verified record `reuse`, or run the function and record its artifact at `key`."""


class PrefectRunner(Runner):
    """Runs stages as task runs of the current flow run: states, retries, tags and timeouts are Prefect's."""

    def _result_store(self, stage: Stage) -> ResultStore:
        if FlowRunContext.get() is None:
            raise CoaloraError("PrefectRunner runs inside a flow", remedy="call it in a @flow, or use DirectRunner")
        task = stage.task
        # `_sync`: inside a running event loop the call would return a coroutine instead.
        return cast(ResultStore, get_result_store().update_for_task(task, _sync=True))  # type: ignore[call-arg]

    def _execute(
        self, stage: Stage, key: str, call: dict[str, Any], results: ResultStore, reuse: Artifact | None
    ) -> Artifact:
        # A verified record goes through Prefect as well, so that the run page shows the stage as cached.
        task = stage.task.with_options(
            cache_policy=replace(stage.policy, key=key),
            refresh_cache=reuse is None,
            task_run_name=_run_name(stage.name, call),
            **self.task_options,
        )
        return task(**call)

    def call(self, task: Task[..., T], /, **inputs: Any) -> T:
        return task(**inputs)


class DirectRunner(Runner):
    """Runs stages as plain calls, without flow, server or API: `python -m flows.<stage>` in DVC stages.

    Records are those of Prefect's local storage path. A storage block set as Prefect's default result storage
    can be read with the API only, and is not shared with.
    """

    def _result_store(self, stage: Stage) -> ResultStore:
        return ResultStore(
            result_storage=LocalFileSystem(basepath=str(get_current_settings().results.local_storage_path)),
            serializer=JSONSerializer(),
            cache_result_in_memory=False,
        )

    def _execute(
        self, stage: Stage, key: str, call: dict[str, Any], results: ResultStore, reuse: Artifact | None
    ) -> Artifact:
        if reuse is not None:
            return reuse
        artifact = stage.task.fn(**call)
        _write_record(results, key, artifact)
        return artifact

    def call(self, task: Task[..., T], /, **inputs: Any) -> T:
        return task.fn(**inputs)


def _run_name(stage: str, call: Mapping[str, Any]) -> str:
    """What the run page calls a task run: the stage, and what tells its runs apart."""
    words = [stage]
    if "method" in call:
        words.append(str(call["method"]))
    if "round_index" in call:
        words.append(f"round {call['round_index']}")
    if "index" in call:
        words.append(f"budget {call['index'] + 1}")
    return " ".join(words)


def _recorded(results: ResultStore, key: str) -> Artifact | None:
    """The record at `key`; None for none, a half-written one, or one of another version of `Artifact`."""
    if not results.exists(key):
        return None
    result = results.read(key).result
    return result if isinstance(result, Artifact) else None


def _write_record(results: ResultStore, key: str, artifact: Artifact) -> None:
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
