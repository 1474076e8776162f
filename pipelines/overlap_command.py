"""``rlsparse overlap``: which weights several runs changed alike, beside what chance explains.

The command is registered in ``cli``; what it measures is ``rlsparse.overlap.mask_set``.
"""

import json
import os
import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from pipelines.json_option import write_json
from rlsparse.definitions import NULLS, VIEWS
from rlsparse.errors import ConfigError

Row = dict[str, Any]

MIN_TABLE_WIDTH = 120
"""Columns below which the numbers of a table would be cut."""
LEGEND = (
    "lift: observed over expected overlap; o1, o2: share of a, of b that is in both; largest: the "
    "lift over uniform that the densities allow"
)

MASKS = typer.Argument(
    metavar="MASK_OR_DIR", show_default=False,
    help="Two or more of: mask files, folders of trials, patches, checkpoints (folders, hub ids, "
    "URLs).",
)  # fmt: skip


def overlap(
    masks: Annotated[list[str], MASKS],
    base: Annotated[
        str | None,
        typer.Option(help="Checkpoint before training; not needed beside the folder of a trial."),
    ] = None,
    view: Annotated[
        str, typer.Option(help=f"Format in which weights are compared: {', '.join(VIEWS)}.")
    ] = "stored",
    per_module: Annotated[
        bool, typer.Option("--per-module", help="Print a line per module too.")
    ] = False,
    json_path: Annotated[
        str | None,
        typer.Option(
            "--json", metavar="PATH", help="Write all numbers here; - is standard output."
        ),
    ] = None,
) -> None:
    """Say how much the changed weights of several runs overlap, and how much chance explains."""
    if view not in VIEWS:
        raise ConfigError(f"--view {view}: choose of {', '.join(VIEWS)}")
    from rlsparse.overlap.mask_set import compare_masks, last_snapshot

    rows = [_measures(row) for row in compare_masks(masks, base=base, view=view)]
    taken = {place: patch.parent.name for place in masks if (patch := last_snapshot(place))}
    if json_path is not None:
        content = {"view": view, "masks": masks, "snapshots": taken, "overlaps": rows}
        write_json(json_path, json.dumps(content, indent=1, allow_nan=False))
    if json_path != "-":
        _print([row for row in rows if per_module or row["module"] is None], masks, taken)


def _measures(row: Row) -> Row:
    """The counts of a row of table ``overlaps``, and all measures of them."""
    from rlsparse.overlap import jaccard, kappa, lift, max_lift, odds_ratio, one_sided

    a, b, both, total = (row[key] for key in ("num_a", "num_b", "num_both", "num_elements"))
    expected = {null: row[f"expected_{null}"] for null in NULLS}
    found: Row = {
        "a": row["trial_a"],
        "b": row["trial_b"],
        **{k: row[k] for k in ("module", "num_elements", "num_a", "num_b", "num_both")},
        "num_both_random": row["num_both_random"],
        "o1": one_sided(both, a),
        "o2": one_sided(both, b),
        "jaccard": jaccard(both, a, b),
        "kappa": kappa(both, a, b, total),
        "odds_ratio": odds_ratio(both, a, b, total),
        "max_lift": max_lift(a, b, total),
        "expected": expected,
        "lift": {null: None if e is None else lift(both, e) for null, e in expected.items()},
        "update_size_of": row["update_size_of"],
    }
    return _finite(found)


def _finite(row: Row) -> Row:
    from rlsparse.report.formats import finite

    result: Row = finite(
        {k: float(v) if hasattr(v, "dtype") else v for k, v in row.items() if k != "lift"}
        | {"lift": {k: None if v is None else float(v) for k, v in row["lift"].items()}}
    )
    return result


def _print(rows: list[Row], masks: list[str], taken: Mapping[str, str]) -> None:
    """Print a table, or blocks of lines where it is too wide; ``taken``: place -> snapshot."""
    from rich.console import Console

    is_known = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = Console(width=None if is_known else 160)
    short = {place: f"[{number}]" for number, place in enumerate(masks, 1)}
    for place, name in short.items():
        of = f" ({taken[place]})" if place in taken else ""
        console.print(f"{name}  {place}{of}", markup=False, highlight=False, soft_wrap=True)
    if console.width < MIN_TABLE_WIDTH:
        for row in rows:
            for line in _block(row, short):
                console.print(line, markup=False, highlight=False, soft_wrap=True)
        console.print()
    else:
        console.print(_table(rows, short))
    console.print(LEGEND, highlight=False, soft_wrap=console.width >= MIN_TABLE_WIDTH)


def _block(row: Row, short: Mapping[str, str]) -> list[str]:
    """A pair of masks in lines of at most 80 characters."""
    from rlsparse.report.formats import number, percent

    lifts = "  ".join(f"{null.replace('_', ' ')} {number(row['lift'][null])}" for null in NULLS)
    return [
        "",
        f"{short[row['a']]} and {short[row['b']]}, {row['module'] or 'all'} weights",
        f"  lift  {lifts}",
        f"  largest {number(row['max_lift'])}  kappa {number(row['kappa'])}"
        f"  odds ratio {number(row['odds_ratio'])}",
        f"  o1 {percent(row['o1'])}  o2 {percent(row['o2'])}  Jaccard {number(row['jaccard'])}",
    ]


def _table(rows: list[Row], short: Mapping[str, str]) -> Any:
    from rich.table import Table

    from rlsparse.report.formats import number, percent

    table = Table()
    for column in ("a", "b", "weights", "o1", "o2", "Jaccard", "kappa", "odds ratio"):
        table.add_column(column, justify="left" if column in ("a", "b", "weights") else "right")
    for null in NULLS:
        table.add_column(f"lift, {null.replace('_', ' ')}", justify="right")
    table.add_column("largest", justify="right")
    for row in rows:
        table.add_row(
            short[row["a"]], short[row["b"]], row["module"] or "all",
            percent(row["o1"]), percent(row["o2"]),
            *(number(row[key]) for key in ("jaccard", "kappa", "odds_ratio")),
            *(number(row["lift"][null]) for null in NULLS),
            number(row["max_lift"]),
        )  # fmt: skip
    return table
