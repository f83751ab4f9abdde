"""An artifact's bytes are hashed once in a process, and again when a file of it has changed."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from pipeline.store.store import SETTLED_NS, Artifact, Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


@pytest.fixture
def artifact(store: Store) -> Artifact:
    def write(folder: Path) -> None:
        (folder / "a.txt").write_text("alpha")

    made = store.put("text", write)
    for file in store.path(made).iterdir():
        os.utime(file, (1e9, 1e9))  # written long ago
    return made


@pytest.fixture
def hashed(store: Store, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    asked: list[str] = []
    original = store.verify

    def count(artifact: Artifact) -> list[str]:
        asked.append(artifact.digest)
        return original(artifact)

    monkeypatch.setattr(store, "verify", count)
    return asked


def test_a_whole_artifact_is_hashed_once(store: Store, artifact: Artifact, hashed: list[str]) -> None:
    assert store.problems(artifact) == store.problems(artifact) == []
    assert len(hashed) == 1


@pytest.mark.parametrize("how", ["altered", "deleted", "extra", "replaced"])
def test_a_change_is_found(store: Store, artifact: Artifact, how: str) -> None:
    assert store.problems(artifact) == []
    file = store.path(artifact) / "a.txt"
    file.chmod(0o644)
    if how == "altered":
        file.write_text("gamma")
    elif how == "deleted":
        file.unlink()
    elif how == "extra":
        (file.parent / "b.txt").write_text("")
    else:
        other = file.with_name("other")
        other.write_text("gamma")
        os.utime(other, (1e9, 1e9))
        other.replace(file)
    assert store.problems(artifact)


def test_what_was_written_just_now_is_hashed_again(store: Store, artifact: Artifact, hashed: list[str]) -> None:
    os.utime(store.path(artifact) / "a.txt", (time.time(), time.time() + SETTLED_NS / 1e9))
    assert store.problems(artifact) == store.problems(artifact) == []
    assert len(hashed) == 2


def test_asking_counts_as_use(store: Store, artifact: Artifact) -> None:
    store.problems(artifact)
    os.utime(store.path(artifact), (0, 0))
    store.problems(artifact)
    assert store.path(artifact).stat().st_mtime > 0
