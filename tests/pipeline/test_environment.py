"""Variables that are set before Prefect is imported, and Prefect's settings of the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import prefect  # noqa: F401 (the warning is about this import)
import pytest

from coalora.errors import CoaloraError
from pipeline.environment import require_home, set_defaults

ROOT = Path(__file__).parents[2]


def test_records_lie_in_the_home_and_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "environ", {"COALORA_HOME": str(tmp_path), "DO_NOT_TRACK": "0"})
    with pytest.warns(RuntimeWarning, match="before COALORA_HOME could be passed on"):
        set_defaults()
    assert os.environ["PREFECT_RESULTS_LOCAL_STORAGE_PATH"] == str(tmp_path / "results")
    assert os.environ["DO_NOT_TRACK"] == "0"
    set_defaults()  # set now: no warning
    monkeypatch.setattr(os, "environ", {"PREFECT_LOCAL_STORAGE_PATH": "users"})
    set_defaults()
    assert "PREFECT_RESULTS_LOCAL_STORAGE_PATH" not in os.environ


def test_deploying_runs_no_flow_and_warns_of_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "environ", {"COALORA_HOME": str(tmp_path)})
    monkeypatch.setattr(sys, "argv", ["/bin/prefect", "--no-prompt", "deploy", "--all"])
    set_defaults()
    assert os.environ["PREFECT_RESULTS_LOCAL_STORAGE_PATH"] == str(tmp_path / "results")


def test_prefect_reads_the_checkouts_settings(tmp_path: Path) -> None:
    program = (
        "from prefect.settings import get_current_settings as s\n"
        "print(s().results.local_storage_path, s().server.analytics_enabled, "
        "s().server.ephemeral.startup_timeout_seconds)"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment | {"PREFECT_HOME": str(tmp_path)},
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.split() == [".coalora/results", "False", "120"]


@pytest.mark.parametrize("home", ["file", "file/below", "/proc/coalora"])
def test_a_home_that_cannot_be_written_is_said(home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("COALORA_HOME", str(tmp_path / home))
    with pytest.raises(CoaloraError, match=r"cannot be written \(.*\)\. .*set COALORA_HOME to another"):
        require_home()


def test_a_home_that_is_missing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COALORA_HOME", str(tmp_path / "a/b"))
    assert list(require_home().iterdir()) == []
