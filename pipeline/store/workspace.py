"""Folders in which artifacts are made: locked while they are worked in; those of killed processes are swept away."""

from __future__ import annotations

import fcntl
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.faults import disk_faults
from pipeline.store.artifacts import files_below

STALE_SECONDS = 24 * 3600.0


@contextmanager
def workspace(home: Path, scratch: Path) -> Iterator[Path]:
    """An empty folder below `scratch`, locked while it is worked in and removed afterwards."""
    with disk_faults(home):
        scratch.mkdir(parents=True, exist_ok=True)
        sweep(scratch)
        work = scratch / uuid.uuid4().hex
        lock_file = work.with_name(work.name + ".lock")
        with lock_file.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                work.mkdir()
                yield work
            finally:
                shutil.rmtree(work, ignore_errors=True)
                lock_file.unlink(missing_ok=True)


def sweep(scratch: Path, older_than: float = STALE_SECONDS, *, remove: bool = True) -> list[tuple[Path, int]]:
    """(workspace, bytes) of killed processes: older than so many seconds, their lock held by nobody; removes them."""
    found: list[tuple[Path, int]] = []
    for lock_file in scratch.glob("*.lock"):
        with suppress(OSError), lock_file.open("r+") as lock:  # gone meanwhile, or still held
            if time.time() - lock_file.stat().st_mtime < older_than:
                continue
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for folder in (lock_file.with_suffix(""), lock_file.with_suffix(".damaged")):
                if folder.exists():
                    found.append((folder, sum(f.lstat().st_size for f in files_below(folder).values())))
                    if remove:
                        shutil.rmtree(folder, ignore_errors=True)
            if remove:
                lock_file.unlink()
    return found
