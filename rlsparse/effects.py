"""How factors move responses: contrasts between matched runs, intervals, corrections.

The unit of analysis is the seed: runs of the same seed share prompts and data order, so their
differences are averaged first and the intervals are over seeds. Responses that are fractions are
compared as log odds, with the continuity (k + .5) / (n + 1) that keeps empty and full cells finite
and shrinks as n grows.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd
import pyarrow as pa

from rlsparse import tables
from rlsparse.definitions import DEFINITIONS
from rlsparse.levels import level_label, tags_of
from rlsparse.selection import Pair, apart, by_seed, factor_pairs, matched_pairs, with_configs
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
from rlsparse.study import At, Study, left_out, reference_level

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


# --- effects -----------------------------------------------------------------------------------

_Contrast = tuple[str, str, dict[str, list[Pair]]]
"""Level, reference, and the pairs by what holds for all of them (see ``selection.apart``)."""


def effects(study: Study, trials: pa.Table, frame: pd.DataFrame) -> pa.Table:
    """What each level of each factor does against its reference, matched by seed.

    Rows are per response, factor, level and combination of the other factors (``within``), and
    pooled over these (``within`` = ``{}``: differences averaged within a seed first). Fields of
    algorithms and of tasks are not pooled over several of these, whose fields of one name are
    different things: such rows are within ``{"algorithm.name": ...}``. Intervals are
    Student t over seeds at 95 %, p values exact sign flips, adjusted by Holm within a response and
    factor; a pooled row over a single combination is the same test and counts once. The control
    lr_times_3 is the factor ``control.lr_times_3``. Surrogates are compared only where the reward
    is the factor.

    Args:
        study: the study; gives factors and reference levels.
        trials: table of that name, with the column ``config``.
        frame: result of ``responses``; only last snapshots are used.

    Returns:
        Table ``effects`` with the further column p_floor. ``num_runs`` counts seeds; a level
        without any pair has a pooled row with num_runs 0.
    """
    runs = with_configs(trials)
    families: dict[str, list[_Contrast]] = {}
    for factor, levels in study.factors.items():
        reference = reference_level(study, factor)
        having = [factor in cell for cell in runs["cell"]]
        plain = runs[np.array(having, bool) & ~runs["role"].isin(left_out((), factor))]
        families[factor] = [
            (level, reference, apart(plain, tags_of(factor), pairs))
            for level in dict.fromkeys(level_label(level) for level in levels)
            if level != reference
            for pairs in [factor_pairs(plain, factor, level, reference)]
        ]
    if "lr_times_3" in study.controls:
        families["control.lr_times_3"] = [("lr_times_3", "none", {"{}": control_pairs(runs)})]
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
    plain = runs[~runs["role"].isin(left_out(()))]
    return matched_pairs(runs[runs["control"] == "lr_times_3"], plain)


def _family(contrasts: list[_Contrast], values: Mapping[str, float]) -> Iterator[dict[str, object]]:
    """Rows of one response and factor."""
    rows: list[dict[str, object]] = []
    same: list[str | None] = []  # within of the pooled row that is the same test
    for level, reference, groups in contrasts:
        for pooled, pairs in groups.items():
            parts = {w: [p for p in pairs if p.within == w] for w in {p.within for p in pairs}}
            single = next(iter(parts)) if len(parts) == 1 else pooled
            parts |= {pooled: pairs} if single == pooled else {}
            for within, part in sorted(parts.items()):
                nan = float("nan")
                gaps = [values.get(p.a, nan) - values.get(p.b, nan) for p in part]
                row: dict[str, object] = {"level": level, "reference": reference, "within": within}
                rows.append(row | _contrast(by_seed(part, gaps)))
                same.append(pooled if single != pooled else None)
    adjusted = holm([row["p_value"] for row in rows])  # type: ignore[arg-type]
    for row, p, pooled_within in zip(rows, adjusted, same, strict=True):
        row["p_adjusted"] = p
        yield row
        if pooled_within is not None:
            yield row | {"within": pooled_within}


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
