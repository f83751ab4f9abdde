"""Artifacts and manifests: a folder of files named by the digest of its content, and the checked list of these files.

    digest = sha256 of the JSON of the sorted [path, size, sha256] of all files

A manifest that another machine has written (a shared store, a published run) says which files are made on this one.
So every reader parses it with `Manifest` and nothing else, and a digest becomes a path in `artifact_folder` alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from coalora.errors import CoaloraError
from coalora.files import file_sha256

Scalar = bool | int | float | str | None
MANIFEST = "manifest.json"  # of an artifact's folder; written last
MARKER = ".coalora-artifact"  # of a folder that `pipeline.store.copies` fills
_MAX_BYTES = 1 << 53  # JSON's integers are exact up to here
_MAX_NAME, _MAX_PATH = 255, 1024  # bytes of a file's name and of its whole path


def _checked_digest(value: str) -> str:
    if len(value) != 64 or not set(value) <= set("0123456789abcdef"):
        raise ValueError(f"{value[:80]!r} is no sha256 of 64 hexadecimal digits")
    return value


def checked_name(name: str) -> str:
    """One part of a path, as it is; ValueError for what is none or could be read as another."""
    if name in ("", ".", "..") or "/" in name or "\\" in name or not name.isprintable():
        raise ValueError(f"{name[:80]!r} is no name of a file")
    if len(name.encode()) > _MAX_NAME:
        raise ValueError(f"the name {name[:40]!r}... has more than {_MAX_NAME} bytes")
    return name


def _checked_path(path: str) -> str:
    for name in path.split("/"):
        checked_name(name)
        if name == MARKER:
            raise ValueError(f"{path[:80]!r} has the name of the marker {MARKER}")
    if path == MANIFEST or len(path.encode()) > _MAX_PATH:
        raise ValueError(f"{path[:80]!r} is the manifest's own name or longer than {_MAX_PATH} bytes")
    return path


Digest = Annotated[str, AfterValidator(_checked_digest)]
FileName = Annotated[str, AfterValidator(checked_name)]


class Artifact(BaseModel):
    """Reference to a folder of files in a `Store`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: FileName  # "calibration", "adapter", ...
    digest: Digest  # of its files' manifest
    nbytes: int = Field(ge=0, le=_MAX_BYTES)
    meta: dict[str, Scalar] = {}  # small finite facts for people and tables; not part of the digest

    @property
    def of_this_machine(self) -> bool:
        """Whether it refers to a place on this machine (a local base model): other machines make their own."""
        return "path" in self.meta

    @field_validator("meta")
    @classmethod
    def _finite(cls, meta: dict[str, Scalar]) -> dict[str, Scalar]:
        bad = [name for name, value in meta.items() if isinstance(value, float) and not math.isfinite(value)]
        if bad:
            raise ValueError(f"not finite, which JSON cannot hold: {', '.join(bad)}")
        return meta


class FileEntry(BaseModel):
    """One file: relative posix path that stays inside its folder, bytes, sha256."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Annotated[str, AfterValidator(_checked_path)]
    size: int = Field(ge=0, le=_MAX_BYTES, strict=True)
    sha256: Digest

    @classmethod
    def of(cls, path: str, file: Path) -> FileEntry:
        """The entry of a file that is there; hashes it."""
        return cls(path=path, size=file.stat().st_size, sha256=file_sha256(file))

    def problem(self, file: Path) -> str | None:
        """Why `file` is not this entry, or None."""
        try:
            if file.stat().st_size != self.size or file_sha256(file) != self.sha256:
                return f"{self.path}: altered"
        except OSError as error:
            return f"{self.path}: unreadable ({error.strerror})"
        return None


class Manifest(BaseModel):
    """Files of a folder: no path twice, and none that is a folder of another."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    files: tuple[FileEntry, ...]

    @field_validator("files")
    @classmethod
    def _one_place_each(cls, files: tuple[FileEntry, ...]) -> tuple[FileEntry, ...]:
        paths = {entry.path for entry in files}
        folders = {str(folder) for path in paths for folder in PurePosixPath(path).parents}
        if len(paths) < len(files) or paths & folders:
            raise ValueError("a path is there twice, or is a folder of another")
        return files

    @property
    def digest(self) -> str:
        """sha256 over the sorted (path, size, sha256) of the files."""
        rows = sorted([entry.path, entry.size, entry.sha256] for entry in self.files)
        return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()

    @property
    def nbytes(self) -> int:
        return sum(entry.size for entry in self.files)

    def matching(self, patterns: Sequence[str] | None) -> list[FileEntry]:
        """Entries that fit one of the shell patterns; all of them without patterns."""
        for pattern in patterns or ():
            if not any(fnmatchcase(entry.path, pattern) for entry in self.files):
                folders = sorted({entry.path.rpartition("/")[0] or entry.path for entry in self.files})
                shown = ", ".join(folders[:20]) + (f" and {len(folders) - 20} more" if len(folders) > 20 else "")
                raise CoaloraError(
                    f"The pattern {pattern!r} fits no file",
                    remedy=f"Write something like {folders[0]}/*; there is {shown}" if folders else "Leave it out",
                )
        return [e for e in self.files if not patterns or any(fnmatchcase(e.path, pattern) for pattern in patterns)]


def files_below(folder: Path) -> dict[str, Path]:
    """{relative posix path: path} of everything below but plain folders. Links are listed, not followed."""
    found: dict[str, Path] = {}
    for parent, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        for name in files + links:
            file = Path(parent) / name
            found[file.relative_to(folder).as_posix()] = file
    return found


def manifest_of(files: Iterable[tuple[str, Path]], whose: str) -> Manifest:
    """The manifest of files by their paths in it; hashes each."""
    entries = []
    for name, file in sorted(files):
        if file.is_symlink() or not file.is_file():
            raise CoaloraError(f"{name!r} in {whose} is a link or no regular file", remedy="Put a copy in its place")
        try:
            entries.append(FileEntry.of(name, file))
        except ValidationError as error:
            raise CoaloraError(f"No manifest can list {name!r} in {whose}: {first_problem(error)}") from error
    return Manifest(files=tuple(entries))


def first_problem(error: ValidationError) -> str:
    """The first thing that pydantic found, in one short line."""
    problem: Any = error.errors(include_url=False, include_input=False)[0]
    message = str(problem["msg"]).removeprefix("Value error, ")
    where = ".".join(map(str, problem["loc"]))
    return f"{where}: {message}"[:300] if where else message[:300]


def artifact_folder(digest: str) -> str:
    """Folder of an artifact below the store's; CoaloraError for a digest that is none."""
    try:
        _checked_digest(digest)
    except ValueError as error:
        raise CoaloraError(f"An artifact cannot have this digest: {error}") from error
    return f"{digest[:2]}/{digest}"
