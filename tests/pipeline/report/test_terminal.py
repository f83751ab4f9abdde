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
        "353.8 KB", "16%", "2.2 MB at 16 bits", "CoA-LoRA 0.667 *", "candidates accepted, hypervolume +",
        "2 min 11 s", "calibration 6.2 s", "exports/2.25",
        "out/report.html", "out/front.png", "One seed", "1.929 at 32 bits",
    ):  # fmt: skip
        assert expected in text


def test_the_table_fits_80_columns(result: dict[str, Any]) -> None:
    for budget in result["budgets"]:
        budget["reference_metric"] = budget["reference_loss"] = {"qlora": 1.234}
    result["references"] = {"qlora": {"label": "one LoRA per budget", "n_steps": 9}}
    lines = printed(result, width=80).splitlines()
    table = lines[: next(i for i, line in enumerate(lines) if "is better" in line)]
    assert max(map(len, table)) <= 80
    assert not any("…" in line or "..." in line for line in table)


def test_a_budget_that_is_not_used_up_is_told(result: dict[str, Any]) -> None:
    assert "measured better" not in printed(result)
    result["budgets"][-1]["average_bits"] = result["budgets"][-2]["average_bits"] = 2.13
    assert "2.13 bits measured better than anything up to 5.00 bits" in printed(result)


def test_prompts_are_shown_as_each_model_goes_on(result: dict[str, Any]) -> None:
    result["continued"] = [
        {"budget": 2.25, "prompt": "A list is", "full_precision": "a row", "none": "qqq", "coa": "an object"}
    ]
    text = printed(result)
    assert [word in text for word in ("'A list is', at 2.25 bits", "'a row'", "'qqq'", "'an object'")] == [True] * 4


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
