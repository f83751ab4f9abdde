"""What a run leaves outside of the store: versioned sets, the MLflow run, its folder, the registered version.

These tasks are for their effect, so they are not cached; each of them does nothing where its effect is there already.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from coalora.calibrate.costs import budget_name
from coalora.files import digest, read_json, write_json
from tasks.loaders import SET, TABLES, load_benchmark
from tasks.progress import get_logger
from tasks.results import RESULT
from tasks.settings import Settings
from tasks.store import Artifact, Store

ROUND = "round.json"


@task(name="version-set", cache_policy=NO_CACHE)
def version_set(
    *, pipeline: str, identity: str, round_index: int, configurations: Artifact, root: str, push: bool = False
) -> str:
    """Write a round's set into the checkout and add it to DVC, tagged with run and round; returns its md5."""
    from tasks.versioning import push_file, version_file, write_set

    payload = read_json(Store().path(configurations) / SET)
    tags: dict[str, str | int] = {"pipeline": pipeline, "run": identity[:8], "round": round_index}
    record = version_file(write_set(pipeline, round_index, payload, Path(root)), Path(root), tags)
    get_logger().info("%s: %s %s", record.path, "added to DVC," if record.added else "in DVC already,", record.md5)
    if push:
        push_file(record, Path(root))
    return record.md5


@task(name="remove-stale-sets", cache_policy=NO_CACHE)
def remove_stale(*, pipeline: str, last_round: int, root: str) -> None:
    """Remove the sets of later rounds that an earlier run left."""
    from tasks.versioning import remove_stale_sets

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
    md5: str | None,
) -> str:
    """Log a round's set as a nested MLflow run; returns its id."""
    parent = _open_run(pipeline, settings, identity)
    tags = {"round": str(round_index)} | ({"dvc_md5": md5} if md5 else {})
    child = parent.child(f"round {round_index}", f"round-{round_index}", {"round": round_index}, tags)
    folder = Store().path(configurations)

    def log(run: Any) -> None:
        run.log_artifact(folder / SET, "configurations")
        metrics: dict[str, Any] = {"n_members": configurations.meta.get("n_members")}
        if (folder / ROUND).is_file():
            record = read_json(folder / ROUND)
            names = ("n_candidates", "n_accepted", "surrogate_error", "hypervolume_before", "hypervolume_after")
            metrics |= {name: record[name] for name in names}
            run.log_artifact(folder / ROUND, "configurations")
            parent.log_metrics({f"search/{name}": record[name] for name in names}, step=round_index)
        run.log_metrics(metrics, step=round_index)

    child.log_once("set", configurations.digest, log)
    child.finish()
    return child.run_id


@task(name="track-run", cache_policy=NO_CACHE)
def track_run(
    *,
    pipeline: str,
    settings: Settings,
    identity: str,
    benchmark: Artifact,
    tables: Artifact,
    report: Artifact,
) -> str:
    """Log calibration, curves, results and report to the MLflow run; returns its id."""
    run = _open_run(pipeline, settings, identity)
    store = Store()
    result = read_json(store.path(report) / RESULT)

    def log(_: Any) -> None:
        data = load_benchmark(benchmark)
        run.log_dataset(data.name, f"benchmark of pipeline {pipeline}", benchmark.digest)
        run.log_artifact(store.path(tables) / TABLES, "calibration")
        for method, rows in result["curves"].items():
            run.log_history([{k: row[k] for k in ("step", "loss", "lr")} for row in rows], f"train/{method}/")
        metric = result["benchmark"]["metric"]
        for method in result["arms"]:
            summary = {f"hypervolume/{method}": result["hypervolume"]["values"][method]}
            for row in result["budgets"]:
                at = budget_name(row["budget"], result["cost"]["kind"])
                summary[f"{metric}/{method}/{at}"] = row["metric"][method]
                summary[f"loss/{method}/{at}"] = row["loss"][method]
            run.log_metrics(summary)
        run.log_metrics({f"seconds/{name.replace(' ', '-')}": s for name, s in result["seconds"].items()})
        for name in ("report.html", "front.png", "table.md", RESULT):
            run.log_artifact(store.path(report) / name, "report")

    run.log_once("result", report.digest, log)
    return run.run_id


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
    from tasks.registry import register

    run = _open_run(pipeline, settings, identity)
    content = read_json(Store().path(result) / RESULT)
    volume = content["hypervolume"]
    bits = [member["average_bits"] for member in content["members"]]
    tags = {
        "hypervolume_reference": digest([benchmark.digest, volume["ideal"], volume["ref_point"]])[:16],
        "benchmark": content["benchmark"]["name"],
        "average_bits_range": f"{min(bits):.3f} to {max(bits):.3f}",
        "base_model": content["model"]["name"],
        "base_model_digest": content["model"]["digest"],
    }
    tags |= {"dvc_md5": md5} if md5 else {}
    tags |= {"git_commit": commit} if (commit := git_commit()) else {}
    name = settings.tracking.registered_model or f"coalora-{pipeline}"
    made = register(run, Store().path(bundle), name, hypervolume=volume["values"]["coa"], tags=tags)
    get_logger().info("registered model %s, version %s: %s", made.name, made.version, made.reason)
    run.finish()
    return {"name": made.name, "version": made.version, "champion": made.champion_moved, "reason": made.reason}


@task(name="write-run-folder", cache_policy=NO_CACHE)
def write_run_folder(
    *, folder: str, report: Artifact, bundle: Artifact, exports: dict[str, Artifact], record: dict[str, Any]
) -> str:
    """Copy report, bundle and exports under the run's folder, and point `latest` at it."""
    store, target = Store(), Path(folder)
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


def git_commit() -> str | None:
    """The checkout's commit, with `-dirty` where tracked files differ; None outside of git."""
    try:
        commit = _git("rev-parse", "HEAD")
        return f"{commit}-dirty" if _git("status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout.strip()


def _open_run(pipeline: str, settings: Settings, identity: str) -> Any:
    from tasks.tracking import open_tracker

    tracker = open_tracker(settings.tracking.experiment, settings.tracking.tracking_uri)
    params = settings.model_dump(mode="json", exclude_none=True)
    tags = {"pipeline": pipeline} | ({"git_commit": commit} if (commit := git_commit()) else {})
    return tracker.open_run(identity, pipeline, params, tags)
