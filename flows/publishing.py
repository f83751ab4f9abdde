"""Flow `publication`: report, run folder, MLflow run, registered version, S3; and what happens to every round's set."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect import Task, flow
from pydantic import BaseModel

from coalora.calibrate.costs import budget_name
from coalora.errors import CoaloraError
from flows.calibration import STAGES as CALIBRATION
from flows.calibration import Calibrated
from flows.evaluation import STAGES as EVALUATION
from flows.export import STAGES as EXPORT
from flows.export import Exported
from flows.run import PipelineRun
from flows.training import STAGES as TRAINING
from flows.training import Trained
from pipeline.orchestration.progress import get_logger
from pipeline.settings.sections import Settings
from pipeline.store.store import Artifact
from pipeline.tracking.values import scrub
from tasks.publish import (
    register_version,
    remove_stale,
    track_round,
    track_run,
    track_training,
    version_set,
    write_run_folder,
)
from tasks.publish_s3 import publish_run
from tasks.report import make_report
from tasks.show import show_result, show_round

ALL_STAGES = [*CALIBRATION, *TRAINING, *EVALUATION, *EXPORT, make_report]


class Published(BaseModel):
    """Where a run's results are. Paths are relative to the working directory."""

    folder: str
    report: Artifact
    mlflow_run_id: str
    registered: dict[str, Any]
    s3_address: str | None = None


@dataclass
class Rounds:
    """What happens to every round's set and state as soon as they exist: versioned with DVC, logged to MLflow, shown.

    A tracking server that is away in the middle of a run does not end it: the publication logs what is missing.
    """

    run: PipelineRun
    tables: Artifact
    sets: list[Artifact] = field(default_factory=list)

    def on_set(self, round_index: int, configurations: Artifact) -> None:
        """Version, log and show a set."""
        self.sets.append(configurations)
        md5 = _version(self.run, round_index, configurations, str(Path.cwd()))
        run_id = self._track(
            track_round, round_index=round_index, configurations=configurations, tables=self.tables, md5=md5
        )
        self.run.runner.call(
            show_round,
            pipeline=self.run.name,
            settings=self.run.settings,
            round_index=round_index,
            sets=list(self.sets),
            mlflow_run_id=run_id,
        )
        if round_index == self.run.settings.search.rounds and self.run.settings.versioning.enabled:
            self.run.runner.call(remove_stale, pipeline=self.run.name, last_round=round_index, root=str(Path.cwd()))

    def on_state(self, method: str, round_index: int, state: Artifact) -> None:
        """Log a state's curve."""
        self._track(track_training, round_index=round_index, method=method, state=state)

    def _track(self, part: Task[..., Any], **inputs: Any) -> Any:
        try:
            return self.run.runner.call(part, **_common(self.run), **inputs)
        except CoaloraError as error:
            get_logger().warning("%s: not logged to MLflow yet, the run goes on: %s", part.name, error)
            return None


def _common(run: PipelineRun) -> dict[str, Any]:
    return {"pipeline": run.name, "settings": run.settings, "identity": run.identity(ALL_STAGES)}


def report_chain(run: PipelineRun, exported: Exported) -> Artifact:
    return run.run(make_report, result=exported.result)


def publication_chain(run: PipelineRun, calibrated: Calibrated, trained: Trained, exported: Exported) -> Published:
    """Run the tasks of this flow."""
    report = report_chain(run, exported)
    common = _common(run)
    identity = common["identity"]
    versions = [_version(run, i, made, str(Path.cwd())) for i, made in enumerate(trained.sets)]
    run_id = run.runner.call(
        track_run,
        **common,
        benchmark=calibrated.benchmark,
        tables=calibrated.tables,
        sets=trained.sets,
        versions=versions,
        states=trained.states,
        report=report,
    )
    registered = run.runner.call(
        register_version,
        **common,
        benchmark=calibrated.benchmark,
        bundle=exported.bundle,
        result=exported.result,
        md5=versions[-1],
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
