"""Task `publish-to-s3`: a finished run in a bucket, and its address in MLflow."""

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from pipeline.progress import get_logger
from pipeline.settings.sections import StorageSettings, TrackingSettings


@task(name="publish-to-s3", cache_policy=NO_CACHE)
def publish_run(*, folder: str, storage: StorageSettings, tracking: TrackingSettings, run_id: str | None) -> str:
    """Publish a run folder, and tag its MLflow run and registered versions with the address; returns that."""
    from pipeline.s3.client import S3Location
    from pipeline.store.publish import publish
    from pipeline.tracking.registry import tag_address

    found = publish(Path(folder), S3Location.of(storage))
    get_logger().info("%s: %s", found.address, found.summary)
    for version in tag_address(tracking, run_id, found.address) if run_id else []:
        get_logger().info("registered model %s: tagged with this address", version)
    return found.address
