"""Numbers of a result as files: what DVC compares (`metrics.json`), and tables (`front.csv`, `curves.csv`)."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coalora.files import write_json


def write_numbers(result: dict[str, Any], folder: Path) -> None:
    """Write the three files into `folder`."""
    write_json(folder / "metrics.json", headline(result))
    metric = result["benchmark"]["metric"]
    columns = ["average_bits", "nbytes", *(["cost"] if result["cost"]["kind"] == "latency" else [])]
    _write_csv(
        folder / "front.csv",
        [*columns, "method", metric, "loss"],
        [
            [*(member[name] for name in columns), method, member["metric"][method], member["loss"][method]]
            for member in result["members"]
            for method in result["arms"]
        ],
    )
    _write_csv(
        folder / "curves.csv",
        ["step", "method", "loss"],
        [[row["step"], method, row["loss"]] for method, rows in result["curves"].items() for row in rows],
    )


def headline(result: dict[str, Any]) -> dict[str, Any]:
    """The few numbers that `dvc exp show` gives a column each: hypervolumes, and CoA-LoRA's metric at each budget.

    All others are in `result.json`.
    """
    metric = result["benchmark"]["metric"]
    return {
        "hypervolume": result["hypervolume"]["values"],
        metric: {f"{row['budget']:g}": row["metric"]["coa"] for row in result["budgets"]},
        **({"harness": {f"{row['budget']:g}": row["tasks"] for row in result["harness"]}} if result["harness"] else {}),
    }


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
