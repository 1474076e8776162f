"""What ``rlsparse run`` and ``rlsparse report`` print: runs, claims, and where the rest is."""

import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
from rich.console import Console
from rich.table import Table

from pipelines.scalars import measured_scalars
from rlsparse.report.formats import percent
from rlsparse.study import StudyBase

Row = dict[str, Any]


def print_results(study: StudyBase, tables: Mapping[str, pa.Table]) -> None:
    """Runs, cells with missing trials, claims, and what these are about."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    trials = tables["trials"].to_pylist()
    console.print(_runs(study, tables, trials), markup=False)
    if any(trial["status"] != "finished" for trial in trials):
        console.print(_cells(trials), markup=False)
    claims = tables["claims"].to_pylist()
    if claims:
        console.print(_claims(claims), markup=False)
        for scope in dict.fromkeys(row["scope"] for row in claims):
            print(f"scope   {scope}")


def print_places(places: Mapping[str, str]) -> None:
    """Where the rest is: a word -> what to type."""
    for word, place in places.items():
        print(f"{word:7} {place}")


def relative(path: str) -> str:
    """The path as seen from here, if that is shorter to read."""
    return path if "://" in path else min(path, os.path.relpath(path), key=len)


def _runs(study: StudyBase, tables: Mapping[str, pa.Table], trials: Iterable[Row]) -> Table:
    runs = _table(study.question, "trial", "seed", "score", "unchanged bitwise", "|d| <= 1e-5",
                  "overlap / tensor null")  # fmt: skip
    measured = measured_scalars(study, tables)
    for row in trials:
        if row["role"] == "control":
            continue
        last = {name: value for name, _, value in sorted(measured.get(row["trial_id"], []))}
        lift = last.get("overlap/lift_tensor_other_seed")
        runs.add_row(
            row["label"] if row["status"] == "finished" else f"{row['label']} ({row['status']})",
            str(row["seed"]),
            _score(row["score_before"], row["score_after"]),
            percent(last.get("sparsity/bitwise")),
            percent(last.get("sparsity/abs_1e-05")),
            "" if lift is None else f"{lift:.2f}",
        )
    return runs


def _score(before: float | None, after: float | None) -> str:
    """Both scores as far as they are known; of runs made elsewhere often only the last is."""
    if before is None:
        return "" if after is None else f"{after:.3f}"
    return f"{before:.3f} ->" if after is None else f"{before:.3f} -> {after:.3f}"


def _cells(trials: Iterable[Row]) -> Table:
    cells = _table("trials by cell", "cell", "planned", "finished", "failed")
    counts: dict[str, Counter[str]] = {}
    for row in trials:
        seed = f" s{row['seed']}"
        counts.setdefault(row["label"].replace(seed, "", 1), Counter())[row["status"]] += 1
    for cell, count in counts.items():
        cells.add_row(cell, str(count.total()), str(count["finished"]), str(count["failed"]))
    return cells


def _claims(rows: Iterable[Row]) -> Table:
    claims = _table("claims", "claim", "verdict", "estimate", "interval", "note", right=())
    for row in rows:
        ends = [_number(row[key]) for key in ("ci_low", "ci_high") if row[key] is not None]
        standing = "" if row["registered"] == "registered" else row["registered"]
        note = "; ".join(filter(None, [standing, row["note"]]))
        claims.add_row(row["id"], row["verdict"], _number(row["estimate"]), " .. ".join(ends), note)
    return claims


def _table(title: str, first: str, *others: str, right: Iterable[str] | None = None) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for column in others:
        table.add_column(column, justify="right" if right is None else "left")
    return table


def _number(value: float | None) -> str:
    """Four digits; whole numbers, such as those of checks, without any behind the point."""
    if value is None:
        return ""
    return f"{value:.4g}" if value == round(value) else f"{value:#.4g}"
