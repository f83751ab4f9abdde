"""Which run has used what: a journal for each run identity, which says what to keep of the store.

`<home>/journals/<pipeline>-<identity>.jsonl` gets a line (stage, cache key, artifact) for every stage that a run
computed or reused, so that a run which was killed is known as well. It is locked, shared, while a stage is under way.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.environment import coalora_home
from pipeline.faults import disk_faults
from pipeline.store.artifacts import Artifact

_NAME = re.compile(r"(?P<pipeline>.+)-(?P<identity>[0-9a-f]{16,64})\.jsonl")


@dataclass(frozen=True)
class Journal:
    """The journal of one run."""

    path: Path

    @classmethod
    def of(cls, pipeline: str, identity: str, home: Path | None = None) -> Journal:
        return cls((home or coalora_home()) / "journals" / f"{pipeline}-{identity}.jsonl")

    @property
    def identity(self) -> str:
        match = _NAME.fullmatch(self.path.name)
        return match["identity"] if match else ""

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """While the block runs, nothing that the journal lists is pruned."""
        with disk_faults(self.path.parent):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            stream = self.path.open("a")
        with stream:
            fcntl.flock(stream, fcntl.LOCK_SH)
            yield

    def is_used(self) -> bool:
        """Whether a process has the journal in use now."""
        try:
            with self.path.open("r") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except FileNotFoundError:
            return False
        return False

    def note(self, stage: str, key: str, artifact: Artifact) -> None:
        """Add a line, unless it is there. One write: several processes may add at a time."""
        entry = {"stage": stage, "key": key, "digest": artifact.digest, "nbytes": artifact.nbytes}
        line = json.dumps(entry, sort_keys=True) + "\n"
        with disk_faults(self.path.parent):
            if self.path.is_file() and line in self.path.read_text(encoding="utf-8"):
                os.utime(self.path)
                return
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(line)

    def read(self) -> Used:
        """What it lists. A line that was cut short (a full disk) is left out."""
        used = Used()
        with suppress(FileNotFoundError):
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError, KeyError, TypeError):
                    entry = json.loads(line)
                    used.digests.add(str(entry["digest"]))
                    used.keys.add(str(entry["key"]))
        return used


@dataclass
class Used:
    """Digests of artifacts and cache keys of records."""

    digests: set[str] = field(default_factory=set)
    keys: set[str] = field(default_factory=set)

    def add(self, other: Used) -> None:
        self.digests |= other.digests
        self.keys |= other.keys


def journals(home: Path) -> list[Journal]:
    """All journals of a home."""
    return [Journal(path) for path in sorted((home / "journals").glob("*.jsonl")) if _NAME.fullmatch(path.name)]
