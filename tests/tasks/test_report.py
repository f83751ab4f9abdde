"""The report's files hold the numbers of the result."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.report.numbers import headline
from pipeline.store.store import default_store
from tests.tiny_run import TinyRun


@pytest.fixture(scope="module")
def result(run: TinyRun) -> dict[str, Any]:
    return json.loads((default_store().path(run.exported.result) / "result.json").read_text())


def test_the_headline_is_the_results_own_numbers(result: dict[str, Any]) -> None:
    numbers = headline(result)
    metric = result["benchmark"]["metric"]
    assert numbers == {
        "hypervolume": result["hypervolume"]["values"],
        metric: {"2.5": result["budgets"][0]["metric"]["coa"], "3": result["budgets"][1]["metric"]["coa"]},
    }


def test_the_reports_files_hold_the_same_numbers(run: TinyRun, result: dict[str, Any]) -> None:
    folder: Path = default_store().path(run.exported.report)
    assert json.loads((folder / "result.json").read_text()) == result
    assert json.loads((folder / "metrics.json").read_text()) == headline(result)
    front = list(csv.DictReader(io.StringIO((folder / "front.csv").read_text())))
    assert len(front) == len(result["members"]) * len(result["arms"])
    for i, row in enumerate(front):
        member = result["members"][i // len(result["arms"])]
        assert float(row["average_bits"]) == member["average_bits"]
        assert int(row["nbytes"]) == member["nbytes"]
        assert float(row["loss"]) == member["loss"][row["method"]]
        assert float(row[result["benchmark"]["metric"]]) == member["metric"][row["method"]]
    curves = list(csv.DictReader(io.StringIO((folder / "curves.csv").read_text())))
    assert [float(r["loss"]) for r in curves if r["method"] == "coa"] == [r["loss"] for r in result["curves"]["coa"]]
    for picture in ("front.png", "curves.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
