"""Variables that are set before Prefect is imported."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import prefect  # noqa: F401 (the warning is about this import)
import pytest

from pipeline.environment import set_default_storage


def test_default_storage_is_set_before_prefect_or_warns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "environ", {"COALORA_HOME": str(tmp_path), "DO_NOT_TRACK": "0"})
    with pytest.warns(RuntimeWarning, match="after prefect was imported"):
        set_default_storage()
    assert os.environ["PREFECT_LOCAL_STORAGE_PATH"] == str(tmp_path / "results")
    assert os.environ["DO_NOT_TRACK"] == "0"  # what the user set stays
    set_default_storage()  # set now: no warning
    monkeypatch.setattr(os, "environ", {"PREFECT_RESULTS_LOCAL_STORAGE_PATH": "users"})
    set_default_storage()
    assert "PREFECT_LOCAL_STORAGE_PATH" not in os.environ


def test_deploying_runs_no_flow_and_warns_of_no_storage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "environ", {"COALORA_HOME": str(tmp_path)})
    monkeypatch.setattr(sys, "argv", ["/bin/prefect", "--no-prompt", "deploy", "--all"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        set_default_storage()
    assert os.environ["PREFECT_LOCAL_STORAGE_PATH"] == str(tmp_path / "results")
