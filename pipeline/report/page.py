"""The report of a run as files: one picture for a README, one self-contained HTML page.

The page carries its pictures as inline SVG whose colours are CSS variables, so it follows the reader's light
or dark mode; a content security policy forbids it to load anything. Same result, same bytes: no dates, fixed
salts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline.report.curves import curves_figure
from pipeline.report.front import front_figure
from pipeline.report.heatmap import heatmap_figure
from pipeline.report.rounds import rounds_figure
from pipeline.report.schema import Budget, Result, as_result
from pipeline.report.style import PALETTE, arm_key, bits_color, figure_png, themed_svg
from pipeline.report.table import (
    best_arms,
    budget_table,
    human_bytes,
    human_count,
    human_seconds,
    number,
    other_cost,
    signed,
)


@dataclass(frozen=True)
class ReportFiles:
    """Where `write_report` wrote."""

    front_png: Path
    html: Path


def write_report(result: Result | Mapping[str, Any], folder: str | Path) -> ReportFiles:
    """Write `front.png` (150 dpi) and `report.html` into a folder, which is made if it is missing.

    Raises:
        CoaloraError: the result does not fit the schema; nothing is written then.
    """
    result = as_result(result)
    html = render_page(result)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = ReportFiles(folder / "front.png", folder / "report.html")
    files.front_png.write_bytes(figure_png(front_figure(result), dpi=150, pad_inches=0.15))
    files.html.write_text(html, encoding="utf-8")
    return files


def render_page(result: Result | Mapping[str, Any]) -> str:
    """The page as HTML, without any reference outside itself.

    Raises:
        CoaloraError: the result does not fit the schema.
    """
    result = as_result(result)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "signed": signed,
        "bytes": human_bytes,
        "count": human_count,
        "duration": human_seconds,
    }
    pictures = {
        "front": (front_figure(result), f"Metric and loss of every arm against {result.cost.label}"),
        "heatmap": (heatmap_figure(result), "Bits of every layer at every budget"),
    }
    if result.rounds:
        pictures["rounds"] = (rounds_figure(result), "Hypervolume and fronts by search round")
    if any(result.curves.values()):
        pictures["curves"] = (curves_figure(result), "Training loss and learning rate by step")
    names = result.arm_names
    return environment.get_template("page.html.jinja").render(
        result=result,
        names=names,
        others=other_cost(result),
        keys={name: arm_key(name, names) for name in names},
        rows=budget_table(result),
        bars=[_bits_bar(budget) for budget in result.budgets_in_order],
        legend=[(f"{bits:g}", bits_color(bits)) for bits in _all_bits(result)],
        wins=_wins(result),
        best_volume=best_arms(result.hypervolume.values, higher_is_better=True),
        stages=_stages(result),
        settings=json.dumps(result.settings, indent=2, ensure_ascii=False),
        palette=PALETTE,
        svg={key: Markup(themed_svg(fig, key, title)) for key, (fig, title) in pictures.items()},
    )


def _all_bits(result: Result) -> list[float]:
    return sorted({bits for budget in result.budgets for bits in budget.n_layers_by_bits})


def _bits_bar(budget: Budget) -> list[tuple[str, str, float]]:
    """(what, colour, percent of the layers) of each bit-width of one budget, by rising bits."""
    counts = {bits: n for bits, n in sorted(budget.n_layers_by_bits.items()) if n}
    total = sum(counts.values())
    return [
        (f"{n} layer{'s' * (n > 1)} at {bits:g} bits", bits_color(bits), 100 * n / total) for bits, n in counts.items()
    ]


def _wins(result: Result) -> dict[str, tuple[int, int]]:
    """For each arm: at how many budgets it is best alone, and at how many it ties for the best."""
    rows = budget_table(result)
    return {
        name: (
            sum(row.best == {name} for row in rows),
            sum(name in row.best and len(row.best) > 1 for row in rows),
        )
        for name in result.arm_names
    }


def _stages(result: Result) -> list[tuple[str, float, float]]:
    """(stage, seconds, percent of the longest stage)."""
    longest = max(result.seconds.values(), default=0.0) or 1.0
    return [(stage, spent, 100 * spent / longest) for stage, spent in result.seconds.items()]
