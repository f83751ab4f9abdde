"""`make up` and `make down` with the real servers: started once, healthy, reached by what `env` says, ended alone."""

from __future__ import annotations

import json
import os
import shlex
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from prefect.settings import PREFECT_API_AUTH_STRING, temporary_settings

from coalora.cli import main
from coalora.errors import CoaloraError
from infra.server import set_up
from infra.stack import Stack
from tests.commands import refused

pytestmark = pytest.mark.servers

FREE = {"prefect": 0, "mlflow": 0, "s3": 0}
PUT_AND_GET = """
import pathlib, sys, mlflow
client = mlflow.MlflowClient()
run = client.create_run(client.create_experiment("through-the-proxy"))
file = pathlib.Path(sys.argv[1]) / "note.txt"
file.write_text("by way of the server")
client.log_artifact(run.info.run_id, str(file))
print(run.info.artifact_uri)
print(pathlib.Path(client.download_artifacts(run.info.run_id, "note.txt")).read_text())
"""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    made = Stack(tmp_path_factory.mktemp("stack"))
    try:
        made.up(FREE)
        yield made
    finally:
        made.down()


def variables(stack: Stack) -> dict[str, str]:
    """What a shell has after `source env`."""
    lines = [line.removeprefix("export ") for line in stack.env_file.read_text().splitlines()]
    return dict(shlex.split(line)[0].split("=", 1) for line in lines)


def test_all_services_are_healthy(stack: Stack) -> None:
    assert [(name, words) for name, words, _ in stack.status()] == [
        (name, "healthy") for name in ("s3", "mlflow", "prefect", "worker")
    ]
    assert main(["stack", "status", "--state", str(stack.folder)]) == 0


def test_a_second_up_starts_nothing_and_keeps_the_ports(stack: Stack) -> None:
    before = (stack.folder / "state.json").read_bytes()
    stack.up()
    stack.up(FREE)
    assert (stack.folder / "state.json").read_bytes() == before


def test_another_port_for_a_running_service_is_refused(stack: Stack) -> None:
    with pytest.raises(CoaloraError, match=r"cannot move to 1.*down"):
        stack.up({"mlflow": 1})


def test_files_with_keys_are_for_the_owner_alone_and_no_command_line_shows_them(stack: Stack) -> None:
    assert stat.S_IMODE(stack.folder.stat().st_mode) == 0o700
    keys = json.loads((stack.folder / "credentials.json").read_text())
    for name in ("credentials.json", "env"):
        assert stat.S_IMODE((stack.folder / name).stat().st_mode) == 0o600
    state = (stack.folder / "state.json").read_text()
    logs = "".join(p.read_text(errors="replace") for p in (stack.folder / "logs").iterdir())
    for key in keys.values():
        assert key not in state
        assert key not in logs


def test_mlflow_keeps_artifacts_in_the_s3_store_and_clients_need_no_key(stack: Stack, tmp_path: Path) -> None:
    told = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
    told["MLFLOW_TRACKING_URI"] = variables(stack)["MLFLOW_TRACKING_URI"]
    done = subprocess.run(
        [sys.executable, "-c", PUT_AND_GET, str(tmp_path)], env=told, capture_output=True, text=True, timeout=120
    )
    assert "by way of the server" in done.stdout, done.stderr
    assert "mlflow-artifacts:/" in done.stdout
    assert list((stack.folder / "s3" / "coalora" / "mlflow").rglob("note.txt"))


def test_the_store_takes_multi_part_uploads_and_ranged_reads_with_the_variables_of_env(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables(stack).items():
        monkeypatch.setenv(name, value)
    content = os.urandom(12 << 20)
    (tmp_path / "large").write_bytes(content)
    client = boto3.client("s3")
    client.upload_file(str(tmp_path / "large"), "coalora", "tests/large")  # 8 MiB parts
    part = client.get_object(Bucket="coalora", Key="tests/large", Range="bytes=9000000-9000099")["Body"].read()
    assert part == content[9_000_000:9_000_100]
    assert (stack.folder / "s3" / "coalora" / "tests" / "large").read_bytes() == content


def test_pool_and_limits_are_set_up_again_without_a_change(stack: Stack) -> None:
    told = variables(stack)
    api, login = told["PREFECT_API_URL"], told["PREFECT_API_AUTH_STRING"]
    with temporary_settings({PREFECT_API_AUTH_STRING: login}):
        set_up_again(api)
    with temporary_settings({PREFECT_API_AUTH_STRING: "coalora:wrong"}), pytest.raises(CoaloraError) as refusal:
        set_up(api)
    assert "refuses this login (HTTP 401)" in str(refusal.value)


def set_up_again(api: str) -> None:
    assert set_up(api, gpus=3) == ["work pool coalora: there already", "tag gpu: 3 at a time"]
    assert set_up(api, pool="cluster", kind="kubernetes", limit=4)[0] == "work pool cluster: made, type kubernetes"
    assert set_up(api, pool="cluster", kind="kubernetes", limit=4)[0] == "work pool cluster: there already"
    assert set_up(api, pool="cluster", kind="kubernetes", limit=5)[0] == (
        "work pool cluster: updated (concurrency_limit)"
    )
    with pytest.raises(CoaloraError, match=r"type process, not kubernetes"):
        set_up(api, kind="kubernetes")


def test_down_ends_what_up_started_and_nothing_else_and_what_was_stored_survives(stack: Stack) -> None:
    (stack.folder / "s3" / "coalora" / "kept.txt").write_text("kept")
    pids = [p["pid"] for p in json.loads((stack.folder / "state.json").read_text())["processes"].values()]
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
    try:
        assert stack.down() == ["worker", "prefect", "mlflow", "s3"]
        assert bystander.poll() is None
        assert not any(Path(f"/proc/{pid}/cmdline").is_file() and _words(pid) for pid in pids)
        assert stack.down() == []
        assert main(["stack", "status", "--state", str(stack.folder)]) == 1
    finally:
        bystander.kill()
        bystander.wait()
    assert (stack.folder / "s3" / "coalora" / "kept.txt").read_text() == "kept"
    assert (stack.folder / "mlflow" / "mlflow.db").is_file()


def test_a_taken_port_is_told_and_what_was_started_before_can_be_ended(tmp_path: Path) -> None:
    stack = Stack(tmp_path / "stack")
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        with pytest.raises(CoaloraError, match=r"of mlflow is taken.*--ports mlflow="):
            stack.up({**FREE, "mlflow": held.getsockname()[1]})
    assert stack.down() == ["s3"]


def test_setting_up_without_a_server_says_how_to_start_one() -> None:
    with pytest.raises(CoaloraError, match=r"No Prefect server answers.*make up"):
        set_up("http://127.0.0.1:9/api")


@pytest.mark.parametrize("text", ["mlflow", "mlflow=x", "mlflow=70000"])
def test_a_misspelt_port_is_refused(text: str, tmp_path: Path) -> None:
    assert "is no NAME=NUMBER" in refused("stack", "up", "--state", tmp_path, "--ports", text)


def test_a_port_of_an_unknown_service_is_refused(tmp_path: Path) -> None:
    told = refused("stack", "up", "--state", tmp_path, "--ports", "redis=1")
    assert "no service redis. Give ports of s3, mlflow, prefect" in told


def _words(pid: int) -> bytes:
    """A process's command line; empty for one that has ended and was not waited for yet."""
    return Path(f"/proc/{pid}/cmdline").read_bytes()
