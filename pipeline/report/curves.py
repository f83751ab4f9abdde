"""Training curves of every arm: loss and learning rate by step, search rounds marked.

Every step trains another configuration, so the raw loss jumps with its bits: what is drawn is the mean of
neighbouring steps, over the band between the 10th and the 90th percentile of each group.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.report.schema import Result, Step
from pipeline.report.style import (
    FIGURE_WIDTH,
    MUTED,
    Label,
    arm_look,
    empty_figure,
    end_labels,
    label_width,
    new_figure,
    panel_title,
    short,
    style,
)

MAX_GROUPS = 120


def curves_figure(result: Result) -> Figure:
    """Training loss (upper panel) and learning rate (lower panel) against the step."""
    names = [name for name in result.arm_names if result.curves.get(name)]
    if not names:
        return empty_figure("This run has no training curves.")
    with style():
        figure = new_figure(FIGURE_WIDTH, 4.6)
        labeled = label_width([short(result.arms[name].label) for name in names])
        upper, lower = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3.4, 1]})
        figure.subplots_adjust(
            left=0.75 / FIGURE_WIDTH, right=1 - labeled / FIGURE_WIDTH, top=0.89, bottom=0.12, hspace=0.16
        )
        upper.set_ylabel(f"loss, {result.loss_unit} ↓")
        lower.set_ylabel("learning rate")
        lower.set_xlabel("training step")
        last = max(result.curves[name][-1].step for name in names)
        upper.set_xlim(0, max(last, 1))
        lower.xaxis.set_major_locator(MaxNLocator(integer=True))
        size = max(_group_size(len(result.curves[name])) for name in names)
        reading = f"line: mean of {size} logged steps, band: their 10th to 90th percentile" if size > 1 else ""
        panel_title(upper, "Training loss", reading)
        labels, rates = [], []
        for name in names:
            color, _ = arm_look(name, result.arm_names)
            steps = sorted(result.curves[name], key=lambda at: at.step)
            x, mean, low, high = grouped(steps, size)
            if size > 1:
                upper.fill_between(x, low, high, color=color, alpha=0.13, lw=0)
            upper.plot(x, mean, color=color, lw=1.8, marker="o" if len(x) == 1 else None)
            labels.append(Label(x[-1], mean[-1], short(result.arms[name].label), color, bold=True))
            rate = [at.lr for at in steps]
            lower.plot([at.step for at in steps][::size], rate[::size], color=color, lw=1.5)
            rates += rate
        lower.set_ylim(0, 1.15 * max(rates) or 1.0)
        lower.yaxis.set_major_locator(MaxNLocator(2))
        lower.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        lower.yaxis.get_offset_text().set_fontsize(8)
        _mark_rounds(upper, lower, [at for name in names for at in result.curves[name]])
        end_labels(upper, labels)
    return figure


def grouped(steps: Sequence[Step], size: int) -> tuple[list[float], list[float], list[float], list[float]]:
    """Mean step, mean loss, and 10th and 90th percentile of the loss, for every `size` steps in a row."""
    chunks = [steps[i : i + size] for i in range(0, len(steps), size)]
    if len(chunks) > 1 and len(chunks[-1]) < size / 2:  # a short tail would be noise at the curve's end
        tail = chunks.pop()
        chunks[-1] = [*chunks[-1], *tail]
    losses = [np.array([at.loss for at in chunk]) for chunk in chunks]
    return (
        [float(np.mean([at.step for at in chunk])) for chunk in chunks],
        [float(loss.mean()) for loss in losses],
        [float(np.quantile(loss, 0.1)) for loss in losses],
        [float(np.quantile(loss, 0.9)) for loss in losses],
    )


def _group_size(n_steps: int) -> int:
    """Few steps are drawn as they are; many in at most MAX_GROUPS groups of at least 5."""
    return 1 if n_steps <= 30 else max(5, -(-n_steps // MAX_GROUPS))


def _mark_rounds(upper: Axes, lower: Axes, steps: Sequence[Step]) -> None:
    first: dict[int, int] = {}
    for at in steps:
        first[at.round] = min(first.get(at.round, at.step), at.step)
    if len(first) < 2:
        return
    for number, step in sorted(first.items()):
        for ax in (upper, lower):
            ax.axvline(step, color=MUTED, lw=0.7, ls=(0, (2, 3)), zorder=1)
        upper.annotate(
            f"round {number}", (step, 1), (4, -2), xycoords=upper.get_xaxis_transform(),
            textcoords="offset points", color=MUTED, fontsize=8, va="top",
        )  # fmt: skip
