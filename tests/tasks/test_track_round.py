"""A round is one nested run in MLflow."""

from __future__ import annotations

from pathlib import Path

from tasks.track_round import track_round
from tests import shared
from tests.tiny_run import TinyRun


def test_a_round_is_one_nested_mlflow_run_however_often_it_is_logged(run: TinyRun, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = shared.mlflow_database(tmp_path)
    settings = run.settings.model_copy(
        update={"tracking": run.settings.tracking.model_copy(update={"tracking_uri": uri})}
    )
    ids = [
        track_round.fn(
            pipeline="tiny", settings=settings, identity="0" * 64, round_index=1,
            configurations=run.trained.sets[1], tables=run.calibrated.tables, md5="abc",
        )
        for _ in range(2)
    ]  # fmt: skip
    assert ids[0] == ids[1]
    client = MlflowClient(uri)
    (experiment,) = (e for e in client.search_experiments() if e.name == "coalora")
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 2  # the pipeline's and the round's
    child = client.get_run(ids[0])
    assert child.data.tags["dvc_md5"] == "abc"
    assert child.data.metrics["search/n_members"] == run.trained.sets[1].meta["n_members"]
    assert child.data.metrics["search/hypervolume_after"] >= child.data.metrics["search/hypervolume_before"]
