"""Figures of the page of one checkpoint pair, in the style of ``plots``: rows in, SVG out."""

import math
from collections.abc import Sequence

import matplotlib.ticker
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from numpy.typing import NDArray

from rlsparse.definitions import DEFINITIONS, MIN_EXPONENT, NUM_EXPONENTS, ULP_BINS
from rlsparse.diff import Row
from rlsparse.report.formats import definition, percent
from rlsparse.report.plots import (
    DASHES,
    INK,
    MARKERS,
    PAPER,
    SERIES,
    WIDTH,
    draw,
    percent_axis,
)

MIN_BIN_WEIGHTS = 100
"""Bins of |w| with fewer weights are not drawn: their density is mostly chance."""
PROFILED = ("bitwise", "abs_1e-05")
"""Definitions in the profile over layers."""
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def sparsity_by_definition(sparsity: dict[str, dict[str, float]]) -> Markup:
    """Sparsity under every definition of unchanged; a marker per view (view -> definition)."""

    def paint(figure: Figure) -> None:
        ax = figure.subplots()
        for i, (view, values) in enumerate(sparsity.items()):
            shift = 0.16 * (i - (len(sparsity) - 1) / 2)
            ax.plot(
                [values[name] for name in DEFINITIONS],
                [y + shift for y in range(len(DEFINITIONS))],
                marker=MARKERS[i], ls="", ms=7, mfc=SERIES[i], mec=PAPER, label=view, clip_on=False,
            )  # fmt: skip
        labels = [definition(name).replace(" max", "\nmax") for name in DEFINITIONS]
        ax.set_yticks(range(len(DEFINITIONS)), labels)
        ax.set_ylim(len(DEFINITIONS) - 0.5, -0.5)
        percent_axis(ax.xaxis)
        ax.set_xlabel("weights unchanged")
        if len(sparsity) > 1:
            figure.legend(loc="outside upper left", ncols=3, handletextpad=0.2, columnspacing=1.2)

    size = (WIDTH, 245 + 22 * math.ceil(len(sparsity) / 3) * (len(sparsity) > 1))
    return draw("definitions", "Weights unchanged under every definition", size, paint)


def ulp_histogram(counts: Sequence[int]) -> Markup:
    """Changed weights by how many representable values they moved; ``counts`` as ``ULP_BINS``."""
    shares = np.array(counts) / max(sum(counts), 1)
    last = max(int(np.flatnonzero(shares)[-1]) + 1, 4) if shares.any() else 4

    def paint(figure: Figure) -> None:
        ax = figure.subplots()
        ax.barh(range(last), shares[:last], color=SERIES[0], height=0.7)
        for y, share in enumerate(shares[:last]):
            ax.annotate(
                percent(share) if share else "0", (share, y), xytext=(5, 0), va="center",
                textcoords="offset points", fontsize=11.5,
            )  # fmt: skip
        ax.set_yticks(range(last), ULP_BINS[:last])
        ax.set_ylim(last - 0.5, -0.5)
        ax.set_xlim(0, 1.3 * max(float(shares.max()), 0.01))
        ax.grid(axis="y", visible=False)
        percent_axis(ax.xaxis)
        ax.set_xlabel("of the changed weights")
        ax.set_ylabel("distance (ULP)")

    return draw("ulp", "Changed weights by distance in ULP", (WIDTH, 75 + 24 * last), paint)


def density_by_magnitude(changed: NDArray[np.int64], total: NDArray[np.int64]) -> Markup:
    """Density against |w| before, and below it where the weights are.

    Args:
        changed: changed weights by power of two, shape [NUM_MAGNITUDE_BINS] (``definitions``).
        total: all compared weights, likewise.
    """
    between, exact = slice(1, 1 + NUM_EXPONENTS), slice(1 + NUM_EXPONENTS, None)
    used = np.flatnonzero(np.maximum(total[between], total[exact]) >= MIN_BIN_WEIGHTS)
    low, high = (used[0], used[-1] + 1) if used.size else (0, 1)
    exponents = MIN_EXPONENT + np.arange(NUM_EXPONENTS)
    zero = exponents[low] - 1.5
    parts = (
        (between, exponents + 0.5, "-", "between powers of two"),
        (exact, exponents, "", "exact powers of two"),
        (slice(0, 1), np.array([zero]), "", "zero"),
    )
    share = total / max(int(total.sum()), 1)

    def paint(figure: Figure) -> None:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        for i, (part, x, dash, label) in enumerate(parts):
            enough = total[part] >= MIN_BIN_WEIGHTS
            if enough.any():
                top.plot(
                    x[enough], changed[part][enough] / total[part][enough], ls=dash, lw=1.5,
                    marker=MARKERS[i], ms=5.5, color=SERIES[i], mec=PAPER, mew=0.5, label=label,
                    clip_on=False,
                )  # fmt: skip
        inside = slice(low, high)
        mass = share[between][inside] + share[exact][inside]
        bottom.bar([zero, *(exponents[inside] + 0.5)], [share[0], *mass], color=SERIES[0])
        bottom.set_xlim(zero - 0.6, exponents[inside][-1] + 1.6)
        ticks = exponents[inside][:: math.ceil((high - low) / 6)]
        powers = [f"2{str(exponent).translate(_SUPERSCRIPT)}" for exponent in ticks]
        bottom.set_xticks([zero, *ticks], ["0", *powers])
        top.set_ylim(bottom=0)
        for ax, label in ((top, "density"), (bottom, "weights")):
            percent_axis(ax.yaxis)
            ax.set_ylabel(label)
        bottom.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(2))
        bottom.set_xlabel("|w| before")
        handles, labels = top.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=2, handletextpad=0.4)

    return draw("magnitude", "Density against the magnitude of the weight", (WIDTH, 330), paint)


def layer_profile(layers: Sequence[Row]) -> Markup:
    """Density and relative change against the layer; ``layers`` as ``diff_rows.layer_rows``."""
    shown = [row for row in layers if row["name"].isdecimal()]
    x = [int(row["name"]) for row in shown]
    change = [row["relative_change"] or math.nan for row in shown]

    def paint(figure: Figure) -> None:
        top, bottom = figure.subplots(2, 1, sharex=True)
        for i, name in enumerate(PROFILED):
            top.plot(
                x, [1 - row["sparsity"][name] for row in shown], ls=DASHES[i], marker=MARKERS[i],
                ms=5, lw=1.8, color=SERIES[i], label=f"not {definition(name)}", clip_on=False,
            )  # fmt: skip
        bottom.plot(x, change, marker=MARKERS[2], ms=5, lw=1.8, color=SERIES[2], clip_on=False)
        top.set_ylim(bottom=0)
        top.set_ylabel("density")
        percent_axis(top.yaxis)
        bottom.set_ylim(bottom=0)
        bottom.set_ylabel("‖Δ‖ / ‖w‖")
        bottom.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda v, _: f"{v:.3g}"))
        bottom.set_xlabel("layer")
        bottom.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(8, integer=True))
        handles, labels = top.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=2, handletextpad=0.4)

    return draw("layers", "Density and relative change by layer", (WIDTH, 320), paint)


def stripe_dispersion(modules: Sequence[Row]) -> Markup:
    """Dispersion of the changed counts of rows and of columns, by module; 1 is chance.

    Args:
        modules: rows with ``name``, ``row_dispersion`` and ``column_dispersion``.
    """

    def paint(figure: Figure) -> None:
        ax = figure.subplots()
        ax.axvline(1, color=INK, lw=1.2)
        for i, side in enumerate(("row", "column")):
            ax.plot(
                [row[f"{side}_dispersion"] for row in modules], range(len(modules)),
                marker=MARKERS[i], ls="", ms=7, mfc=SERIES[i], mec=PAPER, label=f"{side}s",
                clip_on=False,
            )  # fmt: skip
        ax.set_yticks(range(len(modules)), [row["name"] for row in modules])
        ax.set_ylim(len(modules) - 0.5, -0.5)
        ax.set_xscale("log")
        low, high = ax.get_xlim()
        ax.set_xlim(min(low, 0.5), max(high, 2))
        ax.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5), numticks=6))
        ax.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda v, _: f"{v:g}"))
        ax.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        ax.set_xlabel("variance over that of chance")
        figure.legend(loc="outside upper left", ncols=2, handletextpad=0.2, columnspacing=1.2)

    size = (WIDTH, 92 + 22 * len(modules))
    return draw("stripes", "Dispersion of rows and columns by module", size, paint)
