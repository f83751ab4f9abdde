"""Content-addressed store: an artifact is a folder of files, named by the digest of what is in them.

`<home>/store/<digest[:2]>/<digest>/` holds the files and `manifest.json`, which is written last, before one
atomic rename: a folder that has its final name is complete. Prefect keeps only the small `Artifact`
reference, and a cache hit says nothing about the bytes: `Store.verify` hashes them again each time.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path

from pydantic import ValidationError

from coalora.errors import CoaloraError
from tasks.artifacts import Artifact, FileEntry, Scalar, content_digest, file_sha256, files_below
from tasks.environment import coalora_home

__all__ = ["MANIFEST", "MARKER", "Artifact", "FileEntry", "Scalar", "Store"]

MANIFEST = "manifest.json"
MARKER = ".coalora-artifact"
_STALE_SECONDS = 24 * 3600.0


class Store:
    """Artifacts below one home folder; safe for several processes at a time.

    Args:
        root: home folder; `COALORA_HOME`, else `.coalora` under the working directory.
    """

    def __init__(self, root: str | Path | None = None) -> None:
        self.root = Path(root).expanduser().resolve() if root is not None else coalora_home()
        self.folder = self.root / "store"
        self._scratch = self.folder / ".tmp"

    def path(self, artifact: Artifact) -> Path:
        """Folder of the artifact's files (read only), whether or not it is there."""
        return self.folder / artifact.digest[:2] / artifact.digest

    def put(self, kind: str, build: Callable[[Path], Mapping[str, Scalar] | None]) -> Artifact:
        """Keep what `build` writes into the empty folder it is given; its return value becomes `meta`.

        The same content is kept once; a damaged copy of it is replaced. An exception leaves nothing behind.

        Raises:
            CoaloraError: no file was written, one is no regular file or has the manifest's name, or
                `meta` holds something else than finite JSON scalars.
        """
        with self._workspace() as work:
            meta = build(work)
            files = files_below(work)
            if not files or MANIFEST in files:
                raise CoaloraError(f"an artifact holds at least one file, and none named {MANIFEST}", got=sorted(files))
            for name, file in files.items():
                if file.is_symlink() or not file.is_file():
                    raise CoaloraError("an artifact holds regular files only", got=name, remedy="copy it")
                file.chmod(0o444)
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
            _write_json(work / MANIFEST, {"digest": artifact.digest, "files": entries})
            (work / MANIFEST).chmod(0o444)
            self._commit(work, artifact)
        return artifact

    def entries(self, artifact: Artifact) -> list[FileEntry]:
        """The artifact's files in order, as its manifest lists them.

        Raises:
            CoaloraError: the artifact is not in the store, or its manifest is damaged.
        """
        entries, problem = self._manifest(artifact)
        if problem:
            raise _damaged(artifact, [problem])
        return entries

    def verify(self, artifact: Artifact) -> list[str]:
        """Problems of the stored files: missing, altered or extra ones; empty = whole. Hashes every byte."""
        entries, problem = self._manifest(artifact)
        if problem:
            return [problem]
        found = files_below(self.path(artifact))
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
        target = Path(os.path.abspath(destination))
        wanted = {entry.path: entry for entry in _select(self.entries(artifact), subset)}
        marker, present = self._inspect(target)
        state = {"digest": artifact.digest, "files": sorted(wanted), "complete": True}
        whole = {name for name, entry in wanted.items() if name in present and not entry.problem(present[name])}
        if marker == state and whole == set(wanted) == set(present):
            return target
        target.mkdir(parents=True, exist_ok=True)
        # Ours from here on: a copy that is killed can be taken up again.
        _write_json(target / MARKER, {**state, "complete": False})
        for name in set(present) - whole:
            present[name].unlink()
        for folder, _, _ in os.walk(target, topdown=False):
            with suppress(OSError):  # not empty
                Path(folder).rmdir()
        for name in sorted(set(wanted) - whole):
            _copy(self.path(artifact) / name, target / name, wanted[name], artifact)
        _write_json(target / MARKER, state)
        return target

    def _inspect(self, target: Path) -> tuple[object, dict[str, Path]]:
        """(content of the marker or None, files of the destination); refuses what must not be overwritten."""
        real = target.resolve()
        if real == self.folder or self.folder in real.parents or real in self.folder.parents:
            raise CoaloraError("the destination lies outside the store", got=target)
        if not target.exists():
            return None, {}
        if not target.is_dir():
            raise CoaloraError("the destination is a folder", got=target, remedy="remove the file")
        present = files_below(target)
        marker = present.pop(MARKER, None)
        content: object = None
        if marker is not None:
            with suppress(ValueError, OSError):
                content = json.loads(marker.read_text(encoding="utf-8"))
        if content is None and present:
            raise CoaloraError(
                f"only an empty folder, or one with our {MARKER}, is written to",
                got=f"{target} with {len(present)} other files",
                remedy="name another folder, or empty this one",
            )
        return content, present

    def _manifest(self, artifact: Artifact) -> tuple[list[FileEntry], str | None]:
        """(entries, problem): exactly one of the two says something."""
        name = f"{artifact.kind} {artifact.digest[:12]}"
        try:
            content = json.loads((self.path(artifact) / MANIFEST).read_text(encoding="utf-8"))
            entries = [FileEntry(str(path), int(size), str(sha)) for path, size, sha in content["files"]]
        except (FileNotFoundError, NotADirectoryError):
            return [], f"{name}: not in the store {self.folder}"
        except (OSError, ValueError, KeyError, TypeError):
            return [], f"{name}: {MANIFEST} is unreadable"
        if content_digest(entries) != artifact.digest:
            return [], f"{name}: {MANIFEST} is altered"
        return entries, None

    def _commit(self, work: Path, artifact: Artifact) -> None:
        final = self.path(artifact)
        final.parent.mkdir(parents=True, exist_ok=True)
        # The lock makes "look, then replace" one step; the kernel frees it when its holder is killed.
        with (self.folder / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
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
        self._scratch.mkdir(parents=True, exist_ok=True)
        self._sweep()
        work = self._scratch / uuid.uuid4().hex
        lock_file = work.with_name(work.name + ".lock")
        with lock_file.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                work.mkdir()
                yield work
            finally:
                shutil.rmtree(work, ignore_errors=True)
                lock_file.unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Remove workspaces of killed processes: older than a day, and their lock held by nobody."""
        for lock_file in self._scratch.glob("*.lock"):
            with suppress(OSError), lock_file.open("r+") as lock:  # gone meanwhile, or still held
                if time.time() - lock_file.stat().st_mtime < _STALE_SECONDS:
                    continue
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for folder in (lock_file.with_suffix(""), lock_file.with_suffix(".damaged")):
                    shutil.rmtree(folder, ignore_errors=True)
                lock_file.unlink()


def _select(entries: list[FileEntry], subset: Sequence[str] | None) -> list[FileEntry]:
    if subset is None:
        return entries
    names = [entry.path for entry in entries]
    for pattern in subset:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise CoaloraError("every name of a subset is a file of the artifact", got=pattern, expected=names)
    return [entry for entry in entries if any(fnmatchcase(entry.path, pattern) for pattern in subset)]


def _copy(source: Path, target: Path, entry: FileEntry, artifact: Artifact) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    # Never written in place: DVC may have linked the old file to its cache.
    part = target.with_name(f".{target.name}.part")
    try:
        shutil.copyfile(source, part)
    except FileNotFoundError as error:
        raise _damaged(artifact, [f"{entry.path}: missing"]) from error
    if problem := entry.problem(part):
        part.unlink()
        raise _damaged(artifact, [problem])
    os.replace(part, target)


def _damaged(artifact: Artifact, problems: list[str]) -> CoaloraError:
    return CoaloraError(
        "an artifact is read only while its files are whole",
        got=f"{artifact.kind} {artifact.digest[:12]}: {'; '.join(problems)}",
        remedy="run the pipeline again: the stage that made it rebuilds it",
    )


def _write_json(path: Path, content: object) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(part, path)
