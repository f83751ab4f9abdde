"""The Pareto search, round by round: the hypervolume before and after, and the front that is left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

from pipeline.report.schema import Cost, Result, Round, as_result
from pipeline.report.style import (
    FIGURE_WIDTH,
    MUTED,
    PALETTE,
    SURFACE,
    Label,
    empty_figure,
    end_labels,
    figure_png,
    new_figure,
    panel_title,
    style,
    tip,
)
from pipeline.report.table import number, signed

COLOR = PALETTE["coa"][0]


def rounds_figure(result: Result | Mapping[str, Any]) -> Figure:
    """Hypervolume by round (left) and the fronts, older ones fainter (right).

    Raises:
        CoaloraError: the result does not fit the schema.
    """
    result = as_result(result)
    if not result.rounds:
        return empty_figure("This run has no search rounds.")
    with style():
        figure = new_figure(FIGURE_WIDTH, 4.0)
        left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": [1, 1.25]})
        figure.subplots_adjust(left=0.75 / FIGURE_WIDTH, right=0.917, top=0.84, bottom=0.13, wspace=0.28)
        _volume_panel(left, result)
        _fronts_panel(right, result.rounds, result.cost, result.loss_unit)
    return figure


def fronts_png(rounds: Sequence[Round], cost: Cost, loss_unit: str) -> bytes:
    """The fronts of rounds as a PNG of about 40 kB, for where a page cannot go."""
    with style():
        figure = new_figure(7.2, 3.8)
        _fronts_panel(figure.subplots(), rounds, cost, loss_unit)
    return figure_png(figure, dpi=110, pad_inches=0.12)


def _volume_panel(ax: Axes, result: Result) -> None:
    rounds = sorted(result.rounds, key=lambda at: at.round)
    panel_title(ax, "Hypervolume of the set", "open: before, filled: after; below the change: accepted/candidates")
    ax.set_xlabel("search round")
    ax.set_ylabel("hypervolume (higher is better ↑)")
    x = [at.round for at in rounds]
    for at in rounds:
        # Losses are measured again as theta trains, so a round need not start where the one before it ended.
        before, after = at.hypervolume_before, at.hypervolume_after
        counts = f"{at.n_accepted} of {at.n_candidates} accepted"
        text = f"round {at.round}: {number(before)} to {number(after)}, {counts}"
        ax.plot([at.round] * 2, [before, after], color=COLOR, lw=2.4, alpha=0.4, zorder=2)
        ax.plot(at.round, before, "o", ms=6.5, mfc=SURFACE, mec=COLOR, mew=1.4, zorder=3, gid=tip(text))
        ax.plot(at.round, after, "o", ms=7, color=COLOR, mec=SURFACE, mew=0.7, zorder=4, gid=tip(text))
        if len(rounds) <= 10:
            text = f"{signed(after - before)}\n{at.n_accepted}/{at.n_candidates}"
            ax.annotate(
                text, (at.round, max(before, after)), (0, 8), textcoords="offset points", ha="center",
                fontsize=8, color=MUTED, linespacing=1.35,
            )  # fmt: skip
    ax.set_xlim(min(x) - 0.6, max(x) + 0.6)
    ax.xaxis.set_major_locator(FixedLocator(x) if len(x) <= 12 else MaxNLocator(integer=True))
    values = [value for at in rounds for value in (at.hypervolume_before, at.hypervolume_after)]
    span = max(max(values) - min(values), 1e-3)
    ax.set_ylim(min(values) - 0.12 * span, max(values) + 0.32 * span)


def _fronts_panel(ax: Axes, all_rounds: Sequence[Round], cost: Cost, loss_unit: str) -> None:
    rounds = [at for at in sorted(all_rounds, key=lambda at: at.round) if at.front]
    panel_title(ax, "Fronts by round", "the older the fainter")
    ax.set_xlabel(cost.label)
    ax.set_ylabel(f"loss, {loss_unit} (lower is better ↓)")
    if not rounds:
        ax.text(0.5, 0.5, "no front was recorded", transform=ax.transAxes, ha="center", color=MUTED)
        return
    labels = []
    right = max(x for at in rounds for _, x in at.front)
    left = min(x for at in rounds for _, x in at.front)
    pad = 0.04 * max(right - left, 0.5 if cost.kind == "average_bits" else 0.1 * right)
    ax.set_xlim(left - pad, right + pad)
    for i, at in enumerate(rounds):
        newest = i == len(rounds) - 1
        alpha = 1.0 if newest else 0.2 + 0.45 * i / max(len(rounds) - 1, 1)
        front = sorted(at.front, key=lambda point: point[1])
        x, y = [at_cost for _, at_cost in front], [loss for loss, _ in front]
        ax.step(
            [*x, right + pad], [*y, y[-1]], where="post", color=COLOR, alpha=alpha, lw=2.0 if newest else 1.2,
            zorder=2 + i,
        )  # fmt: skip
        text = f"round {at.round}: {len(front)} of {at.n_members} members on the front"
        ax.plot(x, y, "o", color=COLOR, ms=4.2 if newest else 3, alpha=alpha, mew=0, zorder=2 + i, gid=tip(text))
        if newest or i == 0:
            labels.append(Label(right + pad, y[-1], f"round {at.round}", COLOR if newest else MUTED, bold=newest))
    end_labels(ax, labels)
