"""docs/notebook.ipynb: its cells run, and its stored outputs are those that come out, but for the numbers."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "notebook.ipynb"


def outputs(path: Path) -> list[tuple[str, str]]:
    """Type and text of every output, every number as #: they differ in the last digits from processor to processor."""
    found = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", []):
            text = "".join(output.get("text") or output["data"]["text/plain"])
            found.append((output["output_type"], re.sub(r"[\d.,]+(e[+-]?\d+)?", "#", re.sub(" +", " ", text))))
    return found


def test_the_notebook_runs_and_shows_what_it_has_stored(tmp_path: Path) -> None:
    copy = tmp_path / "notebook.ipynb"
    shutil.copy(NOTEBOOK, copy)
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "run_notebook.py"), str(copy)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(outputs(copy)) > 5
    assert outputs(copy) == outputs(NOTEBOOK)
