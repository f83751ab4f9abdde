"""A finished run in MLflow is whole, whatever was logged on the way."""

from __future__ import annotations

from pathlib import Path

from tasks.track_run import track_run
from tests import shared
from tests.tiny_run import TinyRun


def test_what_was_not_logged_during_a_run_is_logged_at_its_end_and_only_once(run: TinyRun, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = shared.mlflow_database(tmp_path)
    settings = run.settings.model_copy(
        update={"tracking": run.settings.tracking.model_copy(update={"tracking_uri": uri})}
    )
    ids = {
        track_run.fn(
            pipeline="tiny", settings=settings, identity="1" * 64, benchmark=run.calibrated.benchmark,
            tables=run.calibrated.tables, sets=run.trained.sets, versions=["abc", None], states=run.trained.states,
            report=run.exported.report,
        )
        for _ in range(2)
    }  # fmt: skip
    (run_id,) = ids
    client = MlflowClient(uri)
    found = client.get_run(run_id)
    children = client.search_runs([found.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run_id}'")
    assert {c.info.run_name: c.info.status for c in children} == {"initial set": "FINISHED", "round 1": "FINISHED"}
    steps = [point.step for point in client.get_metric_history(run_id, "train/loss/coa")]
    assert sorted(steps) == [0, 1, 2]
    (second,) = (c for c in children if c.info.run_name == "round 1")
    assert [p.step for p in client.get_metric_history(second.info.run_id, "train/loss/coa")] == [2]
    assert {a.path for a in client.list_artifacts(second.info.run_id, "configurations")} == {
        f"configurations/{name}.json" for name in ("configurations", "round", "table")
    }
    assert found.data.tags["mlflow.note.content"].startswith("| budget |")
