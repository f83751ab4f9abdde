from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.report.schema import as_result
from pipeline.report.terminal import print_result


def printed(result: dict[str, Any], width: int = 130, **keywords: Any) -> str:
    out = io.StringIO()
    print_result(as_result(result), Console(file=out, width=width, force_terminal=False), **keywords)
    return out.getvalue()


def test_table_stars_the_winner_and_shows_arrows(accuracy_result: dict[str, Any]) -> None:
    accuracy_result["budgets"][0]["metric"] = {"none": 0.5, "shared": 0.9, "coa": 0.8}
    lines = printed(accuracy_result).splitlines()
    (row,) = [line for line in lines if line.strip().startswith("2.25")]
    assert row.split()[-4:] == ["0.500", "0.900", "*", "0.800"]
    assert any("accuracy ↑" in line for line in lines)


def test_ties_are_all_starred(result: dict[str, Any]) -> None:
    result["budgets"][0]["metric"] = {"none": 2.5, "shared": 2.0, "coa": 2.0001}
    (row,) = [line for line in printed(result).splitlines() if line.strip().startswith("2.25")]
    assert row.split()[-5:] == ["2.500", "2.000", "*", "2.000", "*"]


def test_everything_promised_is_printed(result: dict[str, Any]) -> None:
    text = printed(result, folder=Path("out"))
    for expected in (
        "239.1 KB", "114.7 KB", "CoA-LoRA 0.667 *", "2 min 11 s", "calibration 6.2 s", "exports/2.25",
        "out/report.html", "out/front.png", "One seed", "1.929 at 32 bits",
    ):  # fmt: skip
        assert expected in text


def test_user_text_is_not_markup_and_long_paths_stay_on_one_line(result: dict[str, Any]) -> None:
    result["pipeline"] = result["arms"]["coa"]["label"] = "[red]x[/red]"
    result["notes"] = ["[bold]kept[/bold]"]
    result["exports"][0]["folder"] = folder = "deep/" * 40 + "end"
    text = printed(result, width=90)
    assert "[bold]kept[/bold]" in text
    assert "[red]x[/red]" in text
    assert folder in text


def test_runs_without_times_or_exports_print(result: dict[str, Any]) -> None:
    result.update(seconds={}, exports=[], notes=[], rounds=[])
    text = printed(result)
    assert "wall time" not in text
    assert "export" not in text
