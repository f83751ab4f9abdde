"""Locks of cache keys: one computation of a result at a time, on this machine and across machines.

On a machine it is `filelock` (flock) on `<home>/locks/<key>.lock`: the kernel frees it when its holder ends, however
it ends. Machines that share a store in S3 use a lease object beside the records (`pipeline.store.lease`). Locks save
work and nothing more: artifacts are named by their content and every write is atomic, so that two runs that did compute
the same result at once (a lease that was lost while the network was down) leave a store as whole as one.

A thread never waits for a lock while it holds another (`pipeline.stages.runner.Runner.run_many`), so that there is no
deadlock.
"""

import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Protocol

import filelock

from coalora.errors import CoaloraError

POLL_SECONDS = 0.2
MAX_POLL_SECONDS = 2.0
REPEAT_SECONDS = 60.0  # how often a run that waits says so


class Lock(Protocol):
    """Something that one at a time can hold."""

    def try_acquire(self) -> bool:
        """Take it if it is free."""

    def release(self) -> None:
        """Give it back; nothing happens where it is not held."""

    def holder(self) -> str:
        """Who has it, as far as is known."""


class FileLock:
    """Lock of a file that is there, and names its holder, while it is held."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # Whoever gives it back may be another thread than the one that took it.
        self._lock = filelock.FileLock(path, thread_local=False)

    def try_acquire(self) -> bool:
        """Take the lock if no other process or thread has it."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(blocking=False)
        except filelock.Timeout:
            return False
        except OSError as error:
            raise CoaloraError(
                f"No lock can be made in {self.path.parent} ({error.strerror})",
                remedy="Mend the folder's owner or permissions, or set COALORA_HOME to another one",
            ) from error
        with suppress(OSError):  # for people alone; a full disk must not stop a run here
            self.path.write_text(json.dumps(this_process()), encoding="utf-8")
        return True

    def release(self) -> None:
        if self._lock.is_locked:  # not in a forked copy, which holds nothing
            self.path.unlink(missing_ok=True)  # who has opened it sees that it is gone, and makes another
            self._lock.release()

    def holder(self) -> str:
        try:
            return describe(json.loads(self.path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return "another process"


def is_held(path: Path) -> bool:
    """Whether a process has this lock now; the file stays as it is."""
    lock = filelock.FileLock(path)
    try:
        with lock.acquire(blocking=False):
            return False
    except (filelock.Timeout, OSError):
        return True


class LockChain:
    """Several locks as one, taken in order: processes of a machine contend among themselves first."""

    def __init__(self, *locks: Lock) -> None:
        self.locks = locks
        self._refused: Lock = locks[0]

    def try_acquire(self) -> bool:
        with ExitStack() as taken:
            for lock in self.locks:
                if not lock.try_acquire():
                    self._refused = lock
                    return False
                taken.callback(lock.release)
            taken.pop_all()  # all of them: none is given back here
        return True

    def release(self) -> None:
        for lock in reversed(self.locks):
            lock.release()

    def holder(self) -> str:
        return self._refused.holder()


def wait_for(lock: Lock, say: Callable[[str, float], None]) -> None:
    """Take a lock, however long it takes.

    Args:
        say: called with the holder and the seconds waited, at once and then every `REPEAT_SECONDS`.
    """
    started = time.monotonic()
    said = -REPEAT_SECONDS
    pause = POLL_SECONDS
    while not lock.try_acquire():
        waited = time.monotonic() - started
        if waited - said >= REPEAT_SECONDS:
            say(lock.holder(), waited)
            said = waited
        time.sleep(pause)
        pause = min(2 * pause, MAX_POLL_SECONDS)


def this_process() -> dict[str, str | int]:
    """Host, process and time, which a lock tells of its holder."""
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": since}


def describe(facts: object) -> str:
    """`process 12 on host since ...`, from what `this_process` wrote."""
    if not isinstance(facts, dict) or "host" not in facts:
        return "another process"
    return f"process {facts.get('pid')} on {facts['host']} since {facts.get('since')}"
