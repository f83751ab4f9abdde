"""Runs, metrics and artifacts on a real sqlite database of MLflow (migrated once, for all tests)."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

import pytest

from coalora.errors import CoaloraError
from pipeline.tracking.runs import MAX_VALUE, TrackedRun, Tracker, flatten, shorten
from pipeline.tracking.server import place_of_runs


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def database(home: Path) -> str:
    return f"sqlite:///{home / 'deep' / 'mlflow.db'}"


@pytest.fixture(scope="module")
def tracker(home: Path, database: str) -> Tracker:
    return Tracker(database, "tests", home / "mlartifacts")


@pytest.fixture
def run(tracker: Tracker, request: pytest.FixtureRequest) -> TrackedRun:
    return tracker.open_run(f"id-{request.node.name[:100].replace('[', '-').replace(']', '')}", "a run")


def _dump(home: Path) -> str:
    """Everything that the database and the artifacts hold, as text."""
    with sqlite3.connect(home / "deep" / "mlflow.db") as connection:
        text = "\n".join(connection.iterdump())
    files = [p for p in (home / "mlartifacts").rglob("*") if p.is_file()]
    return text + "\n".join(p.read_text(errors="replace") for p in files)


def test_a_run_that_was_cut_short_is_resumed(tracker: Tracker) -> None:
    first = tracker.open_run("cut", "pipeline", {"r": 8})
    first.log_metrics({"loss": 2.0}, step=1)
    tracker.client.set_terminated(first.run_id, "FAILED")
    second = tracker.open_run("cut", "pipeline", {"r": 8, "late": 1})
    assert second.run_id == first.run_id
    assert second.status == "RUNNING"
    data = tracker.client.get_run(first.run_id).data
    assert data.params == {"r": "8", "late": "1"}
    assert data.metrics == {"loss": 2.0}


def test_a_finished_run_is_left_as_it_is(tracker: Tracker) -> None:
    first = tracker.open_run("done", "pipeline", {"r": 8})
    first.finish()
    before = tracker.client.get_run(first.run_id)
    second = tracker.open_run("done", "pipeline", {"r": 8, "late": 1}, {"more": "tags"})
    second.finish("FAILED")
    after = tracker.client.get_run(second.run_id)
    assert (after.info.run_id, after.info.status, after.info.end_time) == (
        before.info.run_id,
        "FINISHED",
        before.info.end_time,
    )
    assert after.data.params == before.data.params
    assert after.data.tags == before.data.tags


def test_another_identity_is_another_run(tracker: Tracker) -> None:
    assert tracker.open_run("one", "same name").run_id != tracker.open_run("two", "same name").run_id


def test_threads_that_open_one_identity_share_its_run(tracker: Tracker) -> None:
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(tracker.open_run("threads", "t").run_id)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1


def test_a_child_is_nested_and_resumed_by_its_key(tracker: Tracker, run: TrackedRun) -> None:
    child = run.child("round 1", "round-1", {"steps": 3})
    assert run.child("round 1", "round-1").run_id == child.run_id
    assert run.child("round 2", "round-2").run_id != child.run_id
    assert tracker.client.get_run(child.run_id).data.tags["mlflow.parentRunId"] == run.run_id
    other = tracker.open_run("other-parent", "p").child("round 1", "round-1")
    assert other.run_id != child.run_id


def test_a_part_is_logged_once_until_it_is_rebuilt(run: TrackedRun) -> None:
    calls: list[str] = []
    assert run.log_once("training", "a", lambda r: calls.append(r.run_id))
    assert not run.log_once("training", "a", lambda r: calls.append(r.run_id))
    assert run.log_once("training", "b", lambda r: calls.append(r.run_id))
    assert run.log_once("search", "a", lambda r: calls.append(r.run_id))
    assert calls == [run.run_id] * 3


def test_a_part_that_failed_half_way_is_logged_again_without_doubles(tracker: Tracker, run: TrackedRun) -> None:
    rows = [{"step": i, "loss": 1.0 / (i + 1)} for i in range(5)]

    def cut(r: TrackedRun) -> None:
        r.log_history(rows[:3])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.log_once("training", "a", cut)
    assert run.log_once("training", "a", lambda r: r.log_history(rows))
    history = tracker.client.get_metric_history(run.run_id, "loss")
    assert sorted((m.step, m.value) for m in history) == [(i, 1.0 / (i + 1)) for i in range(5)]


def test_a_rebuilt_part_overrides_the_value_that_is_shown(tracker: Tracker, run: TrackedRun) -> None:
    run.log_metrics({"loss": 3.0}, step=1)
    run.log_metrics({"loss": 2.0}, step=1)
    assert tracker.client.get_run(run.run_id).data.metrics["loss"] == 2.0


def test_more_metrics_than_a_batch_holds_are_all_kept(tracker: Tracker, run: TrackedRun) -> None:
    run.log_history([{"step": i, "loss": float(i), "lr": None, "bits": 2 * i} for i in range(1100)], prefix="t/")
    assert len(tracker.client.get_metric_history(run.run_id, "t/loss")) == 1100
    assert len(tracker.client.get_metric_history(run.run_id, "t/bits")) == 1100
    assert "t/lr" not in tracker.client.get_run(run.run_id).data.metrics


def test_more_parameters_than_a_batch_holds_are_all_kept(tracker: Tracker, run: TrackedRun) -> None:
    run.log_params({f"p{i}": i for i in range(250)})
    assert len(tracker.client.get_run(run.run_id).data.params) == 250


def test_a_changed_parameter_keeps_its_first_value_and_is_named(
    tracker: Tracker, run: TrackedRun, caplog: pytest.LogCaptureFixture
) -> None:
    run.log_params({"runtime": {"cache_mib": 256}})
    run.log_params({"runtime": {"cache_mib": 512, "device": "cpu"}})
    params = tracker.client.get_run(run.run_id).data.params
    assert params == {"runtime.cache_mib": "256", "runtime.device": "cpu"}
    assert "runtime.cache_mib" in caplog.text


def test_secrets_never_reach_the_server(tracker: Tracker, home: Path) -> None:
    params = {
        "hub": {"hf_token": "S3CRET-a", "path": "glue", "tokenizer": "bpe"},
        "s3": {"aws_access_key_id": "S3CRET-b", "secret": "S3CRET-c", "url": "https://u:S3CRET-d@host/b"},
        "list": [{"password": "S3CRET-e", "kept": "yes"}, "s3://k:S3CRET-f@bucket"],
        "signed": "https://host/f?X-Amz-Signature=S3CRET-g&part=1",
    }
    run = tracker.open_run("secrets", "n", params, {"CREDENTIALS": "S3CRET-h", "git": "https://S3CRET-i@host/r.git"})
    run.log_table([{"settings": params}], "settings.json")
    run.log_dataset("glue", {"uri": "https://u:p@S3CRET-j@host/data"}, "0" * 64, "training", {})
    dump = _dump(home)
    assert "S3CRET" not in dump
    for kept in ("hub.tokenizer", "https://host/b", '"kept": "yes"', "https://host/r.git", "part=1"):
        assert kept in dump.replace('\\"', '"')


def test_long_values_stay_distinct_after_the_cut() -> None:
    one, two = shorten("x" * 1000 + "1"), shorten("x" * 1000 + "2")
    assert len(one) == len(two) == MAX_VALUE
    assert one != two
    assert shorten("x" * MAX_VALUE) == "x" * MAX_VALUE
    flat = flatten({"a": {"b": list(range(1000)), "c": None}})
    assert set(flat) == {"a.b", "a.c"}
    assert len(flat["a.b"]) == MAX_VALUE


def test_files_bytes_and_tables_become_artifacts(tracker: Tracker, run: TrackedRun, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    run.log_artifact(tmp_path / "a.txt")
    run.log_bytes(b"a", "report/a.txt")
    run.log_table([{"b": 1}], "report/b.json")
    assert {f.path for f in tracker.client.list_artifacts(run.run_id, "report")} == {"report/a.txt", "report/b.json"}
    assert [f.path for f in tracker.client.list_artifacts(run.run_id)] == ["a.txt", "report"]


def test_a_data_set_is_an_input_of_the_run_once(tracker: Tracker, run: TrackedRun) -> None:
    for _ in range(2):
        run.log_dataset("pydoc-topics", {"builtin": "pydoc-topics"}, "f" * 64, "training", {})
    inputs = tracker.client.get_run(run.run_id).inputs
    assert inputs is not None
    (logged,) = inputs.dataset_inputs
    assert (logged.dataset.name, logged.dataset.digest) == ("pydoc-topics", "f" * 36)


def test_artifacts_of_a_database_lie_under_the_artifact_root(tracker: Tracker, home: Path, run: TrackedRun) -> None:
    assert tracker.client.get_run(run.run_id).info.artifact_uri.startswith((home / "mlartifacts").as_uri())


def test_a_second_tracker_finds_the_experiment_and_its_runs(tracker: Tracker, database: str, run: TrackedRun) -> None:
    again = Tracker(database, "tests")
    assert again.experiment_id == tracker.experiment_id
    assert again.open_run(run.identity, "n").run_id == run.run_id


def test_a_deleted_experiment_says_how_to_restore_it(database: str) -> None:
    gone = Tracker(database, "gone")
    gone.client.delete_experiment(gone.experiment_id)
    with pytest.raises(CoaloraError, match="mlflow experiments restore"):
        Tracker(database, "gone")


@pytest.mark.parametrize("uri", ["mlruns", "file:///tmp/mlruns"])
def test_a_folder_of_runs_is_refused(uri: str) -> None:
    with pytest.raises(CoaloraError, match="neither a server nor a database"):
        Tracker(uri, "tests")


def test_places_are_tried_from_settings_to_environment_to_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COALORA_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert place_of_runs() == f"sqlite:///{tmp_path.resolve() / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://environment:5000")
    assert place_of_runs() == "http://environment:5000"
    assert place_of_runs("http://settings:5000") == "http://settings:5000"


def test_the_hint_is_a_page_on_a_server_and_a_command_for_a_database(
    tracker: Tracker, run: TrackedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run.url_hint.startswith("mlflow ui --backend-store-uri sqlite:///")
    server = Tracker.__new__(Tracker)
    server.tracking_uri, server.experiment_id = "https://me:pw@host/", "7"
    assert server.url_hint("r1") == "https://host/#/experiments/7/runs/r1"
    monkeypatch.setenv("COALORA_MLFLOW_UI", "http://127.0.0.1:5000")  # as a person on the host calls it
    assert server.url_hint("r1") == "http://127.0.0.1:5000/#/experiments/7/runs/r1"
