"""Heat maps: density by layer and module, runs against runs, effects by layer and module."""

import math
from collections.abc import Sequence

from markupsafe import Markup

from rlsparse.definitions import NULLS
from rlsparse.report.charts import Captioned
from rlsparse.report.formats import interval_text, null_name, number, percent
from rlsparse.report.pairs import AGAIN
from rlsparse.report.rows import Row, in_order, short_labels
from rlsparse.report.series import Series
from rlsparse.report.svg import Cell, heat_map

MAX_RUNS = 30
"""With more runs than this the overlap map is one of cells."""
MAX_CELLS = 40
"""Cells in the overlap map, the first by role."""
MAX_TEXT_COLUMNS = 12
"""Maps with more columns carry no numbers in their cells."""
MAX_TEXT_RUNS = 24
"""As ``MAX_TEXT_COLUMNS``, of the overlap map, which has the whole width."""
MAX_MAPS = 12
"""Density maps on the page, the first by order of the trials; ``report.json`` has all."""


def density_maps(rows: Sequence[Row], series: Series) -> Captioned:
    """Density of each algorithm, layers down and modules across; one scale for all."""
    top = max((row["density"] for row in rows), default=0.0) or 1.0
    order = list(dict.fromkeys(cell["algorithm"] for cell in series.cells))
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["algorithm"], []).append(row)
    charts = []
    for algorithm in [name for name in order if name in found][:MAX_MAPS]:
        own = found[algorithm]
        modules = in_order({row["module"] for row in own})
        layers = sorted({row["layer"] for row in own if row["layer"] is not None})
        layers += [None] if any(row["layer"] is None for row in own) else []
        group = own[0]["group"]
        cells = [
            Cell(
                layers.index(row["layer"]),
                modules.index(row["module"]),
                row["density"] / top,
                _bare_percent(row["density"]) if len(modules) <= MAX_TEXT_COLUMNS else "",
                f"{algorithm}, {_layer(row['layer'])}, {row['module']}\n"
                f"{percent(row['density'])} changed",
            )
            for row in own
        ]
        names = ["rest" if layer is None else str(layer) for layer in layers]
        unit = 21 if len(layers) <= 40 else 13
        title = f"{algorithm}: density by layer and module, in percent"
        chart = _only(heat_map(title, names, modules, cells, unit), series.ids(group))
        charts.append((series.labels[group], chart))
    return charts


def _only(chart: Markup, groups: str) -> Markup:
    """A chart that is about all of ``groups``: hidden when none of them is shown."""
    return Markup('<div data-some="{}">{}</div>').format(groups, chart)


def _layer(layer: int | None) -> str:
    return "outside the layers" if layer is None else f"layer {layer}"


def _bare_percent(value: float) -> str:
    return f"{100 * value:.0f}" if value >= 0.0095 or value == 0 else f"{100 * value:.1g}"


def strongest_null(rows: Sequence[Row]) -> str:
    """The null of the overlap map: magnitude where it is known, else that of tensors."""
    known = any(row["lift"]["magnitude"] is not None for row in rows)
    return "magnitude" if known else "tensor"


def overlap_map(rows: Sequence[Row], names: dict[str, tuple[str, str]]) -> Captioned:
    """Runs or cells against one another, by lift over ``strongest_null``.

    Args:
        rows: of ``overlap_rows.run_matrix`` or ``cell_matrix``.
        names: key in ``rows`` -> label and ``data-c``, in the order of the rows.
    """
    null = strongest_null(rows)
    known = [row for row in rows if row["lift"][null] is not None]
    if not known:
        return []
    used = {row[side] for row in known for side in ("a", "b")}
    keys = [key for key in names if key in used]
    place = {key: i for i, key in enumerate(keys)}
    judged = [row for row in known if row.get("relation") != AGAIN] or known
    reach = max(0.1, *(abs(_log2(row["lift"][null])) for row in judged))
    cells = []
    for row in known:
        a, b = place[row["a"]], place[row["b"]]
        lift = row["lift"][null]
        tip = f"{names[row['a']][0]} and {names[row['b']][0]}\n{_lifts(row)}{_shares(row)}"
        text = f"{lift:.2f}" if len(keys) <= MAX_TEXT_RUNS else ""
        ids = f"{names[row['a']][1]} {names[row['b']][1]}"
        for i, j in dict.fromkeys([(a, b), (b, a)]):
            cells.append(Cell(i, j, _log2(lift) / reach, text, tip, ids))
    labels = short_labels([names[key][0] for key in keys], 26)
    numbered = [f"{label} · {i}" for i, label in enumerate(labels, 1)]
    title = f"Overlap, as lift over {null_name(null)}"
    columns = [str(i) for i in range(1, len(keys) + 1)]
    return [("", heat_map(title, numbered, columns, cells))]


def _lifts(row: Row) -> str:
    said = [f"{number(row['lift'][n])} over {n}" for n in NULLS if row["lift"][n] is not None]
    return f"lift {', '.join(said)}"


def _shares(row: Row) -> str:
    if "jaccard" not in row:
        return f"\nmean of {row['num_pairs']} pairs"
    shares = f"{percent(row['share_of_a'])} of one, {percent(row['share_of_b'])} of the other"
    return f"\n{shares}, Jaccard {number(row['jaccard'])}"


def _log2(lift: float) -> float:
    return math.log2(max(lift, 1e-3))


def module_maps(rows: Sequence[Row]) -> Captioned:
    """Lift between seeds by module, a map per null: algorithms down, modules across."""
    algorithms = list(dict.fromkeys(row["algorithm"] for row in rows))
    modules = list(dict.fromkeys(row["module"] for row in rows))
    lifts = [lift for row in rows for lift in row["lift"].values() if lift is not None]
    reach = max(0.1, *(abs(_log2(lift)) for lift in lifts), 0.0)
    charts = []
    for null in NULLS:
        cells = [
            Cell(
                algorithms.index(row["algorithm"]),
                modules.index(row["module"]),
                _log2(row["lift"][null]) / reach,
                f"{row['lift'][null]:.2f}" if len(modules) <= MAX_TEXT_COLUMNS else "",
                f"{row['algorithm']}, {row['module']}\n{_lifts(row)}",
            )
            for row in rows
            if row["lift"][null] is not None
        ]
        if cells:
            caption = f"Lift over {null_name(null)}"
            charts.append((caption, heat_map(caption, algorithms, modules, cells)))
    return charts


def effect_maps(effects: Sequence[Row]) -> Captioned:
    """Effects by layer and by module, a map per response: contrasts down, parts across."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in effects:
        part = "layer" if row["layer"] is not None else "module"
        if row[part] is not None and row["shown"] is not None and not row["within"]:
            found.setdefault((row["response"], part), []).append(row)
    charts = []
    for (response, part), rows in found.items():
        levels = list(dict.fromkeys((r["factor"], r["level"], r["reference"]) for r in rows))
        parts = {row[part] for row in rows}
        columns = sorted(parts) if part == "layer" else in_order(parts)
        reach = max(0.1, *(abs(row["estimate"]) for row in rows))
        cells = [
            Cell(
                levels.index((row["factor"], row["level"], row["reference"])),
                columns.index(row[part]),
                row["estimate"] / reach,
                f"{row['shown']:.2g}" if len(columns) <= MAX_TEXT_COLUMNS else "",
                f"{row['factor']}: {row['contrast']}, {part} {row[part]}\n"
                f"{row['shown_scale']} {interval_text(row)}\n"
                f"p {number(row['p_adjusted'])} (Benjamini-Hochberg)",
            )
            for row in rows
        ]
        names = short_labels([f"{level} / {reference}" for _, level, reference in levels], 26)
        caption = f"{response} by {part}: {rows[0]['shown_scale']}"
        charts.append((caption, heat_map(caption, names, [str(c) for c in columns], cells)))
    return charts
