"""The look of every picture: palette, type, direct labels, axis limits, SVG that follows the page's theme.

Arms keep one colour and one marker everywhere (Okabe-Ito hues, told apart by marker as well as by colour).
Each colour of `PALETTE` occurs once, so that `themed_svg` can replace it by a CSS variable: one inline SVG
then serves light and dark pages.
"""

import io
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import matplotlib
import numpy as np
from markupsafe import escape
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from scipy.optimize import isotonic_regression

PALETTE = {  # name: (light, dark)
    "surface": ("#ffffff", "#171b21"),
    "ink": ("#1c2530", "#e6eaef"),
    "muted": ("#616c78", "#9aa6b2"),
    "grid": ("#e4e8ec", "#2b323b"),
    "none": ("#858f9a", "#8b96a3"),
    "shared": ("#c8590c", "#f0954a"),
    "coa": ("#0b6cb0", "#5cb3f2"),
    "other0": ("#00835f", "#2cc79a"),
    "other1": ("#a8488a", "#e08cc6"),
    "other2": ("#7a6a00", "#d6c33a"),
}
FIGURE_WIDTH = 11.6  # inches
PIXELS_PER_POINT = 1134 / (72 * FIGURE_WIDTH)  # inner width of a card of the page
INK, MUTED, GRID, SURFACE = (PALETTE[name][0] for name in ("ink", "muted", "grid", "surface"))
_MARKERS = {"none": "o", "shared": "s", "coa": "D", "other0": "^", "other1": "v", "other2": "P"}
_BITS_MAP = LinearSegmentedColormap.from_list("bits", ["#f7ecb5", "#a4d8b8", "#4fb3c1", "#2c7fb8", "#253c8f"])


class Label(NamedTuple):
    """A direct label for the curve that ends at data point (x, y)."""

    x: float
    y: float
    text: str
    color: str
    bold: bool = False


def style() -> AbstractContextManager[None]:
    """rcParams of all pictures; hold it open while drawing and while saving."""
    return matplotlib.rc_context(
        {
            **matplotlib.rcParamsDefault,
            "backend": "agg",
            "figure.facecolor": SURFACE,
            "axes.facecolor": "none",
            "axes.edgecolor": MUTED,
            "axes.labelcolor": INK,
            "axes.titlecolor": INK,
            "axes.titlesize": 11,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.linewidth": 0.8,
            "axes.grid": True,
            "axes.grid.axis": "y",
            "axes.axisbelow": True,
            "grid.color": GRID,
            "grid.linewidth": 0.8,
            "xtick.color": MUTED,
            "ytick.color": MUTED,
            "xtick.labelsize": 9,
            "ytick.labelsize": 9,
            "ytick.major.size": 0,
            "text.color": INK,
            "text.parse_math": False,  # labels come from users: "$" is a character
            "font.family": "DejaVu Sans",
            "font.size": 9.5,
            "lines.solid_capstyle": "round",
            "svg.fonttype": "none",
            "svg.hashsalt": "coalora",
        }
    )


def arm_key(name: str, names: Sequence[str]) -> str:
    """The palette entry of an arm: its own, or one of the spare ones in order of appearance."""
    if name in _MARKERS:
        return name
    return f"other{[other for other in names if other not in _MARKERS].index(name) % 3}"


def arm_look(name: str, names: Sequence[str]) -> tuple[str, str]:
    """(colour, marker) of an arm."""
    key = arm_key(name, names)
    return PALETTE[key][0], _MARKERS[key]


def bits_color(bits: float) -> str:
    """Hex colour of a bit-width, logarithmic from 2 (pale) to 8 (dark)."""
    return to_hex(_BITS_MAP(float(np.clip((np.log2(bits) - 1) / 2, 0, 1))))


def text_on(color: str) -> str:
    """Black or white, whichever reads better on a colour (relative luminance, WCAG 2)."""
    rgb = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return "#000000" if float(linear @ np.array([0.2126, 0.7152, 0.0722])) > 0.18 else "#fffffe"


def new_figure(width: float, height: float) -> Figure:
    """A figure outside pyplot's global registry, in inches."""
    return Figure(figsize=(width, height))


def empty_figure(message: str) -> Figure:
    """What a picture without data shows: a plain sentence."""
    with style():
        figure = new_figure(10, 1.2)
        figure.text(0.5, 0.5, message, ha="center", va="center", color=MUTED)
    return figure


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions nearest to `wanted` (least squares), in its order, `gap` apart, inside [low, high].

    Isotonic regression on `wanted[i] - i gap`; when there is no room, the gap shrinks to what fits.
    """
    n = len(wanted)
    order, out = np.argsort(wanted, kind="stable"), np.empty(n)
    steps = np.arange(n) * min(gap, (high - low) / max(n - 1, 1))
    out[order] = np.clip(isotonic_regression(np.array(wanted)[order] - steps).x, low, high - steps[-1]) + steps
    return out.tolist()


def panel_title(ax: Axes, title: str, reading: str = "") -> None:
    """A bold title over a muted line that says how to read the panel."""
    ax.set_title(title, pad=25 if reading else 11)
    if reading:
        ax.annotate(
            reading, (0, 1), (0, 10), xycoords="axes fraction", textcoords="offset points", color=MUTED,
            fontsize=8.5,
        )  # fmt: skip


def short(text: str, n_characters: int = 22) -> str:
    """User text that fits beside a panel."""
    return text if len(text) <= n_characters else text[: n_characters - 1] + "…"


def label_width(texts: Sequence[str]) -> float:
    """Inches that `end_labels` needs to the right of the spine, leaders included."""
    return 0.28 + 0.083 * max(map(len, texts), default=0)


def end_labels(ax: Axes, labels: Sequence[Label]) -> None:
    """Name curves beside the right spine, in their colours, moved apart and tied back to their ends.

    Call it last: it reads the final limits of the axes.
    """
    if not labels:
        return
    ax.get_xlim(), ax.get_ylim()  # autoscaling is lazy: transData is stale until someone asks
    (left, low), (right, high) = ax.transAxes.transform([(0, 0), (1, 1)])
    width = (right - left) / ax.figure.dpi  # inches
    points = ax.transAxes.inverted().transform(ax.transData.transform([(at.x, at.y) for at in labels]))
    ends = np.clip(points, 0, 1)
    gap = 13.5 * ax.figure.dpi / 72 / (high - low)
    for (x, y), at_y, label in zip(ends, spread(ends[:, 1].tolist(), gap, 0.0, 1.0), labels, strict=True):
        ax.plot(
            [x, 1.0, 1.0 + 0.14 / width], [y, y, at_y], color=label.color, lw=0.7, alpha=0.65,
            ls=(0, (1, 1.6)), transform=ax.transAxes, clip_on=False, zorder=1,
        )  # fmt: skip
        ax.text(
            1.0 + 0.18 / width, at_y, label.text, color=label.color, transform=ax.transAxes, va="center",
            weight="bold" if label.bold else "normal",
        )  # fmt: skip


def limits(core: Sequence[float], rest: Sequence[float]) -> tuple[float, float]:
    """Axis limits that hold `core`, and `rest` unless that would squeeze `core` below a fifth of the axis."""
    low, high = min(core), max(core)
    span = max(high - low, 0.02 * max(abs(low), abs(high)), 1e-3)
    every_low, every_high = min([low, *rest]), max([high, *rest])
    low, high = max(every_low, low - 4 * span), min(every_high, high + 4 * span)
    pad = 0.07 * max(high - low, span)
    return low - pad, high + pad


def tip(text: str) -> str:
    """A gid that `themed_svg` turns into a native tooltip of the artist."""
    return "tip:" + text


def figure_png(figure: Figure, *, dpi: int = 130, pad_inches: float | None = None) -> bytes:
    """The picture's bytes, the same for the same picture.

    Args:
        pad_inches: margin around what is drawn; None keeps the figure's size.
    """
    buffer = io.BytesIO()
    cut = {} if pad_inches is None else {"bbox_inches": "tight", "pad_inches": pad_inches}
    with style():
        figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None}, **cut)  # type: ignore[arg-type]
    return buffer.getvalue()


def themed_svg(figure: Figure, prefix: str, title: str) -> str:
    """Inline SVG: ids unique by `prefix`, palette as CSS variables, no reference outside, deterministic."""
    buffer = io.StringIO()
    with style():
        figure.savefig(
            buffer, format="svg", transparent=True, bbox_inches="tight", pad_inches=0.04,
            metadata={"Date": None, "Creator": None},
        )  # fmt: skip
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.S)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r"<style type=\"text/css\">.*?</style>", "", svg, flags=re.S)
    svg = re.sub(r'<g id="tip:([^"]*)">', r"<g><title>\1</title>", svg)
    svg = re.sub(r' id="([^"]+)"', rf' id="{prefix}-\1"', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}-", svg)
    svg = re.sub(r'xlink:href="#', f'href="#{prefix}-', svg)
    for name, (light, _) in PALETTE.items():
        svg = svg.replace(f": {light}", f": var(--{name})")
    box = svg[svg.index('viewBox="') + 9 :].split('"')[0]
    width = float(box.split()[2]) * PIXELS_PER_POINT  # the same type size in every picture
    body = svg[svg.index(">") + 1 :]
    head = f'<svg viewBox="{box}" style="max-width: {width:.0f}px" role="img" aria-label="{escape(title)}">'
    return head + body.strip()
