"""Runs that need the same result at once compute it once, and a killed holder blocks nobody."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from coalora.errors import CoaloraError
from pipeline.store.locks import FileLock, LockChain, wait_for
from tests.pipeline.store.stores import ROOT, Traced, until


def test_of_three_processes_one_waits_for_the_other_is_let_in_by_its_death_and_computes_for_the_third(
    tmp_path: Path,
) -> None:
    traced = Traced.at(tmp_path)
    killed, heir, third = (traced.prepare(name) for name in ("killed", "heir", "third"))
    traced.let("killed")
    until(killed, "begun")
    traced.let("heir")
    assert f"traced: waiting for process {killed.pid} on " in until(heir, "waiting for")
    killed.kill()
    assert killed.wait(30) == -signal.SIGKILL
    until(heir, "begun")  # the kernel let it in
    traced.let("third")
    assert f"traced: waiting for process {heir.pid} on " in until(third, "waiting for")
    traced.go()
    assert until(heir, "done").split("done ")[1].split()[1:] == ["False", "n"]
    assert until(third, "done").split("done ")[1].split()[1:] == ["True", "n"]
    assert (heir.wait(30), third.wait(30)) == (0, 0)
    assert traced.calls == 2
    assert not list((tmp_path / "home" / "locks").iterdir())


def test_a_forked_child_does_not_keep_the_lock_of_its_killed_parent(tmp_path: Path) -> None:
    program = (
        "import os, sys, time\nfrom pathlib import Path\nfrom pipeline.store.locks import FileLock\n"
        "lock = FileLock(Path(sys.argv[1]))\nassert lock.try_acquire()\n"
        "child = os.fork()\n"
        # The child's word: on a busy machine it may not have come to its `release` when the parent is killed.
        "if not child:\n    lock.release()\n    print(os.getpid(), flush=True)\n    time.sleep(60)\n    os._exit(0)\n"
        "time.sleep(60)\n"
    )
    path = tmp_path / "a.lock"
    command = [sys.executable, "-c", program, str(path)]
    holder = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        lock = FileLock(path)
        assert not lock.try_acquire()  # the child's `release` gives back nothing
        holder.kill()
        holder.wait(30)
        os.kill(child, 0)  # still there
        assert lock.try_acquire()
        lock.release()
    finally:
        os.kill(child, signal.SIGKILL)


def test_many_threads_hold_a_lock_one_at_a_time_whoever_removes_its_file(tmp_path: Path) -> None:
    at_work, most, turns = [0], [0], [0]

    def work() -> None:
        for _ in range(50):
            lock = FileLock(tmp_path / "a.lock")
            while not lock.try_acquire():
                time.sleep(0.0001)
            at_work[0] += 1
            most[0] = max(most[0], at_work[0])
            turns[0] += 1
            at_work[0] -= 1
            lock.release()

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (most[0], turns[0]) == (1, 300)
    assert not (tmp_path / "a.lock").exists()


def test_a_chain_takes_all_or_none(tmp_path: Path) -> None:
    one, two = FileLock(tmp_path / "1"), FileLock(tmp_path / "2")
    other = FileLock(tmp_path / "2")
    assert other.try_acquire()
    chain = LockChain(one, two)
    assert not chain.try_acquire()
    assert chain.holder().startswith(f"process {os.getpid()} on ")
    assert FileLock(tmp_path / "1").try_acquire()  # given back
    other.release()


def test_who_waits_says_so_at_once_and_then_now_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.store.locks.REPEAT_SECONDS", 0.3)
    monkeypatch.setattr("pipeline.store.locks.POLL_SECONDS", 0.02)
    monkeypatch.setattr("pipeline.store.locks.MAX_POLL_SECONDS", 0.02)
    held = FileLock(tmp_path / "a")
    assert held.try_acquire()
    said: list[float] = []
    release = threading.Timer(1.0, held.release)
    release.start()
    wait_for(FileLock(tmp_path / "a"), lambda holder, seconds: said.append(seconds))
    assert 3 <= len(said) <= 4
    assert said[0] < 0.2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_said(tmp_path: Path) -> None:
    (tmp_path / "locks").mkdir(mode=0o500)
    with pytest.raises(CoaloraError, match="COALORA_HOME"):
        FileLock(tmp_path / "locks" / "a").try_acquire()


def test_a_file_where_the_folder_should_be_is_said(tmp_path: Path) -> None:
    (tmp_path / "locks").write_text("")
    with pytest.raises(CoaloraError, match="No lock can be made in"):
        FileLock(tmp_path / "locks" / "a").try_acquire()
