"""A pipeline's MLflow run is open from its start and ends as the run ended; its load is logged while it runs."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

import pipeline.tracking.pipeline_run
from pipeline.settings.definitions import load_settings
from pipeline.settings.sections import Settings
from pipeline.tracking.pipeline_run import followed, open_pipeline_run
from pipeline.tracking.runs import TrackedRun
from tests import shared


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    uri = shared.mlflow_database(tmp_path_factory.mktemp("mlflow"))
    file = Path(__file__).parents[2] / "flows" / "tiny.yaml"
    return load_settings("tiny", file=file, changes=[f"tracking.tracking_uri={uri}"])


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError("out of memory"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_a_run_that_ends_by_an_error_says_so_and_goes_on_the_next_time(
    settings: Settings, error: BaseException, status: str
) -> None:
    identity = status.lower()
    seen: list[TrackedRun] = []

    def fail() -> None:
        with followed("tiny", settings, identity) as run:
            assert run.status == "RUNNING"
            seen.append(run)
            raise error

    with pytest.raises(type(error)):
        fail()
    (run,) = seen
    assert run.status == status
    with followed("tiny", settings, identity) as again:
        assert (again.run_id, again.status) == (run.run_id, "RUNNING")


def test_a_finished_run_is_left_as_it_is(settings: Settings) -> None:
    open_pipeline_run("tiny", settings, "done").finish()
    with pytest.raises(RuntimeError), followed("tiny", settings, "done") as run:
        raise RuntimeError
    assert run.status == "FINISHED"
    assert not _system(run)


def test_the_load_of_the_machine_is_logged_by_time_and_goes_on_after_a_kill(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.tracking.pipeline_run, "INTERVAL", 0.1)
    for _ in range(2):
        with followed("tiny", settings, "load") as run:
            time.sleep(1.0)
    history = run.client.get_metric_history(run.run_id, "system/cpu_utilization_percentage")
    steps = [point.step for point in history]
    assert len(steps) >= 2
    assert len(set(steps)) == len(steps)


def test_the_load_of_a_run_shorter_than_an_interval_is_logged(settings: Settings) -> None:
    with followed("tiny", settings, "short") as run:
        pass
    assert "system/cpu_utilization_percentage" in _system(run)


def test_the_load_is_not_logged_where_it_is_not_wanted(settings: Settings) -> None:
    quiet = settings.model_copy(update={"tracking": settings.tracking.model_copy(update={"system_metrics": False})})
    with followed("tiny", quiet, "quiet") as run:
        pass
    assert not _system(run)


def test_a_run_tells_what_started_it_and_from_where(settings: Settings) -> None:
    run = open_pipeline_run("tiny", settings, "0123456789")
    found = run.client.get_run(run.run_id)
    assert found.info.run_name == "tiny 01234567"
    assert found.data.tags["mlflow.source.name"] == "coalora run tiny"
    assert {"host", "mlflow.user", "pipeline"} <= set(found.data.tags)
    assert found.data.params["adapter.r"] == "4"


def _system(run: TrackedRun) -> list[str]:
    return [name for name in run.client.get_run(run.run_id).data.metrics if name.startswith("system/")]
