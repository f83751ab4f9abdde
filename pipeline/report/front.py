"""The picture of a run: what every arm makes of the same configurations, from the lowest bits to the highest.

Left: the metric against average bits, members of the configuration set as points, budgets joined by a line,
full precision as a rule. Right: the loss fronts, whose dominated area is the hypervolume.
"""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.report.schema import Budget, Member, Point, Result
from pipeline.report.style import (
    FIGURE_WIDTH,
    INK,
    SURFACE,
    Label,
    arm_look,
    end_labels,
    label_width,
    limits,
    new_figure,
    panel_title,
    short,
    style,
    tip,
)
from pipeline.words import number


def front_figure(result: Result) -> Figure:
    """Metric and loss against cost (by default average bits per weight), one colour and marker an arm."""
    with style():
        figure = new_figure(FIGURE_WIDTH, 4.6)
        arms = [short(arm.label) for arm in result.arms.values()]
        beside = [label_width(arms), label_width([arm + "  0.000" for arm in arms])]
        panel = (FIGURE_WIDTH - 2 * 0.75 - sum(beside)) / 2  # inches
        x = [0.75, 2 * 0.75 + panel + beside[0]]
        left, right = (figure.add_axes((at / FIGURE_WIDTH, 0.12, panel / FIGURE_WIDTH, 0.74)) for at in x)
        _metric_panel(left, result)
        _loss_panel(right, result)
    return figure


def non_dominated(points: Sequence[Point]) -> list[Point]:
    """The (loss, cost) points that no other point dominates (both minimised), by rising cost."""
    front: list[Point] = []
    for loss, cost in sorted(set(points), key=lambda point: (point[1], point[0])):
        if not front or loss < front[-1][0]:
            front.append((loss, cost))
    return front


def _metric_panel(ax: Axes, result: Result) -> None:
    names = result.arm_names
    better = "higher" if result.benchmark.higher_is_better else "lower"
    panel_title(
        ax,
        f"{result.metric_name[:1].upper()}{result.metric_name[1:]} at every budget",
        f"large: budgets, small: members of the configuration set ({len(result.members)})",
    )
    ax.set_xlabel(result.cost.label)
    ax.set_ylabel(f"{result.metric_name} ({better} is better {result.arrow})")
    budgets = sorted(result.budgets, key=lambda budget: budget.at)
    measured: list[Budget | Member] = [*budgets, *result.members]
    shown = {name: [part.metric[name] for part in measured] for name in names}
    full = result.full_precision.metric
    bounds = _limits(shown, [full])
    _cost_axis(ax, [part.at for part in measured], result)
    ax.set_ylim(*bounds)
    ax.axhline(full, color=INK, lw=1, ls=(0, (5, 3)), zorder=1.5)
    up = result.benchmark.higher_is_better  # the side of the rule where no arm is expected
    ax.annotate(
        f"full precision {number(full)}", (0, full), (5, 4 if up else -4), xycoords=ax.get_yaxis_transform(),
        textcoords="offset points", va="bottom" if up else "top", fontsize=9,
    )  # fmt: skip
    labels = []
    for z, name in enumerate(names):
        color, marker = arm_look(name, names)
        arm = result.arms[name].label
        for member in result.members:
            at = (member.at, member.metric[name])
            if bounds[0] <= at[1] <= bounds[1]:
                text = f"{arm}: {number(at[1])} at {result.cost.text(at[0])} (configuration of round {member.round})"
                _dot(ax, at, color, marker, 4.0, 0.5, 2 + z, text)
        x = [budget.at for budget in budgets]
        y = [budget.metric[name] for budget in budgets]
        ax.plot(x, y, color=color, lw=1.8, zorder=5 + z)
        for budget, at in zip(budgets, zip(x, y, strict=True), strict=True):
            text = f"{arm}: {number(at[1])} at {result.cost.text(at[0])} (budget {budget.budget:g})"
            _dot(ax, at, color, marker, 6.2, 1, 8 + z, text)
        labels.append(Label(x[-1], y[-1], short(arm), color, bold=True))
    _off_scale(ax, shown, result)
    end_labels(ax, labels)


def _loss_panel(ax: Axes, result: Result) -> None:
    names = result.arm_names
    panel_title(ax, "Loss fronts of the set", "faint: dominated members; number beside a name: hypervolume ↑")
    ax.set_xlabel(result.cost.label)
    ax.set_ylabel(f"loss, {result.searched_unit} (lower is better ↓)")
    shown = {name: [member.loss[name] for member in result.members] for name in names}
    bounds = _limits(shown, [])
    _cost_axis(ax, [member.at for member in result.members], result)
    ax.set_ylim(*bounds)
    right = ax.get_xlim()[1]
    labels = []
    for z, name in enumerate(names):
        color, marker = arm_look(name, names)
        points: list[Point] = [(member.loss[name], member.at) for member in result.members]
        front = non_dominated(points)
        x, y = [cost for _, cost in front], [loss for loss, _ in front]
        ax.step([*x, right], [*y, y[-1]], where="post", color=color, lw=1.6, zorder=5 + z)
        for loss, cost in points:
            if bounds[0] <= loss <= bounds[1]:
                on_front = (loss, cost) in front
                text = f"{result.arms[name].label}: loss {number(loss)} at {result.cost.text(cost)}"
                text += "" if on_front else " (dominated)"
                size, alpha = (4.8, 1.0) if on_front else (3.2, 0.3)
                _dot(ax, (cost, loss), color, marker, size, alpha, 8 + z, text)
        volume = number(result.hypervolume.values[name])
        labels.append(Label(right, y[-1], f"{short(result.arms[name].label)}  {volume}", color, bold=True))
    _off_scale(ax, shown, result)
    end_labels(ax, labels)


def _dot(
    ax: Axes, at: tuple[float, float], color: str, marker: str, size: float, alpha: float, z: float, text: str
) -> None:
    ax.plot(
        *at, marker, color=color, ms=size, alpha=alpha, mec=SURFACE, mew=0.7 if alpha == 1 else 0, zorder=z,
        gid=tip(text), clip_on=False,
    )  # fmt: skip


def _limits(shown: Mapping[str, Sequence[float]], rules: Sequence[float]) -> tuple[float, float]:
    """Limits that hold every arm with an adapter; the bare model may leave the axis (see `_off_scale`)."""
    core = [value for name, values in shown.items() if name != "none" for value in values]
    rest = list(shown.get("none", []))
    return limits([*(core or rest), *rules], rest)


def _off_scale(ax: Axes, shown: Mapping[str, Sequence[float]], result: Result) -> None:
    """Say what the limits leave out: nothing is cut silently."""
    low, high = ax.get_ylim()
    values = shown.get("none", [])
    label = result.arms["none"].label if values else ""
    color = arm_look("none", result.arm_names)[0]
    above, below = [v for v in values if v > high], [v for v in values if v < low]
    for cut, y, va, arrow, worst in (
        (above, 0.985, "top", "▲", max(above, default=0.0)),
        (below, 0.015, "bottom", "▼", min(below, default=0.0)),
    ):
        if cut:
            text = f"{arrow} {label}: {len(cut)} point{'s' * (len(cut) > 1)} off the scale, to {number(worst)}"
            ax.text(0.99, y, text, transform=ax.transAxes, color=color, ha="right", va=va, fontsize=8)


def _cost_axis(ax: Axes, costs: Sequence[float], result: Result) -> None:
    low, high = min(costs), max(costs)
    widest = 1 if result.cost.kind == "average_bits" else 0.2 * high  # one bit, or a fifth of the largest, at least
    pad = max(0.04 * (high - low), (widest - (high - low)) / 2)
    ax.set_xlim(low - pad, high + pad)
