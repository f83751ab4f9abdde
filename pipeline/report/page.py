"""The report of a run as files: two pictures, for a README and for DVC, and one self-contained HTML page.

The page carries its pictures as inline SVG whose colours are CSS variables, so it follows the reader's light
or dark mode; a content security policy forbids it to load anything. Same result, same bytes: no dates, fixed
salts.
"""

import json
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from coalora.evaluate.metrics import AGREEMENT
from pipeline.report.curves import curves_figure
from pipeline.report.front import front_figure
from pipeline.report.heatmap import heatmap_figure
from pipeline.report.rounds import rounds_figure
from pipeline.report.schema import Budget, Result, metric_words
from pipeline.report.style import PALETTE, arm_key, bits_color, figure_png, themed_svg
from pipeline.report.table import beside_cell, beside_words, best_arms, best_of, other_cost, used_less
from pipeline.words import human_bytes, human_count, human_seconds, number, signed

FILTERS = {"number": number, "signed": signed, "bytes": human_bytes, "count": human_count, "duration": human_seconds}


def write_report(result: Result, folder: Path) -> None:
    """Write `front.png`, `curves.png` (150 dpi) and `report.html` into a folder, which is made if it is missing."""
    html = render_page(result)
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in (("front", front_figure(result)), ("curves", curves_figure(result))):
        (folder / f"{name}.png").write_bytes(figure_png(figure, dpi=150, pad_inches=0.15))
    (folder / "report.html").write_text(html, encoding="utf-8")


def render_page(result: Result) -> str:
    """The page as HTML, without any reference outside itself."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS
    names, rows = result.arm_names, result.budgets_in_order
    best = [best_of(result, row) for row in rows]
    longest = max(result.seconds.values(), default=0.0) or 1.0
    return environment.get_template("page.html.jinja").render(
        result=result,
        names=names,
        others=other_cost(result),
        keys={name: arm_key(name, names) for name in names},
        rows=rows,
        best=best,
        bars=[_bits_bar(row) for row in rows],
        legend=[(f"{bits:g}", bits_color(bits)) for bits in sorted({b for row in rows for b in row.n_layers_by_bits})],
        used_less=used_less(result),
        beside=[(name, metric_words(name), "↑" if name == AGREEMENT else "↓") for name in result.beside],
        beside_cell=beside_cell,
        beside_words=beside_words(result),
        best_volume=best_arms(result.hypervolume.values, higher_is_better=True),
        stages=[(stage, spent, 100 * spent / longest) for stage, spent in result.seconds.items()],
        settings=json.dumps(result.settings, indent=2, ensure_ascii=False),
        palette=PALETTE,
        svg={key: Markup(themed_svg(fig, key, title)) for key, (fig, title) in pictures(result).items()},
    )


def pictures(result: Result) -> dict[str, tuple[Figure, str]]:
    """The figures of a result with what they show, by the word by which the page has them."""
    found = {
        "front": (front_figure(result), f"Metric and loss of every arm against {result.cost.label}"),
        "heatmap": (heatmap_figure(result), "Bits of every layer at every budget"),
    }
    if result.rounds:
        found["rounds"] = (rounds_figure(result), "Hypervolume and fronts by search round")
    if any(result.curves.values()):
        found["curves"] = (curves_figure(result), "Training loss and learning rate by step")
    return found


def _bits_bar(budget: Budget) -> list[tuple[str, str, float]]:
    """(what, colour, percent of the layers) of each bit-width of one budget, by rising bits."""
    counts = {bits: n for bits, n in sorted(budget.n_layers_by_bits.items()) if n}
    total = sum(counts.values())
    return [
        (f"{n} layer{'s' * (n > 1)} at {bits:g} bits", bits_color(bits), 100 * n / total) for bits, n in counts.items()
    ]
