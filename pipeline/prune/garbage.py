"""Garbage collector of the store, on this machine and in a bucket, by the same rules.

Kept in any case: what was made or used within the age limit; what a run that is under way lists in its journal; the
whole of every journal whose run has a folder, an MLflow run or a registered version; and, in a bucket, every published
run with its files. The age limit is also the time of grace for what is being written.

A run folder on another machine is not seen from here: what only that one refers to goes from a bucket once it was not
used for the age limit, and is computed again by whoever needs it.
"""

import json
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.environment import coalora_home
from pipeline.inputs.loaders import SET
from pipeline.prune.roots import Journal, Roots, Used, artifact_digests, set_md5
from pipeline.s3.client import S3Object
from pipeline.stages.checkpoints import checkpoints_folder
from pipeline.store.artifacts import Manifest, artifact_folder, files_below
from pipeline.store.locks import FileLock
from pipeline.store.publish import published_names, read_run
from pipeline.store.shared import ARTIFACTS, LOCKS, OBJECTS, RECORDS, SharedStore, object_name, parse_record
from pipeline.store.store import Store

_RECORD = re.compile(r"[a-z0-9-]+-[0-9a-f]{64}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_UNUSED = "no run, version or DVC file refers to it"
_NO_ARTIFACT, _UNREADABLE = "of an artifact that goes or is gone", "unreadable"


# Kind -> folder in COALORA_HOME, and what happens to whoever asks for it later.
HAD_AGAIN = {
    "download": ("downloads", "fetched again when asked for"),
    "unpacked": ("gguf", "unpacked again when asked for"),
}


@dataclass(frozen=True)
class Garbage:
    """Something that may go."""

    kind: str  # for the table
    place: Path | str  # on this machine, or below the bucket's prefix
    nbytes: int
    age: float  # seconds since it was made or used
    why: str
    etag: str = ""  # in a bucket; another one is another object


def find_garbage(store: Store, roots: Roots, results: Path, *, older_than: float) -> list[Garbage]:
    """All that may go from this machine, records before the artifacts that they name."""
    used, dead = roots.used(store.root, older_than)
    folders = [folder for folder in sorted(store.folder.glob("??/*")) if _DIGEST.fullmatch(folder.name)]
    records = [file for file in sorted(results.glob("*")) if _RECORD.fullmatch(file.name)]
    unused = _unused(
        {folder.name: _item("artifact", folder) for folder in folders},
        lambda digest: file.read_bytes() if (file := store.folder / artifact_folder(digest) / SET).is_file() else None,
        {file.name: _item("record", file) for file in records},
        lambda key: _recorded_digest(results / key),
        used, roots, older_than,
    )  # fmt: skip
    journals = [_item("journal", journal.path, "its run is gone") for journal in dead]
    return [
        *_unfinished(store, older_than),
        *unused,
        *_checkpoints(used, older_than),
        *_had_again(older_than),
        *journals,
    ]


def remove(store: Store, item: Garbage, *, older_than: float) -> bool:
    """Remove one piece from this machine; False where it was used meanwhile, or is gone."""
    path = Path(item.place)
    if item.kind == "artifact":
        return store.remove(path, older_than)
    if item.kind == "checkpoint":
        lock = FileLock(store.root / "locks" / f"{path.name}.lock")
        if not lock.try_acquire():
            return False
        try:
            shutil.rmtree(path, ignore_errors=True)
        finally:
            lock.release()
    elif item.kind in HAD_AGAIN and _age(path) < older_than:
        return False
    elif item.kind in HAD_AGAIN:
        shutil.rmtree(path, ignore_errors=True)
    elif item.kind == "unfinished":
        shutil.rmtree(path, ignore_errors=True)
        path.with_suffix(".lock").unlink(missing_ok=True)
    elif item.kind == "journal" and Journal(path).is_used():
        return False
    else:
        path.unlink(missing_ok=True)
    return True


def find_shared_garbage(
    shared: SharedStore, used: Used, roots: Roots, *, older_than: float, without: Collection[tuple[str, str]] = ()
) -> list[Garbage]:
    """All that may go from a bucket, in an order in which nothing that is left refers to what is gone.

    Args:
        used: what this machine's journals list.
        older_than: seconds; what is younger stays.
        without: runs (pipeline, run) whose manifests do not count: what would be left over without them.

    Raises:
        CoaloraError: the manifest of a run is damaged: what it refers to is not known, and nothing may go.
    """

    def item(kind: str, found: S3Object, why: str = "") -> Garbage:
        return Garbage(kind, found.name, found.size, found.age, why, found.etag)

    location = shared.location
    objects = list(location.list(OBJECTS))  # before the manifests: what a newer one names is newer, too
    artifacts = {_stem(found.name): found for found in location.list(ARTIFACTS)}
    records = {_stem(found.name): found for found in location.list(RECORDS)}
    with ThreadPoolExecutor(location.settings.workers) as pool:
        read = list(pool.map(lambda found: _manifest(shared, found), artifacts.values()))
    manifests = {digest: manifest for digest, manifest in zip(artifacts, read, strict=True) if manifest is not None}

    def record_of(key: str) -> str | None:
        found = location.get(records[key].name)
        artifact = None if found is None else parse_record(found.content)
        return None if artifact is None else artifact.digest

    garbage = _unused(
        {digest: item("artifact", artifacts[digest]) for digest in manifests},
        lambda digest: _set_of(shared, manifests[digest]),
        {key: item("record", found) for key, found in records.items()},
        record_of,
        used, roots, older_than,
    )  # fmt: skip
    going = {item.place for item in garbage}
    kept: list[Manifest] = [manifest for d, manifest in manifests.items() if artifacts[d].name not in going]
    kept += [read_run(shared, *run) for run in published_names(shared) if run not in without]
    named = {object_name(entry.sha256) for manifest in kept for entry in manifest.files}
    rest = [item("artifact", found, _UNREADABLE) for digest, found in artifacts.items() if digest not in manifests]
    rest += [item("object", found, _UNUSED) for found in objects if found.name not in named]
    rest += [item("lock", found, "of a run that ended") for found in location.list(LOCKS)]
    return garbage + [piece for piece in rest if piece.age >= older_than]


def remove_shared(
    shared: SharedStore, found: Sequence[Garbage], used: Used, roots: Roots, *, older_than: float
) -> list[Garbage]:
    """Remove those of `found` that are still garbage, and unchanged; returns them."""
    still = {(item.place, item.etag) for item in find_shared_garbage(shared, used, roots, older_than=older_than)}
    gone = [item for item in found if (item.place, item.etag) in still]
    if gone:
        shared.location.delete([str(item.place) for item in gone])
    return gone


def _unused(
    artifacts: Mapping[str, Garbage],
    set_of: Callable[[str], bytes | None],
    records: Mapping[str, Garbage],
    digest_of: Callable[[str], str | None],
    used: Used,
    roots: Roots,
    older_than: float,
) -> list[Garbage]:
    """The rules, for a disk and a bucket alike: the records and artifacts that may go.

    Args:
        artifacts, records: what there is, by digest and by cache key.
        set_of: bytes of an artifact's configuration set, None where it has none.
        digest_of: digest of the artifact that a record names, None for one that cannot be read.
    """
    going = {
        digest: replace(item, why=_UNUSED)
        for digest, item in artifacts.items()
        if item.age >= older_than
        and digest not in used.digests
        and not (roots.set_md5s and _md5(set_of(digest)) in roots.set_md5s)
    }
    gone: list[Garbage] = []
    for key, item in records.items():
        if item.age < older_than or key in used.keys:
            continue
        named = digest_of(key)
        if named is None or named in going or named not in artifacts:
            gone.append(replace(item, why=_UNREADABLE if named is None else _NO_ARTIFACT))
    return [*gone, *going.values()]


def _unfinished(store: Store, older_than: float) -> Iterator[Garbage]:
    for folder in store.sweep(older_than, remove=False):
        yield _item("unfinished", folder, "of a process that ended")
    for folder, lock in store.downloads():
        if _age(folder) >= older_than and lock.try_acquire():
            lock.release()
            yield _item("unfinished", folder, "a download that was given up")


def _checkpoints(used: Used, older_than: float) -> Iterator[Garbage]:
    """Checkpoints of stages that nobody came back to."""
    for folder in sorted(checkpoints_folder().glob("*")):
        newest = min((_age(file) for file in files_below(folder).values()), default=_age(folder))
        if newest >= older_than and folder.name not in used.keys:
            yield Garbage("checkpoint", folder, _size(folder), newest, "no run came back to it")


def _had_again(older_than: float) -> Iterator[Garbage]:
    """Bundles that were fetched and models that were unpacked, which every use makes young."""
    for kind, (room, why) in HAD_AGAIN.items():
        folders = [folder for folder in sorted((coalora_home() / room).glob("*")) if folder.is_dir()]
        yield from (_item(kind, folder, why) for folder in folders if _age(folder) >= older_than)


def _item(kind: str, path: Path, why: str = "") -> Garbage:
    return Garbage(kind, path, _size(path), _age(path), why)


def _age(path: Path) -> float:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except FileNotFoundError:
        return 0.0


def _size(path: Path) -> int:
    total = 0
    for file in files_below(path).values() if path.is_dir() else [path]:
        with suppress(OSError):
            total += file.lstat().st_size
    return total


def _recorded_digest(file: Path) -> str | None:
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
        result = json.loads(content["result"]) if isinstance(content["result"], str) else content["result"]
        return next(artifact_digests(result))
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        return None


def _stem(name: str) -> str:
    """`<digest>` of `artifacts/<digest[:2]>/<digest>.json`, `<cache key>` of `records/<cache key>.json`."""
    return name.rpartition("/")[2].removesuffix(".json")


def _manifest(shared: SharedStore, found: S3Object) -> Manifest | None:
    """The manifest in the bucket, without noting a use; None where it is not the artifact's."""
    read = shared.location.get(found.name)
    with suppress(ValueError):
        manifest = Manifest.model_validate_json(read.content) if read is not None else None
        if manifest is not None and manifest.digest == _stem(found.name):
            return manifest
    return None


def _set_of(shared: SharedStore, manifest: Manifest) -> bytes | None:
    for entry in manifest.files:
        if entry.path == SET and (found := shared.location.get(object_name(entry.sha256))) is not None:
            return found.content
    return None


def _md5(configuration_set: bytes | None) -> str | None:
    """MD5 under which DVC has a configuration set."""
    with suppress(ValueError):
        return None if configuration_set is None else set_md5(json.loads(configuration_set))
    return None
