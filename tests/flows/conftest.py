"""Checkouts for the end-to-end tests."""

from __future__ import annotations

import compileall
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import preloaded, shared
from tests.flows.checkout import CODE, PROJECT, Checkout


def _new_checkout(folder: Path) -> None:
    """The code, compiled where it was not yet, in a repository of git and DVC."""
    for item in CODE:
        source = PROJECT / item
        if source.is_dir():
            shutil.copytree(source, folder / item, ignore=shutil.ignore_patterns("*.pyc.*"))
        else:
            shutil.copy(source, folder / item)
    shutil.copy(PROJECT / "tests" / "flows" / "tiny.yaml", folder / "pipelines.yaml")
    compileall.compile_dir(folder, quiet=1)
    subprocess.run(["git", "init", "--quiet"], cwd=folder, env=os.environ | _NO_SETTINGS, check=True)
    preloaded.run("-m", "dvc", "init", "--quiet", cwd=folder, **_NO_SETTINGS)


_NO_SETTINGS = {"GIT_CONFIG_GLOBAL": os.devnull}


@pytest.fixture(scope="session")
def prefect_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One database for all runs of the session."""
    return shared.prefect_home(tmp_path_factory.mktemp("prefect"))


@pytest.fixture(scope="session")
def make_checkout(tmp_path_factory: pytest.TempPathFactory, prefect_home: Path) -> Callable[[str], Checkout]:
    def make(name: str, *, real: str = "") -> Checkout:
        python = preloaded.python(tmp_path_factory.mktemp("bin"), real=real)
        shared.once("checkout", _new_checkout)
        root = shutil.copytree(shared.folder() / "checkout", tmp_path_factory.mktemp(name) / name)
        own = ("COALORA_", "PREFECT_", "MLFLOW_")
        environment = {k: v for k, v in os.environ.items() if not k.startswith(own)} | _NO_SETTINGS
        # One thread: two processes of tiny matrices on two cores lose more than they gain.
        environment |= {"PREFECT_HOME": str(prefect_home), "OMP_NUM_THREADS": "1", "COLUMNS": "140"}
        programs = f"{python.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment |= {"PRELOADED_PYTHON": str(python), "PATH": programs}
        shared.mlflow_database(root / ".coalora")
        return Checkout(root, environment)

    return make


@pytest.fixture(scope="session")
def finished(make_checkout: Callable[[str], Checkout]) -> tuple[Checkout, str]:
    """A checkout in which the tiny pipeline has run once under Prefect, and what that printed; one for a session."""

    def run(_: Path) -> tuple[Checkout, str]:
        checkout = make_checkout("finished")
        return checkout, checkout.pipeline()

    return shared.once("finished", run)
