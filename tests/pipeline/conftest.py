"""Repositories of DVC, buckets in S3, and runners of stages, with a store and records of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests import shared

if TYPE_CHECKING:  # boto3 and moto are imported by the tests that need them
    from pipeline.s3.client import S3Location
    from pipeline.settings.sections import StorageSettings
    from tests.s3_server import FaultProxy


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
    """Prefect's own harness, with a database that is migrated already and a server that has its libraries."""
    import prefect.testing.utilities
    from prefect.settings import PREFECT_HOME, temporary_settings

    home = shared.prefect_home(tmp_path_factory.mktemp("prefect-home"))

    def make_folder() -> str:
        folder = tempfile.mkdtemp()
        shutil.copy(home / "prefect.db", Path(folder) / "prefect-test.db")
        return folder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefect.testing.utilities, "mkdtemp", make_folder)
        patch.setattr(sys, "executable", os.environ["PRELOADED_PYTHON"])
        with (
            temporary_settings({PREFECT_HOME: home}),
            prefect.testing.utilities.prefect_test_harness(server_startup_timeout=120),
        ):
            patch.undo()
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


@pytest.fixture
def proxy(s3: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> FaultProxy:
    """The S3 server's proxy without faults and memories; credentials of the test in the environment."""
    from tests.s3_server import set_credentials, without_waits

    for name in ("AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    set_credentials(monkeypatch.setenv)
    without_waits(monkeypatch)
    s3.clear()
    return s3


@pytest.fixture
def bucket(proxy: FaultProxy) -> str:
    """A bucket of the test's own."""
    from tests.s3_server import create_bucket

    name = f"test-{uuid.uuid4().hex[:12]}"
    create_bucket(proxy.url, name)
    proxy.clear()
    return name


@pytest.fixture
def settings(proxy: FaultProxy, bucket: str) -> StorageSettings:
    from pipeline.settings.sections import StorageSettings

    return StorageSettings(
        endpoint_url=proxy.url,
        bucket=bucket,
        prefix="team/models",
        attempts=3,
        timeout_seconds=5,
        part_mib=5,
        workers=2,
    )


@pytest.fixture
def place(settings: StorageSettings) -> S3Location:
    from pipeline.s3.client import S3Location

    return S3Location.of(settings)
