"""Scratch of a stage under its cache key, from which a killed one goes on; gone when the stage is done.

`<COALORA_HOME>/checkpoints/<stage>-<key>/` belongs to the stage call of that key: the same settings, inputs and code.
How often it is written is a setting of the run (`stages.checkpoint_seconds`), no input of a stage: it changes no key.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple

from coalora.files import read_json, replace_file
from coalora.train.checkpoint import Checkpoints
from pipeline.environment import coalora_home
from pipeline.faults import disk_faults
from pipeline.progress import get_logger

DEFAULT_SECONDS = 60.0
_STALE_SECONDS = 30 * 24 * 3600.0

_seconds: ContextVar[float | None] = ContextVar("coalora_checkpoint_seconds", default=DEFAULT_SECONDS)
_scratch: ContextVar[Path | None] = ContextVar("coalora_scratch", default=None)


class Place(NamedTuple):
    """Scratch of the stage that runs, and the time between two checkpoints; goes to other processes as it is."""

    folder: Path
    seconds: float

    def checkpoints(self, notify: Callable[[str], None]) -> Checkpoints:
        return Checkpoints(self.folder, seconds=self.seconds, notify=notify)


def checkpoints_folder() -> Path:
    """The folder of all stages' scratch; safe to delete as long as nothing runs."""
    return coalora_home() / "checkpoints"


def discard(key: str) -> None:
    """Forget what a killed stage of this key had reached."""
    shutil.rmtree(checkpoints_folder() / key, ignore_errors=True)


@contextmanager
def checkpoint_every(seconds: float | None) -> Iterator[None]:
    """Stages of this block write a checkpoint after so many seconds; None: never."""
    token = _seconds.set(seconds)
    try:
        yield
    finally:
        _seconds.reset(token)


def checkpoint_seconds() -> float | None:
    """What `checkpoint_every` says here."""
    return _seconds.get()


@contextmanager
def scratch_of(key: str) -> Iterator[None]:
    """The block is the stage call of `key`: its scratch outlives an exception and is removed at the end.

    Raises:
        CoaloraError: the disk got full in the block, or the scratch cannot be written.
    """
    token = _scratch.set(checkpoints_folder() / key)
    try:
        with disk_faults(checkpoints_folder()):
            yield
        discard(key)
        _sweep()
    finally:
        _scratch.reset(token)


def place() -> Place | None:
    """Where the running stage keeps its checkpoints; None outside of stages, and where they are switched off."""
    folder, seconds = _scratch.get(), _seconds.get()
    return None if folder is None or seconds is None else Place(folder, seconds)


def tell(words: str) -> None:
    """What a checkpoint says, in the run's log."""
    if words.startswith("WARNING: "):
        get_logger().warning("%s", words.removeprefix("WARNING: "))
    else:
        get_logger().info("%s", words)


class Memo:
    """Numbers, of `most` in all, that a loop has found so far, under its name in the stage's scratch: a killed one does
    not find them again.
    """

    def __init__(self, name: str, most: int) -> None:
        self._place = place()
        self._saved_at = time.monotonic()
        self.values: list[float] = self._read(name, most) if self._place else []

    def _read(self, name: str, most: int) -> list[float]:
        assert self._place is not None
        self._file = self._place.folder / f"{name}.json"
        try:
            values = read_json(self._file)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except (OSError, ValueError):
            values = None
        whole = isinstance(values, list) and len(values) <= most and all(isinstance(v, float) for v in values)
        if not whole:
            tell(f"WARNING: {self._file} is damaged and ignored: its numbers are found anew")
            return []
        tell(f"resumed: {len(values)} of {most} losses of the {name} are measured already")
        return values

    def add(self, value: float) -> None:
        """One more; written when it is time."""
        self.values.append(float(value))
        if self._place and time.monotonic() - self._saved_at >= self._place.seconds:
            self.save()

    def save(self) -> None:
        """Write what there is now."""
        if self._place is None or not self.values:
            return
        self._place.folder.mkdir(parents=True, exist_ok=True)
        replace_file(self._file, json.dumps(self.values).encode(), durable=True)
        self._saved_at = time.monotonic()


def _sweep() -> None:
    """Remove scratch that nobody came back to for a month."""
    for folder in checkpoints_folder().glob("*"):
        with suppress(OSError):  # gone meanwhile
            if time.time() - folder.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
