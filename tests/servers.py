"""A real Prefect server and worker for tests: started on a free port of the loopback, ended by their process ids.

with prefect_server(home) as server:
    server.run(checkout, "work-pool", "create", "coalora", "--type", "process")
    server.deploy(checkout)
    with server.worker(checkout):
        run = server.start("pipeline/tiny", {"settings": ...})
        server.wait_for_log(run, "training coa, round 1: ")
        server.cancel(run)
        server.wait(run)
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterKey,
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterParentFlowRunId,
    LogFilter,
    LogFilterFlowRunId,
    TaskRunFilter,
    TaskRunFilterFlowRunId,
)
from prefect.client.schemas.objects import Artifact, FlowRun, TaskRun
from prefect.client.schemas.sorting import LogSort
from prefect.states import Cancelling

from infra.processes import free_port
from tests import shared
from tests.preloaded import Process


def end(process: subprocess.Popen[Any], *, patience: float = 20.0, number: int = signal.SIGTERM) -> None:
    """End a process that was started in a session of its own, with all its children."""
    if process.poll() is None:
        os.killpg(process.pid, number)
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@dataclass
class Server:
    """A running Prefect server. `environment` is that of commands that talk to it; `log` its output."""

    api: str
    environment: dict[str, str]
    log: Path
    client: SyncPrefectClient

    def run(self, cwd: Path, *command: str, expect: int = 0) -> str:
        """`prefect COMMAND` in a checkout; what it printed."""
        return self.python(cwd, "-m", "prefect", *command, expect=expect)

    def python(self, cwd: Path, *command: str, expect: int = 0) -> str:
        """`python COMMAND` in a checkout, with this server's address; what it printed."""
        process = Process(command, cwd, self.environment)
        printed = process.read(timeout=300)
        assert process.returncode == expect, printed[-4000:]
        return printed

    def deploy(self, cwd: Path, file: str = "pipelines.yaml") -> str:
        return self.run(cwd, "--no-prompt", "deploy", "--all", "--prefect-file", file)

    @contextmanager
    def worker(self, cwd: Path, *, pool: str = "coalora", poll_seconds: float = 1.0) -> Iterator[subprocess.Popen[str]]:
        """A process worker of the pool, working in `cwd`, with output in `worker.log`; it and its runs are forks."""
        environment = self.environment | {"PREFECT_WORKER_QUERY_SECONDS": str(poll_seconds)}
        with (cwd / "worker.log").open("a") as log:
            command = [os.environ["PRELOADED_PYTHON"], "-m", "prefect", "worker", "start", "--pool", pool]
            process = _start(command, cwd, environment, log)
            try:
                yield process
            finally:
                end(process)

    def start(self, deployment: str, changes: dict[str, Any] | None = None) -> FlowRun:
        """A run of a deployment as from the form: `changes` of its parameters, nested."""
        found = self.client.read_deployment_by_name(deployment)
        return self.client.create_flow_run_from_deployment(found.id, parameters=merged(found.parameters, changes or {}))

    def scheduled(self, deployment: str, *, timeout: float = 120.0) -> FlowRun:
        """The next run that a schedule of the deployment has made, as soon as a worker has begun it."""
        of_it = FlowRunFilterDeploymentId(any_=[self.deployment_id(deployment)])
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            for run in self.client.read_flow_runs(flow_run_filter=FlowRunFilter(deployment_id=of_it)):
                if run.auto_scheduled and run.start_time is not None:
                    return run
            time.sleep(0.3)
        raise AssertionError(f"no scheduled run of {deployment} began in {timeout} s")

    def cancel(self, run: FlowRun) -> None:
        """What the button in the UI does."""
        self.client.set_flow_run_state(run.id, Cancelling())

    def state(self, run: FlowRun) -> str:
        """Name of the run's state, such as `Completed`."""
        found = self.client.read_flow_run(run.id).state
        return found.name if found and found.name else "none"

    def wait(self, run: FlowRun, *, timeout: float = 300.0) -> str:
        """Wait for a final state and return its name."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            state = self.client.read_flow_run(run.id).state
            if state is not None and state.is_final():
                return str(state.name)
            time.sleep(0.3)
        raise AssertionError(f"still {self.state(run)} after {timeout} s:\n" + "\n".join(self.logs(run)[-40:]))

    def runs(self, run: FlowRun) -> list[FlowRun]:
        """The run and its subflow runs."""
        parent = FlowRunFilterParentFlowRunId(any_=[run.id])
        return [run, *self.client.read_flow_runs(flow_run_filter=FlowRunFilter(parent_flow_run_id=parent))]

    def logs(self, run: FlowRun) -> list[str]:
        """Messages of a run and its subflow runs, as far as they have arrived."""
        runs = LogFilterFlowRunId(any_=[r.id for r in self.runs(run)])
        found: list[str] = []
        while page := self.client.read_logs(
            LogFilter(flow_run_id=runs), limit=200, offset=len(found), sort=LogSort.TIMESTAMP_ASC
        ):
            found += [line.message for line in page]
        return found

    def wait_for_log(self, run: FlowRun, words: str, *, timeout: float = 300.0) -> str:
        """The first message with these words, waited for."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            for line in self.logs(run):
                if words in line:
                    return line
            state = self.client.read_flow_run(run.id).state
            if state is not None and state.is_final():
                time.sleep(3)  # logs come in batches
                for line in self.logs(run):
                    if words in line:
                        return line
                break
            time.sleep(0.3)
        raise AssertionError(f"{self.state(run)} without {words!r}:\n" + "\n".join(self.logs(run)[-60:]))

    def wait_for_worker(self, cwd: Path, words: str, *, timeout: float = 300.0) -> None:
        """Wait until the worker of `cwd` has printed these words: seconds before they come out of the server."""
        deadline = time.monotonic() + timeout
        while words not in (cwd / "worker.log").read_text():
            assert time.monotonic() < deadline, (cwd / "worker.log").read_text()[-6000:]
            time.sleep(0.05)

    def task_runs(self, run: FlowRun) -> list[TaskRun]:
        """Task runs of a run and its subflow runs."""
        runs = TaskRunFilterFlowRunId(any_=[r.id for r in self.runs(run)])
        return self.client.read_task_runs(task_run_filter=TaskRunFilter(flow_run_id=runs))

    def artifacts(self, key: str) -> list[Artifact]:
        """All artifacts of a key: its history, in no order."""
        return self.client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])))

    def deployment_id(self, name: str) -> UUID:
        return self.client.read_deployment_by_name(name).id


@contextmanager
def prefect_server(home: Path, *, port: int | None = None) -> Iterator[Server]:
    """A server whose database lies in `home`; up when this returns, ended with the block."""
    port = port or free_port()
    api = f"http://127.0.0.1:{port}/api"
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "COALORA_", "MLFLOW_"))}
    plain |= {
        "PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1",
        "OMP_NUM_THREADS": "1", "COLUMNS": "140", "GIT_CONFIG_GLOBAL": os.devnull,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    if not (home / "prefect.db").exists():
        shared.prefect_home(home)
    path = home / "server.log"
    with path.open("a") as log:
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
        process = _start(command, home, plain | {"PREFECT_API_URL": api}, log)
        try:
            _wait_until_healthy(process, f"{api}/health", path)
            with SyncPrefectClient(api) as client:
                yield Server(api, plain | {"PREFECT_API_URL": api}, path, client)
        finally:
            end(process)


def merged(parameters: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A deep copy of `parameters` with `changes`; mappings are merged, everything else is replaced."""
    result = deepcopy(parameters)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else deepcopy(value)
    return result


def _start(command: list[str], cwd: Path, environment: dict[str, str], log: TextIO) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def _wait_until_healthy(process: subprocess.Popen[Any], url: str, log: Path, *, timeout: float = 180.0) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"no server at {url}:\n{log.read_text()[-4000:]}")
