"""Task `track-training`: a round's loss curve in MLflow."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from pipeline.settings.sections import Settings
from pipeline.store.store import Artifact


@task(name="track-training", cache_policy=NO_CACHE)
def track_training(
    *, pipeline: str, settings: Settings, identity: str, round_index: int, method: str, state: Artifact
) -> None:
    """Log a round's loss curve to the pipeline's MLflow run; CoA's also to the round's, which it ends."""
    from pipeline.tracking.pipeline_run import on_run, track_state

    on_run(pipeline, settings, identity, lambda run: track_state(run, round_index, method, state))
