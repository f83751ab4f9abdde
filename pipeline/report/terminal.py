"""The closing table of a run in the terminal."""

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.report.schema import Result
from pipeline.report.table import (
    beside_cell,
    beside_words,
    best_arms,
    best_of,
    first_cells,
    other_cost,
    used_less,
)
from pipeline.words import human_bytes, human_count, human_seconds, number, signed


def print_result(result: Result, console: Console, folder: Path | None = None) -> None:
    """Print the budget table, hypervolumes, wall time by stage, notes, and where files lie.

    The best arm of each row is bold and starred (so that it survives a pipe); ties are all marked. User text is never
    read as markup.
    """
    names, model, benchmark = result.arm_names, result.model, result.benchmark
    console.print()
    words = (
        f"  {model.name} ({human_count(model.n_weights)} weights in {model.n_layers} layers)"
        f" on {benchmark.name} ({benchmark.n_validation:,} validation examples)"
    )
    console.print(Text.assemble((result.pipeline, "bold"), words))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    labels = [arm.label for arm in (*(result.arms[name] for name in names), *result.references.values())]
    heads = ["budget", *other_cost(result), "bits a\nweight", "size", "of the\noriginal"]
    # One word of a label in a line: the table fits 80 columns.
    for head in (*heads, *(label.replace(" ", "\n").replace("-", "-\n") for label in labels)):
        table.add_column(Text(head), justify="right", no_wrap=True, vertical="bottom")
    for budget in result.budgets_in_order:
        best = best_of(result, budget)
        arms = [_mark(budget.metric[name], name in best) for name in names]
        single = [Text(number(budget.reference_metric[name])) for name in result.references]
        table.add_row(*first_cells(result, budget), *arms, *single)
    console.print(table)
    better = "higher" if benchmark.higher_is_better else "lower"
    words = f"{result.metric_name} {result.arrow} ({better} is better); * best of its row at the decimals shown"
    console.print(Text(f"{words}, ties too", style="dim"))
    if result.beside:
        _print_beside(result, console)
    _line(console, "full precision", f"{number(result.full_precision.metric)} at {result.full_precision.bits:g} bits")
    _line(console, "original", f"{human_bytes(model.original_bytes)} at 16 bits a number, all tensors")
    for sentence in used_less(result):
        _line(console, "budgets", sentence)
    values = result.hypervolume.values
    best = best_arms(values, higher_is_better=True)
    volumes: list[Text | str] = []
    for name in names:
        volumes += [f"{result.arms[name].label} ", _mark(values[name], name in best), "   "]
    _line(console, "hypervolume ↑", *volumes[:-1])
    for found in result.rounds:
        gained = signed(found.hypervolume_after - found.hypervolume_before)
        words = f"{found.n_accepted} of {found.n_candidates} candidates accepted, hypervolume {gained} by them"
        _line(console, f"search round {found.round}", words)
    for text in result.continued:
        _line(console, "prompt", f"{text.prompt!r}, at {result.cost.text(text.budget)}")
        for head, said in (("original", text.full_precision), ("no adapter", text.none), ("CoA-LoRA", text.coa)):
            _line(console, f"  {head}", repr(said))
    if result.seconds:
        stages = "   ".join(f"{stage} {human_seconds(spent)}" for stage, spent in result.seconds.items())
        _line(console, "wall time", f"{human_seconds(sum(result.seconds.values()))}   ({stages})")
    for note in result.notes:
        _line(console, "note", note)
    for export in sorted(result.exports, key=lambda at: at.budget):
        nbytes = export.base_bytes + export.adapter_bytes
        size = f"{human_bytes(nbytes)}, {result.bits_of_all(nbytes):.2f} bits a weight of everything"
        place = export.folder if folder is None else str(folder.parent / export.folder)
        _line(console, f"export at {result.cost.number(export.budget)}", f"{place}   ({size})")
    if folder is not None:
        _line(console, "report", str(folder / "report.html"))
        _line(console, "picture", str(folder / "front.png"))


def _print_beside(result: Result, console: Console) -> None:
    """A second table, of the metrics beside the headline: both of an arm in a cell."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    labels = [result.arms[name].label.replace(" ", "\n").replace("-", "-\n") for name in result.arm_names]
    for head in ("budget", *labels):
        table.add_column(Text(head), justify="right", no_wrap=True, vertical="bottom")
    for budget in result.budgets_in_order:
        cells = [
            "  ".join(beside_cell(metric, budget.metrics[metric][arm]) for metric in result.beside)
            for arm in result.arm_names
        ]
        table.add_row(result.cost.number(budget.budget), *cells)
    console.print(table)
    console.print(Text(beside_words(result), style="dim"))


def _mark(value: float, best: bool) -> Text:
    return Text(number(value) + " *", style="bold") if best else Text(number(value) + "  ")


def _line(console: Console, head: str, *parts: Text | str) -> None:
    # soft_wrap: a path that is broken over lines cannot be clicked or copied
    console.print(Text.assemble((f"{head:<16}", "dim"), *parts), soft_wrap=True)
