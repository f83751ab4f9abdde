"""Publish a finished run in S3, and say in MLflow where it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from prefect import task
from prefect.cache_policies import NO_CACHE

from coalora.errors import CoaloraError
from pipeline.progress import get_logger
from pipeline.scrub import one_line
from pipeline.settings.sections import StorageSettings, TrackingSettings

if TYPE_CHECKING:
    from pipeline.store.publish import Publication

ADDRESS_TAG = "s3_address"


@task(name="publish-to-s3", cache_policy=NO_CACHE)
def publish_run(*, folder: str, storage: StorageSettings, tracking: TrackingSettings, run_id: str | None) -> str:
    """Publish a run folder, and tag its MLflow run and registered versions with the address; returns that."""
    from pipeline.s3.client import S3Location
    from pipeline.store.publish import publish

    found = publish(Path(folder), S3Location.of(storage))
    get_logger().info("%s: %s", found.address, words(found))
    for version in tag_address(tracking, run_id, found.address) if run_id else []:
        get_logger().info("registered model %s: tagged with this address", version)
    return found.address


def words(found: Publication) -> str:
    """What was sent, in a few words."""
    if not found.changed and not found.sent_files:
        return f"published already, all {found.n_files} files ({found.nbytes:,} bytes) are there"
    return f"{found.n_files} files, {found.nbytes:,} bytes; sent {found.sent_files} files, {found.sent_bytes:,} bytes"


def tag_address(tracking: TrackingSettings, run_id: str, address: str) -> list[str]:
    """Set the tag `s3_address` of a run and of all versions registered from it; returns these, as `NAME version N`.

    Raises:
        CoaloraError: MLflow does not know the run, or cannot be reached: the publication itself is whole.
    """
    from mlflow.exceptions import MlflowException

    from pipeline.tracking.runs import open_tracker

    try:
        client = open_tracker(tracking.experiment, tracking.tracking_uri).client
        client.set_tag(run_id, ADDRESS_TAG, address)
        versions = client.search_model_versions(f"run_id = '{run_id}'")
        for version in versions:
            client.set_model_version_tag(version.name, version.version, ADDRESS_TAG, address)
    except MlflowException as error:
        raise CoaloraError(
            f"MLflow does not tag run {run_id} with its address ({one_line(error)[:200]})",
            remedy=f"Call `coalora upload` where MLflow can be reached; {address} itself is whole",
        ) from error
    return sorted(f"{version.name} version {version.version}" for version in versions)
