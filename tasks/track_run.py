"""Task `track-run`: data sets, results and report of a run in MLflow."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefect import task
from prefect.cache_policies import NO_CACHE

from pipeline.settings.sections import Settings
from pipeline.store.store import Artifact

if TYPE_CHECKING:
    from pipeline.tracking.runs import TrackedRun


@task(name="track-run", cache_policy=NO_CACHE)
def track_run(
    *,
    pipeline: str,
    settings: Settings,
    identity: str,
    benchmark: Artifact,
    tables: Artifact,
    sets: list[Artifact],
    versions: list[str | None],
    states: dict[str, list[Artifact]],
    report: Artifact,
) -> str:
    """Log data sets, results, figures and report to the MLflow run, and what is missing of the rounds; returns its id.

    Args:
        sets, versions: of every round, its configurations and their md5 in DVC.
        states: method -> its training states, round by round.
    """
    from pipeline.tracking.pipeline_run import log_datasets, log_result, on_run, track_set, track_state

    def log(run: TrackedRun) -> str:
        for i, (made, md5) in enumerate(zip(sets, versions, strict=True)):
            track_set(run, i, made, tables, md5)
        for method, trained in states.items():
            for i, state in enumerate(trained):
                track_state(run, i, method, state)
        source = settings.benchmark.model_dump(mode="json", exclude_none=True)
        run.log_once("datasets", benchmark.digest, lambda r: log_datasets(r, benchmark, source))
        run.log_once("result", report.digest, lambda r: log_result(r, tables, report))
        return run.run_id

    return on_run(pipeline, settings, identity, log)
