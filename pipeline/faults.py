"""Faults of a disk or a database as errors that say what to do; everything else passes through."""

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from coalora.errors import CoaloraError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
# What libraries make of the same faults in errors of their own (safetensors, Arrow).
_FULL_WORDS = ("No space left on device", "StorageFull", "Disk quota exceeded")
LOCKED = re.compile(r"database (table )?is locked", re.IGNORECASE)  # SQLite


@contextmanager
def disk_faults(folder: Path) -> Iterator[None]:
    """Turn a full disk and a folder without permission into errors that say what to do."""
    try:
        yield
    except CoaloraError:
        raise
    except OSError as error:
        if error.errno in _FULL:
            raise _full(folder) from error
        if error.errno in _REFUSED and _inside(error.filename, folder):
            raise CoaloraError(
                f"{error.filename} cannot be written ({error.strerror})",
                remedy="Mend its owner or permissions, or set COALORA_HOME to another folder",
            ) from error
        raise
    except Exception as error:
        if any(words in str(error) for words in _FULL_WORDS):
            raise _full(folder) from error
        raise


@contextmanager
def database_faults() -> Iterator[None]:
    """Turn a database that another process keeps locked into an error that says what to do."""
    try:
        yield
    except CoaloraError:
        raise
    except Exception as error:
        if not LOCKED.search(str(error)):
            raise
        raise CoaloraError(
            f"Another process keeps the database of runs locked ({str(error).splitlines()[0]})",
            remedy="See which one (fuser FILE.db), end it or wait, and run again: every stage is kept. Several runs at "
            "once want servers: `mlflow server`, `prefect server start`",
        ) from error


def _inside(name: object, folder: Path) -> bool:
    """Whether a file is below the folder, or one of the folders above it that would have to be made."""
    if not isinstance(name, str | Path):
        return False
    return Path(name).is_relative_to(folder) or folder.is_relative_to(name)


def _full(folder: Path) -> CoaloraError:
    there = folder
    while not there.exists():
        there = there.parent
    return CoaloraError(
        f"The disk of {folder} is full ({shutil.disk_usage(there).free / 1e6:.1f} MB free)",
        remedy="Free some room (`coalora prune` lists what nothing refers to), and run again: it goes on behind its "
        "last finished stage",
    )
