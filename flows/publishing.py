"""Flow `publication`: report, run folder, MLflow run, registered version, S3; and what happens to every round's set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefect import flow
from pydantic import BaseModel

from coalora.calibrate.costs import budget_name
from flows.calibration import STAGES as CALIBRATION
from flows.calibration import Calibrated
from flows.evaluation import STAGES as EVALUATION
from flows.export import STAGES as EXPORT
from flows.export import Exported
from flows.run import PipelineRun
from flows.training import STAGES as TRAINING
from flows.training import Trained
from tasks.publish import (
    register_version,
    remove_stale,
    track_round,
    track_run,
    version_set,
    write_run_folder,
)
from tasks.publish_s3 import publish_run
from tasks.reporting import make_report
from tasks.settings import Settings
from tasks.showing import show_result, show_round
from tasks.store import Artifact
from tasks.tracking_values import scrub

ALL_STAGES = [*CALIBRATION, *TRAINING, *EVALUATION, *EXPORT, make_report]


class Published(BaseModel):
    """Where a run's results are. Paths are relative to the working directory."""

    folder: str
    report: Artifact
    mlflow_run_id: str
    registered: dict[str, Any]
    s3_address: str | None = None


def track_sets(run: PipelineRun) -> Callable[[int, Artifact], None]:
    """What to do with every round's set as soon as it exists: version it with DVC, log it to MLflow, show it."""
    root = str(Path.cwd())
    identity = run.identity(ALL_STAGES)
    sets: list[Artifact] = []

    def on_set(round_index: int, configurations: Artifact) -> None:
        sets.append(configurations)
        run_id = run.runner.call(
            track_round,
            pipeline=run.name,
            settings=run.settings,
            identity=identity,
            round_index=round_index,
            configurations=configurations,
            md5=_version(run, round_index, configurations, root),
        )
        run.runner.call(
            show_round,
            pipeline=run.name,
            settings=run.settings,
            round_index=round_index,
            sets=list(sets),
            mlflow_run_id=run_id,
        )
        if round_index == run.settings.search.rounds and run.settings.versioning.enabled:
            run.runner.call(remove_stale, pipeline=run.name, last_round=round_index, root=root)

    return on_set


def report_chain(run: PipelineRun, exported: Exported) -> Artifact:
    return run.run(make_report, result=exported.result)


def publication_chain(run: PipelineRun, calibrated: Calibrated, trained: Trained, exported: Exported) -> Published:
    """Run the tasks of this flow."""
    identity = run.identity(ALL_STAGES)
    report = report_chain(run, exported)
    common = {"pipeline": run.name, "settings": run.settings, "identity": identity}
    run_id = run.runner.call(
        track_run, **common, benchmark=calibrated.benchmark, tables=calibrated.tables, report=report
    )
    last = len(trained.sets) - 1
    registered = run.runner.call(
        register_version,
        **common,
        benchmark=calibrated.benchmark,
        bundle=exported.bundle,
        result=exported.result,
        md5=_version(run, last, trained.sets[last], str(Path.cwd())),
    )
    folder = f"runs/{run.name}/{identity[:8]}"
    budgets, kind = run.settings.evaluation.budgets, run.settings.cost.kind
    run.runner.call(
        write_run_folder,
        folder=folder,
        report=report,
        bundle=exported.bundle,
        exports={f"export/{budget_name(b, kind)}": e for b, e in zip(budgets, exported.exports, strict=True)},
        record={
            "pipeline": run.name,
            "identity": identity,
            # It is copied, sent and shown to others: without a password in a server's address.
            "settings": scrub(run.settings.model_dump(mode="json")),
            "base": calibrated.base.model_dump(mode="json"),
            "benchmark": calibrated.benchmark.model_dump(mode="json"),
            "tables": calibrated.tables.model_dump(mode="json"),
            "bundle": exported.bundle.model_dump(mode="json"),
            "mlflow_run_id": run_id,
        },
    )
    run.runner.call(
        show_result,
        pipeline=run.name,
        settings=run.settings,
        report=report,
        folder=folder,
        mlflow_run_id=run_id,
        registered=registered,
    )
    address = None
    if run.settings.storage.publish:
        address = run.runner.call(
            publish_run,
            folder=folder,
            storage=run.settings.storage,
            tracking=run.settings.tracking,
            run_id=run_id,
        )
    return Published(folder=folder, report=report, mlflow_run_id=run_id, registered=registered, s3_address=address)


def _version(run: PipelineRun, round_index: int, configurations: Artifact, root: str) -> str | None:
    if not run.settings.versioning.enabled:
        return None
    return run.runner.call(
        version_set,
        pipeline=run.name,
        identity=run.identity(ALL_STAGES),
        round_index=round_index,
        configurations=configurations,
        root=root,
        push=run.settings.versioning.push,
    )


@flow(name="publication", flow_run_name="{name}: publication")
def publication(
    name: str,
    settings: Settings,
    refresh: list[str],
    calibrated: Calibrated,
    trained: Trained,
    exported: Exported,
) -> Published:
    """Report, track, register, and lay the files out under runs/."""
    return publication_chain(PipelineRun.under_prefect(name, settings, refresh), calibrated, trained, exported)
