"""Task `track-round`: a round's configuration set in MLflow."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from pipeline.settings.sections import Settings
from pipeline.store.store import Artifact


@task(name="track-round", cache_policy=NO_CACHE)
def track_round(
    *,
    pipeline: str,
    settings: Settings,
    identity: str,
    round_index: int,
    configurations: Artifact,
    tables: Artifact,
    md5: str | None,
) -> str:
    """Log a round's set to the round's nested MLflow run; returns its id."""
    from pipeline.tracking.pipeline_run import on_run, track_set

    return on_run(pipeline, settings, identity, lambda run: track_set(run, round_index, configurations, tables, md5))
