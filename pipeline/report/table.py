"""The budget table as data and as Markdown, and how numbers are written everywhere in a report.

The best arm of a row is the one that is best, whichever it is; arms that read the same at the three decimals
shown tie, and all of them are marked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.report.schema import Result, as_result

DECIMALS = 3


@dataclass(frozen=True)
class BudgetRow:
    """One budget: bits per weight, cost as text, bytes on disk, metric of every arm and reference, the best arms."""

    budget: float
    average_bits: float
    cost: str
    base_bytes: int
    adapter_bytes: int
    total_bytes: int
    metric: dict[str, float]
    reference: dict[str, float]
    best: frozenset[str]


def best_arms(values: Mapping[str, float], *, higher_is_better: bool) -> frozenset[str]:
    """Names of the best arms at the precision that is shown; several when they tie."""
    shown = {name: round(value, DECIMALS) for name, value in values.items()}
    best = max(shown.values()) if higher_is_better else min(shown.values())
    return frozenset(name for name, value in shown.items() if value == best)


def budget_table(result: Result | Mapping[str, Any]) -> list[BudgetRow]:
    """Rows by rising budget.

    Raises:
        CoaloraError: the result does not fit the schema.
    """
    result = as_result(result)
    return [
        BudgetRow(
            budget=budget.budget,
            average_bits=budget.average_bits,
            cost=result.cost.number(budget.at),
            base_bytes=budget.base_bytes,
            adapter_bytes=budget.adapter_bytes,
            total_bytes=budget.total_bytes,
            metric={name: budget.metric[name] for name in result.arm_names},
            reference=budget.reference_metric,
            best=best_arms(budget.metric, higher_is_better=result.benchmark.higher_is_better),
        )
        for budget in result.budgets_in_order
    ]


def other_cost(result: Result) -> list[str]:
    """The head of a column for the cost, where it is not the average bits that have one anyway."""
    return [] if result.cost.kind == "average_bits" else [result.cost.unit]


def number(value: float) -> str:
    """A metric, loss or hypervolume with three decimals; never "-0.000"."""
    return f"{round(value, DECIMALS) + 0.0:.{DECIMALS}f}"


def signed(value: float) -> str:
    """A difference with its sign, a true minus, and no sign for zero."""
    text = number(abs(value))
    return text if float(text) == 0 else ("+" if value > 0 else "\u2212") + text


def human_bytes(n_bytes: int) -> str:
    """Decimal units with one decimal: "812 B", "57.3 KB", "3.2 MB"."""
    if n_bytes < 1000:
        return f"{n_bytes} B"
    value, unit = n_bytes / 1000, "KB"
    for larger in ("MB", "GB", "TB"):
        if round(value, 1) < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.1f} {unit}"


def human_count(n: int) -> str:
    """A number of weights: "912", "12.3 K", "302.0 M", "6.5 B"."""
    if n < 1000:
        return str(n)
    value, unit = n / 1000, "K"
    for larger in ("M", "B", "T"):
        if round(value, 1) < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.1f} {unit}"


def human_seconds(seconds: float) -> str:
    """A wall time: "85 ms", "4.2 s", "3 min 05 s", "2 h 07 min"."""
    if round(seconds * 1000) < 1000:
        return f"{seconds * 1000:.0f} ms"
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def markdown_table(result: Result | Mapping[str, Any]) -> str:
    """The budget table in GitHub's Markdown, best arm of each row in bold, ending in a newline.

    Raises:
        CoaloraError: the result does not fit the schema.
    """
    result = as_result(result)
    names = result.arm_names
    arms = [_cell(result.arms[name].label) for name in names]
    single = [_cell(arm.label) for arm in result.references.values()]
    head = ["budget", *other_cost(result), "bits a weight", "base", "adapter", "both"]
    columns = [f"{arm}, {_cell(result.metric_name)} {result.arrow}" for arm in [*arms, *single]]
    lines = [
        "| " + " | ".join([*head, *columns]) + " |",
        "|" + " ---: |" * (len(head) + len(columns)),
    ]
    for row in budget_table(result):
        cells = [result.cost.number(row.budget), *([row.cost] * len(other_cost(result))), f"{row.average_bits:.2f}"]
        cells += [human_bytes(n) for n in (row.base_bytes, row.adapter_bytes, row.total_bytes)]
        cells += [_bold(number(row.metric[name]), name in row.best) for name in names]
        cells += [number(row.reference[name]) for name in result.references]
        lines.append("| " + " | ".join(cells) + " |")
    values = result.hypervolume.values
    best = best_arms(values, higher_is_better=True)
    shown = [f"{arm} {_bold(number(values[n]), n in best)}" for n, arm in zip(names, arms, strict=True)]
    full = f"Full precision ({result.full_precision.bits:g} bits): {number(result.full_precision.metric)}."
    return "\n".join([*lines, "", f"{full} Hypervolume ↑: {', '.join(shown)}.", ""])


def _bold(text: str, bold: bool) -> str:
    return f"**{text}**" if bold else text


def _cell(text: str) -> str:
    """User text that cannot end a cell or a row."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
