"""Charts of the study's page, as SVG elements that adapt to the width they are given.

x is a percentage of the plot, y and the size of text and marks are pixels: nothing is scaled, so a
chart is as readable on a phone as on a wide screen. Colours are classes of the style sheet, which
follow the light or dark scheme. A mark says its numbers in ``data-tip`` and its groups in
``data-c``, which ``script.js`` shows and filters. Attribute values and texts are escaped.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from markupsafe import Markup, escape
from matplotlib.ticker import MaxNLocator

HEIGHT = 190
"""Height of the plot of a chart, in pixels; its labels come on top."""
STRIP = 24
"""Height of a strip, a chart in the row of a table."""

SHAPES = (
    "M-4.6 0a4.6 4.6 0 1 0 9.2 0a4.6 4.6 0 1 0-9.2 0z",
    "M-4.1-4.1h8.2v8.2h-8.2z",
    "M0-5.4L5.2 4H-5.2z",
    "M0-5.8L5.8 0L0 5.8L-5.8 0z",
    "M0 5.4L5.2-4H-5.2z",
    "M-1.7-5.1h3.4v3.4h3.4v3.4h-3.4v3.4h-3.4v-3.4h-3.4v-3.4h3.4z",
    "M-4.8-4.8h9.6L-4.8 4.8h9.6z",
    "M0-5.2L4.5-2.6V2.6L0 5.2L-4.5 2.6V-2.6z",
    "M0-2l3-3l2 2l-3 3l3 3l-2 2l-3-3l-3 3l-2-2l3-3l-3-3l2-2z",
)
"""Outlines of the marks, around the origin."""
NUM_COLOURS = 6
NUM_STYLES = NUM_COLOURS * len(SHAPES)

Format = Callable[[float], str]


class Style(NamedTuple):
    """Colour (1 to ``NUM_COLOURS``; 0 is muted) and shape (place in ``SHAPES``) of a series."""

    colour: int
    shape: int


def style(index: int) -> Style:
    """The style of the ``index``-th series; ``NUM_STYLES`` differ, neighbours in both parts."""
    if index >= NUM_STYLES:
        return Style(0, 0)
    turn, colour = divmod(index, NUM_COLOURS)
    return Style(colour + 1, (colour + turn) % len(SHAPES))


# --- elements --------------------------------------------------------------------------------


def tag(name: str, *children: str, **attributes: object) -> Markup:
    """An element; ``_`` in names of attributes stands for ``-``, None leaves one out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_text(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inside = "".join(escape(child) for child in children)
    return Markup(f"<{name}{written}>{inside}</{name}>" if inside else f"<{name}{written}/>")


def _text(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def percentage(share: float) -> str:
    """A place along x, from a share of the width."""
    return f"{_text(100.0 * float(share))}%"


def mark(
    look: Style, x: float, y: float, tip: str, groups: str | None = None, kind: str = ""
) -> Markup:
    """A mark at share ``x`` of the width and ``y`` pixels."""
    name = f"mark s{look.colour} {kind}".strip()
    return tag(
        "use", href=f"#m{look.shape}", class_=name, x=percentage(x), y=float(y), data_tip=tip,
        data_c=groups,
    )  # fmt: skip


def bar(
    kind: str, x: tuple[float, float], y: tuple[float, float], tip: str, groups: str | None = None
) -> Markup:
    """A rectangle between two shares of the width and two heights in pixels."""
    left, right = sorted(x)
    return tag(
        "rect", class_=kind, x=percentage(left), width=percentage(right - left), y=float(min(y)),
        height=float(abs(y[1] - y[0])), data_tip=tip, data_c=groups,
    )  # fmt: skip


def rule(
    kind: str, x: tuple[float, float], y: tuple[float, float], groups: str | None = None
) -> Markup:
    """A straight line between two places."""
    return tag(
        "line", class_=kind, x1=percentage(x[0]), x2=percentage(x[1]), y1=float(y[0]),
        y2=float(y[1]), data_c=groups,
    )  # fmt: skip


def symbols() -> Markup:
    """The definitions that marks refer to; once per page."""
    shapes = [tag("path", id=f"m{i}", d=outline) for i, outline in enumerate(SHAPES)]
    defs = tag("defs", *shapes)
    return tag("svg", defs, width="0", height="0", class_="symbols", aria_hidden="true")


# --- scales ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """From values to shares of an axis, linear or logarithmic."""

    low: float
    high: float
    log: bool = False

    def at(self, value: float) -> float:
        """Share of the axis; values outside are put at its ends."""
        low, high, value = (self._inner(v) for v in (self.low, self.high, value))
        return min(max((value - low) / (high - low), 0.0), 1.0)

    def _inner(self, value: float) -> float:
        return math.log(max(value, 1e-300)) if self.log else value

    def ticks(self, count: int) -> list[float]:
        """At most ``count`` round values inside."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
                found = [s * 10.0**d for d in decades for s in steps]
                inside = [v for v in found if self.low <= v * (1 + 1e-9) and v <= self.high]
                if 2 <= len(inside) <= count:
                    return inside
            stride = -(-len(inside) // count)
            if stride > 1:  # each second or third decade, ...
                return [10.0**d for d in decades if 10.0**d in inside and d % stride == 0]
        values = MaxNLocator(count - 1, steps=[1, 2, 2.5, 5, 10]).tick_values(self.low, self.high)
        margin = 1e-9 * (self.high - self.low)
        return [float(v) for v in values if self.low - margin <= v <= self.high + margin]


def scale_of(values: Iterable[float | None], *, log: bool = False, pad: float = 0.04) -> Scale:
    """A scale that shows all finite ``values``, with a margin of ``pad`` of its length."""
    known = np.array([v for v in values if v is not None and math.isfinite(v)], np.float64)
    if log:
        known = np.log(known[known > 0])
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    if high - low < 1e-9 * max(abs(high), 1e-9):
        low, high = low - (0.1 * abs(low) or 0.5), high + (0.1 * abs(high) or 0.5)
    low, high = low - pad * (high - low), high + pad * (high - low)
    return Scale(math.exp(low), math.exp(high), log=True) if log else Scale(low, high)


def from_zero(values: Iterable[float | None]) -> Scale:
    """A scale from 0 to a little above the largest of ``values``."""
    top = max((v for v in values if v is not None and math.isfinite(v)), default=0.0)
    return Scale(0.0, 1.05 * top or 1.0)


def labels(scale: Scale, count: int, write: Format) -> list[tuple[float, str]]:
    """Ticks and their labels, with more digits than ``write`` gives where they would be equal.

    Ticks for which ``write`` gives an empty text are left out.
    """
    ticks = [(value, text) for value in scale.ticks(count) if (text := write(value))]
    if len({text for _, text in ticks}) < len(ticks):
        return [(value, f"{value:.6g}") for value, _ in ticks]
    return ticks


# --- charts ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    """The plot of a chart: two scales, how their ticks are written, and how many x may have."""

    x: Scale
    y: Scale
    x_format: Format
    y_format: Format
    height: float = HEIGHT
    num_ticks: int = 5

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Share of the width and pixels from the top."""
        return self.x.at(x), self.height * (1 - self.y.at(y))

    def mark(
        self, look: Style, x: float, y: float, tip: str, groups: str | None = None, kind: str = ""
    ) -> Markup:
        """A mark at a point of data."""
        return mark(look, *self.place(x, y), tip, groups, kind)

    def line(self, look: Style, points: Sequence[tuple[float, float]], groups: str) -> Markup:
        """A line through points of data; goes among the ``lines`` of ``chart``."""
        kind = f"line s{look.colour} d{look.shape}"
        return tag("polyline", class_=kind, points=self._path(points), data_c=groups)

    def band(
        self, look: Style, low: Sequence[tuple[float, float]], high: Sequence[tuple[float, float]],
        groups: str,
    ) -> Markup:  # fmt: skip
        """The area between two lines; goes among the ``lines`` of ``chart``."""
        outline = self._path([*low, *reversed(high)])
        return tag("polygon", class_=f"band s{look.colour}", points=outline, data_c=groups)

    def _path(self, points: Sequence[tuple[float, float]]) -> str:
        places = [self.place(x, y) for x, y in points]
        return " ".join(f"{_text(100 * x)},{_text(y)}" for x, y in places)

    def chart(
        self, title: str, parts: Sequence[str], lines: Sequence[str] = (), x_label: str = ""
    ) -> Markup:
        """The whole chart: grid, labels, lines, and marks on top of them."""
        grid = []
        for value, label in labels(self.y, 5, self.y_format):
            _, y = self.place(self.x.low, value)
            grid.append(rule("grid", (0, 1), (y, y)))
            grid.append(tag("text", label, x="-7", y=y + 4, class_="end"))
        for value, label in labels(self.x, self.num_ticks, self.x_format):
            x, _ = self.place(value, self.y.low)
            grid.append(tag("text", label, x=percentage(x), y=self.height + 16, class_="mid"))
        grid.append(rule("axis", (0, 1), (self.height, self.height)))
        grid.append(tag("text", x_label, x="50%", y=self.height + 34, class_="mid name"))
        stretched = tag(
            "svg", *lines, viewBox=f"0 0 100 {_text(self.height)}", preserveAspectRatio="none",
            width="100%", height=self.height, class_="lines",
        )  # fmt: skip
        return figure("xy", title, [*grid, stretched, *parts], self.height + 50)


def figure(kind: str, title: str, parts: Iterable[str], height: float, css: str = "") -> Markup:
    """An SVG element that fills its place, with a name for those who cannot see it."""
    return tag(
        "svg", *parts, class_=f"plot chart {kind}", role="img", tabindex="0", aria_label=title,
        style=f"height:{_text(float(height))}px;{css}",
    )  # fmt: skip


def strip(scale: Scale, title: str, parts: Sequence[str], at: float | None = None) -> Markup:
    """A chart of one row of a table, with lines at the ticks and a stronger one at ``at``."""
    grid = [
        rule("axis" if value == at else "grid", (x, x), (0, STRIP))
        for value in dict.fromkeys([*scale.ticks(4), *([] if at is None else [at])])
        for x in [scale.at(value)]
    ]
    return tag("svg", *grid, *parts, class_="plot strip", role="img", aria_label=title)


def strip_axis(scale: Scale, write: Format) -> Markup:
    """The labels of the ticks of strips, for the head of their column."""
    texts = [
        tag("text", label, x=percentage(scale.at(value)), y=11.0, class_="mid")
        for value, label in labels(scale, 4, write)
    ]
    return tag("svg", *texts, class_="plot strip ticks", aria_hidden="true")


class Cell(NamedTuple):
    """A cell of a heat map: place, value in [-1, 1] as the strength of its colour, text, tip."""

    row: int
    column: int
    value: float
    text: str
    tip: str
    groups: str | None = None


def heat_map(
    title: str, rows: Sequence[str], columns: Sequence[str], cells: Sequence[Cell], unit: int = 21
) -> Markup:
    """Cells of ``unit`` pixels in height, in an element that scrolls where they are too wide."""
    parts = []
    width = 1 / max(len(columns), 1)
    for row, column, value, text, tip, groups in cells:
        kind = "more" if value >= 0 else "less"
        parts.append(
            tag(
                "rect", class_=f"heat {kind}", x=percentage(column * width),
                width=percentage(width), y=unit * row, height=unit,
                fill_opacity=f"{min(max(abs(value), 0.03), 1.0):.2f}", data_tip=tip, data_c=groups,
            )
        )  # fmt: skip
        if text:
            place = percentage((column + 0.5) * width)
            ink = "mid on" if abs(value) > 0.68 else "mid"
            parts.append(
                tag("text", text, x=place, y=unit * row + unit / 2 + 4, class_=ink, data_c=groups)
            )
    for i, name in enumerate(rows):
        parts.append(tag("text", name, x="-7", y=unit * i + unit / 2 + 4, class_="end"))
    for j, name in enumerate(columns):
        parts.append(tag("text", name, x=percentage((j + 0.5) * width), y="-6", class_="mid"))
    margin = 14 + round(6.4 * max((len(name) for name in rows), default=0))
    height = unit * len(rows) + 26
    least = margin + (33 if any(cell.text for cell in cells) else 19) * len(columns)
    css = f"padding-left:{margin}px;min-width:{least}px"
    return tag("div", figure("matrix", title, parts, height, css), class_="wide-scroll")
