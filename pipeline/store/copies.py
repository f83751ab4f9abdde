"""Copies outside of the store: a folder that holds exactly the files of a manifest, and a marker that says so."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from coalora.errors import CoaloraError
from coalora.files import json_bytes, replace_file
from pipeline.store.artifacts import MARKER, FileEntry, files_below


def fill(
    folder: Path, entries: Sequence[FileEntry], state: Mapping[str, object], bring: Callable[[list[FileEntry]], None]
) -> int:
    """Bring a folder to exactly these files; returns how many were missing.

    The folder is new, empty, or has a marker of an earlier call: then what does not belong is removed from it. Nothing
    is written where it is as wanted already, and one that was broken off is taken up again, file by file.

    Args:
        state: what the marker says of the content.
        bring: writes the entries that are missing, each in one step and checked.

    Raises:
        CoaloraError: the destination is a file, or holds files without our marker.
    """
    marker, present = _inspect(folder)
    wanted = {entry.path: entry for entry in entries}
    whole = {name for name, entry in wanted.items() if name in present and not entry.problem(present[name])}
    complete = {**state, "files": sorted(wanted), "complete": True}
    if marker == complete and whole == set(wanted) == set(present):
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    # Ours from here on: a copy that is killed can be taken up again.
    replace_file(folder / MARKER, json_bytes({**complete, "complete": False}))
    for name in set(present) - whole:
        present[name].unlink()
    for parent, _, _ in os.walk(folder, topdown=False):
        with suppress(OSError):  # not empty
            Path(parent).rmdir()
    missing = [entry for name, entry in wanted.items() if name not in whole]
    bring(missing)
    replace_file(folder / MARKER, json_bytes(complete))
    return len(missing)


def _inspect(folder: Path) -> tuple[object, dict[str, Path]]:
    """(content of the marker or None, files of the destination); refuses what must not be overwritten."""
    if folder.exists() and not folder.is_dir():
        raise CoaloraError(f"The destination {folder} is a file", remedy="Name a folder")
    present = files_below(folder)
    marker = present.pop(MARKER, None)
    content: object = None
    if marker is not None:
        with suppress(ValueError, OSError):
            content = json.loads(marker.read_text(encoding="utf-8"))
    if content is None and present:
        raise CoaloraError(
            f"The destination {folder} holds {len(present)} files that are not ours (there is no {MARKER})",
            remedy="Name a new or empty folder",
        )
    return content, present
