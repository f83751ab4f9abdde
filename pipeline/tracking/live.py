"""A pipeline's MLflow run while it is under way: open from the start, with the machine's load, ended as it ended."""

from __future__ import annotations

import getpass
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal

from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.utils.mlflow_tags import (
    MLFLOW_GIT_COMMIT,
    MLFLOW_SOURCE_NAME,
    MLFLOW_SOURCE_TYPE,
    MLFLOW_USER,
)

from pipeline.settings.sections import Settings
from pipeline.tracking.faults import patiently
from pipeline.tracking.place import default_place
from pipeline.tracking.run import TrackedRun
from pipeline.tracking.tracker import open_tracker
from pipeline.versioning.git import git_commit

INTERVAL = 10.0  # seconds between two readings of the machine's load


def open_pipeline_run(pipeline: str, settings: Settings, identity: str) -> TrackedRun:
    """The run of a pipeline's identity, opened or resumed; named like its folder under runs/.

    Raises:
        CoaloraError: as `pipeline.tracking.faults.patiently`.
    """

    def call() -> TrackedRun:
        tracker = open_tracker(settings.tracking.experiment, settings.tracking.tracking_uri)
        params = settings.model_dump(mode="json", exclude_none=True)
        return tracker.open_run(identity, f"{pipeline} {identity[:8]}", params, run_tags(pipeline))

    return patiently(call, tracking_uri(settings))


def tracking_uri(settings: Settings) -> str:
    """Where runs of these settings are tracked."""
    return default_place(settings.tracking.tracking_uri).tracking_uri


def run_tags(pipeline: str) -> dict[str, str]:
    """Who ran what from where: columns of MLflow's table of runs."""
    tags = {
        "pipeline": pipeline,
        "host": socket.gethostname(),
        MLFLOW_SOURCE_NAME: f"flows.pipeline {pipeline}",
        MLFLOW_SOURCE_TYPE: "LOCAL",
        MLFLOW_USER: _user(),
    }
    if commit := git_commit():
        tags |= {"git_commit": commit, MLFLOW_GIT_COMMIT: commit.removesuffix("-dirty")}
    if url := _prefect_url():
        tags["prefect_run"] = url
    return tags


@contextmanager
def followed(pipeline: str, settings: Settings, identity: str) -> Iterator[TrackedRun]:
    """The run, with the machine's load logged while the block runs; FAILED or KILLED where an error ends the block.

    A run that is finished already is left as it is.
    """
    run = open_pipeline_run(pipeline, settings, identity)
    monitor = _monitor(run) if settings.tracking.system_metrics and run.status != "FINISHED" else None
    try:
        yield run
    except BaseException as error:
        ending: Literal["FAILED", "KILLED"] = "FAILED" if isinstance(error, Exception) else "KILLED"
        with suppress(Exception):  # the error that ended the run is the one to be told
            run.finish(ending)
        raise
    finally:
        if monitor is not None:
            monitor.finish()


def _monitor(run: TrackedRun) -> Any:
    # It says that it starts and stops in every run's log.
    logging.getLogger("mlflow.system_metrics.system_metrics_monitor").setLevel(logging.WARNING)
    monitor = SystemMetricsMonitor(
        run.run_id, sampling_interval=INTERVAL, resume_logging=True, tracking_uri=run.tracker.tracking_uri
    )
    monitor.start()
    return monitor


def _user() -> str:
    with suppress(OSError, KeyError):
        return getpass.getuser()
    return "unknown"  # a container's user without a name


def _prefect_url() -> str | None:
    """The page of the pipeline's flow run on the Prefect server, from any of its subflows; None outside of one."""
    from prefect.runtime import flow_run

    with suppress(Exception):
        if flow_run.id:
            return f"{str(flow_run.ui_url).rsplit('/', 1)[0]}/{flow_run.root_flow_run_id}"
    return None
