"""What was measured of each run, as numbers to compare: sparsity, score, distance from the base.

Fractions are compared as log odds, with the continuity (k + .5) / (n + 1) that keeps empty and full
runs finite and shrinks as n grows.
"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from rlsparse.claim_config import At
from rlsparse.definitions import DEFINITIONS
from rlsparse.statistics import Floats, log_density, log_odds

Scale = Literal["log_odds", "log", "identity"]
Run = pd.DataFrame | Mapping[str, npt.NDArray[Any]]
"""Result of ``snapshots``, or its columns: a study's claims read very many of them."""

FAILED, VALIDATION = "failed", "score_validation"
_SCALES: dict[str, Scale] = {"score_gain": "identity", FAILED: "identity", "kl_final": "log"}
_ENDED = {"finished": 0.0, "failed": 1.0}
_COLUMNS = ["trial_id", "response", "step", "value", "numerator", "n", "last"]


def responses(
    trials: pa.Table, steps: pa.Table, changes: pa.Table, view_default: str
) -> pd.DataFrame:
    """All responses of all runs at all their snapshots, in long form.

    Args:
        trials: table of that name.
        steps: table of that name.
        changes: table of that name.
        view_default: the view whose responses come first.

    Returns:
        One row per response, trial and step: trial_id, response
        (``sparsity.<definition>@<view>``, ``score_after``, ``score_gain``, ``score_validation``: of
        the validation split, after the last step; ``kl_final``: KL to the base in nats per token;
        ``failed``: 1 or 0 per trial that has ended), step, value, numerator and n (weights changed
        of all; problems solved of all; null for score_gain and kl_final), last (whether the step is
        the trial's last). Sorted, so that the order of input rows does not matter.
    """
    runs = trials.to_pandas().set_index("trial_id")
    scores = _along(runs, steps, "score", "score_after")
    kl = _along(runs, steps, "kl_base", "kl_final")
    scores = _counted(scores, runs["num_eval_problems"])
    validation = runs.reset_index()[["trial_id", "num_steps", VALIDATION]].dropna()
    validation = validation.set_axis(["trial_id", "step", "value"], axis=1)
    before = scores["trial_id"].map(runs["score_before"]).astype(np.float64)
    gain = scores.assign(value=scores["value"] - before, numerator=np.nan, n=np.nan)
    end = runs.index.to_series().map(runs["num_steps"]).astype(np.float64)
    failed = runs["status"].map(_ENDED).astype(np.float64)
    failures = pd.DataFrame({"trial_id": runs.index, "step": end.fillna(0), "value": failed})
    frame = pd.concat(
        [
            *_sparsities(changes),
            scores.assign(response="score_after"),
            gain.assign(response="score_gain"),
            _counted(validation, runs["num_validation_problems"]).assign(response=VALIDATION),
            kl.assign(response="kl_final"),
            failures.assign(response=FAILED, numerator=failed, n=1.0),
        ]
    ).dropna(subset=["value"])
    last = (frame["step"] == frame["trial_id"].map(end)) | (frame["response"] == FAILED)
    later = frame["response"].str.contains("@") & ~frame["response"].str.endswith(
        f"@{view_default}"
    )
    frame = frame.assign(last=last, later=later, step=frame["step"].astype(np.int64))
    frame = frame.sort_values(["later", "response", "trial_id", "step"], ignore_index=True)
    result: pd.DataFrame = frame[_COLUMNS]
    return result


def _counted(scores: pd.DataFrame, num_problems: pd.Series) -> pd.DataFrame:
    """Scores with the problems that they are of (n) and those solved (numerator), by trial."""
    n = scores["trial_id"].map(num_problems).astype(np.float64)
    return scores.assign(n=n, numerator=(scores["value"] * n).round())


def _sparsities(changes: pa.Table) -> list[pd.DataFrame]:
    """Sums of ``changes`` over layers and modules, one frame per definition."""
    counts = [f"num_changed_{name}" for name in DEFINITIONS]
    sums = (
        changes.group_by(["trial_id", "view", "step"], use_threads=False)
        .aggregate([(name, "sum") for name in ["num_elements", *counts]])
        .to_pandas()
    )
    n = sums["num_elements_sum"].astype(np.float64)
    parts = []
    for definition, count in zip(DEFINITIONS, counts, strict=True):
        changed = sums[f"{count}_sum"].astype(np.float64)
        part = sums[["trial_id", "step"]].assign(
            response=f"sparsity.{definition}@" + sums["view"], numerator=changed, n=n
        )
        parts.append(part.assign(value=(n - changed) / n))
    return parts


def _along(runs: pd.DataFrame, steps: pa.Table, column: str, last: str) -> pd.DataFrame:
    """trial_id, step, value: a column of ``steps``, and one of ``trials`` that holds the end."""
    along = steps.select(["trial_id", "step", column]).to_pandas()
    after = runs.reset_index()[["trial_id", "num_steps", last]]
    both: pd.DataFrame = pd.concat(
        part.set_axis(["trial_id", "step", "value"], axis=1).dropna().astype({"value": np.float64})
        for part in (along, after)
    )
    return both.drop_duplicates(["trial_id", "step"], keep="last")


def scale_of(response: str) -> Scale:
    """Scale on which a response of ``responses`` is compared."""
    return _SCALES.get(response, "log_odds")


def scaled(frame: pd.DataFrame) -> Floats:
    """Values of rows of ``responses`` on the scale of their contrasts, see ``scale_of``.

    Log odds of sparsity, score_after and score_validation (nan where the number of problems is not
    known); log of kl_final (nan where it is not above 0, as a sampled KL may be); score_gain and
    failed as they are.
    """
    values = frame["value"].to_numpy(np.float64)
    sign = np.where(frame["response"].str.startswith("sparsity."), -1.0, 1.0)
    odds = sign * log_odds(frame["numerator"], frame["n"])
    logs = np.log(np.where(values > 0, values, np.nan))
    scales = frame["response"].map(scale_of).to_numpy()
    return np.select([scales == "identity", scales == "log"], [values, logs], odds)


def snapshots(frame: pd.DataFrame, trial_id: str, response: str) -> pd.DataFrame:
    """Snapshots of one run: step, log_density, score, kl (to the base); nan where not measured.

    log_density is nan at step 0, where kl is 0 by definition if the run has any.

    Args:
        frame: result of ``responses``.
        trial_id: the run.
        response: a sparsity response.
    """
    ours = frame[frame["trial_id"] == trial_id]
    found = {
        name: ours[ours["response"] == of]
        for name, of in [("log_density", response), ("score", "score_after"), ("kl", "kl_final")]
    }
    columns = {
        name: dict(zip(rows["step"], rows["value"], strict=True)) for name, rows in found.items()
    }
    counted = found["log_density"]
    density = log_density(counted["numerator"], counted["n"])
    columns["log_density"] = dict(zip(counted["step"], density, strict=True))
    if columns["kl"]:
        columns["kl"][0] = 0.0
    steps = sorted({step for column in columns.values() for step in column})
    values = {
        name: np.array([column.get(step, np.nan) for step in steps], np.float64)
        for name, column in columns.items()
    }
    return pd.DataFrame({"step": np.array(steps, np.int64), **values})


def density_at(run: Run, at: At | None) -> tuple[float | None, str]:
    """Log density of a run at a step, at a score, at a KL to the base, or at its last snapshot.

    At a score or a KL it is interpolated linearly in these between the two snapshots where they
    first reach the value. Before the first snapshot there is nothing to interpolate from: the
    density at step 0 is zero.

    Args:
        run: result of ``snapshots``, or its columns.
        at: where; the last snapshot when None. ``common`` must have been resolved, see ``common``.

    Returns:
        The log density and "", or None and why there is none.
    """
    steps, level = (np.asarray(run[name]) for name in ("step", "log_density"))
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
    what, wanted = ("score", at.score) if at.score is not None else ("kl", at.kl)
    if not isinstance(wanted, float):
        return None, f"the {what} {wanted!r} is not a number"
    return _at_first(run, what, wanted)


def _at_first(run: Run, what: str, wanted: float) -> tuple[float | None, str]:
    """Log density where the column ``what`` first reaches a value; see ``density_at``."""
    level, reading = (np.asarray(run[name]) for name in ("log_density", what))
    level, reading = level[~np.isnan(reading)], reading[~np.isnan(reading)]
    reached = np.flatnonzero(reading >= wanted)
    if reached.size == 0:
        return None, f"{what} {wanted:.4g} is not reached"
    first = reached[0]
    if reading[first] == wanted and not np.isnan(level[first]):
        return float(level[first]), ""
    if first == 0 or np.isnan(level[first - 1 : first + 1]).any():
        return None, f"{what} {wanted:.4g} is reached before the first snapshot; take earlier ones"
    share = (wanted - reading[first - 1]) / (reading[first] - reading[first - 1])
    return float(level[first - 1] + share * (level[first] - level[first - 1])), ""


def common(run_a: Run, run_b: Run, what: Literal["score", "kl"]) -> float:
    """Highest score or KL that both runs (results of ``snapshots``) reach; nan if one has none."""
    highest = [np.fmax.reduce(np.asarray(run[what]), initial=np.nan) for run in (run_a, run_b)]
    return float(np.minimum(*highest))
