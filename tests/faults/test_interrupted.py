"""Runs that are interrupted from outside: recorded as such, without a traceback, and no server is left behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.faults.runs import served
from tests.flows.checkout import Checkout

pytestmark = pytest.mark.servers


def gone(pid: int, *, seconds: float) -> bool:
    """Whether a process ends in so many seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False


def test_a_run_that_is_killed_leaves_no_server_behind(tmp_path: Path) -> None:
    with served(tmp_path) as (process, told):
        process.kill()
        assert gone(int(told["pid"]), seconds=20)


def test_ctrl_c_in_the_terminal_ends_a_run_at_once_and_its_server_last(tmp_path: Path) -> None:
    with served(tmp_path) as (process, told):
        began = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)  # the whole group of the terminal
        printed = process.stdout.read()
        process.wait(60)
        assert time.monotonic() - began < 20, printed
        assert "ConnectError" not in printed  # it could tell its server how it ended
        assert gone(int(told["pid"]), seconds=20)


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [(signal.SIGINT, 130, "interrupted. Run the same command again"), (signal.SIGHUP, -signal.SIGTERM, "")],
)
def test_mlflow_says_killed_of_a_run_that_was_interrupted(
    make_checkout: Callable[[str], Checkout], number: signal.Signals, code: int, words: str
) -> None:
    checkout = make_checkout(number.name.lower())
    process = checkout.start("-m", "coalora", "run", "tiny", "--set", "training.initial_steps=5000")
    printed = ""
    for line in process.stdout:
        printed += line
        if "training coa, round 0: " in line:
            break
    began = time.monotonic()
    os.killpg(process.pid, number)
    printed += process.stdout.read()
    process.wait(60)
    assert time.monotonic() - began < 30, printed[-6000:]
    assert process.returncode == code, printed[-6000:]
    assert words in printed
    assert "Traceback" not in printed, printed[-6000:]
    assert statuses(checkout) == {"KILLED"}


def test_a_server_that_cannot_start_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "prefect.db").write_text("no database" * 100)
    began = time.monotonic()
    words = r"Prefect's temporary server does not start \(.*See .*prefect\.log"
    with pytest.raises(AssertionError, match=words), served(tmp_path, database=False):
        pass
    assert time.monotonic() - began < 60


def statuses(checkout: Checkout) -> set[str]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{checkout.root / '.coalora' / 'mlflow.db'}")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    return {run.info.status for run in runs if "mlflow.parentRunId" not in run.data.tags}
