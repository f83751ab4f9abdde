"""A round's set is under DVC once, and the checkout holds no set of a round that is no more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tasks.remove_stale import remove_stale
from tasks.version_set import version_set
from tests.tiny_run import TinyRun


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    found = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in found}


def test_a_rounds_set_is_versioned_once_and_a_stale_one_removed(
    run: TinyRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / ".dvc").mkdir()
    subprocess.run(["dvc", "init", "--no-scm", "--force", "--quiet"], cwd=tmp_path, check=True, env=_path())
    sets = run.trained.sets
    common = {"pipeline": "tiny", "identity": "0123abcd" * 8, "root": str(tmp_path)}
    added = [version_set.fn(**common, round_index=i, configurations=s) for i, s in enumerate(sets)]
    assert len(set(added)) == len(sets) == 2
    folder = tmp_path / "configurations" / "tiny"
    before = files(folder)
    again = version_set.fn(**common, round_index=1, configurations=sets[1])
    assert again == added[1]
    assert files(folder) == before
    (out,) = yaml.safe_load((folder / "round-01.json.dvc").read_text())["outs"]
    assert out["meta"] == {"pipeline": "tiny", "run": "0123abcd", "round": 1}
    remove_stale.fn(pipeline="tiny", last_round=0, root=str(tmp_path))
    assert sorted(p.name for p in folder.glob("round-*")) == ["round-00.json", "round-00.json.dvc"]


def _path() -> dict[str, str]:
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
