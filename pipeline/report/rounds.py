"""Search rounds: the set of one as picture and table, and the fronts and hypervolumes of all."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

from coalora.calibrate.tables import CalibrationTables
from coalora.configurations import ConfigurationSet
from pipeline.report.front import non_dominated
from pipeline.report.schema import Cost, Result, Round
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
from pipeline.words import number, signed

COLOR = PALETTE["coa"][0]


def rounds_figure(result: Result) -> Figure:
    """Hypervolume by round (left) and the fronts, older ones fainter (right)."""
    if not result.rounds:
        return empty_figure("This run has no search rounds.")
    with style():
        figure = new_figure(FIGURE_WIDTH, 4.0)
        left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": [1, 1.25]})
        figure.subplots_adjust(left=0.75 / FIGURE_WIDTH, right=0.917, top=0.84, bottom=0.13, wspace=0.28)
        _volume_panel(left, result)
        _fronts_panel(right, result.rounds, result.cost, result.searched_unit)
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


def round_figure(members: ConfigurationSet, measured: CalibrationTables, record: Mapping[str, Any]) -> Figure:
    """Loss against cost of a round's members, the new ones marked, with their front."""
    costs, losses = measured.costs(members.configurations), members.losses
    new = members.joined == record["round"]
    before, after = record["hypervolume_before"], record["hypervolume_after"]
    with style():
        figure = new_figure(7.2, 4.4)
        axes = figure.add_axes((0.12, 0.13, 0.84, 0.71))
        panel_title(
            axes,
            f"Configuration set after round {record['round']}",
            f"{len(members)} members, {int(new.sum())} new of {record['n_candidates']} candidates; "
            f"hypervolume {number(after)} ({signed(after - before)})",
        )
        front = non_dominated([(float(loss), float(cost)) for loss, cost in zip(losses, costs, strict=True)])
        x, y = [cost for _, cost in front], [loss for loss, _ in front]
        axes.step([*x, float(costs.max())], [*y, y[-1]], where="post", color=COLOR, lw=1.6, zorder=2)
        axes.plot(costs[~new], losses[~new], "o", color=COLOR, ms=5, alpha=0.45, mew=0, zorder=3, label="kept")
        axes.plot(costs[new], losses[new], "D", color=COLOR, ms=6, mec="white", mew=0.7, zorder=4, label="new")
        axes.set_xlabel(measured.cost_unit.label)
        axes.set_ylabel("loss on the search split (lower is better ↓)")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8))
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, labelcolor=MUTED)
    return figure


def round_rows(members: ConfigurationSet, measured: CalibrationTables) -> list[dict[str, Any]]:
    """One row a member, by rising bits: average bits, cost where it is another, bytes, loss, layers by bits, round."""
    bits, sizes = measured.average_bits(members.configurations), measured.total_nbytes(members.configurations)
    costs = measured.costs(members.configurations)
    n_weights = np.array([layer.n_weights for layer in measured.layers])
    rows = []
    for i in np.argsort(bits, kind="stable"):
        packed = measured.nbytes[np.arange(len(n_weights)), members.configurations[i]]
        counts = Counter(round(float(b), 1) for b in packed * 8 / n_weights)
        loss = float(members.losses[i])
        row: dict[str, Any] = {"average bits": round(float(bits[i]), 3)}
        if measured.cost_kind == "latency":
            row[measured.cost_unit.words] = round(float(costs[i]), 3)
        row |= {
            "bytes": int(sizes[i]),
            "loss": round(loss, 5) if np.isfinite(loss) else None,
            "layers by bits": ", ".join(f"{n} at {b:g}" for b, n in sorted(counts.items())),
            "since round": int(members.joined[i]),
        }
        rows.append(row)
    return rows
