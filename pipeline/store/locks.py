"""One computation of a result at a time: a lock for each cache key, on this machine and across machines.

On a machine it is `flock` on `<home>/locks/<key>.lock`: the kernel frees it when its holder ends, however it ends.
Machines that share a store in S3 use a lease object beside the records (`pipeline.store.lease`). Locks save work and
nothing more: artifacts are named by their content and every write is atomic, so that two runs that did compute the
same result at once (a lease that was lost while the network was down) leave a store as whole as one.

A thread never waits for a lock while it holds another (`pipeline.stages.runner.Runner.run_many`), so that there is no
deadlock.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from coalora.errors import CoaloraError

POLL_SECONDS = 0.2
MAX_POLL_SECONDS = 2.0
REPEAT_SECONDS = 60.0  # how often a run that waits says so

_open: set[int] = set()  # file descriptors of held locks


def _forget_in_child() -> None:
    # A lock belongs to all copies of its descriptor: a forked child that outlives a killed holder would keep it.
    for descriptor in _open:
        with suppress(OSError):
            os.close(descriptor)
    _open.clear()


os.register_at_fork(after_in_child=_forget_in_child)


class Lock(Protocol):
    """What can be held by one at a time."""

    def try_acquire(self) -> bool:
        """Take it if it is free."""

    def release(self) -> None:
        """Give it back; nothing happens where it is not held."""

    def holder(self) -> str:
        """Who has it, as far as is known."""


class FileLock:
    """`flock` on a file that is there while it is held.

    Args:
        path: the lock's file; its folder is made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._owner = 0  # process that holds it: a forked copy must not give back what it does not hold

    def try_acquire(self) -> bool:
        """Take the lock if no other process or thread has it.

        Raises:
            CoaloraError: the folder cannot be written to.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise CoaloraError(
                "locks are files in a folder that this user may write to",
                got=f"{self.path.parent}: {error.strerror}",
                remedy="mend the folder's owner or permissions, or set COALORA_HOME to another one",
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last holder may have removed the file between our open and our lock: then it locks nothing.
            if not _same_file(descriptor, self.path):
                os.close(descriptor)
                return False
        except OSError:
            os.close(descriptor)
            return False
        _open.add(descriptor)
        self._descriptor, self._owner = descriptor, os.getpid()
        with suppress(OSError):  # for people alone; a full disk must not stop a run here
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(this_process()).encode(), 0)
        return True

    def release(self) -> None:
        if self._descriptor is None or self._owner != os.getpid():
            return
        descriptor, self._descriptor = self._descriptor, None
        with suppress(OSError):
            self.path.unlink()
        _open.discard(descriptor)
        os.close(descriptor)

    def holder(self) -> str:
        try:
            return describe(json.loads(self.path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return "another process"


class LockChain:
    """Several locks as one, taken in order: processes of a machine contend among themselves first."""

    def __init__(self, *locks: Lock) -> None:
        self.locks = locks
        self._refused: Lock = locks[0]

    def try_acquire(self) -> bool:
        for position, lock in enumerate(self.locks):
            try:
                taken = lock.try_acquire()
            except BaseException:
                self._release(self.locks[:position])
                raise
            if not taken:
                self._refused = lock
                self._release(self.locks[:position])
                return False
        return True

    def release(self) -> None:
        self._release(self.locks)

    def holder(self) -> str:
        return self._refused.holder()

    @staticmethod
    def _release(locks: tuple[Lock, ...]) -> None:
        for lock in reversed(locks):
            lock.release()


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
    """What a lock says about its holder."""
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": since}


def describe(facts: object) -> str:
    """`process 12 on host since ...`, from what `this_process` wrote."""
    if not isinstance(facts, dict) or "host" not in facts:
        return "another process"
    return f"process {facts.get('pid')} on {facts['host']} since {facts.get('since')}"


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    ours = os.fstat(descriptor)
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)
