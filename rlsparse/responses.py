"""What was measured of each run, as numbers to compare: sparsity, score, distance from the base.

Fractions are compared as log odds, with the continuity (k + .5) / (n + 1) that keeps empty and full
runs finite and shrinks as n grows.
"""

import numpy as np
import pandas as pd
import pyarrow as pa

from rlsparse.claim_config import At
from rlsparse.definitions import DEFINITIONS
from rlsparse.statistics import Floats, log_density, log_odds


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
