"""The report of a study: tables in, one self-contained page and one JSON file out.

``index.html`` loads nothing and can be read without its small script; ``report.json`` holds the
numbers of the page for machines. Equal tables give equal bytes.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from rlsparse.definitions import AGREEMENT_DEFINITIONS, DEFINITIONS, NULLS, SYNC_INTERVAL
from rlsparse.effects import BOOTSTRAP, UNPAIRED
from rlsparse.effects.responses import FAILED
from rlsparse.identity import canonical_json
from rlsparse.report import charts, formats, heat_maps, probe_rows, strips, svg
from rlsparse.report.curve_rows import curve_rows, magnitude_rows, rank_rows, window_rows
from rlsparse.report.overlap_rows import (
    RANDOM,
    cell_matrix,
    consensus_rows,
    module_rows,
    relation_rows,
    run_matrix,
    third_runs,
    with_lifts,
)
from rlsparse.report.page import render
from rlsparse.report.pairs import module_pairs, outside_rows, pairs_of
from rlsparse.report.rows import (
    Row,
    cell_rows,
    collapsed,
    density_map,
    short_labels,
    trial_rows,
)
from rlsparse.report.series import MAX_LABEL, Series, series_of
from rlsparse.report.subnetwork_rows import subnetwork_rows
from rlsparse.report.sync_rows import (
    EARLY_STEPS,
    LINKS_GBIT_S,
    SHOWN_K,
    size_rows,
    step_rows,
    way_rows,
)
from rlsparse.report.verdict_rows import (
    claim_rows,
    effect_rows,
    is_primary,
    levels_of,
    mean_rows,
    shared_scope,
    term_rows,
)
from rlsparse.study import StudyBase

__all__ = ["build_report", "claim_rows", "summary_rows"]

MAX_SERIES = 20
"""Cells drawn as curves (``Series.shown``); ``report.json`` has the curves of no others."""
MAX_FOREST_ROWS = 60
"""Effects drawn per response."""
MAX_EFFECTS = 300
"""Effects in the table of all others; ``report.json`` has every one."""
_PROVENANCE = (
    "command", "git_commit", "study_sha256", "claims_sha256", "versions", "hosts", "wall_s",
    "cpu_s", "allow_missing", "dropped_claims",
)  # fmt: skip

_WAY_NAMES = {
    "relative": "relative", "absolute": "absolute", "indices": "indices and values",
    "dense": "dense", "dense_zstd": "dense, zstd",
}  # fmt: skip


def build_report(
    study: StudyBase,
    tables: Mapping[str, pa.Table],
    out_dir: Path,
    *,
    provenance: Mapping[str, object],
    links: Sequence[float] = LINKS_GBIT_S,
) -> Path:
    """Write ``index.html`` and ``report.json`` into ``out_dir``, each atomically.

    Args:
        study: the resolved study.
        tables: ``trials``, and as far as they exist ``steps``, ``changes``, ``magnitudes``,
            ``overlaps``, ``consensus``, ``spectra``, ``agreement``, ``syncs``, ``effects``,
            ``terms``, ``means`` and ``claims`` (see ``schemas``). ``trials`` may have the further
            columns ``config`` (JSON of the trial) and ``label``.
        out_dir: made when missing.
        provenance: what the page states at its end; known keys are ``command``, ``git_commit``,
            ``study_sha256``, ``claims_sha256``, ``versions`` (a mapping), ``hosts``, ``wall_s`` and
            ``cpu_s`` (sums over trials) and ``allow_missing``.
        links: Gbit/s for which the pauses of weight syncs are given.

    Returns:
        Path of ``index.html``.
    """
    content = _content(study, tables, provenance, links)
    series = series_of(content["cells"])
    page = render(
        "page.html.jinja",
        {
            **content,
            "series": series,
            "filter": _filter(study, content["cells"]),
            "figures": _figures(content, series),
            "symbols": svg.symbols(),
            "null_styles": [svg.style(i) for i in range(len(NULLS))],
            "primary_effects": _primary_effects(content["effects"]),
            "third": _third(content["third_runs"]),
            "other_effects": _other_effects(content["effects"])[:MAX_EFFECTS],
            "num_other_effects": len(_other_effects(content["effects"])),
            "overlap_null": heat_maps.strongest_null(content["overlap_map"]["rows"]),
            "provenance": dict.fromkeys(_PROVENANCE) | content["provenance"],
            "known_provenance": _PROVENANCE,
            "effect_groups": lambda row: series.with_level(levels_of(row)),
            "definitions": DEFINITIONS,
            "agreement_definitions": AGREEMENT_DEFINITIONS,
            "mask_labels": _mask_labels(content["subnetworks"]),
            "nulls": NULLS,
            "early_steps": EARLY_STEPS,
            "shown_k": SHOWN_K,
            "sync_interval": SYNC_INTERVAL,
            "way_names": _WAY_NAMES,
            "explained": _of_runs(content["relations"]),
            "probe_heads": {
                "split": probe_rows.SPLIT,
                "casts": probe_rows.CASTS,
                "gate": probe_rows.GATE,
                "prices": probe_rows.PRICES,
            },
        },
    )
    out_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(formats.finite(content), indent=0, sort_keys=True, allow_nan=False)
    _write_atomically(out_dir / "report.json", text + "\n")
    _write_atomically(out_dir / "index.html", page)
    return out_dir / "index.html"


def summary_rows(study: StudyBase, tables: Mapping[str, pa.Table]) -> list[Row]:
    """The command line's final table: one row per trial that is not a control.

    Keys: ``algorithm, seed, label, score_before, score_after, sparsity_bitwise, sparsity_1e-05,
    overlap_lift, status``. ``overlap_lift`` is the mean, over the other seeds of the same cell, of
    the observed overlap divided by that expected from the density of each tensor.
    """
    trials = trial_rows(study, tables)
    return _summary(with_lifts(trials, pairs_of(study, tables, trials)))


def _summary(trials: Sequence[Row]) -> list[Row]:
    return [
        {
            **{k: row[k] for k in ("algorithm", "seed", "label", "score_before", "score_after")},
            "sparsity_bitwise": row["sparsity"].get("bitwise"),
            "sparsity_1e-05": row["sparsity"].get("abs_1e-05"),
            "overlap_lift": row["overlap_lift"],
            "status": row["status"],
        }
        for row in trials
        if row["role"] != "control"
    ]


# --- content ---------------------------------------------------------------------------------


def _content(
    study: StudyBase,
    tables: Mapping[str, pa.Table],
    provenance: Mapping[str, object],
    links: Sequence[float],
) -> Row:
    """All numbers of the report, as JSON values."""
    plain = trial_rows(study, tables)
    pairs = pairs_of(study, tables, plain)
    trials = with_lifts(plain, pairs)
    cells = cell_rows(trials)
    groups = series_of(cells).shown(MAX_SERIES)
    drawn = [t for t in trials if t["group"] in groups]
    by_cell = {
        canonical_json(t["cell"]): t["group"] for t in drawn if t["role"] in ("baseline", "factor")
    }
    claims = claim_rows(tables)
    return {
        "study": study.model_dump(mode="json"),
        "view": study.default_view,
        "status": _status(trials),
        "claims": claims,
        "shared_scope": shared_scope(claims),
        "summary": _summary(trials),
        "trials": trials,
        "cells": cells,
        "collapsed": collapsed(study, trials),
        "drawn": groups,
        "curves": curve_rows(drawn, outside_rows(study, tables, drawn), tables),
        "windows": window_rows(drawn, tables),
        "split": probe_rows.split_rows(trials, tables),
        "casts": probe_rows.cast_rows(trials, tables),
        "gate": probe_rows.gate_rows(trials, tables),
        "prices": probe_rows.price_rows(tables),
        "magnitudes": magnitude_rows(study, tables, drawn),
        "density": density_map(study, tables, trials),
        "ranks": rank_rows(study, tables, trials),
        "relations": relation_rows(pairs),
        "third_runs": third_runs(study, tables, trials),
        "modules": module_rows(trials, pairs, module_pairs(study, tables, trials)),
        "overlap_map": _overlap_map(trials, cells, pairs),
        "consensus": consensus_rows(study, tables, by_cell),
        "subnetworks": subnetwork_rows(trials, tables),
        "syncs": {
            "links": [*links],
            "sizes": size_rows(trials, tables),
            "ways": way_rows(trials, tables, links),
            "steps": step_rows(drawn, tables),
        },
        "effects": effect_rows(tables),
        "terms": term_rows(tables),
        "means": mean_rows(tables),
        "provenance": dict(provenance),
    }


def _overlap_map(trials: Sequence[Row], cells: Sequence[Row], pairs: Any) -> Row:
    """Runs against runs, or cells against cells where there are too many runs; none masked."""
    measured = [t for t in trials if t["sparsity"] and not t["masked"]]
    if len(measured) <= heat_maps.MAX_RUNS:
        return {"of": "runs", "rows": run_matrix(trials, pairs), "num_left_out": 0}
    masked = {t["group"] for t in trials if t["masked"]}
    groups = [c["group"] for c in cells if c["num_finished"] and c["role"] != "control"]
    groups = [group for group in groups if group not in masked]
    kept = groups[: heat_maps.MAX_CELLS]
    rows = cell_matrix(trials, pairs, kept)
    return {"of": "cells", "rows": rows, "num_left_out": len(groups) - len(kept)}


def _status(trials: Sequence[Row]) -> Row:
    """Counts of trials and the settings that the headline numbers belong to."""
    real = [t for t in trials if t["role"] != "control"]
    ratios = [t["gate_ratio"] for t in real if t["gate_ratio"] is not None]
    bases = _distinct(t["base"] for t in trials)
    return {
        "num_planned": len(trials),
        "num_finished": sum(t["status"] == "finished" for t in trials),
        "num_failed": sum(t["status"] == "failed" for t in trials),
        "bases": bases,
        "tasks": _distinct(t["task"] for t in trials),
        "algorithms": _distinct(t["algorithm"] for t in real),
        "seeds": sorted(_distinct(t["seed"] for t in real)),
        "precisions": _distinct(t["precision"] for t in real),
        "learning_rates": _distinct(t["learning_rate"] for t in real),
        "num_steps": _distinct(t["num_steps"] for t in real),
        "gate_ratio": [min(ratios), max(ratios)] if ratios else None,
        "checks_pipeline_only": "tiny" in bases,
    }


def _distinct(values: Iterable[Any]) -> list[Any]:
    return [value for value in dict.fromkeys(values) if value is not None]


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


# --- what the page needs besides -------------------------------------------------------------


def _filter(study: StudyBase, cells: Sequence[Row]) -> Row:
    """Factors with the levels that occur, and each group's levels, for the script."""
    kinds = {"baseline": "studied", "factor": "studied"}
    groups = [{**c["cell"], "kind": kinds.get(c["role"], c["role"])} for c in cells]
    paths = [*study.factors, "kind"]
    levels = {path: _distinct(group.get(path) for group in groups) for path in paths}
    return {"levels": {p: v for p, v in levels.items() if len(v) > 1}, "groups": groups}


def _primary_effects(effects: Sequence[Row]) -> dict[str, list[Row]]:
    """Effects to draw, by response: of all weights, pooled over the other factors."""
    found: dict[str, list[Row]] = {}
    for row in effects:
        if _is_drawn(row):
            found.setdefault(row["response"], []).append(row)
    return {response: rows[:MAX_FOREST_ROWS] for response, rows in found.items()}


def _is_drawn(row: Row) -> bool:
    """Not the effects on parts, nor sensitivities, nor effects on failures that did not occur."""
    whole = row["layer"] is None and row["module"] is None and not row["within"]
    idle = row["response"] == FAILED and not row["estimate"]
    secondary = row["method"] in (UNPAIRED, BOOTSTRAP)
    return whole and is_primary(row["response"]) and not secondary and not idle


def _other_effects(effects: Sequence[Row]) -> list[Row]:
    return [row for row in effects if not _is_drawn(row)]


def _figures(content: Row, series: Series) -> dict[str, Any]:
    """Figures of the page; an empty list where there is nothing to show."""
    trials, cells, groups = content["trials"], content["cells"], content["drawn"]
    relations = content["relations"]
    studied, controls = ([c for c in cells if (c["role"] == "control") == is_control]
                         for is_control in (False, True))  # fmt: skip
    views = dict.fromkeys(view for cell in cells for view in cell["views"])
    return {
        "cells": strips.cell_strips(trials, studied, series),
        "control_cells": strips.cell_strips(trials, controls, series),
        "legend": series.legend(groups),
        "training": charts.training_charts(content["curves"], groups, series),
        "windows": charts.window_chart(content["windows"], groups, series),
        "gain": charts.gain_chart(trials, series),
        "loss": charts.loss_charts(content["curves"], groups, series),
        "subnetworks": _subnetwork_figures(content, series),
        "syncs": charts.sync_charts(
            content["syncs"]["sizes"], content["syncs"]["steps"], groups, series
        ),
        "density": heat_maps.density_maps(content["density"], series),
        "magnitude": charts.magnitude_chart(content["magnitudes"], groups, series),
        "ranks": charts.rank_charts(content["ranks"], series),
        "relations": strips.relation_strips(relations),
        "explained": strips.explained_strips(_of_runs(relations)),
        "overlap": heat_maps.overlap_map(content["overlap_map"]["rows"], _names(content, series)),
        "modules": heat_maps.module_maps(content["modules"]),
        "consensus": charts.consensus_charts(content["consensus"], groups, series),
        "definitions": {view: strips.definition_strips(cells, view, series) for view in views},
        "forests": {
            response: strips.forest_strips(rows)
            for response, rows in _primary_effects(content["effects"]).items()
        },
        "parts": heat_maps.effect_maps(content["effects"]),
    }


def _subnetwork_figures(content: Row, series: Series) -> Row:
    """The mean loss of the cells that share the baseline's other factors, or the first block's."""
    rows = content["subnetworks"]
    block = next((row["block"] for row in rows if row["is_baseline"]), rows and rows[0]["block"])
    own = {row["group"] for row in rows if row["block"] == block}
    groups = [group for group in content["drawn"] if group in own]
    losses = [
        {**row, "low": None, "high": None} for row in content["curves"] if row["measure"] == "loss"
    ]
    drawn = charts.loss_charts(losses, groups, series)
    return {"block": block, "groups": groups, "loss": drawn}


def _mask_labels(rows: Sequence[Row]) -> dict[str, str]:
    """Labels of masks; long ones shortened where they stay apart."""
    masks = _distinct(row["mask"] for row in rows)
    is_long = any(len(mask or "") > MAX_LABEL for mask in masks)
    return dict(zip(masks, short_labels(masks, MAX_LABEL) if is_long else masks, strict=True))


def _third(runs: Sequence[Row]) -> dict[bool, str]:
    """Third runs in words: those whose reward carries no information (True) and the others."""
    found: dict[bool, str] = {}
    for is_surrogate in (True, False):
        seeds: dict[str, list[str]] = {}
        for run in runs:
            if (run["role"] == "surrogate") == is_surrogate:
                seeds.setdefault(run["kind"], []).append(f"s{run['seed']}")
        if seeds:
            said = (f"{kind} {', '.join(own)}" for kind, own in seeds.items())
            found[is_surrogate] = "; ".join(said)
    return found


def _of_runs(relations: Sequence[Row]) -> list[Row]:
    """Without the random mask, which shares nothing that a null could explain."""
    return [row for row in relations if row["relation"] != RANDOM]


def _names(content: Row, series: Series) -> dict[str, tuple[str, str]]:
    """Labels and groups of the rows of the overlap map."""
    if content["overlap_map"]["of"] == "cells":
        return {group: (group, series.ids(group)) for group in series.index}
    return {t["trial_id"]: (t["label"], series.ids(t["group"])) for t in content["trials"]}
