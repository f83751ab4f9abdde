"""Where runs are tracked. Apart from the tracker, which imports MLflow: whoever only asks should not wait for that."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pipeline.environment import coalora_home


@dataclass(frozen=True)
class Place:
    """Where runs go.

    Attributes:
        tracking_uri: MLflow server or database.
        artifact_root: folder of the artifacts; None where the server decides.
    """

    tracking_uri: str
    artifact_root: Path | None


def default_place(tracking_uri: str | None = None) -> Place:
    """The settings' URI, else `MLFLOW_TRACKING_URI`, else `<COALORA_HOME>/mlflow.db` with `mlartifacts` by it."""
    home = coalora_home()
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home / 'mlflow.db'}"
    return Place(uri, home / "mlartifacts" if uri.startswith("sqlite:") else None)
