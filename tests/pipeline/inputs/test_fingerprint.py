"""A changed file has another digest and a moved one has not; what is remembered is never trusted too far."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from coalora.models import files
from pipeline.inputs import fingerprint
from pipeline.inputs.fingerprint import files_digest, model_digest


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COALORA_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were really read."""
    names: list[str] = []

    def record(path: Path) -> str:
        names.append(path.name)
        return original(path)

    original = fingerprint.file_sha256
    monkeypatch.setattr(fingerprint, "file_sha256", record)
    return names


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that is a minute ahead: files that were just written count as old."""
    now = time.time_ns
    monkeypatch.setattr(fingerprint.time, "time_ns", lambda: now() + 60_000_000_000)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_changed_content_changes_the_digest(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "one")
    before = files_digest([file])
    write(file, "two")  # same size, and most likely the same tick of the clock
    assert files_digest([file]) != before
    write(file, "one")
    assert files_digest([file]) == before


@pytest.mark.usefixtures("settled")
def test_changed_content_is_seen_behind_a_restored_modification_time(tmp_path: Path, hashed: list[str]) -> None:
    file = write(tmp_path / "a.txt", "one")
    stat = file.stat()
    before = files_digest([file])
    time.sleep(0.02)  # past a tick of the file system's clock
    write(file, "two")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert files_digest([file]) != before
    assert hashed == ["a.txt", "a.txt"]


def test_a_moved_file_keeps_its_digest(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "one")
    before = files_digest([file])
    moved = tmp_path / "deep" / "b.txt"
    moved.parent.mkdir()
    file.rename(moved)
    assert files_digest([moved]) == before


def test_order_and_number_of_files_matter(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", "1"), write(tmp_path / "b", "2")
    assert len({files_digest(x) for x in ([a, b], [b, a], [a], [a, a], [])}) == 5


@pytest.mark.usefixtures("settled")
def test_a_file_is_read_once(tmp_path: Path, hashed: list[str]) -> None:
    file = write(tmp_path / "a.txt", "one")
    assert files_digest([file]) == files_digest([file])
    assert hashed == ["a.txt"]


def test_a_file_that_was_just_written_is_not_remembered(tmp_path: Path, hashed: list[str], home: Path) -> None:
    file = write(tmp_path / "a.txt", "one")
    files_digest([file])
    files_digest([file])
    assert hashed == ["a.txt", "a.txt"]
    assert not (home / "fingerprints.json").exists()


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("damage", ["", "{", "[]", '"text"', "null", '{"a": 1}', '{"a": "short"}', "\x00"])
def test_the_memory_survives_corruption(tmp_path: Path, hashed: list[str], home: Path, damage: str) -> None:
    file = write(tmp_path / "a.txt", "one")
    before = files_digest([file])
    write(home / "fingerprints.json", damage)
    assert files_digest([file]) == before
    assert hashed == ["a.txt", "a.txt"]
    assert len(json.loads((home / "fingerprints.json").read_text())) == 1
    assert files_digest([file]) == before
    assert len(hashed) == 2
    assert [p.name for p in home.iterdir()] == ["fingerprints.json"]


def test_a_models_digest_is_the_librarys(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        write(tmp_path / "m" / name, name)
    assert model_digest(tmp_path / "m") == files.model_digest(tmp_path / "m")
