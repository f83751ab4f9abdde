"""The commit of the checkout, and whether it was edited since."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from pipeline.tracking.pipeline_run import git_commit


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false", *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_git_commit_tells_the_checkouts_commit_and_whether_it_was_edited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    assert git_commit() is None  # outside of git
    git(tmp_path, "init", "--quiet")
    assert git_commit() is None  # no commit yet
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert len(commit) == 40
    assert git_commit() == commit
    (tmp_path / "b").write_text("not tracked")
    assert git_commit() == commit
    (tmp_path / "a").write_text("2")
    assert git_commit() == f"{commit}-dirty"


def test_without_the_program_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit() is None
