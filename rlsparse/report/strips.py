"""Charts in the rows of tables: seeds of a cell, nulls of a relation, intervals of effects."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from rlsparse.definitions import DEFINITIONS, NESTED_NULLS, NULLS
from rlsparse.report.formats import interval_text, null_name, number, percent
from rlsparse.report.rows import Row
from rlsparse.report.series import Series
from rlsparse.report.svg import STRIP, Scale, bar, mark, rule, scale_of, strip, strip_axis, style

MIDDLE = STRIP / 2
PARTS = (*NESTED_NULLS[1:], "left")
"""What the excess over chance is split into."""


@dataclass(frozen=True)
class Strips:
    """A column of strips: the labels of its ticks, and a strip per row of the table."""

    axis: Markup
    rows: list[Markup]


def short_percent(value: float) -> str:
    """A tick of a fraction."""
    return f"{100 * value:.6g} %"


def cell_strips(trials: Sequence[Row], cells: Sequence[Row], series: Series) -> Strips:
    """Bitwise sparsity of each cell: a mark per run, a line at the mean."""
    found: dict[str, list[Row]] = {cell["group"]: [] for cell in cells}
    shown = [t for t in trials if t["sparsity"] and t["group"] in found]
    scale = _below_one([t["sparsity"]["bitwise"] for t in shown])
    for trial in shown:
        found[trial["group"]].append(trial)
    rows = []
    for cell in cells:
        runs = found[cell["group"]]
        parts = []
        if runs:
            place = scale.at(cell["sparsity"]["bitwise"])
            parts.append(rule("centre", (place, place), (4, STRIP - 4)))
        for i, run in enumerate(runs):
            share = run["sparsity"]["bitwise"]
            tip = f"{run['label']}\n{percent(share)} unchanged"
            height = MIDDLE + 4 * (i % 3 - 1)  # so that runs beside each other can be told apart
            look, kind = series.style(cell["group"]), series.kind(cell["group"])
            parts.append(mark(look, scale.at(share), height, tip, kind=kind))
        title = f"{cell['group']}: sparsity of {len(runs)} runs"
        rows.append(strip(scale, title, parts))
    return Strips(strip_axis(scale, short_percent), rows)


def _below_one(values: Sequence[float]) -> Scale:
    scale = scale_of(values)
    return Scale(scale.low, min(scale.high, 1.0)) if scale.low < 1 else scale


def definition_strips(cells: Sequence[Row], view: str, series: Series) -> Strips:
    """Mean sparsity under each definition of unchanged in a view: a mark per cell."""
    shown = [c for c in cells if c["role"] != "control" and c["views"].get(view)]
    scale = _below_one([c["views"][view][d] for c in cells if view in c["views"]
                        for d in DEFINITIONS if c["views"][view][d] is not None])  # fmt: skip
    rows = []
    for definition in DEFINITIONS:
        parts = []
        for cell in shown:
            value = cell["views"][view][definition]
            if value is not None:
                tip = f"{cell['group']}\n{percent(value)} unchanged"
                look, ids = series.style(cell["group"]), series.ids(cell["group"])
                parts.append(mark(look, scale.at(value), MIDDLE, tip, ids))
        rows.append(strip(scale, f"{definition}: mean sparsity of {len(parts)} cells", parts))
    return Strips(strip_axis(scale, short_percent), rows)


def relation_strips(relations: Sequence[Row]) -> Strips:
    """Lift over each null, by what the runs differ in; a line at 1."""
    ends = [row[end][null] for row in relations for end in ("low", "high") for null in NULLS]
    scale = scale_of([*ends, 1.0], log=True)
    rows = []
    for row in relations:
        parts = []
        for i, null in enumerate(NULLS):
            low, lift, high = (row[key][null] for key in ("low", "lift", "high"))
            if lift is None:
                continue
            parts.append(rule(f"range s{i + 1}", (scale.at(low), scale.at(high)), (MIDDLE, MIDDLE)))
            tip = (
                f"{row['relation']}\n{number(lift)} times what {null_name(null)} expects\n"
                f"{number(low)} to {number(high)} over {row['num_pairs']} pairs"
            )
            parts.append(mark(style(i), scale.at(lift), MIDDLE, tip))
        rows.append(strip(scale, f"{row['relation']}: lift over each null", parts, at=1.0))
    return Strips(strip_axis(scale, number), rows)


def explained_strips(relations: Sequence[Row]) -> Strips:
    """The log excess over the uniform null, split by the nested nulls; stacked from 0."""
    stacks = [_stack(row["explained"]) for row in relations]
    ends = [end for stack in stacks for _, start, stop in stack for end in (start, stop)]
    scale = scale_of([0.0, *ends])
    rows = []
    for row, stack in zip(relations, stacks, strict=True):
        parts = []
        for name, start, stop in stack:
            value = row["explained"][name]
            what = "left unexplained" if name == "left" else f"explained by {null_name(name)}"
            tip = f"{row['relation']}\n{number(value)} {what}"
            if row["explained"]["total"]:
                tip += f" ({100 * value / row['explained']['total']:.0f} % of the excess)"
            kind = f"part p{PARTS.index(name) + 1}"
            parts.append(bar(kind, (scale.at(start), scale.at(stop)), (5, STRIP - 5), tip))
        title = f"{row['relation']}: excess explained by each null"
        rows.append(strip(scale, title, parts, at=0.0))
    return Strips(strip_axis(scale, number), rows)


def _stack(explained: Row) -> list[tuple[str, float, float]]:
    """Name, start and end of each part: positive ones to the right of 0, others to the left."""
    ends = {True: 0.0, False: 0.0}
    found = []
    for name in PARTS:
        if (value := explained[name]) is not None:
            side = value >= 0
            found.append((name, ends[side], ends[side] + value))
            ends[side] += value
    return found


def forest_strips(effects: Sequence[Row]) -> Strips:
    """Effects on one response with their intervals; ratios on a log axis, 1 or 0 marked."""
    ratio = bool(effects) and effects[0]["shown_scale"] != "difference"
    neutral = 1.0 if ratio else 0.0
    ends = [row[k] for row in effects for k in ("shown_low", "shown", "shown_high")]
    scale = scale_of([neutral, *ends], log=ratio)
    rows = []
    for row in effects:
        value, low, high = row["shown"], row["shown_low"], row["shown_high"]
        parts = []
        if low is not None and high is not None and math.isfinite(low):
            parts.append(rule("interval", (scale.at(low), scale.at(high)), (MIDDLE, MIDDLE)))
        if value is not None and math.isfinite(value):
            tip = (
                f"{row['contrast']}\n{row['shown_scale']} {interval_text(row)}\n"
                f"{row['num_runs']} seeds"
            )
            parts.append(mark(style(0), scale.at(value), MIDDLE, tip))
        title = f"{row['contrast']}: {number(value)}"
        rows.append(strip(scale, title, parts, at=neutral))
    return Strips(strip_axis(scale, number), rows)
