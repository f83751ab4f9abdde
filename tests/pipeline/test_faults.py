"""A full disk, a folder without permission and a locked database: clear words, nothing lost, nothing half written."""

from __future__ import annotations

import errno
import os
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, temporary_settings

from coalora.errors import CoaloraError
from pipeline.stages.runner import DirectRunner, stage
from pipeline.store.store import Artifact, default_store


@stage("filling")
def filling(*, n_bytes: int) -> Artifact:
    return default_store().put("bytes", lambda folder: (folder / "a.bin").write_bytes(os.urandom(n_bytes)) and None)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("COALORA_HOME", str(tmp_path / "home"))
    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: tmp_path / "home" / "results"}):
        yield tmp_path / "home"


@pytest.fixture
def small_disk(home: Path) -> Iterator[Path]:
    """The home on a disk of half a megabyte."""
    home.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(home)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk is not allowed here")
    try:
        yield home
    finally:
        subprocess.run(["umount", "--lazy", str(home)], check=True)


def test_a_disk_that_fills_up_in_mid_write_loses_nothing_and_serves_again_when_there_is_room(small_disk: Path) -> None:
    kept = DirectRunner().run(filling, n_bytes=200_000)
    with pytest.raises(CoaloraError, match=r"full \(.* MB free\).*coalora prune"):
        DirectRunner().run(filling, n_bytes=600_000)
    assert not list((small_disk / "store" / ".tmp").iterdir())
    assert not list((small_disk / "locks").iterdir())
    runner = DirectRunner()
    assert runner.run(filling, n_bytes=200_000) == kept
    assert runner.history[0].cached
    assert default_store().verify(DirectRunner().run(filling, n_bytes=100_000)) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError('Error while serializing: IoError(Os { code: 28, kind: StorageFull, message: "No space left" })'),
    ],
)
def test_a_full_disk_is_said_whoever_meets_it(home: Path, error: Exception) -> None:
    def build(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise error

    with pytest.raises(CoaloraError, match=r"The disk of .* is full.*goes on behind its last"):
        default_store().put("text", build)
    assert not list((home / "store" / ".tmp").iterdir())
    with pytest.raises(RuntimeError, match="another"):
        default_store().put("text", lambda folder: (_ for _ in ()).throw(RuntimeError("another error")))


def test_a_record_that_finds_no_room_leaves_the_old_one_whole(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    DirectRunner().run(filling, n_bytes=10)
    (record,) = (home / "results").glob("filling-*")
    before = record.read_bytes()
    write = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if self.parent == home / "results":
            write(self, data[:20])
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(CoaloraError, match="is full"):
        DirectRunner().run(filling, n_bytes=10, refresh=True)
    assert record.read_bytes() == before
    assert os.listdir(home / "results") == [record.name]


def test_a_store_without_permission_is_said(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mkdir = Path.mkdir

    def refuse(self: Path, *args: object, **options: object) -> None:
        if self.name == ".tmp":  # simulated: the tests may run as root, who may write anywhere
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        mkdir(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(CoaloraError, match=r"\.tmp cannot be written \(Permission denied\).*COALORA_HOME"):
        DirectRunner().run(filling, n_bytes=10)


def test_files_of_others_without_permission_are_not_blamed_on_the_store(home: Path) -> None:
    def build(folder: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/etc/other")

    with pytest.raises(PermissionError, match="/etc/other"):
        default_store().put("text", build)


@task(cache_policy=NO_CACHE)
def write_row(*, database: str) -> None:
    with sqlite3.connect(database, timeout=0.05) as connection:
        connection.execute("INSERT INTO runs VALUES (1)")


def test_a_locked_database_is_said_and_serves_again_when_it_is_free(tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"
    holder = sqlite3.connect(database)
    holder.execute("CREATE TABLE runs (id)")
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(CoaloraError, match=r"database is locked.*fuser.*mlflow server"):
        DirectRunner().call(write_row, database=str(database))
    holder.rollback()
    DirectRunner().call(write_row, database=str(database))
    assert holder.execute("SELECT count(*) FROM runs").fetchone() == (1,)
