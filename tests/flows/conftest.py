"""Checkouts for the end-to-end tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.flows.checkout import CODE, PROJECT, Checkout


@pytest.fixture(scope="session")
def prefect_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One database for all runs of the session: its migration takes longer than a run."""
    return tmp_path_factory.mktemp("prefect")


@pytest.fixture(scope="session")
def make_checkout(tmp_path_factory: pytest.TempPathFactory, prefect_home: Path) -> Callable[[str], Checkout]:
    def make(name: str) -> Checkout:
        root = tmp_path_factory.mktemp(name)
        for item in CODE:
            source = PROJECT / item
            if source.is_dir():
                shutil.copytree(source, root / item, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, root / item)
        shutil.copy(PROJECT / "tests" / "flows" / "tiny.yaml", root / "pipelines.yaml")
        own = ("COALORA_", "PREFECT_", "MLFLOW_")
        environment = {k: v for k, v in os.environ.items() if not k.startswith(own)}
        # One thread: two processes of tiny matrices on two cores lose more than they gain.
        environment |= {"PREFECT_HOME": str(prefect_home), "OMP_NUM_THREADS": "1", "COLUMNS": "140"}
        environment |= {"GIT_CONFIG_GLOBAL": os.devnull, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        checkout = Checkout(root, environment)
        subprocess.run(["git", "init", "--quiet"], cwd=root, env=environment, check=True)
        checkout.run("-m", "dvc", "init", "--quiet")
        return checkout

    return make


@pytest.fixture(scope="session")
def finished(make_checkout: Callable[[str], Checkout]) -> tuple[Checkout, str]:
    """A checkout in which the tiny pipeline has run once under Prefect, and what that printed."""
    checkout = make_checkout("finished")
    return checkout, checkout.pipeline()
