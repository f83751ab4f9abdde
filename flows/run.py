"""One pipeline run: its name, its settings, digests of what it reads, its runner and its journal, made once.

Everything that runs a stage gets this object: settings are resolved and input files digested when it is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from coalora.files import digest
from coalora.models.loading import resolved
from pipeline.inputs.base import model_content
from pipeline.inputs.fingerprint import files_digest, input_files
from pipeline.inputs.loaders import read_set_file
from pipeline.prune.roots import Journal
from pipeline.settings.sections import Settings
from pipeline.stages.checkpoints import checkpoint_every
from pipeline.stages.runner import Runner, Stage
from pipeline.stages.stage import Pool
from pipeline.store.store import Artifact
from pipeline.workers.pool import open_pool
from pipeline.workers.worker import WorkerPool


@dataclass
class Run:
    """A run under way."""

    name: str  # the pipeline's
    settings: Settings  # with `runtime` resolved for this machine
    runner: Runner
    sources: tuple[str, ...] = ()  # digests of the code of every stage that the run may come to
    refresh: frozenset[str] = frozenset()  # names of stages that are computed again whatever is recorded
    model_content: str | None = None  # digests of local input files, here and below; None where there are none
    benchmark_content: str | None = None
    cost_content: str | None = None
    given: dict[str, Any] | None = None  # content of initial_set.file; None where the initial set is allocated

    @classmethod
    def start(
        cls, name: str, settings: Settings, runner: Runner, *, sources: Sequence[str] = (), refresh: Sequence[str] = ()
    ) -> Run:
        """Digest the input files and resolve the runtime."""
        settings = settings.model_copy(update={"runtime": resolved(settings.runtime)})
        files = input_files(settings.benchmark)
        return cls(
            name,
            settings,
            runner,
            tuple(sources),
            frozenset(refresh),
            model_content=model_content(settings.model),
            benchmark_content=files_digest(files) if files else None,
            cost_content=files_digest([Path(settings.cost.table)]) if settings.cost.table else None,
            given=read_set_file(settings.initial_set.file) if settings.initial_set.file else None,
        )

    @cached_property
    def identity(self) -> str:
        """Digest of all that decides the result: settings, input files and the stages' code."""
        return digest(
            [
                self.name,
                self.settings.of_the_result().model_dump(mode="json"),
                self.model_content,
                self.benchmark_content,
                self.cost_content,
                None if self.given is None else digest(self.given),
                sorted(self.sources),
            ]
        )

    @cached_property
    def _journal(self) -> Journal:
        return Journal.of(self.name, self.identity)

    def run(self, stage: Stage, **inputs: Any) -> Artifact:
        """Run one stage."""
        return self.run_many(stage, [inputs])[0]

    def run_many(
        self, stage: Stage, calls: Sequence[Mapping[str, Any]], *, workers: int = 1, pool: Pool | None = None
    ) -> list[Artifact]:
        """Run one stage for each of `calls`, at most `workers` at a time: in threads, or in the processes of a pool."""
        refresh = stage.name in self.refresh
        with self._journal.in_use(), checkpoint_every(self.settings.stages.checkpoint_seconds):
            artifacts = self.runner.run_many(stage, calls, workers=workers, refresh=refresh, pool=pool)
            for inputs, artifact in zip(calls, artifacts, strict=True):
                self._journal.note(stage.name, stage.key(inputs), artifact)
        return artifacts

    def run_each(self, stage: Stage, calls: Sequence[Mapping[str, Any]], pool: Pool | None) -> list[Artifact]:
        """As `run_many` for stages that only processes may share: in this process they run one after the other."""
        return self.run_many(stage, calls, workers=1 if pool is None else self.settings.evaluation.workers, pool=pool)

    def workers(self) -> AbstractContextManager[WorkerPool | None]:
        """Workers as `evaluation.runner` asks for them; None for threads. They start with the first call to compute."""
        asked = self.settings.evaluation
        pool = open_pool(asked.runner, asked.workers, address=asked.address)
        return nullcontext() if pool is None else closing(pool)
