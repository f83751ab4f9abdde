"""Task `write-run-folder`: report, bundle and exports of a run under runs/."""

import os
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from coalora.files import write_json
from pipeline.store.store import Artifact, current_store


@task(name="write-run-folder", cache_policy=NO_CACHE)
def write_run_folder(
    *, folder: str, report: Artifact, bundle: Artifact, exports: dict[str, Artifact], record: dict[str, Any]
) -> str:
    """Copy report, bundle and exports under the run's folder, and point `latest` at it."""
    store, target = current_store(), Path(folder)
    for name, made in {"report": report, "bundle": bundle, **exports}.items():
        store.materialize(made, target / name)
    write_json(target / "run.json", record)
    part = target.parent / f".latest.{os.getpid()}"
    part.symlink_to(target.name)
    os.replace(part, target.parent / "latest")
    return str(target)
