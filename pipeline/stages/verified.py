"""Artifacts that this process has read whole: their bytes are hashed once, and again only when a file has changed.

A changed file shows in its inode, size or time of modification. A file that was written within one tick of its file
system's clock before it was hashed could change unseen: such an artifact is hashed again the next time.
"""

from __future__ import annotations

import time
from pathlib import Path

from pipeline.store.artifacts import Artifact, files_below
from pipeline.store.store import Store

_SETTLED_NS = 100_000_000
Stats = dict[str, tuple[int, int, int]]  # file -> inode, size, time of modification

_whole: dict[Path, Stats] = {}


def problems(store: Store, artifact: Artifact) -> list[str]:
    """As `Store.problems`, without hashing what this process has found whole before."""
    folder = store.place(artifact)
    before = _stats(folder)
    if before and _whole.get(folder) == before:
        store.touch(artifact)
        return []
    found = store.problems(artifact)
    settled = bool(before) and time.time_ns() - max(modified for _, _, modified in before.values()) > _SETTLED_NS
    if settled and not found:
        _whole[folder] = before
    else:
        _whole.pop(folder, None)
    return found


def _stats(folder: Path) -> Stats:
    try:
        found = {name: path.lstat() for name, path in files_below(folder).items()}
    except FileNotFoundError:  # it goes while it is looked at
        return {}
    return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}
