"""Objects below a prefix that no published run refers to, and runs that are no longer wanted.

A run goes by its manifest: without it nobody sees the run, and what it alone referred to is left over. Manifests are
read again just before anything is deleted, and what is young stays, so that a publication that is under way keeps its
objects. One that relies on left-over objects older than that may lose them: publish it again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Sequence

from coalora.errors import CoaloraError
from pipeline.s3.client import S3Location, S3Object
from pipeline.s3.manifest import (
    LATEST,
    MANIFEST,
    OBJECTS,
    RUNS,
    Manifest,
    object_name,
    published_names,
    read_manifest,
    run_name,
)


def published_runs(root: S3Location) -> dict[tuple[str, str], Manifest]:
    """Manifests below `root` by (pipeline, run).

    Raises:
        CoaloraError: one is damaged: what it refers to is not known, and nothing may be called left over.
    """
    return {(pipeline, run): read_manifest(root, pipeline, run) for pipeline, run in published_names(root)}


def left_over(
    root: S3Location, *, older_than: float, without: Collection[tuple[str, str]] = (), now: float | None = None
) -> list[S3Object]:
    """Objects that no manifest names and that were written `older_than` seconds ago or earlier.

    Args:
        without: runs (pipeline, run) whose manifests do not count: what would be left over without them.
    """
    objects = list(root.list(f"{OBJECTS}/"))  # before the manifests: what a newer one names is newer, too
    counted = [manifest for run, manifest in published_runs(root).items() if run not in without]
    named = {object_name(file.sha256) for manifest in counted for file in manifest.files}
    now = time.time() if now is None else now
    return [o for o in objects if root.name_of(o) not in named and now - o.modified >= older_than]


def delete_left_over(root: S3Location, found: Sequence[S3Object], *, older_than: float) -> list[S3Object]:
    """Delete those of `found` that are still left over; returns them."""
    still = {item.key: item.etag for item in left_over(root, older_than=older_than)}
    gone = [item for item in found if still.get(item.key) == item.etag]
    if gone:
        root.delete([root.name_of(item) for item in gone])
    return gone


def withdraw(root: S3Location, pipeline: str, run: str) -> None:
    """Make a published run invisible; where it was the latest one, so is that pointer.

    Raises:
        CoaloraError: there is no such run.
    """
    check_published(root, pipeline, run)
    latest = f"{RUNS}/{pipeline}/{LATEST}"
    pointer = root.get_bytes(latest)
    if pointer is not None and json.loads(pointer).get("run") == run:
        root.delete([latest])  # first: it never points at a run that is gone
    root.delete([f"{run_name(pipeline, run)}/{MANIFEST}"])


def check_published(root: S3Location, pipeline: str, run: str) -> None:
    """Refuse to withdraw a run that nobody has published."""
    there = published_names(root)
    if (pipeline, run) not in there:
        raise CoaloraError(
            "a run that is withdrawn has been published",
            got=f"{pipeline}/{run}",
            expected=", ".join(map("/".join, there)) or f"a run below {root}, where there is none",
        )
