"""Content-addressed store: an artifact is a folder of files, named by the digest of its content.

`<home>/store/<digest[:2]>/<digest>/` holds the files and `manifest.json`, which is written last, before one atomic
rename: a folder that has its final name is complete. Prefect keeps only the small `Artifact` reference, and a cache hit
says nothing about the bytes: `Store.problems` does.

With a shared store (`pipeline.store.shared`) the folder is a cache of it: `path` downloads what is not here, `share`
uploads what is new.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING

import filelock
from pydantic import ValidationError

from coalora.errors import CoaloraError
from coalora.files import json_bytes, replace_file, write_json
from pipeline.environment import READ_ONLY_VARIABLE, STORE_VARIABLE, coalora_home
from pipeline.faults import disk_faults
from pipeline.store.artifacts import (
    MANIFEST,
    MARKER,
    Artifact,
    FileEntry,
    Manifest,
    Scalar,
    artifact_folder,
    files_below,
    first_problem,
    manifest_of,
)
from pipeline.store.copies import fill
from pipeline.store.locks import FileLock, Lock, LockChain, is_held, wait_for

if TYPE_CHECKING:
    from pipeline.store.shared import SharedStore

__all__ = ["MANIFEST", "MARKER", "Artifact", "FileEntry", "Scalar", "Store", "default_store"]

STALE_SECONDS = 24 * 3600.0  # after which the workspace of a killed process is swept away
SETTLED_NS = 100_000_000
Stats = dict[str, tuple[int, int, int]]  # file -> inode, size, time of modification

_whole: dict[Path, Stats] = {}  # folders of artifacts that this process has hashed


class Store:
    """Artifacts below one home folder; safe for several processes at a time.

    Args:
        root: home folder; `default_store` takes the environment's.
        shared_url: `s3://bucket/prefix` of the shared store that this one is a cache of; none by default.
        read_only: nothing is written to the shared store.
    """

    def __init__(self, root: str | Path, *, shared_url: str | None = None, read_only: bool = False) -> None:
        self.root = Path(root).expanduser().resolve()
        self.folder = self.root / "store"
        self.shared_url, self.read_only = shared_url, read_only
        self._scratch = self.folder / ".tmp"

    @property
    def shared(self) -> SharedStore | None:
        """The store that this one is a cache of, where there is one."""
        if self.shared_url is None:
            return None  # without the import of boto3
        from pipeline.store.shared import open_shared

        return open_shared(self.shared_url, read_only=self.read_only)

    def place(self, artifact: Artifact) -> Path:
        """Folder of the artifact's files, whether or not it is there."""
        return self.folder / artifact_folder(artifact.digest)

    def path(self, artifact: Artifact) -> Path:
        """Folder of the artifact's files (read only); downloaded from the shared store where it is not here.

        Without a shared store: whether or not it is there.
        """
        folder = self.place(artifact)
        if not folder.is_dir() and (shared := self.shared) is not None:
            self._fetch(artifact, shared)
        return folder

    def lock(self, cache_key: str) -> Lock:
        """The lock of a key, on this machine and among those that write to the shared store."""
        here = FileLock(self.root / "locks" / f"{cache_key}.lock")
        shared = self.shared
        return here if shared is None or shared.read_only else LockChain(here, shared.lease(cache_key))

    def put(self, kind: str, build: Callable[[Path], Mapping[str, Scalar] | None]) -> Artifact:
        """Keep what `build` writes into the empty folder it is given; its return value becomes `meta`.

        The same content is kept once; a damaged copy of it is replaced. An exception leaves nothing behind.

        Raises:
            CoaloraError: no file was written, one is no regular file or has a name that a manifest cannot hold, or
                `meta` holds something else than finite JSON scalars.
        """
        with self._workspace() as work:
            meta = build(work)
            manifest = manifest_of(files_below(work).items(), f"artifact {kind!r}")
            if not manifest.files:
                raise CoaloraError(f"Artifact {kind!r} was made without a file", remedy="Write at least one")
            try:
                artifact = Artifact(kind=kind, digest=manifest.digest, nbytes=manifest.nbytes, meta=dict(meta or {}))
            except ValidationError as error:
                raise CoaloraError(
                    f"The facts of artifact {kind!r} are no finite JSON scalars: {first_problem(error)}"
                ) from error
            self._finish(work, artifact, manifest)
        return artifact

    def put_json(self, kind: str, files: Mapping[str, object], meta: Mapping[str, Scalar] | None = None) -> Artifact:
        """Keep JSON files, by their names."""

        def write(folder: Path) -> Mapping[str, Scalar] | None:
            for name, content in files.items():
                write_json(folder / name, content)
            return meta

        return self.put(kind, write)

    def manifest(self, artifact: Artifact) -> Manifest:
        """The artifact's files."""
        manifest, problem = self._read_manifest(artifact)
        if manifest is None:
            raise _damaged(artifact, problem)
        return manifest

    def verify(self, artifact: Artifact) -> list[str]:
        """Problems of the stored files: missing, altered or extra ones; empty = whole. Hashes every byte."""
        manifest, problem = self._read_manifest(artifact)
        if manifest is None:
            return [problem]
        found = files_below(self.place(artifact))
        found.pop(MANIFEST, None)
        problems: list[str] = []
        for entry in manifest.files:
            file = found.pop(entry.path, None)
            if file is None:
                problems.append(f"{entry.path}: missing")
            elif file.is_symlink():
                problems.append(f"{entry.path}: altered (a link)")
            elif found_problem := entry.problem(file):
                problems.append(found_problem)
        return problems + [f"{name}: extra" for name in sorted(found)]

    def problems(self, artifact: Artifact) -> list[str]:
        """Why the artifact cannot be read; empty = it can be, here or after a download from the shared store.

        What this process has found whole is hashed again only when a file has changed (inode, size or time). A copy
        here that is damaged goes where the shared store has a whole one. Asking counts as use: what was used lately is
        not pruned.
        """
        folder = self.place(artifact)
        self.touch(artifact)
        before = _stats(folder)
        if before and _whole.get(folder) == before:
            return []
        _whole.pop(folder, None)
        if not (found := self.verify(artifact)):
            # Written within a tick of its clock, a file could change unseen: it is hashed again the next time.
            if before and time.time_ns() - max(modified for _, _, modified in before.values()) > SETTLED_NS:
                _whole[folder] = before
            return []
        if (shared := self.shared) is None or shared.manifest(artifact) is None:
            return found
        if folder.exists():
            with self._workspace() as work, self._committing(), suppress(FileNotFoundError):
                folder.rename(work / "damaged")
        return []

    def share(self, artifact: Artifact) -> int:
        """Upload the artifact where there is a shared store that lacks it; returns the bytes that were sent."""
        shared = self.shared
        if shared is None or shared.read_only or shared.manifest(artifact) is not None:
            return 0
        return shared.push(artifact, self.place(artifact), self.manifest(artifact))

    def materialize(self, artifact: Artifact, destination: str | Path) -> Path:
        """Copy the files to a folder outside the store, which then holds exactly these files and a marker.

        Nothing is written when the folder is as wanted already. A folder with a marker of ours is brought up
        to date: what does not belong to the artifact is removed from it.

        Raises:
            CoaloraError: the destination is a file, lies in the store, or is a folder with files but without
                our marker; the artifact is damaged.
        """
        source = self.path(artifact)
        target = Path(os.path.abspath(destination))
        real = target.resolve()
        if real == self.folder or self.folder in real.parents or real in self.folder.parents:
            raise CoaloraError(
                f"The destination {target} is a folder of the store {self.folder}", remedy="Name another one"
            )

        def copy(missing: list[FileEntry]) -> None:
            for entry in missing:
                _copy(source / entry.path, target / entry.path, entry, artifact)

        with disk_faults(target):
            fill(target, self.manifest(artifact).files, {"digest": artifact.digest}, copy)
        return target

    def remove(self, folder: Path, older_than: float) -> bool:
        """Remove an artifact's folder unless it was made or used in the last `older_than` seconds; whether it went."""
        with self._workspace() as work:
            with self._committing():
                try:
                    if time.time() - folder.stat().st_mtime < older_than:
                        return False
                    folder.rename(work / "removed")
                except FileNotFoundError:
                    return False
            return True

    def sweep(self, older_than: float = STALE_SECONDS, *, remove: bool = True) -> list[Path]:
        """Workspaces of killed processes: older than so many seconds, their lock held by nobody; removes them."""
        found: list[Path] = []
        for lock in self._scratch.glob("*.lock"):
            with suppress(OSError):  # gone meanwhile
                if time.time() - lock.stat().st_mtime < older_than or is_held(lock):
                    continue
                found += [f for f in (lock.with_suffix(""), lock.with_suffix(".damaged")) if f.exists()]
                if remove:
                    for folder in (lock.with_suffix(""), lock.with_suffix(".damaged")):
                        shutil.rmtree(folder, ignore_errors=True)
                    lock.unlink()
        return found

    def downloads(self) -> list[tuple[Path, FileLock]]:
        """Folders of downloads that are under way or broken off, each with its lock."""
        folders = sorted(self._scratch.glob("download-*"))
        return [(folder, FileLock(self.root / "locks" / f"{folder.name}.lock")) for folder in folders]

    def touch(self, artifact: Artifact) -> None:
        # Under the lock of `remove`: what is touched first stays, what is removed first is missing.
        with suppress(OSError):
            if self.place(artifact).is_dir():
                with self._committing():
                    os.utime(self.place(artifact))

    def _fetch(self, artifact: Artifact, shared: SharedStore) -> None:
        # Not a workspace: one that was broken off keeps its whole files. `prune` removes forgotten ones.
        work = self._scratch / f"download-{artifact.digest}"
        lock = FileLock(self.root / "locks" / f"{work.name}.lock")
        wait_for(lock, lambda holder, seconds: None)  # one download for all processes of this machine
        try:
            if self.place(artifact).is_dir():
                return
            with disk_faults(self.root):
                work.mkdir(parents=True, exist_ok=True)
                self._finish(work, artifact, shared.pull(artifact, work))
                shutil.rmtree(work, ignore_errors=True)  # where another process was faster
        finally:
            lock.release()

    def _read_manifest(self, artifact: Artifact) -> tuple[Manifest | None, str]:
        """(manifest, problem): exactly one of the two says something."""
        name = f"{artifact.kind} {artifact.digest[:12]}"
        try:
            manifest = Manifest.model_validate_json((self.place(artifact) / MANIFEST).read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None, f"{name}: not in the store {self.folder}"
        except (OSError, ValidationError):
            return None, f"{name}: {MANIFEST} is unreadable"
        if manifest.digest != artifact.digest:
            return None, f"{name}: {MANIFEST} is altered"
        return manifest, ""

    def _finish(self, work: Path, artifact: Artifact, manifest: Manifest) -> None:
        """Write the manifest of a workspace's files and give the folder its name."""
        replace_file(work / MANIFEST, json_bytes(manifest.model_dump()))
        for name in [MANIFEST, *(entry.path for entry in manifest.files)]:
            (work / name).chmod(0o444)
        final = self.place(artifact)
        final.parent.mkdir(parents=True, exist_ok=True)
        with self._committing():
            if final.exists():
                if not self.verify(artifact):
                    return
                trash = work.with_name(work.name + ".damaged")
                final.rename(trash)
                work.rename(final)
                shutil.rmtree(trash, ignore_errors=True)
            else:
                work.rename(final)

    @contextmanager
    def _workspace(self) -> Iterator[Path]:
        """An empty folder, locked while it is worked in and removed afterwards; those of killed processes go."""
        with disk_faults(self.root):
            self._scratch.mkdir(parents=True, exist_ok=True)
            self.sweep()
            work = self._scratch / uuid.uuid4().hex
            lock = work.with_name(work.name + ".lock")
            with filelock.FileLock(lock):
                try:
                    work.mkdir()
                    yield work
                finally:
                    shutil.rmtree(work, ignore_errors=True)
                    lock.unlink(missing_ok=True)

    def _committing(self) -> filelock.BaseFileLock:
        """Makes "look, then replace" one step; the kernel frees the lock when its holder is killed."""
        return filelock.FileLock(self.folder / ".lock", poll_interval=0.005)


def default_store() -> Store:
    """The store that the environment names: COALORA_HOME, COALORA_STORE and COALORA_STORE_READ_ONLY."""
    read_only = os.environ.get(READ_ONLY_VARIABLE) or "0"
    if read_only not in ("0", "1"):
        raise CoaloraError(f"{READ_ONLY_VARIABLE} is {read_only[:80]!r}", remedy="Set it to 1 or 0")
    return Store(coalora_home(), shared_url=os.environ.get(STORE_VARIABLE) or None, read_only=read_only == "1")


_current: ContextVar[Store | None] = ContextVar("coalora_store", default=None)


def current_store() -> Store:
    """The store of the run under way: of the runner whose call this is, else the environment's."""
    return _current.get() or default_store()


@contextmanager
def using(store: Store) -> Iterator[None]:
    """Calls of the block, in its threads as well, read and write this store."""
    token = _current.set(store)
    try:
        yield
    finally:
        _current.reset(token)


def _copy(source: Path, target: Path, entry: FileEntry, artifact: Artifact) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    # Never written in place: DVC may have linked the old file to its cache.
    part = target.with_name(f".{uuid.uuid4().hex}.part")
    try:
        shutil.copyfile(source, part)
        if problem := entry.problem(part):
            raise _damaged(artifact, problem)
        os.replace(part, target)
    except FileNotFoundError as error:
        raise _damaged(artifact, f"{entry.path}: missing") from error
    finally:
        part.unlink(missing_ok=True)


def _stats(folder: Path) -> Stats:
    try:
        found = {name: path.lstat() for name, path in files_below(folder).items()}
    except FileNotFoundError:  # it goes while it is looked at
        return {}
    return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}


def _damaged(artifact: Artifact, problem: str) -> CoaloraError:
    return CoaloraError(
        f"{artifact.kind} {artifact.digest[:12]} in the store is damaged: {problem}",
        remedy="Run the pipeline again: the stage that made it rebuilds it",
    )
