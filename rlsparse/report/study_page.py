"""The report of a study: tables in, one self-contained page and one JSON file out.

``index.html`` loads nothing and runs nothing; ``report.json`` holds the same rows for machines.
Equal tables give equal bytes.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from markupsafe import Markup

from rlsparse.definitions import DEFINITIONS
from rlsparse.report import formats, plots
from rlsparse.report.page import render
from rlsparse.report.rows import (
    NULLS,
    Row,
    cell_rows,
    claim_rows,
    density_map,
    effect_rows,
    module_overlap,
    overlap_pairs,
    overlap_rows,
    summary_rows,
    trial_rows,
)
from rlsparse.study import Study

__all__ = ["build_report", "claim_rows", "summary_rows"]

MAX_FOREST_ROWS = 20
"""Effects drawn per response; the table below the figure has all of them."""


def build_report(
    study: Study,
    tables: Mapping[str, pa.Table],
    out_dir: Path,
    *,
    versions: Mapping[str, str] | None = None,
) -> Path:
    """Write ``index.html`` and ``report.json`` into ``out_dir``, each atomically.

    Args:
        study: the resolved study.
        tables: ``trials``, and as far as they exist ``steps``, ``tensor_deltas``, ``overlaps``,
            ``effects`` and ``claims`` (schemas in ``rlsparse.tables``). ``trials`` may have the
            further columns ``config`` (JSON of the trial) and ``label``.
        out_dir: made when missing.
        versions: what the page states at its end, such as package versions and the git commit.

    Returns:
        Path of ``index.html``.
    """
    trials = trial_rows(study, tables)
    cells, effects = cell_rows(trials), effect_rows(tables)
    pairs = overlap_pairs(study, tables)
    density = density_map(study, tables, trials)
    content: Row = {
        "study": study.model_dump(mode="json"),
        "view": study.default_view,
        "status": _status(study, trials),
        "claims": claim_rows(tables),
        "summary": summary_rows(study, tables),
        "trials": trials,
        "cells": cells,
        "overlaps": overlap_rows(pairs),
        "effects": effects,
        "versions": dict(versions or {}),
    }
    page = render(
        "page.html.jinja",
        {
            **content,
            "figures": _figures(trials, cells, density, pairs, effects),
            "densest": _densest(density),
            "definitions": DEFINITIONS,
            "nulls": NULLS,
        },
    )
    out_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(formats.finite(content), indent=1, sort_keys=True, allow_nan=False)
    _write_atomically(out_dir / "report.json", text + "\n")
    _write_atomically(out_dir / "index.html", page)
    return out_dir / "index.html"


def _status(study: Study, trials: Sequence[Row]) -> Row:
    """Counts of trials and the setting that the headline numbers belong to."""
    real = [t for t in trials if t["role"] != "control"]
    ratios = [t["gate_ratio"] for t in real if t["gate_ratio"] is not None]
    bases = _distinct(t["base"] for t in trials) or [study.baseline.model.source]
    return {
        "num_planned": len(trials),
        "num_finished": sum(t["status"] == "finished" for t in trials),
        "num_failed": sum(t["status"] == "failed" for t in trials),
        "bases": bases,
        "task": study.baseline.task.name,
        "precisions": _distinct(t["precision"] for t in real),
        "learning_rates": _distinct(t["learning_rate"] for t in real),
        "num_steps": _distinct(t["num_steps"] for t in real),
        "gate_ratio": [min(ratios), max(ratios)] if ratios else None,
        "checks_pipeline_only": "tiny" in bases,
    }


def _distinct(values: Any) -> list[Any]:
    return [value for value in dict.fromkeys(values) if value is not None]


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _figures(
    trials: Sequence[Row],
    cells: Sequence[Row],
    density: Sequence[Row],
    pairs: Sequence[Row],
    effects: Sequence[Row],
) -> dict[str, list[tuple[str, Markup]]]:
    """Captions and figures of the page by section; an empty list where there is nothing to show."""
    colour = plots.colours([t["algorithm"] for t in trials])
    measured = [t for t in trials if t["snapshots"]]
    real = [t for t in measured if t["role"] != "control"]
    algorithms = list(dict.fromkeys(t["algorithm"] for t in real))
    lifts = module_overlap(pairs)
    limits = plots.training_limits(real)
    top = _densest(density)
    known = [p for p in pairs if p["module"] is None and p["lift"]["tensor"] is not None]
    labels = {t["trial_id"]: t["label"] for t in trials}
    return {
        "sparsity": [
            *(
                [
                    (
                        "By cell: a point per run, a bar at the mean",
                        plots.sparsity_by_cell(trials, cells, colour),
                    )
                ]
                if measured
                else []
            ),
            *([("By definition of unchanged", plots.definitions(cells, colour))] if real else []),
        ],
        "training": [
            (
                a,
                plots.training_curves(
                    a, [t for t in real if t["algorithm"] == a], limits, colour[a]
                ),
            )
            for a in algorithms
        ],
        "density": [(a, plots.density_heat_map(a, density, top)) for a in algorithms],
        "overlap": [("", plots.overlap_heat_map(labels, pairs))] if known else [],
        "modules": [
            (a, plots.module_lifts(a, lifts))
            for a in algorithms
            if any(row["algorithm"] == a for row in lifts)
        ],
        "effects": [
            (response, plots.effect_forest(response, rows[:MAX_FOREST_ROWS]))
            for response, rows in _pooled_effects(effects).items()
        ],
    }


def _densest(density: Sequence[Row]) -> float:
    """The density that the heat maps of all algorithms draw darkest."""
    return max((row["density"] for row in density), default=0.0)


def _pooled_effects(effects: Sequence[Row]) -> dict[str, list[Row]]:
    """Effects to draw, by response: pooled over the other factors, sparsity in bits only."""
    found: dict[str, list[Row]] = {}
    for row in effects:
        response, ends = row["response"], [row[k] for k in ("shown", "shown_low", "shown_high")]
        secondary = response.startswith("sparsity.") and "bitwise" not in response
        known = all(end is not None and math.isfinite(end) for end in ends)
        if known and not secondary and not row["within"]:
            found.setdefault(response, []).append(row)
    return found
