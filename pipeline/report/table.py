"""The budget table in Markdown, and which arm of a row is the best.

The best arm is the one that is best, whichever it is; arms that read the same at the three decimals shown tie, and all
of them are marked.
"""

from collections.abc import Mapping

from coalora.evaluate.metrics import AGREEMENT
from pipeline.report.schema import Budget, Result, metric_words
from pipeline.words import DECIMALS, human_bytes, number


def best_arms(values: Mapping[str, float], *, higher_is_better: bool) -> frozenset[str]:
    """Names of the best arms at the precision that is shown; several when they tie."""
    shown = {name: round(value, DECIMALS) for name, value in values.items()}
    best = max(shown.values()) if higher_is_better else min(shown.values())
    return frozenset(name for name, value in shown.items() if value == best)


def best_of(result: Result, budget: Budget) -> frozenset[str]:
    """The best arms at a budget."""
    return best_arms(budget.metric, higher_is_better=result.benchmark.higher_is_better)


def other_cost(result: Result) -> list[str]:
    """The head of a column for the cost, where it is not the average bits that have one anyway."""
    return [] if result.cost.kind == "average_bits" else [result.cost.unit]


def first_cells(result: Result, budget: Budget) -> list[str]:
    """What a row says of its budget before the arms: budget, cost where it has a column, bits a weight of the target
    layers, bytes of the whole model with its adapter, and their share of the original's 16 bits."""
    cost = [result.cost.number(budget.at) for _ in other_cost(result)]
    size = [human_bytes(budget.total_bytes), result.share(budget.total_bytes)]
    return [result.cost.number(budget.budget), *cost, f"{budget.average_bits:.2f}", *size]


def beside_cell(name: str, value: float) -> str:
    """A number of a metric beside the headline; agreement in percent."""
    return f"{100 * value:.1f}%" if name == AGREEMENT else number(value)


def beside_words(result: Result) -> str:
    """What the metrics beside the headline are, with the direction in which each improves, and their reference."""
    words = " and ".join(f"{metric_words(name)} {'↑' if name == AGREEMENT else '↓'}" for name in result.beside)
    return f"{words}; reference: {result.benchmark.reference}"


def used_less(result: Result) -> list[str]:
    """Sentences about budgets that are not used up, because fewer bits measured better."""
    largest = {budget.at: budget.budget for budget in result.budgets_in_order}
    return [words for at, budget in sorted(largest.items()) if (words := result.cost.unused(at, budget))]


def markdown_table(result: Result) -> str:
    """The budget table in GitHub's Markdown, best arm of each row in bold, ending in a newline."""
    names = result.arm_names
    arms = [cell(result.arms[name].label) for name in names]
    single = [cell(arm.label) for arm in result.references.values()]
    head = ["budget", *other_cost(result), "bits a weight", "size", "of the original"]
    columns = [f"{arm}, {cell(result.metric_name)} {result.arrow}" for arm in [*arms, *single]]
    lines = ["| " + " | ".join([*head, *columns]) + " |", "|" + " ---: |" * (len(head) + len(columns))]
    for budget in result.budgets_in_order:
        best = best_of(result, budget)
        cells = [*first_cells(result, budget), *(_bold(number(budget.metric[name]), name in best) for name in names)]
        cells += [number(budget.reference_metric[name]) for name in result.references]
        lines.append("| " + " | ".join(cells) + " |")
    values = result.hypervolume.values
    best = best_arms(values, higher_is_better=True)
    shown = [f"{arm} {_bold(number(values[n]), n in best)}" for n, arm in zip(names, arms, strict=True)]
    full = (
        f"Full precision ({result.full_precision.bits:g} bits): {number(result.full_precision.metric)}. "
        f"Original: {human_bytes(result.model.original_bytes)} at 16 bits."
    )
    full += "".join(f" {words}." for words in used_less(result))
    lines += ["", f"{full} Hypervolume ↑: {', '.join(shown)}.", ""]
    return "\n".join([*lines, *_beside(result, dict(zip(names, arms, strict=True))), ""])


def _beside(result: Result, arms: Mapping[str, str]) -> list[str]:
    """The table of metrics beside the headline, and of bits a weight of everything."""
    told = [(name, arm) for arm in arms for name in result.beside]
    columns = [f"{arms[arm]}, {metric_words(name)} {'↑' if name == AGREEMENT else '↓'}" for name, arm in told]
    head = ["budget", "bits a weight of everything", *columns]
    lines = ["| " + " | ".join(head) + " |", "|" + " ---: |" * len(head)]
    for budget in result.budgets_in_order:
        cells = [beside_cell(name, budget.metrics[name][arm]) for name, arm in told]
        bits = f"{result.bits_of_all(budget.total_bytes):.2f}"
        lines.append("| " + " | ".join([result.cost.number(budget.budget), bits, *cells]) + " |")
    words = f" {beside_words(result)[:1].upper()}{beside_words(result)[1:]}." if result.beside else ""
    return [*lines, "", f"Everything: base and adapter, all files.{words}"]


def _bold(text: str, bold: bool) -> str:
    return f"**{text}**" if bold else text


def cell(text: str) -> str:
    """User text that cannot end a cell or a row."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
