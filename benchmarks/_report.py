"""Report of a benchmark: a table on the terminal, and the rows as JSON with the machine that they were measured on."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def report(name: str, rows: list[dict], *, notes: str = "") -> None:
    """Print `rows` (one dictionary a line, the same keys in all) and write them to `benchmarks/results/<name>.json`."""
    print(f"\n{name}\n{table(rows)}")
    if notes:
        print(notes)
    RESULTS.mkdir(exist_ok=True)
    content = {"name": name, "machine": machine(), "notes": notes, "rows": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def table(rows: list[dict]) -> str:
    """One line a row, and one of the columns' names."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns] + [[_text(row.get(key)) for key in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join(lines)


def machine() -> dict[str, str | int | None]:
    """The parts of a machine that a measured time depends on."""
    git = shutil.which("git")
    command = [git or "false", "rev-parse", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False).stdout
    return {
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "commit": commit.strip() or None,
    }


def _text(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
