"""The closing table of a run in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.report.schema import Result, as_result
from pipeline.report.table import best_arms, budget_table, human_bytes, human_count, human_seconds, number, other_cost

if TYPE_CHECKING:
    from pipeline.report.page import ReportFiles


def print_result(result: Result | Mapping[str, Any], console: Console, files: ReportFiles | None = None) -> None:
    """Print the budget table, hypervolumes, wall time by stage, notes, and where files lie.

    The best arm of each row is bold and starred (so that it survives a pipe); ties are all marked.

    Args:
        result: the run.
        console: where to print; user text is never read as markup.
        files: what `write_report` returned, to name the files.

    Raises:
        CoaloraError: the result does not fit the schema.
    """
    result = as_result(result)
    names, model, benchmark = result.arm_names, result.model, result.benchmark
    console.print()
    console.print(
        Text.assemble(
            (result.pipeline, "bold"),
            f"  {model.name} ({human_count(model.n_weights)} weights in {model.n_layers} layers)"
            f" on {benchmark.name} ({benchmark.n_validation:,} validation examples)",
        )
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for head in ("budget", *other_cost(result), "bits a\nweight", "base", "adapter", "both"):
        table.add_column(Text(head), justify="right", no_wrap=True, vertical="bottom")
    for name in names:
        table.add_column(Text(result.arms[name].label), justify="right", no_wrap=True, vertical="bottom")
    for reference in result.references.values():
        table.add_column(Text(reference.label), justify="right", no_wrap=True, vertical="bottom")
    for row in budget_table(result):
        cells = [result.cost.number(row.budget), *([row.cost] * len(other_cost(result))), f"{row.average_bits:.2f}"]
        cells += [human_bytes(n) for n in (row.base_bytes, row.adapter_bytes, row.total_bytes)]
        cells_of_arms = [_mark(row.metric[name], name in row.best) for name in names]
        single = [Text(number(row.reference[name])) for name in result.references]
        table.add_row(*cells, *cells_of_arms, *single)
    console.print(table)
    better = "higher" if result.benchmark.higher_is_better else "lower"
    words = (
        f"{result.metric_name} {result.arrow} ({better} is better); * best of its row at the decimals shown, ties too"
    )
    console.print(Text(words, style="dim"))
    full = result.full_precision
    _line(console, "full precision", f"{number(full.metric)} at {full.bits:g} bits")
    values = result.hypervolume.values
    best = best_arms(values, higher_is_better=True)
    volumes: list[Text | str] = []
    for name in names:
        volumes += [f"{result.arms[name].label} ", _mark(values[name], name in best), "   "]
    _line(console, "hypervolume ↑", *volumes[:-1])
    if result.seconds:
        stages = "   ".join(f"{stage} {human_seconds(spent)}" for stage, spent in result.seconds.items())
        _line(console, "wall time", f"{human_seconds(sum(result.seconds.values()))}   ({stages})")
    for note in result.notes:
        _line(console, "note", note)
    for export in sorted(result.exports, key=lambda at: at.budget):
        size = human_bytes(export.base_bytes + export.adapter_bytes)
        folder = export.folder if files is None else str(files.html.parent.parent / export.folder)
        _line(console, f"export at {result.cost.number(export.budget)}", f"{folder}   ({size})")
    if files is not None:
        _line(console, "report", str(files.html))
        _line(console, "picture", str(files.front_png))


def _mark(value: float, best: bool) -> Text:
    return Text(number(value) + " *", style="bold") if best else Text(number(value) + "  ")


def _line(console: Console, head: str, *parts: Text | str) -> None:
    # soft_wrap: a path that is broken over lines cannot be clicked or copied
    console.print(Text.assemble((f"{head:<16}", "dim"), *parts), soft_wrap=True)
