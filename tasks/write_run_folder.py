"""Task `write-run-folder`: report, bundle and exports of a run under runs/."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from coalora.files import write_json
from pipeline.store.current import current_store
from pipeline.store.store import Artifact


@task(name="write-run-folder", cache_policy=NO_CACHE)
def write_run_folder(
    *, folder: str, report: Artifact, bundle: Artifact, exports: dict[str, Artifact], record: dict[str, Any]
) -> str:
    """Copy report, bundle and exports under the run's folder, and point `latest` at it."""
    store, target = current_store(), Path(folder)
    store.materialize(report, target / "report")
    store.materialize(bundle, target / "bundle")
    for name, export in exports.items():
        store.materialize(export, target / name)
    write_json(target / "run.json", record)
    part = target.parent / f".latest.{os.getpid()}"
    part.symlink_to(target.name)
    os.replace(part, target.parent / "latest")
    return str(target)
