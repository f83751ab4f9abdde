"""What an artifact is: a reference by content, the entries of its files, and the digest over them."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, field_validator

from coalora.files import file_sha256

Scalar = bool | int | float | str | None
MANIFEST = "manifest.json"  # lists an artifact's files; written last


class Artifact(BaseModel):
    """Reference to a folder of files in a `Store`.

    Attributes:
        kind: what it is ("calibration", "adapter", ...).
        digest: sha256 over the sorted (relative path, size, sha256) of its files.
        nbytes: size of its files together, in bytes.
        meta: small facts for people and tables (JSON scalars, finite); not part of the digest.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    digest: str
    nbytes: int
    meta: dict[str, Scalar] = {}

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


class FileEntry(NamedTuple):
    """One file of an artifact: relative posix path, bytes, sha256."""

    path: str
    size: int
    sha256: str

    def problem(self, file: Path) -> str | None:
        """Why `file` is not this entry, or None."""
        try:
            if file.stat().st_size != self.size or file_sha256(file) != self.sha256:
                return f"{self.path}: altered"
        except OSError as error:
            return f"{self.path}: unreadable ({error.strerror})"
        return None


def files_below(folder: Path) -> dict[str, Path]:
    """{relative posix path: path} of everything below but plain folders. Links are listed, not followed."""
    found: dict[str, Path] = {}
    for parent, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        for name in files + links:
            file = Path(parent) / name
            found[file.relative_to(folder).as_posix()] = file
    return found


def content_digest(entries: list[FileEntry]) -> str:
    return hashlib.sha256(json.dumps(sorted(entries), separators=(",", ":")).encode()).hexdigest()


def artifact_folder(digest: str) -> str:
    """Folder of an artifact below the store's, on disk and in S3 alike."""
    return f"{digest[:2]}/{digest}"
