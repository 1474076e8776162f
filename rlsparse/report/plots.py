"""Figures of the report: plain rows in, inline SVG out.

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

from rlsparse.definitions import DEFINITIONS
from rlsparse.report.formats import definition, percent
from rlsparse.report.rows import NULLS, Row, in_order

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
MAX_LAYERS, MAX_MODULES, MAX_RUNS = 40, 10, 24
"""Heat maps with more rows or columns than this carry no numbers in their cells."""
MAX_STEP_TICKS = 6
"""With more snapshots than this the step axis has round ticks instead of one per snapshot."""


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


def _short(names: Sequence[str], limit: int) -> list[str]:
    """Names cut to ``limit`` characters; those that become equal get their number."""
    cut = [name if len(name) <= limit else f"{name[: limit - 1]}…" for name in names]
    return [
        name if cut.count(name) == 1 else f"{name[: limit - 4]}…#{i}"
        for i, name in enumerate(cut, 1)
    ]


def percent_axis(axis: Any) -> None:
    """Ticks of a fraction as percentages."""
    axis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
    axis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda v, _: f"{100 * v:.10g} %"))


def colours(names: Sequence[str]) -> dict[str, str]:
    """One colour of the palette per name, in order of first appearance."""
    return {name: SERIES[i % len(SERIES)] for i, name in enumerate(dict.fromkeys(names))}


# --- sparsity --------------------------------------------------------------------------------


def sparsity_by_cell(trials: Sequence[Row], cells: Sequence[Row], colour: dict[str, str]) -> Markup:
    """Bitwise sparsity: one line per cell, its seeds as points, its mean as a bar and a number."""
    shown = [cell for cell in cells if cell["sparsity"]["bitwise"] is not None]
    names = _short([cell["group"] for cell in shown], 40)

    def paint(figure: Figure) -> None:
        ax = figure.subplots()
        for y, (cell, name) in enumerate(zip(shown, names, strict=True)):
            values = [
                t["sparsity"]["bitwise"]
                for t in trials
                if t["group"] == cell["group"] and t["sparsity"]
            ]
            ink = colour[cell["algorithm"]]
            face = PAPER if cell["role"] == "control" else ink
            centre = cell["sparsity"]["bitwise"]
            ax.plot(
                values, [y] * len(values), "o", ms=7, mfc=face, mec=ink, alpha=0.75, clip_on=False
            )
            ax.plot([centre, centre], [y - 0.14, y + 0.14], "-", color=INK, lw=2, clip_on=False)
            ax.annotate(
                f"{name}: {percent(centre)}", (0, y), xytext=(0, 15), fontsize=11.5, va="center",
                xycoords=("axes fraction", "data"), textcoords="offset points",
            )  # fmt: skip
        ax.set_ylim(len(shown) - 0.6, -0.75)
        ax.set_yticks([])
        ax.grid(axis="y", visible=False)
        ax.spines["left"].set_visible(False)
        percent_axis(ax.xaxis)
        ax.set_xlabel("weights unchanged (bitwise)")

    size = (WIDTH, 62 + 46 * len(shown))
    return draw("sparsity", "Sparsity by cell, one point per run", size, paint)


def definitions(cells: Sequence[Row], colour: dict[str, str]) -> Markup:
    """Mean sparsity of each cell under every definition of unchanged."""
    shown = [c for c in cells if c["role"] != "control" and c["sparsity"]["bitwise"] is not None]
    names = _short([cell["group"] for cell in shown], 42)
    columns = 3 if max(len(c["group"]) for c in shown) < 8 else 1

    def paint(figure: Figure) -> None:
        ax = figure.subplots()
        for i, cell in enumerate(shown):
            offset = 0.14 * (i - (len(shown) - 1) / 2) if len(shown) <= 5 else 0
            heights = [y + offset for y in range(len(DEFINITIONS))]
            ax.plot(
                [cell["sparsity"][d] for d in DEFINITIONS], heights,
                marker=MARKERS[i % len(MARKERS)], ls="", ms=7, mfc=colour[cell["algorithm"]],
                mec=PAPER, label=names[i], clip_on=False,
            )  # fmt: skip
        labels = [definition(name).replace(" max", "\nmax") for name in DEFINITIONS]
        ax.set_yticks(range(len(DEFINITIONS)), labels)
        ax.set_ylim(len(DEFINITIONS) - 0.5, -0.5)
        percent_axis(ax.xaxis)
        ax.set_xlabel("weights unchanged, mean over seeds")
        figure.legend(loc="outside upper left", ncols=columns, handletextpad=0.2, columnspacing=1.2)

    size = (WIDTH, 275 + 20 * math.ceil(len(shown) / columns))
    return draw("definitions", "Mean sparsity under every definition of unchanged", size, paint)


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


# --- along training --------------------------------------------------------------------------


def training_limits(trials: Sequence[Row]) -> tuple[float, float]:
    """Highest score and highest density of all snapshots, for axes that figures share."""
    points = [point for trial in trials for point in trial["snapshots"]]
    score = max((p["score"] for p in points if p["score"] is not None), default=0.0)
    density = max((1 - p["sparsity"] for p in points if p["sparsity"] is not None), default=0.0)
    return score or 1.0, density or 1.0


def training_curves(
    algorithm: str, trials: Sequence[Row], limits: tuple[float, float], colour: str
) -> Markup:
    """Score and density of one algorithm against the step: seeds thin, the mean of a cell bold.

    ``limits`` are the tops of the two axes, see ``training_limits``.
    """
    groups = list(dict.fromkeys(t["group"] for t in trials))
    names = _short(groups, 38)
    panels = zip(("score", "density"), limits, strict=True)
    shown = [(key, top) for key, top in panels if any(_curve(t, key) for t in trials)]

    def paint(figure: Figure) -> None:
        axes = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
        for (key, top), ax in zip(shown, axes, strict=True):
            for i, group in enumerate(groups):
                dash = DASHES[i % len(DASHES)]
                curves = [_curve(t, key) for t in trials if t["group"] == group]
                for curve in curves:
                    ax.plot(*_split(curve), ls=dash, color=colour, lw=0.9, alpha=0.5)
                ax.plot(
                    *_split(_mean_curve(curves)), ls=dash, marker="o", ms=5, color=colour, lw=2.4,
                    label=names[i], clip_on=False,
                )  # fmt: skip
            ax.set_ylim(0, 1.05 * top)
            ax.set_ylabel(key)
            percent_axis(ax.yaxis)
        axes[-1].set_xlabel("optimizer step")
        steps = sorted({p["step"] for t in trials for p in t["snapshots"]})
        if len(steps) <= MAX_STEP_TICKS:
            axes[-1].set_xticks(steps)
        if len(groups) > 1:
            handles, labels = axes[-1].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper left", ncols=1, handlelength=3)

    height = 50 + 120 * len(shown) + (20 * len(groups) if len(groups) > 1 else 0)
    title = f"{algorithm}: {' and '.join(key for key, _ in shown)} against the step"
    return draw(f"training {algorithm}", title, (WIDTH, height), paint)


def _curve(trial: Row, key: str) -> list[tuple[int, float]]:
    measure = "score" if key == "score" else "sparsity"
    points = [(p["step"], p[measure]) for p in trial["snapshots"] if p[measure] is not None]
    return points if key == "score" else [(step, 1 - sparsity) for step, sparsity in points]


def _split(curve: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [step for step, _ in curve], [value for _, value in curve]


def _mean_curve(curves: Sequence[list[tuple[int, float]]]) -> list[tuple[int, float]]:
    """Mean at the steps that every run has."""
    known = [dict(curve) for curve in curves if curve]
    steps = sorted(set.intersection(*map(set, known))) if known else []
    return [(s, math.fsum(curve[s] for curve in known) / len(known)) for s in steps]


# --- overlap and effects ---------------------------------------------------------------------


def overlap_heat_map(labels: dict[str, str], pairs: Sequence[Row]) -> Markup:
    """Runs x runs: observed overlap over that expected from the density of each tensor.

    Args:
        labels: trial_id -> label, in the order of the rows.
        pairs: rows of ``overlap_pairs``; those of single modules are left out.
    """
    whole = [p for p in pairs if p["module"] is None and p["lift"]["tensor"] is not None]
    lifts = {key: p["lift"]["tensor"] for p in whole for key in (_ends(p), _ends(p)[::-1])}
    known = {run for pair in lifts for run in pair}
    runs = [run for run in labels if run in known]
    values = np.array([[lifts.get((a, b), math.nan) for b in runs] for a in runs])
    judged = [p for p in whole if p["relation"] != "with a control"] or whole
    reach = max(0.1, *(abs(_log2(p["lift"]["tensor"])) for p in judged))
    names = [f"{name} · {i}" for i, name in enumerate(_short([labels[run] for run in runs], 44), 1)]
    annotated = len(runs) <= MAX_RUNS
    step = 34 if annotated else 14

    def paint(figure: Figure) -> None:
        ax = figure.subplots()
        texts = [[f"{v:.2f}" if annotated else "" for v in line] for line in values]
        _heat_map(
            ax, np.vectorize(_log2)(values), texts, Normalize(-reach, reach, clip=True), "PuOr_r"
        )
        ax.set_aspect("equal")
        ax.set_xticks(np.arange(len(runs)) + 0.5, [str(i + 1) for i in range(len(runs))])
        ax.set_yticks(np.arange(len(runs)) + 0.5, names)
        if not annotated:
            ax.tick_params(labelsize=9)

    margin = 30 + 7 * max(len(name) for name in names)
    size = (margin + step * len(runs), 30 + step * len(runs))
    return draw("overlap", "Overlap of runs with runs, as lift over the null", size, paint)


def _ends(pair: Row) -> tuple[str, str]:
    return pair["trial_a"], pair["trial_b"]


def _log2(lift: float) -> float:
    return math.log2(max(lift, 1e-3)) if not math.isnan(lift) else lift


def module_lifts(algorithm: str, rows: Sequence[Row]) -> Markup:
    """Observed overlap between seeds over that expected under each null, by module."""
    shown = [r for r in rows if r["algorithm"] == algorithm]

    def paint(figure: Figure) -> None:
        ax = figure.subplots()
        ax.axvline(1, color=INK, lw=1.2)
        for null, marker, ink in zip(NULLS, MARKERS, SERIES, strict=False):
            ax.plot(
                [math.nan if r["lift"][null] is None else r["lift"][null] for r in shown],
                range(len(shown)), marker=marker, ls="", ms=7, mfc=ink, mec=PAPER, label=null,
            )  # fmt: skip
        ax.set_yticks(range(len(shown)), [r["module"] for r in shown])
        ax.set_ylim(len(shown) - 0.5, -0.5)
        ax.set_xlabel("observed / expected overlap of two seeds")
        figure.legend(loc="outside upper left", ncols=3, handletextpad=0.2, columnspacing=1.2)

    title = f"{algorithm}: observed overlap over that expected, by module"
    return draw(f"modules {algorithm}", title, (WIDTH, 92 + 22 * len(shown)), paint)


def effect_forest(response: str, rows: Sequence[Row]) -> Markup:
    """Effects on one response with their intervals; ratios on a log axis, 1 or 0 marked."""
    ratio = rows[0]["shown_scale"] != "difference"
    names = _short([f"{r['factor']}: {r['level']} against {r['reference']}" for r in rows], 48)

    def paint(figure: Figure) -> None:
        ax = figure.subplots()
        ax.axvline(1 if ratio else 0, color=INK, lw=1.2)
        for y, (row, name) in enumerate(zip(rows, names, strict=True)):
            ax.plot([row["shown_low"], row["shown_high"]], [y, y], color=SERIES[0], lw=2)
            ax.plot([row["shown"]], [y], "o", ms=7, color=SERIES[0])
            ax.annotate(
                name, (0, y),
                xytext=(0, 15), xycoords=("axes fraction", "data"), textcoords="offset points",
                fontsize=11.5, va="center",
            )  # fmt: skip
        ax.set_ylim(len(rows) - 0.6, -0.75)
        ax.set_yticks([])
        ax.grid(axis="y", visible=False)
        ax.spines["left"].set_visible(False)
        if ratio:
            ax.set_xscale("log")
            ax.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5), numticks=6))
            ax.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda v, _: f"{v:g}"))
            ax.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        ax.set_xlabel(f"{rows[0]['shown_scale']} of {response}")

    size = (WIDTH, 62 + 46 * len(rows))
    return draw(f"effects {response}", f"Effects on {response} with intervals", size, paint)
