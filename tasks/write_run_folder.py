"""Task `write-run-folder`: report, bundle and exports of a run under runs/."""

import os
from contextlib import suppress
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
    """Copy report, bundle and exports under the run's folder, and point `latest` at it.

    Budgets of the same configuration have equal exports: their bytes lie there once, by hard links where the file
    system has them.
    """
    store, target = current_store(), Path(folder)
    first: dict[str, Path] = {}
    for name, made in {"report": report, "bundle": bundle, **exports}.items():
        place = store.materialize(made, target / name)
        if (same := first.setdefault(made.digest, place)) != place:
            for entry in store.manifest(made).files:
                _link(same / entry.path, place / entry.path)
    write_json(target / "run.json", record)
    part = target.parent / f".latest.{os.getpid()}"
    part.symlink_to(target.name)
    os.replace(part, target.parent / "latest")
    return str(target)


def _link(source: Path, target: Path) -> None:
    """Make `target`, which has the bytes of `source`, the same file; a file system without hard links keeps both."""
    if source.samefile(target):
        return
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    with suppress(OSError):
        os.link(source, part)
        os.replace(part, target)
