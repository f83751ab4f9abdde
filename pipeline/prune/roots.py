"""Roots of the garbage collector: journals of runs, and what refers to these runs and to artifacts.

A run is wanted while its folder, an MLflow run or a registered version of it exists; what it computed or reused is in
its journal, `<home>/journals/<pipeline>-<identity>.jsonl`: a line (stage, cache key, artifact) for every stage, so that
a run that was killed is known as well. Artifacts are wanted by themselves where a run folder, a copy outside of the
store or a configuration set under DVC names them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock
import yaml

from coalora.errors import CoaloraError
from coalora.files import json_bytes, read_json
from pipeline.environment import coalora_home
from pipeline.faults import disk_faults
from pipeline.scrub import one_line, scrub_text
from pipeline.store.artifacts import MARKER, Artifact
from pipeline.store.locks import is_held
from pipeline.tracking.server import require_server

_NAME = re.compile(r"(?P<pipeline>.+)-(?P<identity>[0-9a-f]{16,64})\.jsonl")


@dataclass(frozen=True)
class Journal:
    """The journal of one run; in use while a lock beside it is held."""

    path: Path

    @classmethod
    def of(cls, pipeline: str, identity: str) -> Journal:
        return cls(coalora_home() / "journals" / f"{pipeline}-{identity}.jsonl")

    @property
    def identity(self) -> str:
        match = _NAME.fullmatch(self.path.name)
        return match["identity"] if match else ""

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """While the block runs, nothing that the journal lists is pruned. Any number of processes at a time."""
        lock = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex}.lock")
        with disk_faults(self.path.parent):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
            held = filelock.FileLock(lock)
            held.acquire()
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
            held.release()

    def is_used(self) -> bool:
        """Whether a process has the journal in use now; forgets the locks of killed ones."""
        used = False
        for lock in self.path.parent.glob(f"{self.path.name}.*.lock"):
            if is_held(lock):
                used = True
            else:
                lock.unlink(missing_ok=True)
        return used

    def note(self, stage: str, key: str, artifact: Artifact) -> None:
        """Add a line, unless it is there. One write: several processes may add at a time."""
        entry = {"stage": stage, "key": key, "digest": artifact.digest, "nbytes": artifact.nbytes}
        line = json.dumps(entry, sort_keys=True) + "\n"
        with disk_faults(self.path.parent):
            if self.path.is_file() and line in self.path.read_text(encoding="utf-8"):
                os.utime(self.path)
                return
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(line)

    def read(self) -> Used:
        """Its entries. A line that was cut short (a full disk) is left out."""
        used = Used()
        with suppress(FileNotFoundError):
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError, KeyError, TypeError):
                    entry = json.loads(line)
                    used.digests.add(str(entry["digest"]))
                    used.keys.add(str(entry["key"]))
        return used


@dataclass
class Used:
    """Digests of artifacts and cache keys of records."""

    digests: set[str] = field(default_factory=set)
    keys: set[str] = field(default_factory=set)


@dataclass
class Roots:
    """References to runs and artifacts."""

    identities: set[str] = field(default_factory=set)  # of runs that still exist; whole, or their first digits
    digests: set[str] = field(default_factory=set)  # of artifacts that are named directly
    set_md5s: set[str] = field(default_factory=set)  # of configuration sets under DVC
    seen: dict[str, int] = field(default_factory=dict)  # how many of each kind were found, for people

    def count(self, what: str) -> None:
        self.seen[what] = self.seen.get(what, 0) + 1

    def used(self, home: Path, older_than: float) -> tuple[Used, list[Journal]]:
        """(what is wanted, the journals that keep nothing: of runs that are gone, not under way and not young)."""
        used, dead = Used(digests=set(self.digests)), []
        for path in sorted((home / "journals").glob("*.jsonl")):
            journal = Journal(path)
            if not journal.identity:
                continue
            exists = any(journal.identity.startswith(known) for known in self.identities)
            if journal.is_used() or exists or time.time() - path.stat().st_mtime < older_than:
                found = journal.read()
                used.digests |= found.digests
                used.keys |= found.keys
            else:
                dead.append(journal)
        return used, dead


def roots_of(checkout: Path, tracking_uris: set[str]) -> Roots:
    """References of a checkout (`runs/`, `outputs/`, `configurations/`) and of MLflow.

    Args:
        tracking_uris: MLflow servers or databases, besides those that runs name.

    Raises:
        CoaloraError: a run folder or .dvc file cannot be read, or MLflow cannot be asked: without these answers nothing
            may be removed.
    """
    found = Roots()
    uris = set(tracking_uris)
    for file in sorted(checkout.glob("runs/*/*/run.json")):
        if not file.parent.is_symlink():
            _run_folder(file, found, uris)
    for folder in ("runs", "outputs"):
        for marker in sorted((checkout / folder).rglob(MARKER)):
            with suppress(OSError, ValueError, KeyError, TypeError):  # a copy that was broken off is written anew
                found.digests.add(str(json.loads(marker.read_text(encoding="utf-8"))["digest"]))
                found.count("copies under runs/ and outputs/")
    for dvc_file in sorted((checkout / "configurations").rglob("*.dvc")):
        _dvc_file(dvc_file, found)
    for uri in sorted(uris):
        if uri in tracking_uris or not _is_gone(uri):
            _mlflow(uri, found)
    return found


def set_md5(payload: Any) -> str:
    """MD5 under which DVC keeps a configuration set (`pipeline.versioning.sets.write_set`)."""
    return hashlib.md5(json_bytes(payload), usedforsecurity=False).hexdigest()


def _run_folder(file: Path, found: Roots, uris: set[str]) -> None:
    with _readable(file, "Mend or delete this run folder"):
        record: Any = read_json(file)
        found.digests.update(artifact_digests(record))
        if identity := record.get("identity"):
            found.identities.add(str(identity))
        if uri := record.get("settings", {}).get("tracking", {}).get("tracking_uri"):
            uris.add(str(uri))
    found.count("run folders")


def artifact_digests(record: Any) -> Iterator[str]:
    """Digests of all artifacts written anywhere in a JSON value."""
    if isinstance(record, dict):
        if {"kind", "digest", "nbytes"} <= set(record):
            yield str(record["digest"])
        record = list(record.values())
    for value in record if isinstance(record, list) else ():
        yield from artifact_digests(value)


def _dvc_file(file: Path, found: Roots) -> None:
    with _readable(file, "Restore it with git, or delete it"):
        found.set_md5s.update(str(out["md5"]) for out in yaml.safe_load(file.read_text(encoding="utf-8"))["outs"])
    found.count("sets under DVC")


@contextmanager
def _readable(file: Path, remedy: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, AttributeError, KeyError, TypeError, yaml.YAMLError) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"[:300]
        raise CoaloraError(
            f"{file} cannot be read, so that nothing may be removed ({reason})", remedy=remedy
        ) from error


def _is_gone(uri: str) -> bool:
    """Whether a database that a run names is there no more: asking MLflow would make an empty one."""
    try:
        require_server(uri, existing=True)
    except CoaloraError:
        return uri.startswith("sqlite:")  # another kind may answer again: asking it says so
    return False


def _mlflow(uri: str, found: Roots) -> None:
    """Identities of all runs that are not deleted, and of the runs behind registered versions."""
    from mlflow import MlflowClient
    from mlflow.entities import ViewType
    from mlflow.exceptions import MlflowException

    from pipeline.tracking.runs import IDENTITY_TAG

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
            f"MLflow at {scrub_text(uri)} does not say which runs there are, so that nothing may be removed "
            f"({scrub_text(str(error).splitlines()[0])[:200]})",
            remedy="Start its server, or unlock its database, and run this again",
        ) from error


def _pages(search: Any, **options: Any) -> Iterator[Any]:
    token = None
    while True:
        page = search(page_token=token, max_results=1000, **options)
        yield from page
        token = page.token
        if not token:
            return
