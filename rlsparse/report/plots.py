"""Figures of the page of one checkpoint pair: matplotlib's, as inline SVG.

Figures are small multiples near the width of a phone, so that the page, not the figure, adapts to
the screen. Text stays text. Colours are CSS variables of the page, which follow its light or dark
scheme; series differ by marker and dash too. No pyplot: nothing global outlives a call, and equal
rows give equal bytes.
"""

import html
import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import matplotlib.ticker
import numpy as np
from markupsafe import Markup
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from rlsparse.report.formats import percent
from rlsparse.report.rows import Row, in_order

WIDTH = 360
"""Width of a figure in CSS pixels (one SVG unit each)."""

INK, GRID, PAPER = "#010101", "#020202", "#fefefe"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
"""The Okabe-Ito palette, safe for colour-blind readers; the page has a variable for each."""

_CSS = {INK: "var(--ink)", GRID: "var(--rule)", PAPER: "var(--paper)"} | {
    colour: f"var(--series-{i})" for i, colour in enumerate(SERIES, 1)
}
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", ":", "-.")
_STYLE = {
    "svg.fonttype": "none",
    "text.hinting": "none",
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.labelsize": 12,
    "legend.fontsize": 11.5,
    "xtick.labelsize": 11.5,
    "ytick.labelsize": 11.5,
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.edgecolor": GRID,
    "grid.color": GRID,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
}
MAX_LAYERS, MAX_MODULES = 40, 10
"""Heat maps with more rows or columns than this carry no numbers in their cells."""


def draw(
    name: str, title: str, size: tuple[float, float], paint: Callable[[Figure], None]
) -> Markup:
    """Paint a figure of ``size`` CSS pixels and return it as an SVG element labelled ``title``."""
    buffer, nothing = io.StringIO(), dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**_STYLE, "svg.hashsalt": name})
        layout = ConstrainedLayoutEngine(w_pad=6 / 72, h_pad=4 / 72)
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), layout=layout)
        paint(figure)
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    used = set(re.findall(r"(?:href=\"|url\()#([^\")]+)", body))
    body = re.sub(r'(<[^<>]*?) id="([^"]*)"', lambda m: m[0] if m[2] in used else m[1], body)
    for colour, variable in _CSS.items():
        body = body.replace(colour, variable)
    head = (
        f'<svg class="plot" role="img" aria-label="{html.escape(title)}" width="{size[0]:.0f}" '
        f'height="{size[1]:.0f}" viewBox="0 0 {size[0]:g} {size[1]:g}">'
    )
    return Markup(head + body.strip())


def percent_axis(axis: Any) -> None:
    """Ticks of a fraction as percentages."""
    axis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
    axis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda v, _: f"{100 * v:.10g} %"))


def density_heat_map(algorithm: str, rows: Sequence[Row], top: float) -> Markup:
    """Density (fraction changed) of one algorithm: layers down, modules across.

    ``top`` is the density of the darkest colour, shared by the figures of all algorithms.
    """
    cells = {(r["layer"], r["module"]): r["density"] for r in rows if r["algorithm"] == algorithm}
    modules = in_order({module for _, module in cells})
    numbered = sorted({layer for layer, _ in cells if layer is not None})
    layers = [*numbered, None] if any(layer is None for layer, _ in cells) else numbered
    values = np.array([[cells.get((y, x), math.nan) for x in modules] for y in layers])
    annotated = len(layers) <= MAX_LAYERS and len(modules) <= MAX_MODULES
    every = 1 if annotated else math.ceil(len(layers) / 24)
    names = ["rest" if y is None else str(y) for y in layers]

    def paint(figure: Figure) -> None:
        ax = figure.subplots()
        texts = [[_bare_percent(v) if annotated else "" for v in line] for line in values]
        _heat_map(ax, values, texts, Normalize(0, top or 1), "Blues")
        if not annotated:
            percent_axis(figure.colorbar(ax.collections[0], location="bottom", aspect=40).ax.xaxis)
        ax.set_xticks(
            np.arange(len(modules)) + 0.5, modules, rotation=45, ha="left", rotation_mode="anchor"
        )
        ax.set_yticks(np.arange(0, len(layers), every) + 0.5, names[::every])
        ax.set_ylabel("layer")

    height = 70 + 50 * (not annotated) + max(len(layers) * (20 if annotated else 9), 60)
    title = f"{algorithm}: density by layer and module, in percent; the darkest is {percent(top)}"
    return draw(f"density {algorithm}", title, (WIDTH, height), paint)


def _bare_percent(value: float) -> str:
    if math.isnan(value):
        return ""
    return f"{100 * value:.0f}" if value >= 0.0095 else f"{100 * value:.1g}"


def _heat_map(ax: Any, values: Any, texts: list[list[str]], norm: Normalize, palette: str) -> None:
    """Cells as vector rectangles, first row on top, each with its text in a readable ink."""
    colormap = matplotlib.colormaps[palette]
    ax.pcolormesh(np.ma.masked_invalid(values), norm=norm, cmap=colormap, edgecolors=PAPER, lw=0.8)
    for (y, x), value in np.ndenumerate(values):
        if texts[y][x] and not math.isnan(value):
            red, green, blue, _ = colormap(norm(value))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
            ink = "#ffffff" if dark else "#111111"
            ax.text(
                x + 0.5, y + 0.5, texts[y][x], ha="center", va="center", color=ink, fontsize=10.5
            )
    ax.invert_yaxis()
    ax.xaxis.tick_top()
    ax.grid(visible=False)
    for spine in ax.spines.values():
        spine.set_visible(False)
