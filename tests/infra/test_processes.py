"""Background processes are known again by more than their number, and ended alone."""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path

import psutil
import pytest

from coalora.errors import CoaloraError
from infra.processes import Process, free_port, require_free, start, stop, tail, wait_until

SLEEP = [sys.executable, "-c", "import time; print('awake', flush=True); time.sleep(60)"]
# Starts a child, and neither listens to a polite request.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""


def started(tmp_path: Path, command: list[str] | None = None) -> Process:
    return start(command or SLEEP, log=tmp_path / "log", environment=dict(os.environ), folder=tmp_path)


def wait_for_log(path: Path) -> str:
    for _ in range(200):
        if path.is_file() and (text := path.read_text()):
            return text
        time.sleep(0.05)
    raise AssertionError("nothing was logged")


def test_a_started_process_is_found_again_and_ended(tmp_path: Path) -> None:
    process = started(tmp_path)
    again = Process.model_validate_json(process.model_dump_json())
    assert again.find() is not None
    assert stop(again)
    assert again.find() is None
    assert not stop(again)


def test_another_process_with_the_same_number_is_left_alone(tmp_path: Path) -> None:
    process = started(tmp_path)
    try:
        earlier = process.model_copy(update={"started": process.started - 100})
        other = process.model_copy(update={"command": ["another", "program"]})
        assert not stop(earlier)
        assert not stop(other)
        assert process.find() is not None
    finally:
        assert stop(process)


def test_what_does_not_end_by_itself_is_killed_with_its_children(tmp_path: Path) -> None:
    process = started(tmp_path, [sys.executable, "-c", STUBBORN])
    child = psutil.Process(int(wait_for_log(tmp_path / "log")))
    assert stop(process, patience=0.5)
    assert process.find() is None
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_a_process_that_ends_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(0.5); raise SystemExit('no such table: runs')"]
    process = started(tmp_path, command)
    with pytest.raises(CoaloraError, match=r"no such table: runs") as caught:
        wait_until(lambda: "no answer", process, name="mlflow", log=tmp_path / "log", seconds=20)
    assert "mlflow ended" in str(caught.value)


def test_a_process_that_never_gets_healthy_is_told_what_is_missing(tmp_path: Path) -> None:
    process = started(tmp_path)
    try:
        wait_for_log(tmp_path / "log")
        with pytest.raises(CoaloraError, match=r"(?s)not healthy after 0 s \(no answer\).*awake"):
            wait_until(lambda: "no answer", process, name="mlflow", log=tmp_path / "log", seconds=0.2)
    finally:
        stop(process)


def test_a_taken_port_is_refused_with_its_holder() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        holder = rf"Port {port} of mlflow is taken \(used by process {os.getpid()}.*--ports mlflow="
        with pytest.raises(CoaloraError, match=holder):
            require_free(port, "mlflow")
    require_free(free_port(), "mlflow")


def test_the_end_of_a_log_is_short_and_a_missing_log_is_no_error(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("".join(f"line {i}\n" for i in range(100)))
    assert tail(log, 2).split() == ["line", "98", "line", "99"]
    assert "No such file" in tail(tmp_path / "none")
