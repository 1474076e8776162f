"""What the tables say, as plain rows: the one source of page, ``report.json`` and terminal.

A row is a dictionary of JSON values. Fractions lie in [0, 1]; what was not measured is ``None``.
All numbers are in the study's default view. Only finished trials enter means: a trial that failed
half-way is listed and counted, never averaged.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from rlsparse.definitions import DEFINITIONS, MODULES
from rlsparse.study import Study

Row = dict[str, Any]
Tables = Mapping[str, pa.Table]

NULLS: tuple[str, ...] = ("uniform", "tensor", "magnitude")
"""Nulls of the overlap table, the weakest first."""

RELATIONS: tuple[str, ...] = (
    "same cell, other seed",
    "same cell, same seed",
    "other cell, same seed",
    "other cell, other seed",
    "with a control",
)
"""How the two runs of a pair are related."""

SCALES = {
    "exact": "fraction",
    "within": "fraction",
    "greater": "odds ratio",
    "equivalent": "density ratio",
    "above_null": "observed / expected",
}
"""Scale on which the claims table gives estimate, interval and margin of each kind."""


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


def cell_label(algorithm: str, cell: Mapping[str, str]) -> str:
    """Short text of a cell: the algorithm, then every other factor as ``name=level``."""
    rest = [
        f"{path.split('.', 1)[-1]}={level}"
        for path, level in cell.items()
        if path not in ("algorithm", "algorithm.name")
    ]
    return " ".join([cell.get("algorithm", algorithm), *rest])


# --- trials ----------------------------------------------------------------------------------


def trial_rows(study: Study, tables: Tables) -> list[Row]:
    """One row per planned trial, controls and failures included, in the order of the table.

    ``group`` is the cell and, for a control, its name. ``sparsity`` maps definitions to the
    fraction unchanged at the last snapshot, ``snapshots`` holds ``step``, ``score`` and bitwise
    ``sparsity`` along training, step 0 (nothing changed) first.
    """
    sparsity = _sparsity_by_step(study, tables)
    scores = _score_by_step(tables)
    lifts = _lift_to_other_seeds(overlap_pairs(study, tables))
    rows = []
    for trial in rows_of(tables, "trials"):
        name, cell = trial["trial_id"], parsed(trial["cell"])
        measured = sparsity.get(name, {}) if trial["status"] == "finished" else {}
        config = parsed(trial.get("config"))
        label = cell_label(trial["algorithm"], cell)
        rows.append(
            {
                **{key: trial[key] for key in _KEPT},
                "base": config.get("model", study.baseline.model.model_dump()).get("source"),
                "label": trial.get("label") or f"{label} s{trial['seed']}",
                "cell": cell,
                "cell_label": label,
                "group": f"{label} · {trial['control']}" if trial["control"] else label,
                "sparsity": measured[max(measured)] if measured else {},
                "snapshots": _snapshots(measured, scores.get(name, {})) if measured else [],
                "overlap_lift": lifts.get(name),
            }
        )
    return rows


_KEPT = (
    "trial_id", "status", "error", "algorithm", "seed", "replicate", "role", "control",
    "precision", "learning_rate", "num_steps", "score_base", "score_before", "score_after",
    "gate_ratio", "patch_bytes", "wall_s", "host",
)  # fmt: skip


def _snapshots(measured: dict[int, Row], scores: dict[int, float]) -> list[Row]:
    points = {0: 1.0, **{step: value["bitwise"] for step, value in measured.items()}}
    return [
        {"step": step, "score": scores.get(step), "sparsity": points.get(step)}
        for step in sorted({*points, *scores})
    ]


def _in_view(study: Study, table: pa.Table) -> pa.Table:
    return table.filter(pc.equal(table["view"], study.default_view))


def _sparsity_by_step(study: Study, tables: Tables) -> dict[str, dict[int, Row]]:
    """trial -> step -> definition -> fraction unchanged; exactly 1 iff no weight changed."""
    found: dict[str, dict[int, Row]] = defaultdict(dict)
    if (deltas := tables.get("tensor_deltas")) is None:
        return found
    counts = [f"num_changed_{d}" for d in DEFINITIONS]
    sums = _in_view(study, deltas).group_by(["trial_id", "step_after"])
    for row in sums.aggregate([(c, "sum") for c in ("num_elements", *counts)]).to_pylist():
        if total := row["num_elements_sum"]:
            found[row["trial_id"]][row["step_after"]] = {
                d: 1 - row[f"num_changed_{d}_sum"] / total for d in DEFINITIONS
            }
    return found


def _score_by_step(tables: Tables) -> dict[str, dict[int, float]]:
    scores: dict[str, dict[int, float]] = defaultdict(dict)
    for row in rows_of(tables, "steps"):
        if row["score"] is not None:
            scores[row["trial_id"]][row["step"]] = row["score"]
    return scores


def summary_rows(study: Study, tables: Tables) -> list[Row]:
    """The command line's final table: one row per trial that is not a control.

    Keys: ``algorithm, seed, label, score_before, score_after, sparsity_bitwise, sparsity_1e-05,
    overlap_lift, status``. ``overlap_lift`` is the mean, over the other seeds of the same cell, of
    the observed overlap divided by that expected from the density of each tensor.
    """
    return [
        {
            **{k: row[k] for k in ("algorithm", "seed", "label", "score_before", "score_after")},
            "sparsity_bitwise": row["sparsity"].get("bitwise"),
            "sparsity_1e-05": row["sparsity"].get("abs_1e-05"),
            "overlap_lift": row["overlap_lift"],
            "status": row["status"],
        }
        for row in trial_rows(study, tables)
        if row["role"] != "control"
    ]


def cell_rows(trials: Sequence[Row]) -> list[Row]:
    """One row per cell, and per cell and control: counts of trials, and means over the finished."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for trial in trials:
        groups[trial["group"]].append(trial)
    rows = []
    for group, members in groups.items():
        done = [m for m in members if m["status"] == "finished"]
        rows.append(
            {
                **{k: members[0][k] for k in ("cell", "algorithm", "role", "control")},
                "group": group,
                "num_planned": len(members),
                "num_finished": len(done),
                "num_failed": sum(m["status"] == "failed" for m in members),
                "gate_ratio": mean(m["gate_ratio"] for m in done),
                "score_before": mean(m["score_before"] for m in done),
                "score_after": mean(m["score_after"] for m in done),
                "sparsity": {d: mean(m["sparsity"].get(d) for m in done) for d in DEFINITIONS},
            }
        )
    return sorted(rows, key=lambda row: row["role"] == "control")


def density_map(study: Study, tables: Tables, trials: Sequence[Row]) -> list[Row]:
    """Bitwise density per algorithm, layer and module, over finished runs at their last snapshot.

    Keys: ``algorithm, layer`` (``None`` outside the layers)``, module, density``; controls and
    surrogates are left out.
    """
    runs = {
        t["trial_id"]: (t["algorithm"], t["snapshots"][-1]["step"])
        for t in trials
        if t["role"] not in ("control", "surrogate") and t["snapshots"]
    }
    if not runs:
        return []
    deltas = _in_view(study, tables["tensor_deltas"])
    keys = ["trial_id", "step_after", "layer", "module"]
    counts = ("num_elements", "num_changed_bitwise")
    sums: dict[tuple[str, int | None, str], list[int]] = defaultdict(lambda: [0, 0])
    for row in deltas.group_by(keys).aggregate([(c, "sum") for c in counts]).to_pylist():
        algorithm, last = runs.get(row["trial_id"], (None, None))
        if algorithm is not None and row["step_after"] == last:
            entry = sums[algorithm, row["layer"], row["module"]]
            entry[0] += row["num_changed_bitwise_sum"]
            entry[1] += row["num_elements_sum"]
    return [
        {"algorithm": a, "layer": layer, "module": module, "density": changed / total}
        for (a, layer, module), (changed, total) in sums.items()
        if total
    ]


def in_order(modules: Collection[str]) -> list[str]:
    """Module names in the order of ``definitions.MODULES``, unknown ones last."""
    return [*(m for m in MODULES if m in modules), *sorted(set(modules) - set(MODULES))]


# --- overlaps --------------------------------------------------------------------------------


def overlap_pairs(study: Study, tables: Tables) -> list[Row]:
    """Bitwise overlap of every pair of finished trials: all weights (``module`` None) and modules.

    Each row has ``a`` and ``b`` (rows of the trials table), the counts, ``lift`` (null -> observed
    / expected, ``None`` where nothing is expected) and ``relation``. Pairs come in the order of
    the trials, a before b.
    """
    finished = {t["trial_id"]: t for t in rows_of(tables, "trials") if t["status"] == "finished"}
    rank = {trial: i for i, trial in enumerate(finished)}
    pairs: dict[tuple[str, str, str | None], Row] = {}
    for row in rows_of(tables, "overlaps"):
        ends = [(row["trial_a"], row["num_a"]), (row["trial_b"], row["num_b"])]
        wanted = row["tensor"] is None and row["definition"] == "bitwise"
        if not wanted or row["view"] != study.default_view or any(e[0] not in rank for e in ends):
            continue
        (a, num_a), (b, num_b) = sorted(ends, key=lambda end: rank[end[0]])
        lift = {null: _ratio(row["num_both"], row[f"expected_{null}"]) for null in NULLS}
        own = {"trial_a": a, "trial_b": b, "num_a": num_a, "num_b": num_b, "lift": lift}
        pairs[a, b, row["module"]] = {
            **row,
            **own,
            "a": finished[a],
            "b": finished[b],
            "relation": _relation(finished[a], finished[b]),
        }
    return sorted(pairs.values(), key=lambda p: (rank[p["trial_a"]], rank[p["trial_b"]]))


def _relation(a: Row, b: Row) -> str:
    if {"control", "surrogate"} & {a["role"], b["role"]}:
        return "with a control"
    cell = "same cell" if _cell_key(a) == _cell_key(b) else "other cell"
    return f"{cell}, {'same' if a['seed'] == b['seed'] else 'other'} seed"


def _cell_key(trial: Row) -> tuple[str, str]:
    return trial["algorithm"], trial["cell"] or "{}"


def _ratio(value: float, by: float | None) -> float | None:
    return value / by if by else None


def _lift_to_other_seeds(pairs: Sequence[Row]) -> dict[str, float | None]:
    lifts: dict[str, list[float | None]] = defaultdict(list)
    for pair in pairs:
        if pair["module"] is None and pair["relation"] == "same cell, other seed":
            for side in ("trial_a", "trial_b"):
                lifts[pair[side]].append(pair["lift"]["tensor"])
    return {trial: mean(values) for trial, values in lifts.items()}


def overlap_rows(pairs: Sequence[Row]) -> list[Row]:
    """Overlap of all weights, averaged over the pairs of each two algorithms and relation.

    Keys: ``pair, relation, num_pairs, jaccard, one_sided`` (mean of both sides)``, lift`` (by
    null), ``max_lift`` (the largest that the densities allow under the uniform null). Pairs share
    runs, so no interval is given here: verdicts come from the claims.
    """
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for pair in pairs:
        if pair["module"] is None and pair["relation"] != "with a control":
            names = " \N{MULTIPLICATION SIGN} ".join(
                dict.fromkeys([pair["a"]["algorithm"], pair["b"]["algorithm"]])
            )
            groups[names, pair["relation"]].append(pair)
    return [
        {
            "pair": names,
            "relation": relation,
            "num_pairs": len(members),
            "jaccard": mean(_ratio(p["num_both"], _union(p)) for p in members),
            "one_sided": mean(
                _ratio(p["num_both"], p[side]) for p in members for side in ("num_a", "num_b")
            ),
            "lift": {null: mean(p["lift"][null] for p in members) for null in NULLS},
            "max_lift": mean(
                _ratio(p["num_elements"], max(p["num_a"], p["num_b"])) for p in members
            ),
        }
        for (names, relation), members in sorted(
            groups.items(), key=lambda item: RELATIONS.index(item[0][1])
        )
    ]


def _union(pair: Row) -> int:
    return int(pair["num_a"] + pair["num_b"] - pair["num_both"])


def module_overlap(pairs: Sequence[Row]) -> list[Row]:
    """Mean lift between the seeds of a cell, per algorithm and module (``all`` first)."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for pair in pairs:
        if pair["relation"] == "same cell, other seed":
            groups[pair["a"]["algorithm"], pair["module"] or "all"].append(pair)
    order = ["all", *in_order({module for _, module in groups} - {"all"})]
    rows = [
        {
            "algorithm": algorithm,
            "module": module,
            "lift": {null: mean(p["lift"][null] for p in members) for null in NULLS},
        }
        for (algorithm, module), members in groups.items()
    ]
    return sorted(rows, key=lambda row: order.index(row["module"]))


# --- claims and effects ----------------------------------------------------------------------


def claim_rows(tables: Tables) -> list[Row]:
    """One row per claim: the columns of the claims table, and the ``scale`` of its numbers.

    Scales are ``fraction``, ``odds ratio``, ``density ratio``, ``observed / expected`` and
    ``difference``.
    """
    return [
        {**row, "scale": _claim_scale(row["kind"], row["statistic"] or "")}
        for row in rows_of(tables, "claims")
    ]


def _claim_scale(kind: str, statistic: str) -> str:
    return "difference" if "score_gain" in statistic else SCALES.get(kind, "value")


def effect_rows(tables: Tables) -> list[Row]:
    """One row per effect: the columns of the table, ``within`` parsed, its interval made readable.

    ``shown_scale`` is ``odds ratio``, ``ratio`` or ``difference``; ``shown``, ``shown_low`` and
    ``shown_high`` are the estimate and its interval on it. Bitwise sparsity comes first; an effect
    within the only combination of other factors is its pooled row, and left out.
    """
    effects = rows_of(tables, "effects")
    contrast = itemgetter("response", "factor", "level")
    combinations = Counter(contrast(row) for row in effects if row["within"] != "{}")
    effects = [r for r in effects if r["within"] == "{}" or combinations[contrast(r)] > 1]
    rows = []
    for row in sorted(effects, key=lambda row: not row["response"].startswith("sparsity.bitwise")):
        name = {"log_odds": "odds ratio", "log": "ratio"}.get(row["scale"], "difference")
        back = (lambda value: value) if name == "difference" else _exp
        shown = {
            f"shown{end}": None if row[key] is None else back(row[key])
            for end, key in (("", "estimate"), ("_low", "ci_low"), ("_high", "ci_high"))
        }
        rows.append({**row, "within": parsed(row["within"]), "shown_scale": name, **shown})
    return rows


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
