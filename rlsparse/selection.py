"""Which runs a claim or a factor is about, and which of them are alike but for what is compared.

Seeds are the units: runs of the same seed share prompts and data order.
"""

import itertools
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from rlsparse.errors import TableError
from rlsparse.identity import canonical_json
from rlsparse.levels import Scalar, canonical_path, tags_of, touches
from rlsparse.statistics import Floats
from rlsparse.study import left_out

_COLUMNS = ("role", "control", "seed", "replicate")


class Pair(NamedTuple):
    """Two runs that are alike but for what is compared.

    ``within`` is the JSON of the factors that are held fixed: path -> level label.
    """

    a: str
    b: str
    seed: int
    within: str


def with_configs(trials: pa.Table) -> pd.DataFrame:
    """Table ``trials`` in order of trial_id, with ``config`` and ``cell`` as dictionaries.

    Raises:
        TableError: the column ``config`` is missing.
    """
    if "config" not in trials.column_names:
        raise TableError(
            "table trials lacks the column config (JSON of each resolved configuration); "
            "run the study again to rebuild its tables"
        )
    frame: pd.DataFrame = trials.to_pandas().sort_values("trial_id", ignore_index=True)
    return frame.assign(
        config=[json.loads(text) for text in frame["config"]],
        cell=[json.loads(text) for text in frame["cell"]],
    )


def select(runs: pd.DataFrame, selector: Mapping[str, Scalar], varied: str = "") -> pd.DataFrame:
    """Rows of ``with_configs`` that a claim's selector names, whatever their status.

    Args:
        runs: result of ``with_configs``.
        selector: dotted configuration path (``algorithm`` and ``task`` are short for
            ``algorithm.name`` and ``task.name``) or role, control, seed, replicate -> value.
        varied: the factor that is compared; with the selector it says whether controls and
            surrogates are left out, see ``study.left_out``.
    """
    hidden = left_out(selector, varied)
    keep = [
        row["role"] not in hidden
        and all(value_at(row, path) == (wanted,) for path, wanted in selector.items())
        for row in runs[["config", *_COLUMNS]].to_dict("records")
    ]
    result: pd.DataFrame = runs[np.array(keep, bool)]
    return result


def value_at(row: Mapping[Any, Any], path: str) -> tuple[Any, ...]:
    """The value at ``path`` as a tuple of one; empty if the run does not have it."""
    if path in _COLUMNS:
        return (None if pd.isna(row[path]) else row[path],)
    node: Any = row["config"]
    for part in canonical_path(path).split("."):
        if not isinstance(node, dict) or part not in node:
            return ()
        node = node[part]
    return (node,)


def matched_pairs(
    runs_a: pd.DataFrame,
    runs_b: pd.DataFrame,
    ignoring: Collection[str] = (),
    holding: Collection[str] = (),
) -> list[Pair]:
    """All pairs of finished runs that share the seed and every factor that both have.

    Args:
        runs_a: rows of ``with_configs``.
        runs_b: rows of ``with_configs``.
        ignoring: factors that need not agree; those inside or around them (``algorithm`` for
            ``algorithm.name``) neither.
        holding: paths of the configuration that must agree besides.
    """
    free = {canonical_path(path) for path in ignoring}
    finished = [runs[runs["status"] == "finished"].to_dict("records") for runs in (runs_a, runs_b)]
    pairs = []
    for a, b in itertools.product(*finished):
        if a["seed"] != b["seed"] or a["trial_id"] == b["trial_id"]:
            continue
        if any(value_at(a, path) != value_at(b, path) for path in holding):
            continue
        cell_a, cell_b = (
            {k: v for k, v in run["cell"].items() if not any(touches(k, f) for f in free)}
            for run in (a, b)
        )
        if all(cell_a[path] == cell_b[path] for path in cell_a.keys() & cell_b.keys()):
            within = canonical_json(cell_a | cell_b)
            pairs.append(Pair(a["trial_id"], b["trial_id"], int(a["seed"]), within))
    return pairs


def factor_pairs(runs: pd.DataFrame, factor: str, level: str, reference: str) -> list[Pair]:
    """Matched pairs of runs at ``level`` (a) and ``reference`` (b) of ``factor``, by labels.

    All other factors that both have agree, those inside or around this one too.
    """
    at = np.array([cell.get(factor, "") for cell in runs["cell"]])
    others = [{k: v for k, v in cell.items() if k != factor} for cell in runs["cell"]]
    runs = runs.assign(cell=pd.Series(others, index=runs.index, dtype=object))
    return matched_pairs(runs[at == level], runs[at == reference])


def run_pairs(runs: pd.DataFrame, between: str) -> list[tuple[Any, Any]]:
    """Pairs of runs that differ in ``between`` alone: in the seed, or in a factor at one seed.

    Args:
        runs: rows of ``with_configs`` of finished runs.
        between: ``seed`` or the path of a factor.

    Returns:
        Rows as dictionaries, in order of trial_id within a pair.
    """
    rows: dict[str, Any] = {row["trial_id"]: row for row in runs.to_dict("records")}
    if between == "seed":
        alike = {t: canonical_json({**row["config"], "seed": 0}) for t, row in rows.items()}
        return [
            (rows[a], rows[b])
            for a, b in itertools.combinations(sorted(rows), 2)
            if alike[a] == alike[b] and rows[a]["seed"] != rows[b]["seed"]
        ]
    return [
        (rows[pair.a], rows[pair.b])
        for pair in matched_pairs(runs, runs, [between], tags_of(between))
        if pair.a < pair.b and value_at(rows[pair.a], between) != value_at(rows[pair.b], between)
    ]


def apart(runs: pd.DataFrame, tags: Sequence[str], pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
    """Pairs by what must not be pooled: by algorithm and task, where they are among ``tags``.

    Args:
        runs: the runs that the pairs come from, of any status.
        tags: result of ``levels.tags_of``.
        pairs: pairs whose runs agree in the tags.

    Returns:
        JSON of the tags' values -> pairs; ``{}`` -> pairs if the runs do not differ in the tags.
    """
    values = {
        run["trial_id"]: canonical_json(
            {tag: value for tag in tags for value in value_at(run, tag)}
        )
        for run in runs.to_dict("records")
    }
    groups: dict[str, list[Pair]] = {value: [] for value in sorted(set(values.values()))}
    if len(groups) < 2:
        return {"{}": list(pairs)}
    for pair in pairs:
        groups[values[pair.a]].append(pair)
    return groups


def by_seed(pairs: Sequence[Pair], values: npt.ArrayLike) -> Floats:
    """Mean of the pairs' values within each seed, in order of the seeds.

    Only seeds that have every combination of the factors held fixed count: else a lost run would
    pass for an effect of its cell.

    Args:
        pairs: P matched pairs.
        values: [P]; nan where a value could not be had.
    """
    found: dict[tuple[int, str], list[float]] = {}
    for pair, value in zip(pairs, np.asarray(values, np.float64), strict=True):
        found.setdefault((pair.seed, pair.within), []).append(value)
    seeds, withins = sorted({seed for seed, _ in found}), sorted({within for _, within in found})
    means = [
        np.mean([np.mean(found.get((seed, within), np.nan)) for within in withins])
        for seed in seeds
    ]
    return np.array([mean for mean in means if not np.isnan(mean)], np.float64)
