"""Copies of artifacts outside of the store: a folder that holds exactly an artifact's files, and a marker."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

from coalora.errors import CoaloraError
from coalora.files import json_bytes, replace_file
from pipeline.store.artifacts import Artifact, FileEntry, files_below

MARKER = ".coalora-artifact"


def copy_out(
    source: Path,
    store: Path,
    artifact: Artifact,
    entries: list[FileEntry],
    destination: Path,
    subset: Sequence[str] | None,
) -> Path:
    """What `Store.materialize` does. `source`: the artifact's folder in the folder `store`."""
    target = Path(os.path.abspath(destination))
    wanted = {entry.path: entry for entry in _select(entries, subset)}
    marker, present = _inspect(target, store)
    state = {"digest": artifact.digest, "files": sorted(wanted), "complete": True}
    whole = {name for name, entry in wanted.items() if name in present and not entry.problem(present[name])}
    if marker == state and whole == set(wanted) == set(present):
        return target
    target.mkdir(parents=True, exist_ok=True)
    # Ours from here on: a copy that is killed can be taken up again.
    replace_file(target / MARKER, json_bytes({**state, "complete": False}))
    for name in set(present) - whole:
        present[name].unlink()
    for folder, _, _ in os.walk(target, topdown=False):
        with suppress(OSError):  # not empty
            Path(folder).rmdir()
    for name in sorted(set(wanted) - whole):
        _copy(source / name, target / name, wanted[name], artifact)
    replace_file(target / MARKER, json_bytes(state))
    return target


def _inspect(target: Path, store: Path) -> tuple[object, dict[str, Path]]:
    """(content of the marker or None, files of the destination); refuses what must not be overwritten."""
    real = target.resolve()
    if real == store or store in real.parents or real in store.parents:
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
        raise damaged(artifact, [f"{entry.path}: missing"]) from error
    if problem := entry.problem(part):
        part.unlink()
        raise damaged(artifact, [problem])
    os.replace(part, target)


def damaged(artifact: Artifact, problems: list[str]) -> CoaloraError:
    return CoaloraError(
        "an artifact is read only while its files are whole",
        got=f"{artifact.kind} {artifact.digest[:12]}: {'; '.join(problems)}",
        remedy="run the pipeline again: the stage that made it rebuilds it",
    )
