"""Charts of measurements against one another: rows in, captioned SVG out."""

import math
from collections.abc import Sequence

from markupsafe import Markup

from rlsparse.definitions import NESTED_NULLS
from rlsparse.report.formats import null_name, number, percent, score
from rlsparse.report.rows import Row
from rlsparse.report.series import Series
from rlsparse.report.strips import short_percent
from rlsparse.report.svg import Frame, Scale, bar, from_zero, rule, scale_of, style, tag

Captioned = list[tuple[str, Markup]]

MEASURES = {
    "density": "Density (1 - sparsity) against the step",
    "score": "Held-out score against the step",
    "outside": "Updates outside the final mask, of those made so far",
    "step_density": "Weights that one step changes",
    "step_outside": "Updates of one step outside the final mask",
}
MAX_CONSENSUS = 12
"""Cells of which the consensus is drawn."""
MAX_MARKS = 12
"""A curve with more points than this has no marks on it but at its ends."""
MAX_BANDS = 4
"""With more groups than this the ranges over seeds are not drawn."""
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def training_charts(curves: Sequence[Row], groups: Sequence[str], series: Series) -> Captioned:
    """Density, score and updates outside the final mask against the step, by cell."""
    charts = []
    for measure, caption in MEASURES.items():
        rows = [r for r in curves if r["measure"] == measure and r["group"] in groups]
        if rows:
            charts.append((caption, _curves(caption, rows, series, True)))
    return charts


def window_chart(rows: Sequence[Row], groups: Sequence[str], series: Series) -> Captioned:
    """Density of the change over k steps against k."""
    shown = [row for row in rows if row["group"] in groups]
    title = "Weights that k steps change (1 - S_k), mean over windows"

    def words(row: Row) -> str:
        ends = " to ".join(percent(row[end]) for end in ("low", "high"))
        return f"{percent(row['mean'])} changed\n{ends} over {row['num_runs']} runs"

    points = [(row["group"], row["k"], row["mean"], words(row)) for row in shown]
    return _over_k(title, points, from_zero(row["high"] for row in shown), series)


def sync_charts(
    sizes: Sequence[Row], steps: Sequence[Row], groups: Sequence[str], series: Series
) -> Captioned:
    """Bytes of syncs against the steps between them, and against the step where that is one."""
    points = [
        (row["group"], row["k"], row["share"]["p50"], f"{percent(row['share']['p50'])} of all")
        for row in sizes
        if row["group"] in groups
    ]
    shown = [row for row in steps if row["group"] in groups]
    title = "Bytes of a sync after k steps, of those of all weights, median"
    charts = _over_k(title, points, scale_of((p[2] for p in points), log=True), series)
    if shown:
        title = "Bytes of the sync of each step, of those of all weights"
        x = scale_of([row["step"] for row in shown], pad=0.02)
        frame = Frame(
            x, scale_of((row["share"] for row in shown), log=True), _integer, short_percent
        )
        lines = [
            frame.line(
                series.style(group),
                [(row["step"], row["share"]) for row in shown if row["group"] == group],
                series.ids(group),
            )
            for group in dict.fromkeys(row["group"] for row in shown)
        ]
        charts.append((title, frame.chart(title, [], lines, "optimizer step")))
    return charts


def _over_k(
    title: str, points: Sequence[tuple[str, int, float, str]], y: Scale, series: Series
) -> Captioned:
    """Values (group, k, value, what the tip says) against k, doubling by doubling."""
    if not points:
        return []
    last = math.log2(max(k for _, k, *_ in points))
    frame = Frame(Scale(-0.2, last + 0.2), y, _power_of_two, short_percent, num_ticks=7)
    lines, parts = [], []
    for group in dict.fromkeys(group for group, *_ in points):
        look, ids = series.style(group), series.ids(group)
        own = [(math.log2(k), value, words) for g, k, value, words in points if g == group]
        lines.append(frame.line(look, [(x, value) for x, value, _ in own], ids))
        for x, value, words in own:
            tip = f"{group}, k = {2**x:.0f}\n{words}"
            parts.append(frame.mark(look, x, value, tip, ids))
    return [(title, frame.chart(title, parts, lines, "steps (k)"))]


def _power_of_two(exponent: float) -> str:
    return _integer(2**exponent) if abs(exponent - round(exponent)) < 1e-9 else ""


def loss_charts(curves: Sequence[Row], groups: Sequence[str], series: Series) -> Captioned:
    """Training loss and reward against the step, a chart per algorithm: losses do not compare."""
    algorithm = {cell["group"]: cell["algorithm"] for cell in series.cells}
    found: dict[str, list[Row]] = {}
    for row in curves:
        if row["measure"] in ("loss", "reward") and row["group"] in groups:
            title = f"{algorithm[row['group']]}: {row['measure']}"
            found.setdefault(title, []).append(row)
    return [(title, _curves(title, rows, series, False)) for title, rows in found.items()]


def _curves(title: str, rows: Sequence[Row], series: Series, fraction: bool) -> Markup:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["group"], []).append(row)
    ends = [row[key] for row in rows for key in ("low", "mean", "high")]
    y = scale_of(ends) if rows[0]["measure"] in ("score", "loss", "reward") else from_zero(ends)
    x = scale_of([row["step"] for row in rows], pad=0.02)
    write = short_percent if fraction else number
    frame = Frame(x, y, _integer, write)
    lines, parts = [], []
    for group, points in found.items():
        look, ids = series.style(group), series.ids(group)
        has_range = all(p["low"] is not None for p in points)
        if has_range and len(found) <= MAX_BANDS:
            low, high = ([(p["step"], p[end]) for p in points] for end in ("low", "high"))
            lines.append(frame.band(look, low, high, ids))
        lines.append(frame.line(look, [(p["step"], p["mean"]) for p in points], ids))
        marked = points if len(points) <= MAX_MARKS else [points[0], points[-1]]
        for p in marked:
            tip = f"{group}, step {p['step']}\n{_said(p['mean'], fraction)}"
            if has_range and p["num_runs"] > 1:
                ends_said = " to ".join(_said(p[end], fraction) for end in ("low", "high"))
                tip += f"\n{ends_said} over {p['num_runs']} runs"
            parts.append(frame.mark(look, p["step"], p["mean"], tip, ids))
    return frame.chart(title, parts, lines, "optimizer step")


def _said(value: float, fraction: bool) -> str:
    return percent(value) if fraction else number(value)


def gain_chart(trials: Sequence[Row], series: Series) -> Captioned:
    """Score gain against density: a mark per finished trial that was scored, controls too."""
    runs = [
        (t, 1 - t["sparsity"]["bitwise"], t["score_after"] - t["score_before"])
        for t in trials
        if t["sparsity"] and t["score_after"] is not None and t["score_before"] is not None
    ]
    if not runs:
        return []
    x = scale_of([0.0, *(density for _, density, _ in runs)])
    frame = Frame(
        x, scale_of([0.0, *(gain for *_, gain in runs)]), short_percent, _points
    )  # fmt: skip
    zero = frame.place(0, 0)[1]
    parts: list[Markup] = [rule("axis", (0, 1), (zero, zero))]
    for trial, density, gain in runs:
        tip = (
            f"{trial['label']}\n{percent(density)} changed\n"
            f"score {score(trial['score_before'])} → {score(trial['score_after'])}"
        )
        ids = series.ids(trial["group"])
        look, kind = series.style(trial["group"]), series.kind(trial["group"])
        parts.append(frame.mark(look, density, gain, tip, ids, kind))
    title = "Score gain (points) against density: one mark per trial"
    hollow = any(series.kind(trial["group"]) for trial, *_ in runs)
    caption = f"{title}; hollow: controls" if hollow else title
    return [(caption, frame.chart(title, parts, x_label="weights changed, bitwise"))]


def _points(value: float) -> str:
    return f"{100 * value:+.3g}" if value else "0"


def magnitude_chart(rows: Sequence[Row], groups: Sequence[str], series: Series) -> Captioned:
    """Density against |w|, with the threshold below which one Adam step moves a bf16 weight."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["group"] in groups:
            found.setdefault(row["group"], []).append(row)
    if not found:
        return []
    shown = [row for points in found.values() for row in points]
    exponents = [row["exponent"] for row in shown]
    thresholds = sorted({row["rounding_threshold"] for row in shown} - {0.0})
    levels = [math.log2(threshold) for threshold in thresholds]
    x = Scale(min([*exponents, *levels]) - 0.5, max([*exponents, *levels]) + 1.5)
    frame = Frame(x, from_zero(row["density"] for row in shown), _power, short_percent)
    lines, parts = [], []
    for threshold, level in zip(thresholds, levels, strict=True):
        place = frame.x.at(level)
        parts.append(rule("threshold", (place, place), (0, frame.height)))
        words = f"rounding threshold {number(threshold)}"
        side = "end" if place > 0.5 else "start"
        shift = 100 * place + (-1 if place > 0.5 else 1)
        if len(thresholds) == 1:
            parts.append(tag("text", words, x=f"{shift:.2f}%", y="4", class_=f"name {side}"))
    for group, points in found.items():
        look, ids = series.style(group), series.ids(group)
        middles = [(p["exponent"] + 0.5, p["density"]) for p in points]
        lines.append(frame.line(look, middles, ids))
        for point, (place, value) in zip(points, middles, strict=True):
            tip = (
                f"{group}\n{percent(value)} of {point['num_elements']:,} weights changed\n"
                f"{_power(point['exponent'])} < |w| < {_power(point['exponent'] + 1)}"
            )
            parts.append(frame.mark(look, place, value, tip, ids))
    title = "Density against |w| before training"
    if len(thresholds) > 1:
        title += f"; dashed: {', '.join(map(number, thresholds))}"
    return [(title, frame.chart(title, parts, lines, "|w| before"))]


def _power(exponent: float) -> str:
    return f"2{str(round(exponent)).translate(_SUPERSCRIPT)}"


def rank_charts(rows: Sequence[Row], series: Series) -> Captioned:
    """Histograms of the rank of updates and of their nulls, a chart per algorithm and statistic."""
    order = list(dict.fromkeys(cell["algorithm"] for cell in series.cells))
    found: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: order.index(row["algorithm"])):
        found.setdefault((row["algorithm"], row["statistic"]), []).append(row)
    charts = []
    for (algorithm, statistic), bins in found.items():
        frame = Frame(
            Scale(0, 1), from_zero(b["share"] for b in bins), short_percent, short_percent
        )
        parts = []
        for b in bins:
            left, right = frame.x.at(b["low"]), frame.x.at(b["high"])
            middle = (left + right) / 2
            sides = {"update": (left, middle), "null": (middle, right)}[b["kind"]]
            tip = (
                f"{b['kind']}: {b['num_matrices']} matrices ({percent(b['share'])})\n"
                f"{statistic} {short_percent(b['low'])} to {short_percent(b['high'])} of full"
            )
            kind = "bar s1" if b["kind"] == "update" else "bar s2"
            y = (frame.height, frame.place(0, b["share"])[1])
            parts.append(bar(kind, sides, y, tip))
        title = f"{algorithm}: {statistic} of the updates"
        charts.append((title, frame.chart(title, parts, x_label="share of the full rank")))
    return charts


def consensus_charts(rows: Sequence[Row], groups: Sequence[str], series: Series) -> Captioned:
    """Share of weights changed in exactly k runs of a cell (bars) and what nulls expect (marks)."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["group"] in groups and row["k"] > 0:
            found.setdefault(row["group"], []).append(row)
    charts = []
    for group, points in list(found.items())[:MAX_CONSENSUS]:
        values = [p["share"] for p in points]
        nulls = [v for p in points for v in p["expected"].values() if v is not None]
        top = points[0]["num_runs"]
        frame = Frame(
            Scale(0.4, top + 0.6), from_zero([*values, *nulls]), _integer, short_percent,
            num_ticks=10
        )  # fmt: skip
        parts = []
        for p in points:
            sides = frame.x.at(p["k"] - 0.35), frame.x.at(p["k"] + 0.35)
            y = (frame.height, frame.place(0, p["share"])[1])
            tip = f"{group}\n{percent(p['share'])} changed in {p['k']} of {top} runs"
            parts.append(bar("bar muted", sides, y, tip))
            for i, null in enumerate(NESTED_NULLS[:-1]):
                if (value := p["expected"][null]) is not None:
                    said = f"{percent(value)} expected by {null_name(null)}, k = {p['k']} of {top}"
                    parts.append(frame.mark(style(i), p["k"] + 0.18 * (i - 1), value, said))
        title = f"{series.labels[group]}: weights changed in k of {top} runs"
        charts.append((series.labels[group], frame.chart(title, parts, x_label="runs (k)")))
    return charts


def _integer(value: float) -> str:
    return f"{value:.0f}" if abs(value - round(value)) < 1e-9 else ""
