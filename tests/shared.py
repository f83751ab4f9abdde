"""A folder for what all test processes of one session share, and what is made in it once.

pytest-xdist starts a process for each core, and each would make its own servers and runs.
"""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

_VARIABLE = "TESTS_SHARED"
T = TypeVar("T")


def begin() -> None:
    """Make the folder; in the first process alone, whose children inherit it."""
    if _VARIABLE not in os.environ:
        os.environ[_VARIABLE] = f"{os.getpid()}:{tempfile.mkdtemp(prefix='coalora-tests-')}"


def end() -> None:
    """Remove the folder; in the process that made it."""
    if owner() == os.getpid():
        shutil.rmtree(folder(), ignore_errors=True)


def owner() -> int:
    """Number of the process that made the folder."""
    return int(os.environ[_VARIABLE].partition(":")[0])


def folder() -> Path:
    return Path(os.environ[_VARIABLE].partition(":")[2])


def prefect_home(to: Path) -> Path:
    """A new home of Prefect at `to`, whose database is migrated: that takes longer than a run."""
    from tests import preloaded

    def migrate(place: Path) -> None:
        preloaded.run("-m", "prefect", "server", "database", "upgrade", "-y", PREFECT_HOME=str(place))

    once("prefect-home", migrate)
    return shutil.copytree(folder() / "prefect-home", to, dirs_exist_ok=True)


def mlflow_database(to: Path) -> str:
    """Address of a new database of MLflow in folder `to`, whose tables are made: that takes seconds."""
    from tests import preloaded

    def migrate(place: Path) -> None:
        code = "import sys, mlflow; mlflow.MlflowClient(sys.argv[1]).search_experiments()"
        preloaded.run("-c", code, f"sqlite:///{place / 'mlflow.db'}", cwd=place)

    once("mlflow", migrate)
    to.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{shutil.copy(folder() / 'mlflow' / 'mlflow.db', to)}"


def once(name: str, make: Callable[[Path], T]) -> T:
    """What `make` returns for a new folder of this name, made by the first process that asks for it."""
    from filelock import FileLock

    place = folder() / name
    known = folder() / f"{name}.pickle"
    with FileLock(folder() / f"{name}.lock"):
        if not known.exists():
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            made = make(place)
            known.write_bytes(pickle.dumps(made))
    return pickle.loads(known.read_bytes())
