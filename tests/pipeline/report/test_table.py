from __future__ import annotations

from typing import Any

from pipeline.report.schema import as_result
from pipeline.report.table import best_arms, best_of, markdown_table


def test_the_truly_best_arm_is_marked_in_both_directions(
    result: dict[str, Any], accuracy_result: dict[str, Any]
) -> None:
    for run, pick in ((result, min), (accuracy_result, max)):
        run["budgets"][0]["metric"] = {"none": 0.5, "shared": 0.7, "coa": 0.6}
        checked = as_result(run)
        best = [best_of(checked, row) for row in checked.budgets_in_order]
        assert best[0] == ({"none"} if pick is min else {"shared"})
        for row, arms in zip(checked.budgets_in_order, best, strict=True):
            extreme = pick(round(value, 3) for value in row.metric.values())
            assert arms == {name for name, value in row.metric.items() if round(value, 3) == extreme}


def test_arms_that_read_the_same_tie_and_are_all_marked() -> None:
    values = {"none": 0.8, "shared": 0.86201, "coa": 0.86249}
    assert best_arms(values, higher_is_better=True) == {"shared", "coa"}
    assert best_arms({**values, "coa": 0.8626}, higher_is_better=True) == {"coa"}


def test_rows_rise_with_the_budget_and_keep_their_own_values(result: dict[str, Any]) -> None:
    expected = [(b["budget"], b["metric"]["coa"], b["total_bytes"]) for b in result["budgets"]]
    result["budgets"].reverse()
    assert [(b.budget, b.metric["coa"], b.total_bytes) for b in as_result(result).budgets_in_order] == expected


def test_markdown_marks_the_winner_even_when_it_is_not_ours(accuracy_result: dict[str, Any]) -> None:
    accuracy_result["budgets"] = accuracy_result["budgets"][:1]
    accuracy_result["budgets"][0]["metric"] = {"none": 0.51, "shared": 0.8214, "coa": 0.806}
    accuracy_result["hypervolume"]["values"] = {"none": 0.3, "shared": 0.62, "coa": 0.6}
    text = markdown_table(as_result(accuracy_result))
    assert "| 0.510 | **0.821** | 0.806 |" in text
    assert "Shared-LoRA **0.620**" in text
    assert "accuracy ↑" in text
    assert text.count("**") == 4


def test_user_text_cannot_break_the_markdown_table(result: dict[str, Any]) -> None:
    result["arms"]["coa"]["label"] = "a|b\nc"
    header = markdown_table(as_result(result)).splitlines()[0]
    assert "a\\|b c, bits per byte ↓" in header
