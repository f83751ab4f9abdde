"""One search round by itself: its set as picture and table, for those who watch a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from coalora.calibrate.tables import CalibrationTables
from coalora.configurations import ConfigurationSet
from pipeline.report.front import non_dominated
from pipeline.report.style import MUTED, PALETTE, new_figure, panel_title, style
from pipeline.report.table import number, signed

COLOR = PALETTE["coa"][0]


def round_figure(members: ConfigurationSet, measured: CalibrationTables, record: Mapping[str, Any]) -> Figure:
    """Loss against cost of a round's members, the new ones marked, with their front.

    Args:
        record: what the search wrote as `round.json`.
    """
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
