"""What a run leaves outside of the store: versioned sets, the MLflow run, its folder, the registered version.

These tasks are for their effect, so they are not cached; each of them does nothing where its effect is there already.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from prefect import task
from prefect.cache_policies import NO_CACHE

from coalora.files import digest, read_json, write_json
from pipeline.inputs.loaders import SET
from pipeline.progress import get_logger
from pipeline.settings.sections import Settings
from pipeline.store.current import current_store
from pipeline.store.store import Artifact
from pipeline.versioning.git import git_commit
from tasks.result import RESULT

T = TypeVar("T")


@task(name="version-set", cache_policy=NO_CACHE)
def version_set(
    *, pipeline: str, identity: str, round_index: int, configurations: Artifact, root: str, push: bool = False
) -> str:
    """Write a round's set into the checkout and add it to DVC, tagged with run and round; returns its md5."""
    from pipeline.versioning.sets import push_file, version_file, write_set

    payload = read_json(current_store().path(configurations) / SET)
    tags: dict[str, str | int] = {"pipeline": pipeline, "run": identity[:8], "round": round_index}
    record = version_file(write_set(pipeline, round_index, payload, Path(root)), Path(root), tags)
    get_logger().info("%s: %s %s", record.path, "added to DVC," if record.added else "in DVC already,", record.md5)
    if push:
        push_file(record, Path(root))
    return record.md5


@task(name="remove-stale-sets", cache_policy=NO_CACHE)
def remove_stale(*, pipeline: str, last_round: int, root: str) -> None:
    """Remove the sets of later rounds that an earlier run left."""
    from pipeline.versioning.sets import remove_stale_sets

    for path in remove_stale_sets(pipeline, last_round, Path(root)):
        get_logger().info("%s: removed, this run has no such round (DVC keeps its bytes)", path)


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
    from pipeline.tracking.pipeline_run import track_set

    def call() -> str:
        parent = _open_run(pipeline, settings, identity)
        return track_set(parent, round_index, configurations, tables, md5)

    return _patiently(call, settings)


@task(name="track-training", cache_policy=NO_CACHE)
def track_training(
    *, pipeline: str, settings: Settings, identity: str, round_index: int, method: str, state: Artifact
) -> None:
    """Log a round's loss curve to the pipeline's MLflow run; CoA's also to the round's, which it ends."""
    from pipeline.tracking.pipeline_run import track_state

    def call() -> None:
        track_state(_open_run(pipeline, settings, identity), round_index, method, state)

    _patiently(call, settings)


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
    from pipeline.tracking.pipeline_run import log_datasets, log_result, track_set, track_state

    def call() -> str:
        run = _open_run(pipeline, settings, identity)
        for i, (made, md5) in enumerate(zip(sets, versions, strict=True)):
            track_set(run, i, made, tables, md5)
        for method, trained in states.items():
            for i, state in enumerate(trained):
                track_state(run, i, method, state)
        source = settings.benchmark.model_dump(mode="json", exclude_none=True)
        run.log_once("datasets", benchmark.digest, lambda r: log_datasets(r, benchmark, source))
        run.log_once("result", report.digest, lambda r: log_result(r, tables, report))
        return run.run_id

    return _patiently(call, settings)


@task(name="register", cache_policy=NO_CACHE)
def register_version(
    *,
    pipeline: str,
    settings: Settings,
    identity: str,
    benchmark: Artifact,
    bundle: Artifact,
    result: Artifact,
    md5: str | None,
) -> dict[str, Any]:
    """Register the bundle as a model version; `champion` moves only when the hypervolume improves."""
    from pipeline.report.table import markdown_table
    from pipeline.tracking.registry import register

    content = read_json(current_store().path(result) / RESULT)
    volume = content["hypervolume"]
    bits = [member["average_bits"] for member in content["members"]]
    tags = {
        "pipeline": pipeline,
        "hypervolume_reference": digest([benchmark.digest, volume["ideal"], volume["ref_point"]])[:16],
        "benchmark": content["benchmark"]["name"],
        "average_bits_range": f"{min(bits):.3f} to {max(bits):.3f}",
        "base_model": content["model"]["name"],
        "base_model_digest": content["model"]["digest"],
    }
    tags |= {"dvc_md5": md5} if md5 else {}
    tags |= {"git_commit": commit} if (commit := git_commit()) else {}
    name = settings.tracking.registered_model or f"coalora-{pipeline}"

    def call() -> dict[str, Any]:
        run = _open_run(pipeline, settings, identity)
        made = register(
            run,
            current_store().path(bundle),
            name,
            hypervolume=volume["values"]["coa"],
            tags=tags,
            description=markdown_table(content),
        )
        get_logger().info("registered model %s, version %s: %s", made.name, made.version, made.reason)
        run.finish()
        return {"name": made.name, "version": made.version, "champion": made.champion_moved, "reason": made.reason}

    return _patiently(call, settings)


@task(name="write-run-folder", cache_policy=NO_CACHE)
def write_run_folder(
    *, folder: str, report: Artifact, bundle: Artifact, exports: dict[str, Artifact], record: dict[str, Any]
) -> str:
    """Copy report, bundle and exports under the run's folder, and point `latest` at it."""
    store, target = current_store(), Path(folder)
    store.materialize(report, target / "report")
    store.materialize(bundle, target / "bundle")
    for name, export in exports.items():
        store.materialize(export, target / name)
    write_json(target / "run.json", record)
    latest = target.parent / "latest"
    part = target.parent / f".latest.{os.getpid()}"
    part.symlink_to(target.name)
    os.replace(part, latest)
    return str(target)


def _open_run(pipeline: str, settings: Settings, identity: str) -> Any:
    from pipeline.tracking.pipeline_run import open_pipeline_run

    return open_pipeline_run(pipeline, settings, identity)


def _patiently(call: Callable[[], T], settings: Settings) -> T:
    from pipeline.tracking.pipeline_run import tracking_uri
    from pipeline.tracking.server import patiently

    return patiently(call, tracking_uri(settings))
