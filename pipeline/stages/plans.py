"""Plan of a stage call: its key, the record that answers it, or else the key's lock.

Looked for on this machine, then in the shared store; and once more when the lock is held, since another run may have
finished the result meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from prefect.results import ResultStore

from coalora.errors import CoaloraError
from pipeline.progress import format_seconds, get_logger
from pipeline.stages.checkpoints import discard
from pipeline.stages.keys import artifacts_in
from pipeline.stages.records import Plan, recorded_artifact, write_record
from pipeline.stages.stage import Pool, Stage
from pipeline.stages.verified import problems
from pipeline.store.artifacts import Artifact
from pipeline.store.locks import Lock, wait_for
from pipeline.store.store import Store


class Planner:
    """Plans the calls of one stage.

    Args:
        store: of the artifacts; beside it lie the locks.
        results: of the stage's records.
    """

    def __init__(self, store: Store, stage: Stage, results: ResultStore) -> None:
        self.store, self.stage, self.results = store, stage, results

    def plan(
        self, inputs: Mapping[str, Any], *, refresh: bool, pool: Pool | None, before_waiting: Callable[[], None]
    ) -> Plan:
        """The record that answers a call where there is one and its files are whole, or else the lock of its key.

        Args:
            refresh: look for no record.
            pool: where the function is to run.
            before_waiting: called when another has the lock, before it is waited for.

        Raises:
            TypeError: missing, unknown or unsupported inputs.
            CoaloraError: the stage has to run, and an artifact among its inputs is missing or damaged.
        """
        started = time.perf_counter()
        call = self.stage.bind(inputs)
        key = self.stage.key(call)
        reuse, damaged = (None, False) if refresh else self._recorded(key)
        lock = None
        if reuse is None:
            lock = self._claim(key, before_waiting)
            try:
                if refresh:
                    discard(key)  # from the start, and not from where a killed run had come to
                else:  # another run may have finished it meanwhile
                    reuse, again = self._recorded(key)
                    damaged = damaged or again
                if reuse is None:
                    self._require_inputs(call)
            except BaseException:
                lock.release()
                raise
            if reuse is not None:
                lock.release()
                lock = None
        return Plan(self.stage, key, call, self.results, reuse, damaged, started, lock, pool)

    def _recorded(self, key: str) -> tuple[Artifact | None, bool]:
        """(the artifact that a record names, if it is whole; whether there was a record without)."""
        damaged = False
        recorded = recorded_artifact(self.results, key)
        if recorded is not None:
            found = problems(self.store, recorded)
            if not found:
                return recorded, False
            get_logger().warning("%s: stored result is rebuilt: %s", self.stage.name, "; ".join(found))
            damaged = True
        shared = self.store.shared
        known = shared.record(key) if shared is not None else None
        if known is None or known == recorded or known.of_this_machine or problems(self.store, known):
            return None, damaged
        write_record(self.results, key, known)
        return known, damaged

    def _claim(self, key: str, before_waiting: Callable[[], None]) -> Lock:
        """The lock of a key, after waiting for whoever has it."""
        lock = self.store.lock(key)
        if not lock.try_acquire():
            before_waiting()  # no lock is held while another is waited for: two runs cannot wait for each other

            def say(holder: str, waited: float) -> None:
                since = f" ({format_seconds(waited)} so far)" if waited > 1 else ""
                get_logger().info("%s: waiting for %s, which computes it%s", self.stage.name, holder, since)

            wait_for(lock, say)
        return lock

    def _require_inputs(self, call: Mapping[str, Any]) -> None:
        for name, artifact in artifacts_in(call):
            if found := problems(self.store, artifact):
                raise CoaloraError(
                    f"Stage {self.stage.name!r} cannot read its input {name}: {'; '.join(found)}",
                    remedy="Run the pipeline again from the start, which rebuilds it, or with --refresh",
                )
