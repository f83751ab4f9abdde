"""Task `remove-stale-sets`: the checkout without sets of rounds that the run does not have."""

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from pipeline.progress import get_logger


@task(name="remove-stale-sets", cache_policy=NO_CACHE)
def remove_stale(*, pipeline: str, last_round: int, root: str) -> None:
    """Remove the sets of later rounds that an earlier run left."""
    from pipeline.versioning.sets import remove_stale_sets

    for path in remove_stale_sets(pipeline, last_round, Path(root)):
        get_logger().info("%s: removed, this run has no such round (DVC keeps its bytes)", path)
