"""Heat map of bits: layers across, budgets down, colour for the nominal bits of each layer."""

import re
from collections.abc import Sequence
from itertools import groupby

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from pipeline.report.schema import Result
from pipeline.report.style import FIGURE_WIDTH, INK, MUTED, bits_color, new_figure, style, text_on, tip

MAX_PRINTED_LAYERS = 40  # columns wide enough for a number
MAX_NAMED_LAYERS = 64  # columns wide enough for the name of a kind
_ROW = 0.34  # inches


def heatmap_figure(result: Result) -> Figure:
    """N columns in the model's order, one row a budget, transformer blocks set apart by gaps."""
    heat = result.heatmap
    n_layers, n_budgets = len(heat.layers), len(heat.budgets)
    named, printed = n_layers <= MAX_NAMED_LAYERS, n_layers <= MAX_PRINTED_LAYERS
    blocks = block_runs(heat.layers)
    gap = 0.012 * n_layers if len(blocks) > 1 else 0.0
    order = sorted(range(n_budgets), key=lambda b: heat.budgets[b])
    top, bottom = 0.62, (0.07 * max(map(len, heat.kinds)) + 0.1 if named else 0.1) + 0.42
    height = top + bottom + _ROW * max(n_budgets, 2)
    with style():
        figure = new_figure(FIGURE_WIDTH, height)
        ax = figure.add_axes((0.062, bottom / height, 0.918, 1 - (top + bottom) / height))
        ax.set_title("Bits of every layer at every budget")
        unit = "bits per weight" if result.cost.kind == "average_bits" else result.cost.unit
        ax.set_ylabel(f"budget\n({unit})")
        ax.grid(False)
        ax.spines[:].set_visible(False)
        offset = {column: block * gap for block, (_, columns) in enumerate(blocks) for column in columns}
        edge = 0.06 if named else 0.0
        for row, b in enumerate(order):
            for column, bits in enumerate(heat.bits[b]):
                color, x = bits_color(bits), column + offset[column]
                text = f"{heat.layers[column]}: {bits:g} bits at budget {heat.budgets[b]:g}"
                cell = (x + edge / 2, row + 0.04)
                ax.add_patch(Rectangle(cell, 1 - edge, 0.92, fc=color, ec=color, lw=0.15, clip_on=False, gid=tip(text)))
                if printed:
                    ax.text(
                        x + 0.5, row + 0.5, f"{bits:.3g}", ha="center", va="center_baseline", fontsize=8.5,
                        color=text_on(color), clip_on=False,
                    )  # fmt: skip
        right = n_layers + gap * (len(blocks) - 1)
        ax.set_xlim(0, right)
        ax.set_ylim(n_budgets, 0)
        ax.set_yticks([row + 0.5 for row in range(n_budgets)], [result.cost.number(heat.budgets[b]) for b in order])
        if named:
            middles = [column + offset[column] + 0.5 for column in range(n_layers)]
            ax.set_xticks(middles, heat.kinds, rotation=90, fontsize=8)
        else:
            ax.set_xticks([])
        ax.tick_params(length=0)
        every = -(-len(blocks) // 32)
        below = -(bottom - 0.22 if named else 0.16) / (_ROW * max(n_budgets, 2))
        for i, (block, columns) in enumerate(blocks):
            if block is not None and i % every == 0:
                name = f"block {block}" if len(blocks) <= 12 else str(block)
                middle = (columns[0] + columns[-1] + 1) / 2 + offset[columns[0]]
                ax.text(
                    middle, below, name, transform=ax.get_xaxis_transform(), ha="center", va="center",
                    color=INK if len(blocks) <= 12 else MUTED, fontsize=9 if len(blocks) <= 12 else 8,
                )  # fmt: skip
        if len(blocks) > 12:
            figure.text(0.521, 0.05 / height, "transformer block", ha="center", va="bottom", color=INK)
        # By what is written: layers of one choice differ in the bytes of their offsets.
        values = {f"{bits:.3g}": bits for row_bits in heat.bits for bits in row_bits}
        _legend(figure, height, sorted(values.values()))
    return figure


def block_runs(layers: Sequence[str]) -> list[tuple[int | None, list[int]]]:
    """Consecutive layers of one block: (block index, column numbers); None for layers outside blocks.

    The block index is the first whole number between dots of the layer's name,
    as in `model.layers.3.mlp.up_proj`.
    """

    def block(column: int) -> int | None:
        found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", layers[column])
        return int(found[1]) if found else None

    return [(index, list(columns)) for index, columns in groupby(range(len(layers)), key=block)]


def _legend(figure: Figure, height: float, values: Sequence[float]) -> None:
    """Swatches in the upper right corner; of many values, eight spread evenly over them."""
    if len(values) > 8:
        values = [values[round(i * (len(values) - 1) / 7)] for i in range(8)]
    side, x, y = 0.17, 0.98 * FIGURE_WIDTH, height - 0.34  # inches; x runs leftwards
    for bits in reversed(values):
        text, color = f"{bits:.3g}", bits_color(bits)
        x -= 0.085 * len(text)
        figure.text(x / FIGURE_WIDTH, y / height, text, va="center_baseline", color=MUTED, fontsize=8.5)
        x -= side + 0.06
        corner = (x / FIGURE_WIDTH, (y - side / 2) / height)
        swatch = Rectangle(corner, side / FIGURE_WIDTH, side / height, fc=color, ec="none")
        figure.add_artist(swatch)
        x -= 0.14
    figure.text(x / FIGURE_WIDTH, y / height, "bits", ha="right", va="center_baseline", color=MUTED, fontsize=8.5)
