"""Environment variables that must be set before Prefect, MLflow, DVC or transformers are imported.

No import of any of them here: their settings are read at import, so this module has to come first.
Everything is a default: a variable that the user has set is left alone.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

_RESULT_PATHS = ("PREFECT_LOCAL_STORAGE_PATH", "PREFECT_RESULTS_LOCAL_STORAGE_PATH")  # two names, one setting
STORE_VARIABLE = "COALORA_STORE"  # s3://bucket/prefix of the store that machines share; none by default
READ_ONLY_VARIABLE = "COALORA_STORE_READ_ONLY"  # 1: that store is read, and never written

_DEFAULTS = {
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",  # first start runs migrations: over 30 s
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "5",  # a minute for a server that is started again, and not four
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # the closing lines name the run
    "DVC_NO_ANALYTICS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def coalora_home() -> Path:
    """Absolute folder of all that is kept: `COALORA_HOME`, else `.coalora` under the working directory."""
    return Path(os.environ.get("COALORA_HOME") or ".coalora").expanduser().resolve()


def set_default_storage() -> None:
    """Point Prefect's result records at `<COALORA_HOME>/results` and switch telemetry and progress bars off.

    Child processes inherit the absolute path. Warns when Prefect was imported before, because this
    process then keeps the storage path that Prefect has read already; not in `prefect deploy`, which reads
    flows and runs none.
    """
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    if any(os.environ.get(name) for name in _RESULT_PATHS):
        return
    os.environ[_RESULT_PATHS[0]] = str(coalora_home() / "results")
    if "prefect" in sys.modules and not (Path(sys.argv[0]).name == "prefect" and "deploy" in sys.argv):
        warnings.warn(
            "set_default_storage() was called after prefect was imported: this process keeps prefect's own "
            f"result storage; call it first, or set {_RESULT_PATHS[0]} in the environment",
            RuntimeWarning,
            stacklevel=2,
        )
