"""Runners of the pipeline's cached stages: inside a Prefect flow, or without any server.

A stage's result record (the small `Artifact`, as JSON) lies at the stage's key in Prefect's local result
storage. `PrefectRunner` lets Prefect write the records; `DirectRunner` does it through
`prefect.results.ResultStore`, without the API: what a flow has computed is reused by `dvc repro`, and the
other way round. Records are read here alone (`recorded_artifact`): read by Prefect, a record would choose the code that
reads it. And a cache hit of Prefect's does not look at the files that the record refers to, so that both
look at the stored files before they trust a record (`Store.problems`), and rebuild what is damaged.

A runner computes a key while it holds the key's lock (`pipeline.store.locks`), and looks again once it has it: of two
runs that need a result at once one computes it, and the other waits and takes it. With a shared store
(`pipeline.store.shared`) records and artifacts are looked for there, too, and what was computed here is uploaded
before the lock is given back.
"""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import copy_context
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar, cast

from prefect import Task
from prefect.cache_policies import NO_CACHE, CacheKeyFnPolicy
from prefect.context import FlowRunContext
from prefect.filesystems import LocalFileSystem
from prefect.results import ResultStore, get_result_store
from prefect.serializers import JSONSerializer
from prefect.settings import get_current_settings
from prefect.utilities.importtools import to_qualified_name

from coalora.errors import CoaloraError
from coalora.files import replace_file
from pipeline.faults import database_faults, disk_faults
from pipeline.orchestration.gpu_tags import tags_of_call, waiting_logged
from pipeline.progress import get_logger
from pipeline.stages.checkpoints import discard
from pipeline.stages.keys import artifacts_in
from pipeline.stages.names import run_name
from pipeline.stages.stage import Call, Pool, Stage, current_call, stage
from pipeline.store.artifacts import Artifact
from pipeline.store.locks import Lock, wait_for
from pipeline.store.store import Store, default_store, using
from pipeline.words import human_seconds

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


@dataclass(frozen=True)
class Plan:
    """A call before it runs."""

    stage: Stage
    key: str
    call: dict[str, Any]
    results: ResultStore
    reuse: Artifact | None  # the record that answers it, its artifact whole
    damaged: bool  # there was one that is not whole
    started: float
    lock: Lock | None = None  # held while the function runs
    pool: Pool | None = None  # where the function runs; None for here
    executions: list[str] = field(default_factory=list)  # filled when the function really runs

    def release(self) -> None:
        """Let others have the key."""
        if self.lock is not None:
            self.lock.release()


class Runner(ABC):
    """Runs stages with caching; `history` lists what was done, in the order of the calls.

    Args:
        store: where the artifacts' files are; `default_store()` by default.
        retries: how often Prefect runs a failed stage again; None leaves it to the stage.
        timeout_seconds: Prefect's limit for one stage; None leaves it to the stage.
    """

    def __init__(
        self, store: Store | None = None, *, retries: int | None = None, timeout_seconds: float | None = None
    ) -> None:
        self.store = store if store is not None else default_store()
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
        plan = self._plan(stage, inputs, refresh)
        try:
            with self._calling(plan):
                record = self._record(plan, self._execute(plan))
            self.history.append(record)
            return record.artifact
        finally:
            plan.release()

    def run_many(
        self,
        stage: Stage,
        calls: Sequence[Mapping[str, Any]],
        *,
        workers: int = 1,
        refresh: bool = False,
        pool: Pool | None = None,
    ) -> list[Artifact]:
        """`run` for each of `calls`, at most `workers` at a time; artifacts in the order of the calls.

        When one fails, none is begun any more, those under way are finished and recorded, and the error arrives
        unchanged: the next run goes on with what is missing.

        Args:
            pool: workers in other processes that the function runs in; threads of this process by default.
        """
        if workers == 1 and pool is None:
            return [self.run(stage, refresh=refresh, **inputs) for inputs in calls]
        records: dict[int, StageRecord] = {}
        pending: dict[int, tuple[Plan, Any]] = {}  # with Prefect's future, or that of a thread
        done: SimpleQueue[int] = SimpleQueue()

        def finish() -> None:
            index = done.get()  # whichever ends first: its worker gets the next call, though others go on
            plan, submitted = pending.pop(index)
            try:
                records[index] = self._record(plan, submitted.result())
            finally:
                plan.release()

        def finish_all() -> None:
            while pending:
                finish()

        with self._workers(workers) as submit:
            try:
                for index, inputs in enumerate(calls):
                    if len(pending) == workers:
                        finish()
                    plan = self._plan(stage, inputs, refresh, pool, before_waiting=finish_all)
                    with self._calling(plan):  # what is submitted runs in a copy of this context
                        submitted = submit(plan)
                    submitted.add_done_callback(lambda _, index=index: done.put(index))
                    pending[index] = plan, submitted
                finish_all()
            except BaseException:
                while pending:
                    with suppress(Exception):  # the first failure is the one that is told
                        finish()
                raise
            finally:
                in_order = [records[index] for index in sorted(records)]
                self.history += in_order
        return [record.artifact for record in in_order]

    def _plan(
        self,
        stage: Stage,
        inputs: Mapping[str, Any],
        refresh: bool,
        pool: Pool | None = None,
        before_waiting: Callable[[], None] = lambda: None,
    ) -> Plan:
        """The record that answers a call where there is one and its files are whole, or else the lock of its key.

        Args:
            before_waiting: called when another has the lock, before it is waited for.
        """
        started = time.perf_counter()
        call = stage.bind(inputs)
        key, results = stage.key(call), self._result_store(stage)
        refresh = refresh or get_current_settings().tasks.refresh_cache
        reuse, damaged = (None, False) if refresh else self._recorded(stage, results, key)
        lock = None
        if reuse is None:
            lock = self._claim(stage, key, before_waiting)
            try:
                if refresh:
                    discard(key)  # from the start, and not from where a killed run had come to
                else:  # another run may have finished it meanwhile
                    reuse, again = self._recorded(stage, results, key)
                    damaged = damaged or again
                if reuse is None:
                    self._require_inputs(stage, call)
            except BaseException:
                lock.release()
                raise
            if reuse is not None:
                lock.release()
                lock = None
        return Plan(stage, key, call, results, reuse, damaged, started, lock, pool)

    def _recorded(self, stage: Stage, results: ResultStore, key: str) -> tuple[Artifact | None, bool]:
        """(the artifact that a record names, if it is whole; whether there was a record without)."""
        recorded = recorded_artifact(results, key)
        if recorded is not None:
            found = self.store.problems(recorded)
            if not found:
                return recorded, False
            get_logger().warning("%s: stored result is rebuilt: %s", stage.name, "; ".join(found))
        shared, damaged = self.store.shared, recorded is not None
        known = shared.record(key) if shared is not None else None
        if known is None or known == recorded or known.of_this_machine or self.store.problems(known):
            return None, damaged
        write_record(results, key, known)
        return known, damaged

    def _claim(self, stage: Stage, key: str, before_waiting: Callable[[], None]) -> Lock:
        """The lock of a key, after waiting for whoever has it."""
        lock = self.store.lock(key)
        if not lock.try_acquire():
            before_waiting()  # no lock is held while another is waited for: two runs cannot wait for each other

            def say(holder: str, waited: float) -> None:
                since = f" ({human_seconds(waited)} so far)" if waited > 1 else ""
                get_logger().info("%s: waiting for %s, which computes it%s", stage.name, holder, since)

            wait_for(lock, say)
        return lock

    def _require_inputs(self, stage: Stage, call: Mapping[str, Any]) -> None:
        for name, artifact in artifacts_in(call):
            if found := self.store.problems(artifact):
                raise CoaloraError(
                    f"Stage {stage.name!r} cannot read its input {name}: {'; '.join(found)}",
                    remedy="Run the pipeline again from the start, which rebuilds it, or with --refresh",
                )

    def _record(self, plan: Plan, artifact: Artifact) -> StageRecord:
        """Share what a finished call has made, and say what was done."""
        shared = self.store.shared
        if shared is not None:
            sent = self.store.share(artifact)
            # After its artifact, and also where a record was there: what a run without the shared store has made.
            if not artifact.of_this_machine and (plan.executions or shared.record(plan.key) is None):
                shared.write_record(plan.key, artifact)
            if sent:
                get_logger().info("%s: %.1f MB to %s", plan.stage.name, sent / 1e6, shared)
        record = StageRecord(
            stage=plan.stage.name,
            key=plan.key,
            cached=not plan.executions,
            rebuilt=bool(plan.damaged and plan.executions),
            seconds=time.perf_counter() - plan.started,
            artifact=artifact,
        )
        how = "reused" if record.cached else "rebuilt" if record.rebuilt else "computed"
        get_logger().info("%s: %s %s (%.1f s)", plan.stage.name, how, artifact.digest[:12], record.seconds)
        return record

    @contextmanager
    def _calling(self, plan: Plan) -> Iterator[None]:
        """The block is the call of a plan: its function reads and writes this runner's store."""
        token = current_call.set(Call(plan.key, plan.executions, plan.pool, plan.reuse))
        try:
            with using(self.store):
                yield
        finally:
            current_call.reset(token)

    @abstractmethod
    def call(self, task: Task[..., T], /, **inputs: Any) -> T:
        """Run a task for its effect outside (tracking, versioning, a report): never cached, idempotent by itself."""

    @abstractmethod
    def _result_store(self, stage: Stage) -> ResultStore:
        """Where the stage's records are."""

    @abstractmethod
    def _execute(self, plan: Plan) -> Artifact:
        """Return the verified record, or run the function and record its artifact."""

    @abstractmethod
    def _workers(self, workers: int) -> AbstractContextManager[Callable[[Plan], Any]]:
        """A function that begins a plan beside others and returns its future."""


class PrefectRunner(Runner):
    """Runs stages as task runs of the current flow run: states, retries, tags and timeouts are Prefect's."""

    def _result_store(self, stage: Stage) -> ResultStore:
        if FlowRunContext.get() is None:
            raise CoaloraError(
                "PrefectRunner was called outside of a flow", remedy="Call it in a @flow, or use DirectRunner"
            )
        task = stage.task
        # `_sync`: inside a running event loop the call would return a coroutine instead.
        return cast(ResultStore, get_result_store().update_for_task(task, _sync=True))  # type: ignore[call-arg]

    def _execute(self, plan: Plan) -> Artifact:
        task = self._task(plan)
        with waiting_logged(run_name(plan.stage.name, plan.call), task.tags, lambda: bool(plan.executions)):
            made = task(**plan.call)
        return plan.reuse or made  # Prefect returns the state of a reused one

    @contextmanager
    def _workers(self, workers: int) -> Iterator[Callable[[Plan], Any]]:
        """Through the flow's task runner: threads, unless the flow was given another."""
        yield lambda plan: self._task(plan).submit(**plan.call)

    def _task(self, plan: Plan) -> Task[..., Artifact]:
        # A verified record is a task run as well, so that the run page shows the stage as cached.
        reused, tags = plan.reuse is not None, plan.stage.task.tags
        elsewhere = getattr(plan.pool, "address", None) is not None  # a cluster, whose workers have GPUs of their own
        return plan.stage.task.with_options(
            cache_policy=NO_CACHE if reused else CacheKeyFnPolicy(cache_key_fn=lambda context, inputs: plan.key),
            persist_result=not reused,
            refresh_cache=True,
            task_run_name=run_name(plan.stage.name, plan.call),
            tags=tags_of_call(tags, _flat(plan.call), reused=reused, elsewhere=elsewhere),
            **self.task_options,
        )

    def call(self, task: Task[..., T], /, **inputs: Any) -> T:
        with database_faults(), using(self.store):
            return task.with_options(task_run_name=run_name(task.name, inputs))(**inputs)


def _flat(call: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a call with those of a `model` among them beside the others."""
    return {**(vars(call["model"]) if is_dataclass(call.get("model")) else {}), **call}


class DirectRunner(Runner):
    """Runs stages as plain calls, without flow, server or API: `coalora stage` in DVC stages.

    Records are those of Prefect's local storage path. A storage block set as Prefect's default result storage
    can be read with the API only, and is not shared with.
    """

    def _result_store(self, stage: Stage) -> ResultStore:
        return ResultStore(
            result_storage=LocalFileSystem(basepath=str(get_current_settings().results.local_storage_path)),
            serializer=JSONSerializer(),
            cache_result_in_memory=False,
        )

    def _execute(self, plan: Plan) -> Artifact:
        if plan.reuse is not None:
            return plan.reuse
        artifact = plan.stage.task.fn(**plan.call)
        write_record(plan.results, plan.key, artifact)
        return artifact

    @contextmanager
    def _workers(self, workers: int) -> Iterator[Callable[[Plan], Any]]:
        with ThreadPoolExecutor(workers, thread_name_prefix="coalora") as pool:
            yield lambda plan: pool.submit(copy_context().run, self._execute, plan)

    def call(self, task: Task[..., T], /, **inputs: Any) -> T:
        with database_faults(), using(self.store):
            return task.fn(**inputs)


def recorded_artifact(results: ResultStore, key: str) -> Artifact | None:
    """The artifact of the record at `key`; None for none.

    Whatever is not the JSON of an `Artifact` is deleted, to be computed again: a half-written record, one of another
    version, or one that names a serializer (pickle) or a class for Prefect to import and call.
    """
    storage = results.result_storage
    local = isinstance(storage, LocalFileSystem)
    path = Path(str(results.create_result_record(None, key=key).metadata.storage_key))
    try:
        content = path.read_bytes() if local else cast(Any, storage).read_path(key)
    except (OSError, ValueError):  # Prefect says so of a path that does not exist
        return None
    try:
        result = json.loads(json.loads(content)["result"])
        if result.keys() == {"__class__", "data"} and result["__class__"] == to_qualified_name(Artifact):
            return Artifact.model_validate(result["data"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    get_logger().warning("The record %s is none of this project's: it is computed again", key)
    if local:
        path.unlink(missing_ok=True)  # the others are written over
    return None


def write_record(results: ResultStore, key: str, artifact: Artifact) -> None:
    """As `ResultStore.write`, but atomic: that one truncates the old record before it writes the new one."""
    record = results.create_result_record(artifact, key=key)
    if not isinstance(results.result_storage, LocalFileSystem):  # a storage block of the user's
        results.persist_result_record(record)
        return
    target = Path(str(record.metadata.storage_key))
    with disk_faults(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_file(target, record.serialize())
