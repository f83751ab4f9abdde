"""What refers to results: run folders, copies outside of the store, MLflow's runs and registry, DVC's sets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from coalora.errors import CoaloraError
from coalora.files import json_bytes, read_json
from pipeline.store.store import MARKER


@dataclass
class References:
    """Found references.

    Attributes:
        identities: of runs that still exist; whole, or their first digits.
        digests: of artifacts that are named directly.
        set_md5s: of configuration sets under DVC.
        seen: how many of each kind were found, for people.
    """

    identities: set[str] = field(default_factory=set)
    digests: set[str] = field(default_factory=set)
    set_md5s: set[str] = field(default_factory=set)
    seen: dict[str, int] = field(default_factory=dict)

    def count(self, what: str) -> None:
        self.seen[what] = self.seen.get(what, 0) + 1

    def names(self, identity: str) -> bool:
        return any(identity.startswith(known) for known in self.identities)


def references_of(root: Path, tracking_uris: set[str]) -> References:
    """References of a checkout and of MLflow.

    Args:
        root: the checkout: its `runs/`, `outputs/` and `configurations/` are read.
        tracking_uris: MLflow servers or databases, besides those that runs name.

    Raises:
        CoaloraError: MLflow cannot be asked: without its answer nothing may be removed.
    """
    found = References()
    uris = set(tracking_uris)
    for file in sorted(root.glob("runs/*/*/run.json")):
        if file.parent.is_symlink():
            continue
        _run_folder(file, found, uris)
    for folder in ("runs", "outputs"):
        for marker in sorted((root / folder).rglob(MARKER)):
            _marker(marker, found)
    for dvc_file in sorted((root / "configurations").rglob("*.dvc")):
        _dvc_file(dvc_file, found)
    for uri in sorted(uris):
        _mlflow(uri, found)
    return found


def set_md5(payload: Any) -> str:
    """MD5 under which DVC keeps a configuration set (`pipeline.versioning.sets.write_set`)."""
    return hashlib.md5(json_bytes(payload), usedforsecurity=False).hexdigest()


def _run_folder(file: Path, found: References, uris: set[str]) -> None:
    try:
        record: Any = read_json(file)
        found.digests.update(_digests(record))
        if identity := record.get("identity"):
            found.identities.add(str(identity))
        uri = record.get("settings", {}).get("tracking", {}).get("tracking_uri")
        if uri:
            uris.add(str(uri))
    except (OSError, ValueError, AttributeError) as error:
        raise CoaloraError(
            "every run folder can be read before anything is removed",
            got=f"{file}: {error}",
            remedy="mend or delete this run folder",
        ) from error
    found.count("run folders")


def _digests(record: Any) -> Iterator[str]:
    """Digests of all artifacts written anywhere in a JSON value."""
    if isinstance(record, dict):
        if {"kind", "digest", "nbytes"} <= set(record):
            yield str(record["digest"])
        for value in record.values():
            yield from _digests(value)
    elif isinstance(record, list):
        for value in record:
            yield from _digests(value)


def _marker(marker: Path, found: References) -> None:
    try:
        found.digests.add(str(json.loads(marker.read_text(encoding="utf-8"))["digest"]))
        found.count("copies under runs/ and outputs/")
    except (OSError, ValueError, KeyError, TypeError):
        return  # a copy that was broken off: the next one writes the marker anew


def _dvc_file(file: Path, found: References) -> None:
    try:
        for out in yaml.safe_load(file.read_text(encoding="utf-8"))["outs"]:
            found.set_md5s.add(str(out["md5"]))
    except (OSError, KeyError, TypeError, yaml.YAMLError) as error:
        raise CoaloraError(
            "every .dvc file can be read before anything is removed",
            got=f"{file}: {type(error).__name__}",
            remedy="restore it with git, or delete it",
        ) from error
    found.count("sets under DVC")


def _mlflow(uri: str, found: References) -> None:
    """Identities of all runs that are not deleted, and of the runs behind registered versions."""
    from mlflow import MlflowClient
    from mlflow.entities import ViewType
    from mlflow.exceptions import MlflowException

    from pipeline.tracking.run import IDENTITY_TAG
    from pipeline.tracking.values import scrub_text

    try:
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        experiments = [e.experiment_id for e in _pages(client.search_experiments, view_type=ViewType.ACTIVE_ONLY)]
        runs = _pages(client.search_runs, experiment_ids=experiments) if experiments else iter(())
        for run in runs:
            if identity := run.data.tags.get(IDENTITY_TAG):
                found.identities.add(identity)
                found.count("runs in MLflow")
        for version in _pages(client.search_model_versions):
            identity = client.get_run(version.run_id).data.tags.get(IDENTITY_TAG) if version.run_id else None
            if identity:
                found.identities.add(identity)
            found.count("registered versions")
    except (MlflowException, OSError) as error:
        raise CoaloraError(
            "MLflow must say which runs and versions there are before anything is removed",
            got=f"{scrub_text(uri)}: {scrub_text(str(error).splitlines()[0])}",
            remedy="start its server (or unlock its database) and run this again",
        ) from error


def _pages(search: Any, **options: Any) -> Iterator[Any]:
    token = None
    while True:
        page = search(page_token=token, max_results=1000, **options)
        yield from page
        token = page.token
        if not token:
            return
