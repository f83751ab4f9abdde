"""The commit that a run's code came from."""

from __future__ import annotations

import subprocess


def git_commit() -> str | None:
    """The checkout's commit, with `-dirty` where tracked files differ; None outside of git."""
    try:
        commit = _git("rev-parse", "HEAD")
        return f"{commit}-dirty" if _git("status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout.strip()
