"""Stage `report`: pictures, page and tables of a result, and the files that DVC compares and plots."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coalora.files import read_json, write_json
from pipeline.report.page import write_report
from pipeline.report.schema import RESULT
from pipeline.report.table import markdown_table
from pipeline.stages.runner import stage
from pipeline.store.current import current_store
from pipeline.store.store import Artifact, Scalar

METRICS = "metrics.json"


@stage("report")
def make_report(*, result: Artifact) -> Artifact:
    """`report.html`, `front.png`, `table.md`, `result.json`, `metrics.json`, `front.csv` and `curves.csv`."""
    content = read_json(current_store().path(result) / RESULT)

    def write(folder: Path) -> dict[str, Scalar]:
        write_report(content, folder)
        (folder / "table.md").write_text(markdown_table(content) + "\n", encoding="utf-8")
        write_json(folder / RESULT, content)
        write_json(folder / METRICS, headline(content))
        metric = content["benchmark"]["metric"]
        columns = ["average_bits", "nbytes", *(["cost"] if content["cost"]["kind"] == "latency" else [])]
        _write_csv(
            folder / "front.csv",
            [*columns, "method", metric, "loss"],
            [
                [*(member[name] for name in columns), method, member["metric"][method], member["loss"][method]]
                for member in content["members"]
                for method in content["arms"]
            ],
        )
        _write_csv(
            folder / "curves.csv",
            ["step", "method", "loss"],
            [[row["step"], method, row["loss"]] for method, rows in content["curves"].items() for row in rows],
        )
        return {}

    return current_store().put("report", write)


def headline(result: dict[str, Any]) -> dict[str, Any]:
    """The few numbers that are compared between runs: hypervolumes, and by budget and method metrics, loss and gap.

    The gap is what is missing to the full-precision base with the Shared-LoRA adapter, in the metric's unit: positive
    is worse, whichever way the metric goes.
    """
    metric = result["benchmark"]["metric"]
    sign = 1 if result["benchmark"]["higher_is_better"] else -1
    ceiling = result["full_precision"]["metric"]
    return {
        "hypervolume": result["hypervolume"]["values"],
        "budgets": {
            f"{row['budget']:g}": {
                "average_bits": row["average_bits"],
                **row["metrics"],
                metric: row["metric"],
                "loss": row["loss"],
                "gap": {method: sign * (ceiling - value) for method, value in row["metric"].items()},
            }
            for row in result["budgets"]
        },
        **({"harness": {f"{row['budget']:g}": row["tasks"] for row in result["harness"]}} if result["harness"] else {}),
    }


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
