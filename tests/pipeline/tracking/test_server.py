"""Faults of MLflow end in messages that say what to do; a locked database is waited for."""

from __future__ import annotations

import errno
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from mlflow.exceptions import MlflowException
from mlflow.store.tracking.dbmodels.initial_models import Base as InitialBase

from coalora.errors import CoaloraError
from pipeline.preflight import preflight
from pipeline.settings.definitions import load_settings
from pipeline.tracking.runs import TrackedRun, Tracker
from pipeline.tracking.server import explanation, patiently, place_of_runs, require_server, set_aside_unfinished
from tests import shared

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrackedRun:
    folder = tmp_path_factory.mktemp("mlflow")
    run = Tracker(shared.mlflow_database(folder), "faults", folder / "files").open_run("a", "a run")
    engine = run.client._tracking_client.store.engine
    # MLflow has SQLite wait 20 seconds for a lock, in each of its sessions; here it is met at once.
    sqlalchemy.event.listen(engine, "before_cursor_execute", _impatient, retval=True)
    return run


def _impatient(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> tuple[str, Any]:
    return statement.replace("busy_timeout = 20000", "busy_timeout = 200"), parameters


@contextmanager
def locked(run: TrackedRun) -> Iterator[None]:
    file = run.tracker.tracking_uri.removeprefix("sqlite:///")
    holder = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
    holder.execute("BEGIN EXCLUSIVE")
    try:
        yield
    finally:
        holder.execute("ROLLBACK")
        holder.close()


@contextmanager
def answering(code: int, body: bytes) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def test_a_locked_database_is_told_with_what_to_do(run: TrackedRun) -> None:
    with locked(run), pytest.raises(CoaloraError, match=r"locked by another process.*fuser.*what was computed is kept"):
        patiently(lambda: run.log_metrics({"loss": 1.0}), run.tracker.tracking_uri, delays=(0.1,))


def test_a_database_that_is_freed_in_time_gets_everything_once(run: TrackedRun) -> None:
    begun = threading.Event()

    def hold() -> None:
        with locked(run):
            begun.set()
            time.sleep(1.5)

    thread = threading.Thread(target=hold)
    thread.start()
    begun.wait()
    rows = [{"step": i, "curve": float(i)} for i in range(5)]
    patiently(lambda: run.log_history(rows), run.tracker.tracking_uri, delays=(0.3,) * 20)
    thread.join()
    assert len(run.client.get_metric_history(run.run_id, "curve")) == 5


def test_a_database_whose_making_was_killed_is_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "mlflow.db"
    engine = sqlalchemy.create_engine(f"sqlite:///{path}")
    InitialBase.metadata.create_all(engine)
    with engine.begin() as half_way:  # the first migration, whose version was not noted any more
        half_way.execute(sqlalchemy.text("create table alembic_version (version_num varchar(32) not null)"))
        half_way.execute(sqlalchemy.text("alter table metrics add column step bigint default '0' not null"))
    engine.dispose()
    Tracker(f"sqlite:///{path}", "faults", tmp_path / "files").open_run("a", "a run")
    assert f"it is {path}.unfinished now" in caplog.text


def test_a_database_that_holds_something_stays(tmp_path: Path) -> None:
    ours = Path(shared.mlflow_database(tmp_path).removeprefix("sqlite:///"))
    other, empty, text = (tmp_path / name for name in ("other.db", "empty.db", "text.db"))
    with closing(sqlite3.connect(other)) as database:
        database.execute("create table experiments (name)")
    empty.touch()
    text.write_text("no database")
    for file in (ours, other, empty, text, tmp_path / "none.db"):
        set_aside_unfinished(file)
    assert all(file.exists() for file in (ours, other, empty, text))
    assert not list(tmp_path.glob("*.unfinished"))


def test_a_server_that_went_away_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(CoaloraError, match=r"MLflow at http://127.0.0.1:9 does not answer.*make up"):
        patiently(lambda: Tracker(NOWHERE, "faults"), NOWHERE)


def test_a_run_does_not_start_while_its_server_is_away() -> None:
    changes = [f"tracking.tracking_uri={NOWHERE}", "versioning.enabled=false"]
    settings = load_settings("tiny", file=Path(__file__).parents[2] / "flows" / "tiny.yaml", changes=changes)
    preflight(settings)  # what only reads shapes needs no server
    with pytest.raises(CoaloraError, match=r"does not answer.*make up"):
        preflight(settings, root=Path.cwd())


def test_another_server_at_the_address_is_not_taken_for_mlflow() -> None:
    with answering(200, b"<html>") as uri, pytest.raises(CoaloraError, match="is no MLflow server"):
        require_server(uri)
    with answering(503, b"") as uri, pytest.raises(CoaloraError, match="HTTP 503"):
        require_server(uri)


def test_a_healthy_server_one_with_a_login_and_a_database_pass(tmp_path: Path) -> None:
    with answering(200, b"OK") as uri:
        require_server(uri)
    with answering(401, b"") as uri:
        require_server(uri)
    (tmp_path / "empty.db").touch()
    require_server(f"sqlite:///{tmp_path}/empty.db")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space is left"),
        (MlflowException("API request failed with error code 403 != 200"), "refuses this user.*MLFLOW_TRACKING"),
        (
            MlflowException("http://h/api/2.0/mlflow-artifacts/artifacts/x: too many 500 error responses"),
            "takes no artifacts.*bucket",
        ),
    ],
)
def test_other_faults_name_their_remedy(error: Exception, words: str) -> None:
    with pytest.raises(CoaloraError, match=words):
        raise explanation(error, "http://user:secret@h:5000") or AssertionError("no explanation")


def test_no_message_holds_a_password() -> None:
    told = explanation(OSError(errno.ENOSPC, "No space left on device"), "http://user:S3CRET@host:5000")
    assert "S3CRET" not in str(told)


def test_what_is_no_fault_of_the_server_passes_unchanged() -> None:
    error = ValueError("a mistake of ours")

    def fail() -> None:
        raise error

    with pytest.raises(ValueError, match="a mistake of ours") as caught:
        patiently(fail, NOWHERE)
    assert caught.value is error


@pytest.mark.parametrize("where", ["settings", "variable"])
def test_a_login_in_a_servers_address_is_refused_by_the_variables_for_it(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = "http://me:SEC/RET@mlflow.example:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri if where == "variable" else "sqlite:////a/mlflow.db")
    with pytest.raises(CoaloraError, match="MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD") as error:
        place_of_runs(uri if where == "settings" else None)
    assert "SEC" not in str(error.value)
    assert "RET" not in str(error.value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:SECRET@host/mlflow")  # its only way
    assert place_of_runs() == "postgresql://me:SECRET@host/mlflow"


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("sqlite:///{}/none/mlflow.db", r"There is no MLflow database .*none/mlflow.db\. Correct"),
        ("sqlite://mlflow.db", "three slashes"),
        ("sqlite:///", "three slashes"),
        ("sqlite:///{}/text.db", "no database of SQLite"),
        ("sqlite:///{}", "Is a directory"),
        ("postgresql+nowhere://h/db", "cannot be opened"),
    ],
)
def test_a_database_that_cannot_be_opened_is_refused(tmp_path: Path, uri: str, words: str) -> None:
    (tmp_path / "text.db").write_text("a text, and no database")
    with pytest.raises(CoaloraError, match=words):
        require_server(uri.format(tmp_path))


def test_only_the_default_database_is_made_without_being_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COALORA_HOME", str(tmp_path))
    require_server(f"sqlite:///{tmp_path}/mlflow.db")
    with pytest.raises(CoaloraError, match=r"no MLflow database .*mlflow.db\. Correct [^`]*$"):
        require_server(f"sqlite:///{tmp_path}/mlflow.db", existing=True)
    (tmp_path / "mlflow.db").touch()
    with pytest.raises(CoaloraError, match=r"no MLflow database .*mlfow.db\. .*\(mlflow.db\?\).*`touch .*mlfow.db`"):
        require_server(f"sqlite:///{tmp_path}/mlfow.db")
    assert [file.name for file in tmp_path.iterdir()] == ["mlflow.db"]


def test_a_deleted_experiment_is_refused(run: TrackedRun) -> None:
    uri = run.tracker.tracking_uri
    require_server(uri, experiment="faults")
    require_server(uri, experiment="another")
    experiment = run.client.get_experiment_by_name("faults")
    run.client.delete_experiment(experiment.experiment_id)
    try:
        with pytest.raises(CoaloraError, match=r"The experiment 'faults' of MLflow .* is deleted"):
            require_server(uri, experiment="faults")
    finally:
        run.client.restore_experiment(experiment.experiment_id)
