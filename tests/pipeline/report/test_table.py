from __future__ import annotations

from typing import Any

import pytest

from coalora.errors import CoaloraError
from pipeline.report.table import (
    best_arms,
    budget_table,
    human_bytes,
    human_count,
    human_seconds,
    markdown_table,
    number,
    signed,
)


def test_the_truly_best_arm_is_marked_in_both_directions(
    result: dict[str, Any], accuracy_result: dict[str, Any]
) -> None:
    for run, pick in ((result, min), (accuracy_result, max)):
        run["budgets"][0]["metric"] = {"none": 0.5, "shared": 0.7, "coa": 0.6}
        best = [row.best for row in budget_table(run)]
        assert best[0] == ({"none"} if pick is min else {"shared"})
        for row in budget_table(run):
            extreme = pick(round(value, 3) for value in row.metric.values())
            assert row.best == {name for name, value in row.metric.items() if round(value, 3) == extreme}


def test_arms_that_read_the_same_tie_and_are_all_marked() -> None:
    values = {"none": 0.8, "shared": 0.86201, "coa": 0.86249}
    assert best_arms(values, higher_is_better=True) == {"shared", "coa"}
    assert best_arms({**values, "coa": 0.8626}, higher_is_better=True) == {"coa"}


def test_rows_rise_with_the_budget_and_keep_their_own_values(result: dict[str, Any]) -> None:
    expected = [(b["budget"], b["metric"]["coa"], b["total_bytes"]) for b in result["budgets"]]
    result["budgets"].reverse()
    assert [(row.budget, row.metric["coa"], row.total_bytes) for row in budget_table(result)] == expected


def test_markdown_marks_the_winner_even_when_it_is_not_ours(accuracy_result: dict[str, Any]) -> None:
    accuracy_result["budgets"] = accuracy_result["budgets"][:1]
    accuracy_result["budgets"][0]["metric"] = {"none": 0.51, "shared": 0.8214, "coa": 0.806}
    accuracy_result["hypervolume"]["values"] = {"none": 0.3, "shared": 0.62, "coa": 0.6}
    text = markdown_table(accuracy_result)
    assert "| 0.510 | **0.821** | 0.806 |" in text
    assert "Shared-LoRA **0.620**" in text
    assert "accuracy ↑" in text
    assert text.count("**") == 4


def test_user_text_cannot_break_the_markdown_table(result: dict[str, Any]) -> None:
    result["arms"]["coa"]["label"] = "a|b\nc"
    header = markdown_table(result).splitlines()[0]
    assert "a\\|b c, bits per byte ↓" in header


def test_nan_is_refused(result: dict[str, Any]) -> None:
    result["budgets"][0]["metric"]["coa"] = float("nan")
    with pytest.raises(CoaloraError, match="finite"):
        markdown_table(result)


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 KB"), (999_949, "999.9 KB"), (999_950, "1.0 MB"),
     (57_300_000, "57.3 MB"), (1.5e12, "1.5 TB")],
)  # fmt: skip
def test_bytes_have_one_decimal_and_never_read_1000(n: float, text: str) -> None:
    assert human_bytes(int(n)) == text


def test_counts_seconds_and_differences_read_well() -> None:
    assert [human_count(n) for n in (912, 302_000_000, 6_476_000_000)] == ["912", "302.0 M", "6.5 B"]
    seconds = [human_seconds(s) for s in (0.0004, 0.9996, 59.96, 185, 3599.6, 7620)]
    assert seconds == ["0 ms", "1.0 s", "1 min 00 s", "3 min 05 s", "1 h 00 min", "2 h 07 min"]
    assert [signed(x) for x in (0.0124, -0.0421, 0.0, -0.0004)] == ["+0.012", "\u22120.042", "0.000", "0.000"]
    assert number(-0.0001) == "0.000"
