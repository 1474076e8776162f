"""Which runs a claim or a factor is about, and which of them are alike but for what is compared.

Seeds are the units: runs of the same seed share prompts and data order.
"""

import itertools
import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from rlsparse.errors import TableError
from rlsparse.identity import canonical_json
from rlsparse.levels import MASK, Scalar, canonical_path, level_label, tags_of, touches
from rlsparse.statistics import Floats
from rlsparse.study import StudyBase, left_out

_COLUMNS = ("role", "control", "seed", "replicate")
FINISHED = ("finished",)
ENDED = ("finished", "failed")
_RATE = "train.learning_rate"


class Pair(NamedTuple):
    """Two runs that are alike but for what is compared.

    ``within`` is the JSON of the factors that are held fixed: path -> level label.
    """

    a: str
    b: str
    seed: int
    within: str


class Contrast(NamedTuple):
    """A level against its reference, with the pairs by what holds for all (see ``apart``)."""

    level: str
    reference: str
    groups: dict[str, list[Pair]]


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
    matches = [
        all(value_at(row, path) == (wanted,) for path, wanted in selector.items())
        for row in runs[["config", *_COLUMNS]].to_dict("records")
    ]
    result: pd.DataFrame = runs[np.array(matches, bool) & _asked(runs, selector, varied)]
    return result


def _asked(runs: pd.DataFrame, asked: Collection[str], varied: str = "") -> npt.NDArray[np.bool_]:
    """Which runs a comparison is about; the arguments are those of ``study.left_out``.

    Surrogates that a control added bear the label of the cell that they vary, unless the reward is
    a label: they have no place where algorithms are compared by label.
    """
    keep = ~runs["role"].isin(left_out(asked, varied)).to_numpy()
    if varied == "algorithm" and "surrogate" in left_out(asked):
        unlabelled = np.array(["algorithm.reward" not in cell for cell in runs["cell"]], bool)
        added = (runs["role"] == "surrogate") & runs["control"].notna()
        keep &= ~(unlabelled & added.to_numpy())
    result: npt.NDArray[np.bool_] = keep
    return result


def value_at(row: Mapping[Any, Any], path: str) -> tuple[Any, ...]:
    """The value at ``path`` as a tuple of one; empty if the run does not have it.

    Of a mask it is the label, such as ``random(final)``.
    """
    if path in _COLUMNS:
        return (None if pd.isna(row[path]) else row[path],)
    node: Any = row["config"]
    for part in canonical_path(path).split("."):
        if not isinstance(node, dict) or part not in node:
            return ()
        node = node[part]
    return (level_label(node) if canonical_path(path) == MASK and node is not None else node,)


def matched_pairs(
    runs_a: pd.DataFrame,
    runs_b: pd.DataFrame,
    ignoring: Collection[str] = (),
    holding: Collection[str] = (),
    statuses: Collection[str] = FINISHED,
) -> list[Pair]:
    """All pairs of runs that share the seed and every factor that both have.

    Args:
        runs_a: rows of ``with_configs``.
        runs_b: rows of ``with_configs``.
        ignoring: factors that need not agree; those inside or around them (``algorithm`` for
            ``algorithm.name``) neither.
        holding: paths of the configuration that must agree besides.
        statuses: of the runs that take part.
    """
    free = {canonical_path(path) for path in ignoring}
    sides = []
    for runs in (runs_a, runs_b):
        rows = runs[runs["status"].isin(statuses)].to_dict("records")
        cells = [
            {k: v for k, v in row["cell"].items() if not any(touches(k, f) for f in free)}
            for row in rows
        ]
        held = [
            canonical_json([row["seed"], *(value_at(row, path) for path in holding)])
            for row in rows
        ]
        sides.append(list(zip(rows, cells, held, strict=True)))
    alike: dict[str, list[tuple[dict[Any, Any], dict[str, str]]]] = {}
    for b, cell_b, held_b in sides[1]:
        alike.setdefault(held_b, []).append((b, cell_b))
    return [
        Pair(a["trial_id"], b["trial_id"], int(a["seed"]), canonical_json(cell_a | cell_b))
        for a, cell_a, held_a in sides[0]
        for b, cell_b in alike.get(held_a, ())
        if a["trial_id"] != b["trial_id"]
        and all(cell_a[path] == cell_b[path] for path in cell_a.keys() & cell_b.keys())
    ]


def factor_pairs(
    runs: pd.DataFrame,
    factor: str,
    level: str,
    reference: str,
    statuses: Collection[str] = FINISHED,
) -> list[Pair]:
    """Matched pairs of runs at ``level`` (a) and ``reference`` (b) of ``factor``, by labels.

    All other factors that both have agree, those inside or around this one too.
    """
    at = np.array([cell.get(factor, "") for cell in runs["cell"]])
    others = [{k: v for k, v in cell.items() if k != factor} for cell in runs["cell"]]
    runs = runs.assign(cell=pd.Series(others, index=runs.index, dtype=object))
    return matched_pairs(runs[at == level], runs[at == reference], statuses=statuses)


def control_pairs(
    study: StudyBase, runs: pd.DataFrame, statuses: Collection[str] = FINISHED
) -> list[Pair]:
    """Matched pairs of the lr_times_3 controls (a) and the runs that they vary (b).

    A control whose learning rate is a level of the grid is no run of its own: there the runs at
    three times the rate of the baseline serve, or, where they are not in the grid, of any cell.
    """
    plain = runs[_asked(runs, ())]
    controls = runs[runs["control"] == "lr_times_3"]
    if len(controls) or "lr_times_3" not in study.controls:
        return matched_pairs(controls, plain, statuses=statuses)
    pairs = matched_pairs(plain, plain, [_RATE], tags_of(_RATE), statuses)
    rates = {row["trial_id"]: value_at(row, _RATE) for row in plain.to_dict("records")}
    threefold = [p for p in pairs if rates[p.b] and _is_threefold(*rates[p.a], *rates[p.b])]
    baseline = set(plain.loc[plain["role"] == "baseline", "trial_id"])
    return [pair for pair in threefold if pair.b in baseline] or threefold


def _is_threefold(rate: float, of: float) -> bool:
    return of > 0 and math.isclose(rate, 3 * of, rel_tol=1e-9)


def having(runs: pd.DataFrame, factor: str) -> pd.DataFrame:
    """Runs that have a factor, without controls, and surrogates only if it is the reward."""
    has = np.array([factor in cell for cell in runs["cell"]], bool)
    result: pd.DataFrame = runs[has & _asked(runs, (), factor)]
    return result


def contrasts(
    study: StudyBase, runs: pd.DataFrame, statuses: Collection[str] = FINISHED
) -> dict[str, list[Contrast]]:
    """Each level of each factor against its reference; ``control.lr_times_3`` is a factor too.

    Args:
        study: gives factors and reference levels.
        runs: result of ``with_configs``.
        statuses: of the runs that take part.
    """
    found: dict[str, list[Contrast]] = {}
    for factor, levels in study.factors.items():
        reference = study.reference_level(factor)
        plain = having(runs, factor)
        found[factor] = [
            Contrast(level, reference, apart(plain, tags_of(factor), pairs))
            for level in dict.fromkeys(level_label(level) for level in levels)
            if level != reference
            for pairs in [factor_pairs(plain, factor, level, reference, statuses)]
        ]
    if "lr_times_3" in study.controls:
        pairs = control_pairs(study, runs, statuses)
        found["control.lr_times_3"] = [Contrast("lr_times_3", "none", {"{}": pairs})]
    return found


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
    if not tags:
        return {"{}": list(pairs)}
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


def seed_means(pairs: Sequence[Pair], values: npt.ArrayLike) -> Floats:
    """Mean of the pairs' values within each seed: first within, then over what is held fixed.

    nan in seeds that lack a combination of the factors held fixed: else a lost run would pass for
    an effect of its cell.

    Args:
        pairs: P matched pairs.
        values: [P, ...]; nan where a value could not be had.

    Returns:
        [seeds, ...], in order of the seeds.
    """
    array = np.asarray(values, np.float64)
    if not pairs:
        return np.empty(array.shape)
    seeds, seed_of = np.unique([pair.seed for pair in pairs], return_inverse=True)
    withins, within_of = np.unique([pair.within for pair in pairs], return_inverse=True)
    shape = (seeds.size, withins.size)
    sums, counts = np.zeros((*shape, *array.shape[1:])), np.zeros(shape)
    np.add.at(sums, (seed_of, within_of), array)
    np.add.at(counts, (seed_of, within_of), 1)
    counts = np.where(counts > 0, counts, np.nan).reshape(shape + (1,) * (array.ndim - 1))
    means: Floats = (sums / counts).mean(axis=1)
    return means


def by_seed(pairs: Sequence[Pair], values: npt.ArrayLike) -> Floats:
    """``seed_means`` of ``values`` [P] in the seeds that have all."""
    means = seed_means(pairs, values)
    return means[~np.isnan(means)]
