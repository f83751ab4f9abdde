"""Downloading a published run, or a part of it: verified file by file, and taken up again where it was cut off."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from coalora.errors import CoaloraError
from coalora.files import json_bytes, replace_file
from pipeline.s3.address import S3Address
from pipeline.s3.client import S3Location
from pipeline.s3.download import part_path
from pipeline.s3.manifest import Manifest, PublishedFile, object_name, read_manifest, split_run_address
from pipeline.s3.transfers import Megabytes, side_by_side
from pipeline.settings.storage import StorageSettings
from pipeline.store.artifacts import files_below

DOWNLOAD = ".coalora-download.json"


@dataclass(frozen=True)
class Retrieval:
    """What a download brought.

    Attributes:
        run: name of the run; tells what `latest` was.
        n_files, nbytes: of the wanted files.
        fetched_files: that were not there already.
    """

    run: str
    n_files: int
    nbytes: int
    fetched_files: int


def retrieve(address: S3Address, folder: Path, settings: StorageSettings, *, only: Sequence[str] = ()) -> Retrieval:
    """Bring `folder` to the files of a published run.

    The folder is new, empty, or one that an earlier call has filled: that is brought up to date, and keeps none of the
    files of another run.

    Args:
        address: `s3://BUCKET/PREFIX/runs/PIPELINE/RUN`; RUN may be `latest`.
        only: shell patterns of the paths to fetch; all by default.

    Raises:
        CoaloraError: no such run, a folder with other files, no room, or S3 fails.
    """
    prefix, pipeline, run = split_run_address(address)
    root = S3Location(prefix, settings)
    manifest = read_manifest(root, pipeline, run)
    wanted = _select(manifest, only)
    state = {"address": str(root.address), "run": manifest.run, "digest": manifest.digest, "only": sorted(only)}
    present = _open(folder)
    replace_file(folder / DOWNLOAD, json_bytes({**state, "complete": False}))
    kept = {file.path for file in wanted}
    parts = {part_path(folder / f.path, f.sha256) for f in wanted}
    for name, path in present.items():
        if name not in kept and path not in parts:
            path.unlink()
    _check_room(folder, wanted)
    fetched = _fetch(wanted, folder, root)
    replace_file(folder / DOWNLOAD, json_bytes({**state, "complete": True}))
    return Retrieval(manifest.run, len(wanted), sum(f.size for f in wanted), fetched)


def _select(manifest: Manifest, only: Sequence[str]) -> list[PublishedFile]:
    for pattern in only:
        if not any(fnmatchcase(file.path, pattern) for file in manifest.files):
            folders = sorted({file.path.rpartition("/")[0] or file.path for file in manifest.files})
            raise CoaloraError(
                "a pattern of --only matches files of the run",
                got=pattern,
                expected=f"something like {folders[0]}/*; folders: {', '.join(folders)}",
            )
    return [f for f in manifest.files if not only or any(fnmatchcase(f.path, pattern) for pattern in only)]


def _open(folder: Path) -> dict[str, Path]:
    """Files of the destination; refuses what an earlier download has not made."""
    if folder.exists() and not folder.is_dir():
        raise CoaloraError("the destination is a folder", got=folder, remedy="name another one")
    folder.mkdir(parents=True, exist_ok=True)
    present = files_below(folder)
    if present and present.pop(DOWNLOAD, None) is None:
        raise CoaloraError(
            "the destination is new, empty, or an earlier download",
            got=f"{folder} with {len(present)} other files",
            remedy="name another folder",
        )
    return present


def _check_room(folder: Path, wanted: Sequence[PublishedFile]) -> None:
    there = 0
    for file in wanted:
        path = folder / file.path
        for candidate in (path, part_path(path, file.sha256)):
            there += min(candidate.stat().st_size, file.size) if candidate.is_file() else 0
    needed, free = sum(file.size for file in wanted) - there, shutil.disk_usage(folder).free
    if needed > free:
        raise CoaloraError(
            "there must be room on the disk",
            got=f"{free:,} bytes free at {folder}",
            expected=f"{needed:,} bytes",
            remedy="free some space, name another folder, or fetch a part with --only 'export/3-bits/*'",
        )


def _fetch(wanted: Sequence[PublishedFile], folder: Path, root: S3Location) -> int:
    """Fetch what is missing, several files at a time; returns how many were fetched."""
    progress = Megabytes("downloading", sum(f.size for f in wanted))
    fetched: list[str] = []

    def fetch(file: PublishedFile) -> None:
        if root.get_file(object_name(file.sha256), folder / file.path, sha256=file.sha256, size=file.size):
            fetched.append(file.path)
        progress.add(file.size, file.path)

    side_by_side(fetch, sorted(wanted, key=lambda f: -f.size), root.settings.workers)
    return len(fetched)
