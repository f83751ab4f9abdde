"""A repository of DVC's for the tests of versioned sets."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


@pytest.fixture
def own_dvc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """DVC's site cache and settings of the user stay out of the test."""
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    for name in ("DVC_SITE_CACHE_DIR", "DVC_GLOBAL_CONFIG_DIR", "DVC_SYSTEM_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "dvc-settings"))


@pytest.fixture
def repository(tmp_path: Path, own_dvc: None) -> Path:
    """A git repository with DVC in it."""
    from dvc.repo import Repo

    root = tmp_path / "checkout"
    root.mkdir()
    subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)
    Repo.init(str(root)).close()
    return root
