"""What the tables say of trials and cells, as plain rows: the source of page, JSON and terminal.

A row is a dictionary of JSON values. Fractions lie in [0, 1]; what was not measured is ``None``.
All numbers are in the study's default view unless a key says otherwise. Only finished trials enter
means: a trial that failed half-way is listed and counted, never averaged.
"""

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rlsparse.definitions import DEFINITIONS, MODULES
from rlsparse.levels import under_mask
from rlsparse.study import StudyBase

Row = dict[str, Any]
Tables = Mapping[str, pa.Table]

CHANGED = tuple(f"num_changed_{name}" for name in DEFINITIONS)

_KEPT = (
    "trial_id", "status", "error", "algorithm", "seed", "replicate", "role", "control",
    "precision", "learning_rate", "num_steps", "score_base", "score_before", "score_after",
    "score_gain_se", "gate_ratio", "kl_final", "patch_bytes", "wall_s", "host", "identical",
)  # fmt: skip


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are there, ``None`` when there are none."""
    known = [v for v in values if v is not None and not math.isnan(v)]
    return math.fsum(known) / len(known) if known else None


def rows_of(tables: Tables, name: str) -> list[Row]:
    """Rows of table ``name`` with NaN as ``None``; no rows when the study has no such table."""
    table = tables.get(name)
    if table is None:
        return []
    rows: list[Row] = table.to_pylist()
    return [
        {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
        for row in rows
    ]


def parsed(text: str | None) -> Row:
    """The JSON object in ``text``; empty when there is none."""
    value = json.loads(text) if text else {}
    return value if isinstance(value, dict) else {}


def numbers(table: pa.Table, columns: Iterable[str]) -> dict[str, NDArray[np.float64]]:
    """Columns of ``table`` as floats, nulls as NaN; [rows] each."""
    return {name: table[name].cast(pa.float64()).to_numpy(zero_copy_only=False) for name in columns}


def codes(column: pa.ChunkedArray, names: Sequence[str]) -> NDArray[np.int64]:
    """Place of each value in ``names``; -1 where it is not among them."""
    places = pc.index_in(column, value_set=pa.array(names, pa.string()))
    found: NDArray[np.int64] = pc.fill_null(places, -1).to_numpy().astype(np.int64)
    return found


# --- labels ----------------------------------------------------------------------------------


def cell_label(algorithm: str, cell: Mapping[str, str]) -> str:
    """Short text of a cell: the algorithm, then every other factor as ``name=level``."""
    rest = [
        f"{path.split('.', 1)[-1]}={level}"
        for path, level in cell.items()
        if path not in ("algorithm", "algorithm.name")
    ]
    return " ".join([cell.get("algorithm", algorithm), *rest])


def short_labels(labels: Sequence[str], limit: int) -> list[str]:
    """Labels of at most ``limit`` characters, cut in their middle, for where there is little room.

    What stands in parentheses (the fields of a level) goes first, if labels stay apart without it;
    those that become equal by cutting get their number.
    """
    bare = [re.sub(r"\([^()]*\)", "", label) for label in labels]
    names = bare if len(set(bare)) == len(set(labels)) else labels
    end = limit // 3
    cut = [
        name if len(name) <= limit else f"{name[: limit - end - 1].rstrip()}…{name[-end:].lstrip()}"
        for name in names
    ]
    twice = {name for name, times in Counter(cut).items() if times > 1}
    return [
        f"{name[: limit - 5].rstrip('… ')}…#{i}" if name in twice else name
        for i, name in enumerate(cut, 1)
    ]


def in_order(modules: Collection[str]) -> list[str]:
    """Module names in the order of ``definitions.MODULES``, unknown ones last."""
    return [*(m for m in MODULES if m in modules), *sorted(set(modules) - set(MODULES))]


# --- trials ----------------------------------------------------------------------------------


def trial_rows(study: StudyBase, tables: Tables) -> list[Row]:
    """One row per planned trial, controls and failures included, in the order of the table.

    ``group`` is the cell and, for a control, its name. ``sparsity`` maps definitions to the
    fraction unchanged at the last snapshot, ``views`` those of all views; ``snapshots`` holds
    ``step``, ``score`` and bitwise ``sparsity`` along training, step 0 (nothing changed) first;
    ``masked`` says whether it trained the weights of a mask alone.
    """
    measured = _sparsity(tables)
    scores = _score_by_step(tables)
    rows = []
    for trial in rows_of(tables, "trials"):
        name, cell, config = trial["trial_id"], parsed(trial["cell"]), parsed(trial.get("config"))
        views = measured.get(name, {}) if trial["status"] == "finished" else {}
        steps = views.get(study.default_view, {})
        label = cell_label(trial["algorithm"], cell)
        rows.append(
            {
                **{key: trial.get(key) for key in _KEPT},
                **_setting(study, config),
                "masked": under_mask(config),
                "label": trial.get("label") or f"{label} s{trial['seed']}",
                "cell": cell,
                "group": f"{label} · {trial['control']}" if trial["control"] else label,
                "sparsity": steps[max(steps)] if steps else {},
                "views": {view: found[max(found)] for view, found in views.items()},
                "snapshots": _snapshots(steps, scores.get(name, {})) if steps else [],
            }
        )
    return rows


def _setting(study: StudyBase, config: Row) -> Row:
    """Base and task of a trial: from its configuration, else from the study."""
    given = study.model_dump(mode="json")
    whole = config or given.get("baseline") or {}
    settings = given.get("settings") or {}
    return {
        "base": whole.get("model", {}).get("source") or settings.get("model.source"),
        "task": whole.get("task", {}).get("name") or settings.get("task.name"),
    }


def _snapshots(measured: dict[int, Row], scores: dict[int, float]) -> list[Row]:
    points = {0: 1.0, **{step: value["bitwise"] for step, value in measured.items()}}
    return [
        {"step": step, "score": scores.get(step), "sparsity": points.get(step)}
        for step in sorted({*points, *scores})
    ]


def _sparsity(tables: Tables) -> dict[str, dict[str, dict[int, Row]]]:
    """trial -> view -> step -> definition -> fraction; exactly 1 iff no weight changed."""
    found: dict[str, dict[str, dict[int, Row]]] = defaultdict(lambda: defaultdict(dict))
    if (changes := tables.get("changes")) is None:
        return found
    sums = changes.group_by(["trial_id", "view", "step"], use_threads=False)
    for row in sums.aggregate([(c, "sum") for c in ("num_elements", *CHANGED)]).to_pylist():
        if total := row["num_elements_sum"]:
            found[row["trial_id"]][row["view"]][row["step"]] = {
                d: 1 - row[f"{c}_sum"] / total for d, c in zip(DEFINITIONS, CHANGED, strict=True)
            }
    return found


def _score_by_step(tables: Tables) -> dict[str, dict[int, float]]:
    scores: dict[str, dict[int, float]] = defaultdict(dict)
    if (steps := tables.get("steps")) is None:
        return scores
    scored = steps.select(["trial_id", "step", "score"]).filter(pc.is_valid(steps["score"]))
    for row in scored.to_pylist():
        if not math.isnan(row["score"]):
            scores[row["trial_id"]][row["step"]] = row["score"]
    return scores


# --- cells -----------------------------------------------------------------------------------

_ROLES = ("baseline", "factor", "surrogate", "control")


def cell_rows(trials: Sequence[Row]) -> list[Row]:
    """One row per cell, and per cell and control: counts of trials, and means over the finished.

    Studied cells come first, then surrogates, then controls. ``views`` maps view -> definition ->
    mean sparsity. ``overlap_lift`` and ``magnitude_lift`` are means of those of the trials, if they
    have them (``overlap_rows.with_lifts``).
    """
    groups: dict[str, list[Row]] = defaultdict(list)
    for trial in trials:
        groups[trial["group"]].append(trial)
    rows = []
    averaged = ("gate_ratio", "score_before", "score_after", "kl_final")
    for group, members in groups.items():
        done = [m for m in members if m["status"] == "finished"]
        views = dict.fromkeys(view for m in done for view in m["views"])
        rows.append(
            {
                **{k: members[0][k] for k in ("cell", "algorithm", "role", "control")},
                "group": group,
                "num_planned": len(members),
                "num_finished": len(done),
                "num_failed": sum(m["status"] == "failed" for m in members),
                **{key: mean(m[key] for m in done) for key in averaged},
                "sparsity": {d: mean(m["sparsity"].get(d) for m in done) for d in DEFINITIONS},
                "views": {
                    view: {d: mean(m["views"].get(view, {}).get(d) for m in done)
                           for d in DEFINITIONS}
                    for view in views
                },
                "overlap_lift": mean(m.get("overlap_lift") for m in done),
                "magnitude_lift": mean(m.get("magnitude_lift") for m in done),
            }
        )  # fmt: skip
    return sorted(rows, key=lambda row: _ROLES.index(row["role"]))


def collapsed(study: StudyBase, trials: Sequence[Row]) -> dict[str, list[str]]:
    """Nested factors: path -> algorithms whose trials do not have it."""
    missing = {
        path: sorted({t["algorithm"] for t in trials if path not in t["cell"]})
        for path in study.factors
    }
    return {path: names for path, names in missing.items() if names}


def of_one_cell(trials: Sequence[Row]) -> list[Row]:
    """Studied runs, of each algorithm those of the cell that is nearest to the baseline.

    Nearest is what differs from the first baseline, or else the first run, in the fewest factors.
    """
    studied = [t for t in trials if t["role"] not in ("control", "surrogate")]
    base = next((t for t in studied if t["role"] == "baseline"), next(iter(studied), None))
    chosen: dict[str, tuple[int, str]] = {}
    for t in studied:
        distance = sum(base["cell"].get(k, v) != v for k, v in t["cell"].items()) if base else 0
        if distance < chosen.get(t["algorithm"], (math.inf, ""))[0]:
            chosen[t["algorithm"]] = distance, t["group"]
    return [t for t in studied if t["group"] == chosen[t["algorithm"]][1]]


def density_map(study: StudyBase, tables: Tables, trials: Sequence[Row]) -> list[Row]:
    """Bitwise density per algorithm, layer and module, over finished runs at their last snapshot.

    Of an algorithm with several cells the runs of one (``of_one_cell``): levels of other factors
    may change many times as many weights.

    Keys: ``algorithm, group, layer`` (``None`` outside the layers)``, module, density``.
    """
    runs = of_one_cell([t for t in trials if t["snapshots"]])
    if not runs:
        return []
    changes = tables["changes"].select(
        ["trial_id", "step", "view", "layer", "module", "num_elements", "num_changed_bitwise"]
    )
    changes = changes.filter(pc.equal(changes["view"], study.default_view))
    place = codes(changes["trial_id"], [t["trial_id"] for t in runs])
    last = np.array([t["snapshots"][-1]["step"] for t in runs])
    is_last = (place >= 0) & (changes["step"].to_numpy() == last[place])
    names = np.array([t["algorithm"] for t in runs], object)[place[is_last]]
    kept = changes.filter(pa.array(is_last)).append_column(
        "algorithm", pa.array(names, pa.string())
    )
    sums = kept.group_by(["algorithm", "layer", "module"], use_threads=False).aggregate(
        [("num_elements", "sum"), ("num_changed_bitwise", "sum")]
    )
    groups = {t["algorithm"]: t["group"] for t in runs}
    return [
        {
            **{key: row[key] for key in ("algorithm", "layer", "module")},
            "group": groups[row["algorithm"]],
            "density": row["num_changed_bitwise_sum"] / row["num_elements_sum"],
        }
        for row in sums.to_pylist()
        if row["num_elements_sum"]
    ]
