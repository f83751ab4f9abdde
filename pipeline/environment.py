"""Environment variables of the pipeline, with defaults for MLflow's, DVC's and transformers' own.

Nothing of theirs is imported here: they read their variables at import, so that this module has to come first.
Prefect's settings are `[tool.prefect]` in pyproject.toml. A variable that the user has set is left alone.
"""

import os
import sys
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path

from coalora.errors import CoaloraError
from coalora.process import set_variables

HOME_VARIABLE = "COALORA_HOME"
STORE_VARIABLE = "COALORA_STORE"  # s3://bucket/prefix of the store that machines share; none by default
READ_ONLY_VARIABLE = "COALORA_STORE_READ_ONLY"  # 1: that store is read, and never written
_RESULTS = ("PREFECT_RESULTS_LOCAL_STORAGE_PATH", "PREFECT_LOCAL_STORAGE_PATH")  # two names, one setting

_DEFAULTS = {
    "DO_NOT_TRACK": "1",
    "PREFECT_CLIENT_MAX_RETRIES": "8",  # eight minutes of a database that is locked or a server that starts, not one
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "5",  # a minute for a server that is started again, and not four
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # the closing lines name the run
    "DVC_NO_ANALYTICS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def coalora_home() -> Path:
    """Absolute folder of all that is kept: `COALORA_HOME`, else `.coalora` under the working directory."""
    return Path(os.environ.get(HOME_VARIABLE) or ".coalora").expanduser().resolve()


def require_home() -> Path:
    """`coalora_home()`, made where it is missing.

    Raises:
        CoaloraError: it cannot be written.
    """
    home = coalora_home()
    try:
        home.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=home).close()
    except OSError as error:
        raise CoaloraError(
            f"{home}, where results are kept, cannot be written ({error.strerror})",
            remedy=f"Mend its owner or permissions, or set {HOME_VARIABLE} to another folder",
        ) from error
    return home


def used_now(folder: Path) -> Path:
    """The folder, where it is there, with the time of this use: `coalora prune` frees what was not used for long."""
    with suppress(OSError):  # not there, or a home that is only read
        os.utime(folder)
    return folder


def set_defaults() -> None:
    """Set what our processes run with, switch telemetry off and keep Prefect's result records in `coalora_home()`.

    Child processes inherit the absolute path. Warns where Prefect has read its settings already and keeps its records
    elsewhere: in a run that a worker started, with `COALORA_HOME` and without Prefect's own variable.
    """
    set_variables()
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    if any(os.environ.get(name) for name in _RESULTS):
        return
    os.environ[_RESULTS[0]] = str(coalora_home() / "results")
    if "prefect" in sys.modules and os.environ.get(HOME_VARIABLE) and Path(sys.argv[0]).name != "prefect":
        warnings.warn(
            f"Prefect was imported before {HOME_VARIABLE} could be passed on, and keeps its records elsewhere: set "
            f"{_RESULTS[0]}={os.environ[_RESULTS[0]]} where the worker is started",
            RuntimeWarning,
            stacklevel=2,
        )
