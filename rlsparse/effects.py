"""How factors move responses: selection and matching of runs, contrasts, intervals, corrections.

The unit of analysis is the seed: runs of the same seed share prompts and data order, so their
differences are averaged first and the intervals are over seeds. Responses that are fractions are
compared as log odds, with the continuity (k + .5) / (n + 1) that keeps empty and full cells finite
and shrinks as n grows.
"""

import itertools
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from rlsparse import tables
from rlsparse.config import canonical_json
from rlsparse.definitions import DEFINITIONS
from rlsparse.errors import TableError
from rlsparse.statistics import (
    CI_LEVEL,
    Floats,
    holm,
    log_density,
    log_odds,
    sign_flip,
    sign_flip_floor,
    t_interval,
)
from rlsparse.study import At, Scalar, Study, level_label, reference_level

_COLUMNS = ("role", "control", "seed", "replicate")


# --- responses ---------------------------------------------------------------------------------


def responses(
    trials: pa.Table, steps: pa.Table, tensor_deltas: pa.Table, view_default: str
) -> pd.DataFrame:
    """All responses of all runs at all their snapshots, in long form.

    Args:
        trials: table of that name.
        steps: table of that name.
        tensor_deltas: table of that name.
        view_default: the view whose responses come first.

    Returns:
        One row per response, trial and step: trial_id, response
        (``sparsity.<definition>@<view>``, ``score_after``, ``score_gain``), step, value, numerator
        and n (weights changed of all; problems solved of all; null for score_gain), last (whether
        the step is the trial's last). Sorted, so that the order of input rows does not matter.
    """
    about = trials.select(["trial_id", "num_steps", "score_before", "num_eval_problems"])
    runs = about.to_pandas().set_index("trial_id")
    counts = [f"num_changed_{name}" for name in DEFINITIONS]
    keys = ["trial_id", "view", "step_after"]
    sums = (
        tensor_deltas.group_by(keys, use_threads=False)
        .aggregate([(name, "sum") for name in ["num_elements", *counts]])
        .to_pandas()
    )
    parts = []
    for definition, count in zip(DEFINITIONS, counts, strict=True):
        part = sums[["trial_id"]].assign(
            response=f"sparsity.{definition}@" + sums["view"],
            step=sums["step_after"],
            numerator=sums[f"{count}_sum"].astype(np.float64),
            n=sums["num_elements_sum"].astype(np.float64),
        )
        parts.append(part.assign(value=(part["n"] - part["numerator"]) / part["n"]))
    scores = _scores(trials, steps)
    n = scores["trial_id"].map(runs["num_eval_problems"]).astype(np.float64)
    scores = scores.assign(n=n, numerator=(scores["value"] * n).round())
    before = scores["trial_id"].map(runs["score_before"]).astype(np.float64)
    gain = scores.assign(value=scores["value"] - before, numerator=np.nan, n=np.nan)
    frame = pd.concat(
        [*parts, scores.assign(response="score_after"), gain.assign(response="score_gain")]
    ).dropna(subset=["value"])
    last = frame["step"] == frame["trial_id"].map(runs["num_steps"]).astype(np.float64)
    later = frame["response"].str.contains("@") & ~frame["response"].str.endswith(
        f"@{view_default}"
    )
    frame = frame.assign(last=last, later=later).sort_values(
        ["later", "response", "trial_id", "step"], ignore_index=True
    )
    result: pd.DataFrame = frame[
        ["trial_id", "response", "step", "value", "numerator", "n", "last"]
    ]
    return result


def _scores(trials: pa.Table, steps: pa.Table) -> pd.DataFrame:
    """trial_id, step, value: scores along training, and the one after it."""
    along = steps.select(["trial_id", "step", "score"]).to_pandas().dropna(subset=["score"])
    after = trials.select(["trial_id", "num_steps", "score_after"]).to_pandas()
    names = ["trial_id", "step", "value"]
    both: pd.DataFrame = pd.concat([frame.set_axis(names, axis=1) for frame in (along, after)])
    return both.dropna(subset=["value"]).drop_duplicates(["trial_id", "step"], keep="last")


def scaled(frame: pd.DataFrame) -> Floats:
    """Values of rows of ``responses`` on the scale of their contrasts.

    Log odds of sparsity and of score_after (nan where the number of problems is not known);
    score_gain as it is.
    """
    sign = np.where(frame["response"].str.startswith("sparsity."), -1.0, 1.0)
    odds = sign * log_odds(frame["numerator"], frame["n"])
    return np.where(frame["response"] == "score_gain", frame["value"].to_numpy(np.float64), odds)


def snapshots(frame: pd.DataFrame, trial_id: str, response: str) -> pd.DataFrame:
    """Snapshots of one run: step, log_density (nan at step 0), score (nan where not scored).

    Args:
        frame: result of ``responses``.
        trial_id: the run.
        response: a sparsity response.
    """
    ours = frame[frame["trial_id"] == trial_id]
    counted = ours[ours["response"] == response]
    scored = ours[ours["response"] == "score_after"]
    density = log_density(counted["numerator"], counted["n"])
    columns = {
        "log_density": dict(zip(counted["step"], density, strict=True)),
        "score": dict(zip(scored["step"], scored["value"], strict=True)),
    }
    steps = sorted({step for column in columns.values() for step in column})
    values = {
        name: np.array([column.get(step, np.nan) for step in steps], np.float64)
        for name, column in columns.items()
    }
    return pd.DataFrame({"step": np.array(steps, np.int64), **values})


def density_at(run: pd.DataFrame, at: At | None) -> tuple[float | None, str]:
    """Log density of a run at a step, at a score, or at its last snapshot.

    At a score it is interpolated linearly in the score between the two snapshots where the score
    first reaches the value. Before the first snapshot there is nothing to interpolate from: the
    density at step 0 is zero.

    Args:
        run: result of ``snapshots``.
        at: where; the last snapshot when None. ``score: common`` must have been resolved, see
            ``common_score``.

    Returns:
        The log density and "", or None and why there is none.
    """
    steps, level, score = (run[name].to_numpy() for name in ("step", "log_density", "score"))
    measured = np.flatnonzero(~np.isnan(level))
    if measured.size == 0:
        return None, "nothing measured"
    if at is None:
        return float(level[measured[-1]]), ""
    if at.step is not None:
        here = measured[steps[measured] == at.step]
        if here.size == 0:
            listed = ", ".join(str(step) for step in steps[measured])
            return None, f"no snapshot at step {at.step}; there are {listed}"
        return float(level[here[0]]), ""
    if not isinstance(at.score, float):
        return None, f"the score {at.score!r} is not a number"
    level, score = level[~np.isnan(score)], score[~np.isnan(score)]
    reached = np.flatnonzero(score >= at.score)
    if reached.size == 0:
        return None, f"score {at.score:.4g} is not reached"
    first = reached[0]
    if score[first] == at.score and not np.isnan(level[first]):
        return float(level[first]), ""
    if first == 0 or np.isnan(level[first - 1 : first + 1]).any():
        return None, f"score {at.score:.4g} is reached before the first snapshot; take earlier ones"
    share = (at.score - score[first - 1]) / (score[first] - score[first - 1])
    return float(level[first - 1] + share * (level[first] - level[first - 1])), ""


def common_score(run_a: pd.DataFrame, run_b: pd.DataFrame) -> float:
    """Highest score that both runs (results of ``snapshots``) reach; nan if one has no score."""
    return float(np.minimum(run_a["score"].max(), run_b["score"].max()))


# --- selecting and matching --------------------------------------------------------------------


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


def select(runs: pd.DataFrame, selector: Mapping[str, Scalar]) -> pd.DataFrame:
    """Rows of ``with_configs`` that a claim's selector names, whatever their status.

    Keys are dotted configuration paths (``algorithm`` is short for ``algorithm.name``) or role,
    control, seed, replicate. Controls are left out unless role, control or replicate is a key.
    """
    asked = {"role", "control", "replicate"} & set(selector)
    keep = [
        (bool(asked) or row["role"] != "control")
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


def canonical_path(path: str) -> str:
    """``algorithm`` as ``algorithm.name``; other paths as they are."""
    return "algorithm.name" if path == "algorithm" else path


def matched_pairs(
    runs_a: pd.DataFrame, runs_b: pd.DataFrame, ignoring: Collection[str] = ()
) -> list[Pair]:
    """All pairs of finished runs that share the seed and every factor that both have.

    Args:
        runs_a: rows of ``with_configs``.
        runs_b: rows of ``with_configs``.
        ignoring: factors that need not agree; those inside or around them (``algorithm`` for
            ``algorithm.name``) neither.
    """
    free = {canonical_path(path) for path in ignoring}
    finished = [runs[runs["status"] == "finished"].to_dict("records") for runs in (runs_a, runs_b)]
    pairs = []
    for a, b in itertools.product(*finished):
        if a["seed"] != b["seed"] or a["trial_id"] == b["trial_id"]:
            continue
        cell_a, cell_b = (
            {k: v for k, v in run["cell"].items() if not _touches(k, free)} for run in (a, b)
        )
        if all(cell_a[path] == cell_b[path] for path in cell_a.keys() & cell_b.keys()):
            within = canonical_json(cell_a | cell_b)
            pairs.append(Pair(a["trial_id"], b["trial_id"], int(a["seed"]), within))
    return pairs


def _touches(path: str, free: Collection[str]) -> bool:
    return any(path == f or path.startswith(f"{f}.") or f.startswith(f"{path}.") for f in free)


def factor_pairs(runs: pd.DataFrame, factor: str, level: str, reference: str) -> list[Pair]:
    """Matched pairs of runs at ``level`` (a) and ``reference`` (b) of ``factor``, by labels."""
    at = np.array([cell.get(factor, "") for cell in runs["cell"]])
    return matched_pairs(runs[at == level], runs[at == reference], [factor])


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


# --- effects -----------------------------------------------------------------------------------


def effects(study: Study, trials: pa.Table, frame: pd.DataFrame) -> pa.Table:
    """What each level of each factor does against its reference, matched by seed.

    Rows are per response, factor, level and combination of the other factors (``within``), and
    pooled over these (``within`` = ``{}``: differences averaged within a seed first). Intervals are
    Student t over seeds at 95 %, p values exact sign flips, adjusted by Holm within a response and
    factor; a pooled row over a single combination is the same test and counts once. The control
    lr_times_3 is the factor ``control.lr_times_3``.

    Args:
        study: the study; gives factors and reference levels.
        trials: table of that name, with the column ``config``.
        frame: result of ``responses``; only last snapshots are used.

    Returns:
        Table ``effects`` with the further column p_floor. ``num_runs`` counts seeds; a level
        without any pair has a pooled row with num_runs 0.
    """
    runs = with_configs(trials)
    plain = runs[runs["role"] != "control"]
    families: dict[str, list[tuple[str, str, list[Pair]]]] = {}
    for factor, levels in study.factors.items():
        reference = reference_level(study, factor)
        families[factor] = [
            (level, reference, factor_pairs(plain, factor, level, reference))
            for level in dict.fromkeys(level_label(level) for level in levels)
            if level != reference
        ]
    if "lr_times_3" in study.controls:
        pairs = control_pairs(runs)
        families["control.lr_times_3"] = [("lr_times_3", "none", pairs)]
    last = frame[frame["last"]]
    rows: list[dict[str, object]] = []
    for response, of_response in last.groupby("response", sort=False):
        values = dict(zip(of_response["trial_id"], scaled(of_response), strict=True))
        scale = "identity" if response == "score_gain" else "log_odds"
        for factor, contrasts in families.items():
            shared = {"response": response, "factor": factor, "scale": scale}
            rows += [shared | row for row in _family(contrasts, values)]
    return tables.from_rows(rows, "effects")


def control_pairs(runs: pd.DataFrame) -> list[Pair]:
    """Matched pairs of the lr_times_3 controls (a) and the runs that they vary (b)."""
    return matched_pairs(runs[runs["control"] == "lr_times_3"], runs[runs["role"] != "control"])


def _family(
    contrasts: list[tuple[str, str, list[Pair]]], values: Mapping[str, float]
) -> Iterator[dict[str, object]]:
    """Rows of one response and factor."""
    rows: list[dict[str, object]] = []
    for level, reference, pairs in contrasts:
        groups = {within: [p for p in pairs if p.within == within] for _, _, _, within in pairs}
        if len(groups) != 1:
            groups["{}"] = pairs
        for within, group in sorted(groups.items()):
            nan = float("nan")
            gaps = [values.get(p.a, nan) - values.get(p.b, nan) for p in group]
            row: dict[str, object] = {"level": level, "reference": reference, "within": within}
            rows.append(row | _contrast(by_seed(group, gaps)))
    adjusted = holm([row["p_value"] for row in rows])  # type: ignore[arg-type]
    for row, p in zip(rows, adjusted, strict=True):
        row["p_adjusted"] = p
        yield row
        alone = [other["within"] for other in rows if other["level"] == row["level"]]
        if alone == [row["within"]] and row["within"] != "{}":
            yield row | {"within": "{}"}


def _contrast(differences: Floats) -> dict[str, object]:
    mean, low, high = t_interval(differences)
    return {
        "method": "matched by seed, t interval, exact sign flips",
        "estimate": float(mean),
        "ci_low": float(low),
        "ci_high": float(high),
        "ci_level": CI_LEVEL,
        "p_value": sign_flip(differences),
        "p_floor": sign_flip_floor(differences.size),
        "num_runs": differences.size,
    }
