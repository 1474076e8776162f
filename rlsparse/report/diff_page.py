"""What ``rlsparse diff --out`` leaves: tables, ``diff.json`` and one self-contained page."""

import json
import os
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
from markupsafe import Markup

from rlsparse import tables
from rlsparse.definitions import DEFINITIONS, NUM_MAGNITUDE_BINS
from rlsparse.diff import Diff, Row
from rlsparse.errors import ConfigError
from rlsparse.report import diff_plots, diff_rows, plots
from rlsparse.report.formats import counted
from rlsparse.report.page import render

MAX_TENSORS = 400
"""Tensors listed on the page; ``tensor_deltas.parquet`` has all of them."""
MAX_NAMES = 20
"""Tensors named in a line about several."""


def write_diff(diff: Diff, out_dir: Path, *, spectra: Sequence[Row] | None = None) -> Path:
    """Write the tables of ``diff`` as Parquet, ``diff.json`` and ``index.html``, all or nothing.

    They are made in a folder beside ``out_dir``, which takes its name when all is there.

    Args:
        diff: with the tables ``base_tensors`` and ``stripes``, if their figures are wanted.
        out_dir: must not exist, or be empty.
        spectra: rows of table ``spectra``; None where it was not asked for.

    Returns:
        Path of ``index.html``.

    Raises:
        ConfigError: ``out_dir`` is not empty, or cannot be written.
    """
    made = {**diff.tables} if spectra is None else {**diff.tables, "spectra": list(spectra)}
    out_dir = out_dir.resolve()
    work = out_dir.with_name(f".{out_dir.name}.{os.getpid()}.partial")
    try:
        work.mkdir(parents=True)
        for name, rows in made.items():
            tables.write(tables.from_rows(rows, name), name, work / f"{name}.parquet")
        text = json.dumps(diff_rows.json_content(diff, spectra), indent=1, allow_nan=False)
        (work / "diff.json").write_text(text + "\n", encoding="utf-8")
        (work / "index.html").write_text(build_page(diff, spectra), encoding="utf-8")
        work.rename(out_dir)  # replaces an empty folder, and no other
    except OSError as error:
        raise ConfigError(
            f"cannot write {out_dir}: {error.strerror}; give a new folder to --out"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return out_dir / "index.html"


def build_page(diff: Diff, spectra: Sequence[Row] | None = None) -> str:
    """The page of one pair, in HTML; arguments as of ``write_diff``."""
    rows = diff_rows.of_view(diff)
    tensors, layers = diff_rows.tensor_rows(rows), diff_rows.layer_rows(rows)
    stripes = diff_rows.stripe_rows(diff.tables.get("stripes", []))
    total = diff_rows.summarise(rows)
    sparsity = diff_rows.sparsity_by_view(diff)
    return render(
        "diff_page.html.jinja",
        {
            "before": diff.before,
            "after": diff.after,
            "views": diff.views,
            "unchanged": _unchanged(diff.views[0]),
            "total": total,
            "sparsity": sparsity,
            "warnings": diff_rows.warnings(diff, spectra or ()),
            "modules": diff_rows.module_rows(rows),
            "layers": layers,
            "tensors": tensors[:MAX_TENSORS],
            "num_tensors": len(tensors),
            "stripes": stripes,
            "spectra": diff_rows.spectrum_lines(spectra or ()),
            "spectrum_titles": tuple(diff_rows.SPECTRUM),
            "accounting": [
                row | {"tensors": diff_rows.shortened(row["tensors"], MAX_NAMES)}
                for row in diff_rows.accounting_rows(diff.accounting)
            ],
            "matched": [
                (
                    f"{counted(len(row['tensors']), 'tensor')} {row['name']}",
                    diff_rows.shortened(row["tensors"], MAX_NAMES),
                )
                for row in diff_rows.matched_rows(diff.accounting)
            ],
            "figures": {
                "definitions": [("", diff_plots.sparsity_by_definition(sparsity))],
                "where": [_heat_map(diff.views[0], rows), *_profile(layers)],
                "sizes": [*_ulps(total), *_magnitudes(rows, diff.tables.get("base_tensors", []))],
                "stripes": [("", diff_plots.stripe_dispersion(stripes))] if stripes else [],
            },
            "definitions": DEFINITIONS,
            "versions": {"rlsparse": version("rlsparse")},
        },
    )


def _unchanged(view: str) -> str:
    """In what sense the weights of the headline are unchanged."""
    if view == "stored":
        return "unchanged, bit for bit"
    return f"unchanged after rounding to {view}"


Captioned = list[tuple[str, Markup]]


def _heat_map(view: str, rows: Sequence[Row]) -> tuple[str, Markup]:
    cells = [cell | {"algorithm": view} for cell in diff_rows.cell_rows(rows)]
    top = max(cell["density"] for cell in cells)
    return "Density by layer and module", plots.density_heat_map(view, cells, top)


def _ulps(total: Row) -> Captioned:
    counts = total["ulp_histogram"]
    title = "How far the changed weights moved, in representable values"
    return [(title, diff_plots.ulp_histogram(counts))] if any(counts) else []


def _magnitudes(rows: Sequence[Row], base: Sequence[Row]) -> Captioned:
    """Only tensors of both tables: the base may have weights that were not compared."""
    known = {row["tensor"] for row in rows} & {row["tensor"] for row in base}
    changed, total = (
        diff_rows.histogram(
            (row for row in table if row["tensor"] in known), column, NUM_MAGNITUDE_BINS
        )
        for table, column in (
            (rows, "magnitude_histogram_changed"),
            (base, "magnitude_histogram"),
        )
    )
    if total.max(initial=0) < diff_plots.MIN_BIN_WEIGHTS:
        return []
    return [
        (
            "Density against |w|",
            diff_plots.density_by_magnitude(changed, np.maximum(total, changed)),
        )
    ]


def _profile(layers: Sequence[Row]) -> Captioned:
    numbered = [row for row in layers if row["name"].isdecimal()]
    return [("By layer", diff_plots.layer_profile(numbered))] if len(numbered) > 1 else []
