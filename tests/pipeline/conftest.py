"""A repository of DVC's for the tests of versioned sets; runners of stages with a store and records of their own."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def own_dvc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """DVC's site cache and settings of the user stay out of the test."""
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    for name in ("DVC_SITE_CACHE_DIR", "DVC_GLOBAL_CONFIG_DIR", "DVC_SYSTEM_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "dvc-settings"))


@pytest.fixture
def repository(tmp_path: Path, own_dvc: None) -> Path:
    """A git repository with DVC in it."""
    from dvc.repo import Repo

    root = tmp_path / "checkout"
    root.mkdir()
    subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)
    Repo.init(str(root)).close()
    return root


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    from prefect.settings import PREFECT_HOME, temporary_settings
    from prefect.testing.utilities import prefect_test_harness

    home = tmp_path_factory.mktemp("prefect-home")
    with temporary_settings({PREFECT_HOME: home}), prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture
def own_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, temporary_settings

    monkeypatch.setenv("COALORA_HOME", str(tmp_path / "home"))
    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: tmp_path / "results"}):
        yield tmp_path / "home"


@pytest.fixture(params=["direct", "prefect"])
def execute(request: pytest.FixtureRequest) -> Callable[[Callable[[Any], Any]], Any]:
    from tests.pipeline.stages.engine_runs import directly, in_flow

    if request.param == "direct":
        return directly
    request.getfixturevalue("prefect_server")
    return in_flow
