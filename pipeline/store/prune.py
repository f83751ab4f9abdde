"""What may go from the store: what nothing refers to, and what was left unfinished. `flows.prune` shows and removes it.

Kept in any case: what was made or used within the age limit (`Store.problems` sets the time of use), what a run that is
under way lists in its journal, and the whole of every journal whose run has a folder, an MLflow run or a registered
version.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coalora.files import read_json
from pipeline.inputs.loaders import SET
from pipeline.stages.checkpoints import checkpoints_folder
from pipeline.store.artifacts import artifact_folder, files_below
from pipeline.store.journal import Journal, Used, journals
from pipeline.store.locks import FileLock
from pipeline.store.references import References, set_md5
from pipeline.store.store import Store
from pipeline.store.workspace import sweep

_RECORD = re.compile(r"[a-z0-9-]+-[0-9a-f]{64}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Garbage:
    """Something that may go.

    Attributes:
        kind: what it is, for the table.
        path: where.
        nbytes: what it takes.
        age: seconds since it was made or used.
        why: why it may go.
    """

    kind: str
    path: Path
    nbytes: int
    age: float
    why: str


def find_garbage(store: Store, references: References, results: Path, *, older_than: float) -> list[Garbage]:
    """All that may go, records before the artifacts that they name.

    Args:
        results: folder of Prefect's result records.
        older_than: seconds; what is younger stays.
    """
    used, dead = _journals(store, references, older_than)
    used.digests |= references.digests
    artifacts = list(_artifacts(store, used, references, older_than))
    going = {item.path.name for item in artifacts}
    records = _records(results, store, used, going, older_than)
    return [*_unfinished(store, older_than), *records, *artifacts, *_scratch(store, used, older_than), *dead]


def remove(store: Store, item: Garbage, *, older_than: float) -> bool:
    """Remove one piece; False where it was used meanwhile, or is gone."""
    if item.kind == "artifact":
        return store.remove(item.path, older_than)
    if item.kind == "checkpoint":
        lock = FileLock(store.root / "locks" / f"{item.path.name}.lock")
        if not lock.try_acquire():
            return False
        try:
            shutil.rmtree(item.path, ignore_errors=True)
        finally:
            lock.release()
        return True
    if item.kind == "unfinished":
        shutil.rmtree(item.path, ignore_errors=True)
        item.path.with_suffix(".lock").unlink(missing_ok=True)
        return True
    if item.kind == "journal" and Journal(item.path).is_used():
        return False
    item.path.unlink(missing_ok=True)
    return True


def _journals(store: Store, references: References, older_than: float) -> tuple[Used, list[Garbage]]:
    """(what living journals list, the others)."""
    used, dead = Used(), []
    for journal in journals(store.root):
        age = _age(journal.path)
        if journal.is_used() or age < older_than or references.names(journal.identity):
            used.add(journal.read())
        else:
            size = journal.path.stat().st_size
            dead.append(Garbage("journal", journal.path, size, age, "its run is gone"))
    return used, dead


def _artifacts(store: Store, used: Used, references: References, older_than: float) -> Iterator[Garbage]:
    for folder in sorted(store.folder.glob("??/*")):
        if not _DIGEST.fullmatch(folder.name) or folder.name in used.digests or _age(folder) < older_than:
            continue
        if references.set_md5s and _set_md5(folder) in references.set_md5s:
            continue
        yield Garbage("artifact", folder, _size(folder), _age(folder), "no run, version or DVC file refers to it")


def _records(results: Path, store: Store, used: Used, going: set[str], older_than: float) -> Iterator[Garbage]:
    """Records of artifacts that go or are gone, and records that cannot be read."""
    for file in sorted(results.glob("*")) if results.is_dir() else ():
        if not _RECORD.fullmatch(file.name) or file.name in used.keys or _age(file) < older_than:
            continue
        digest = _recorded_digest(file)
        if digest is None:
            yield Garbage("record", file, file.stat().st_size, _age(file), "unreadable")
        elif digest in going or not (store.folder / artifact_folder(digest)).is_dir():
            yield Garbage("record", file, file.stat().st_size, _age(file), "of an artifact that goes or is gone")


def _unfinished(store: Store, older_than: float) -> Iterator[Garbage]:
    scratch = store.folder / ".tmp"
    for folder, size in sweep(scratch, older_than, remove=False):
        yield Garbage("unfinished", folder, size, _age(folder), "of a process that ended")
    for folder in sorted(scratch.glob("download-*")):
        lock = FileLock(store.root / "locks" / f"{folder.name}.lock")
        if _age(folder) >= older_than and lock.try_acquire():
            lock.release()
            yield Garbage("unfinished", folder, _size(folder), _age(folder), "a download that was given up")


def _scratch(store: Store, used: Used, older_than: float) -> Iterator[Garbage]:
    """Checkpoints of stages that nobody came back to."""
    for folder in sorted(checkpoints_folder().glob("*")):
        newest = min((_age(file) for file in files_below(folder).values()), default=_age(folder))
        if newest >= older_than and folder.name not in used.keys:
            yield Garbage("checkpoint", folder, _size(folder), newest, "no run came back to it")


def _age(path: Path) -> float:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except FileNotFoundError:
        return 0.0


def _size(folder: Path) -> int:
    total = 0
    for file in files_below(folder).values():
        with suppress(OSError):
            total += file.lstat().st_size
    return total


def _set_md5(folder: Path) -> str | None:
    with suppress(OSError, ValueError):
        if (folder / SET).is_file():
            return set_md5(read_json(folder / SET))
    return None


def _recorded_digest(file: Path) -> str | None:
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
        result = json.loads(content["result"]) if isinstance(content["result"], str) else content["result"]
        return next(_found(result))
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        return None


def _found(value: Any) -> Iterator[str]:
    """The artifact's digest in Prefect's form of a pydantic model."""
    if isinstance(value, dict):
        digest = value.get("digest")
        if isinstance(digest, str) and _DIGEST.fullmatch(digest):
            yield digest
        for inner in value.values():
            yield from _found(inner)
