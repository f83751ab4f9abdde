"""Content-addressed store: an artifact is a folder of files, named by the digest of what is in them.

`<home>/store/<digest[:2]>/<digest>/` holds the files and `manifest.json`, which is written last, before one
atomic rename: a folder that has its final name is complete. Prefect keeps only the small `Artifact`
reference, and a cache hit says nothing about the bytes: `Store.verify` hashes them again each time.

With `COALORA_STORE` (`pipeline.store.shared`) the folder is a cache of a store that machines share: `path` downloads
what is not here, `share` uploads what is new.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from coalora.errors import CoaloraError
from coalora.files import file_sha256, json_bytes, replace_file
from pipeline.environment import STORE_VARIABLE, coalora_home
from pipeline.faults import disk_faults
from pipeline.store.artifacts import MANIFEST, Artifact, FileEntry, Scalar, artifact_folder, content_digest, files_below
from pipeline.store.locks import FileLock, wait_for
from pipeline.store.materialize import MARKER, copy_out, damaged
from pipeline.store.workspace import workspace

if TYPE_CHECKING:
    from pipeline.store.shared import SharedStore

__all__ = ["MANIFEST", "MARKER", "Artifact", "FileEntry", "Scalar", "Store"]


class Store:
    """Artifacts below one home folder; safe for several processes at a time.

    Args:
        root: home folder; `COALORA_HOME`, else `.coalora` under the working directory.
    """

    def __init__(self, root: str | Path | None = None) -> None:
        self.root = Path(root).expanduser().resolve() if root is not None else coalora_home()
        self.folder = self.root / "store"
        self._scratch = self.folder / ".tmp"

    @property
    def shared(self) -> SharedStore | None:
        """The store that this one is a cache of, where `COALORA_STORE` names one."""
        if not os.environ.get(STORE_VARIABLE):
            return None  # without the import of boto3
        from pipeline.store.shared import shared_store

        return shared_store()

    def place(self, artifact: Artifact) -> Path:
        """Folder of the artifact's files, whether or not it is there."""
        return self.folder / artifact_folder(artifact.digest)

    def path(self, artifact: Artifact) -> Path:
        """Folder of the artifact's files (read only); downloaded from the shared store where it is not here.

        Without a shared store: whether or not it is there.

        Raises:
            CoaloraError: the shared store does not have it either, or does not answer.
        """
        folder = self.place(artifact)
        if not folder.is_dir() and (shared := self.shared) is not None:
            self._fetch(artifact, shared)
        return folder

    def put(self, kind: str, build: Callable[[Path], Mapping[str, Scalar] | None]) -> Artifact:
        """Keep what `build` writes into the empty folder it is given; its return value becomes `meta`.

        The same content is kept once; a damaged copy of it is replaced. An exception leaves nothing behind.

        Raises:
            CoaloraError: no file was written, one is no regular file or has the manifest's name, or
                `meta` holds something else than finite JSON scalars.
        """
        with workspace(self.root, self._scratch) as work:
            meta = build(work)
            files = files_below(work)
            if not files or MANIFEST in files:
                raise CoaloraError(f"an artifact holds at least one file, and none named {MANIFEST}", got=sorted(files))
            for name, file in files.items():
                if file.is_symlink() or not file.is_file():
                    raise CoaloraError("an artifact holds regular files only", got=name, remedy="copy it")
            entries = [FileEntry(n, f.stat().st_size, file_sha256(f)) for n, f in sorted(files.items())]
            try:
                artifact = Artifact(
                    kind=kind,
                    digest=content_digest(entries),
                    nbytes=sum(entry.size for entry in entries),
                    meta=dict(meta or {}),
                )
            except ValidationError as error:
                raise CoaloraError(f"meta of artifact {kind!r} holds finite JSON scalars", got=str(error)) from error
            self._finish(work, artifact, entries)
        return artifact

    def entries(self, artifact: Artifact) -> list[FileEntry]:
        """The artifact's files in order, as its manifest lists them.

        Raises:
            CoaloraError: the artifact is not in the store, or its manifest is damaged.
        """
        entries, problem = self._manifest(artifact)
        if problem:
            raise damaged(artifact, [problem])
        return entries

    def verify(self, artifact: Artifact) -> list[str]:
        """Problems of the stored files: missing, altered or extra ones; empty = whole. Hashes every byte."""
        entries, problem = self._manifest(artifact)
        if problem:
            return [problem]
        found = files_below(self.place(artifact))
        found.pop(MANIFEST, None)
        problems: list[str] = []
        for entry in entries:
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

        A copy here that is damaged goes where the shared store has a whole one. Asking counts as use: what was used
        lately is not pruned.
        """
        self._touch(artifact)
        found = self.verify(artifact)
        if not found or (shared := self.shared) is None or shared.manifest(artifact) is None:
            return found
        if self.place(artifact).exists():
            self._discard(artifact)
        return []

    def share(self, artifact: Artifact) -> int:
        """Upload the artifact where there is a shared store that lacks it; returns the bytes that were sent."""
        shared = self.shared
        if shared is None or shared.manifest(artifact) is not None:
            return 0
        return shared.push(artifact, self.place(artifact), self.entries(artifact))

    def remove(self, folder: Path, older_than: float) -> bool:
        """Remove an artifact's folder unless it was made or used in the last `older_than` seconds; whether it went."""
        with workspace(self.root, self._scratch) as work:
            with self._committing():
                try:
                    if time.time() - folder.stat().st_mtime < older_than:
                        return False
                    folder.rename(work / "removed")
                except FileNotFoundError:
                    return False
            return True

    def _touch(self, artifact: Artifact) -> None:
        # Under the lock of `remove`: what is touched first stays, what is removed first is missing.
        with suppress(OSError), (self.folder / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            os.utime(self.place(artifact))

    def _fetch(self, artifact: Artifact, shared: SharedStore) -> None:
        lock = FileLock(self.root / "locks" / f"download-{artifact.digest}.lock")
        wait_for(lock, lambda holder, seconds: None)  # one download for all processes of this machine
        try:
            if self.place(artifact).is_dir():
                return
            # Not a workspace: one that was broken off is taken up again. `flows.prune` removes forgotten ones.
            work = self._scratch / f"download-{artifact.digest}"
            with disk_faults(self.root):
                work.mkdir(parents=True, exist_ok=True)
                entries = shared.pull(artifact, work)
                self._finish(work, artifact, entries)
                shutil.rmtree(work, ignore_errors=True)  # where another process was faster
        finally:
            lock.release()

    def _discard(self, artifact: Artifact) -> None:
        with workspace(self.root, self._scratch) as work, self._committing(), suppress(FileNotFoundError):
            self.place(artifact).rename(work / "damaged")

    def materialize(self, artifact: Artifact, destination: str | Path, *, subset: Sequence[str] | None = None) -> Path:
        """Copy the files to a folder outside the store, which then holds exactly these files and a marker.

        Nothing is written when the folder is as wanted already. A folder with a marker of ours is brought up
        to date: what does not belong to the artifact is removed from it.

        Args:
            subset: relative paths or shell patterns (`*.json`) of the files to copy; all by default.

        Raises:
            CoaloraError: the destination is a file, lies in the store, or is a folder with files but without
                our marker; a pattern matches nothing; the artifact is damaged.
        """
        source = self.path(artifact)
        with disk_faults(Path(os.path.abspath(destination))):
            return copy_out(source, self.folder, artifact, self.entries(artifact), Path(destination), subset)

    def _manifest(self, artifact: Artifact) -> tuple[list[FileEntry], str | None]:
        """(entries, problem): exactly one of the two says something."""
        name = f"{artifact.kind} {artifact.digest[:12]}"
        try:
            content = json.loads((self.place(artifact) / MANIFEST).read_text(encoding="utf-8"))
            entries = [FileEntry(str(path), int(size), str(sha)) for path, size, sha in content["files"]]
        except (FileNotFoundError, NotADirectoryError):
            return [], f"{name}: not in the store {self.folder}"
        except (OSError, ValueError, KeyError, TypeError):
            return [], f"{name}: {MANIFEST} is unreadable"
        if content_digest(entries) != artifact.digest:
            return [], f"{name}: {MANIFEST} is altered"
        return entries, None

    def _finish(self, work: Path, artifact: Artifact, entries: list[FileEntry]) -> None:
        """Write the manifest of a workspace's files and give the folder its name."""
        replace_file(work / MANIFEST, json_bytes({"digest": artifact.digest, "files": entries}))
        for name in [MANIFEST, *(entry.path for entry in entries)]:
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
    def _committing(self) -> Iterator[None]:
        """Makes "look, then replace" one step; the kernel frees the lock when its holder is killed."""
        with (self.folder / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
