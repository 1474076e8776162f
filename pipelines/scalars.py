"""The numbers of a trial that a tracker shows: about thirty, each with its step."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from rlsparse.definitions import DEFINITIONS
from rlsparse.overlap import jaccard, kappa, lift
from rlsparse.study import StudyBase

Scalars = list[tuple[str, int, float]]
"""(name, step, value)."""

PER_STEP = (
    "loss", "reward", "kl", "kl_base", "entropy", "grad_norm", "num_tokens", "score",
    "update_sparsity_k1", "ever_changed_fraction",
)  # fmt: skip
FINAL = (
    "score_base", "score_before", "score_after", "score_gain_se", "kl_final", "gate_ratio",
    "num_clipped_steps",
    "patch_bytes", "wall_s", "cpu_s", "peak_bytes",
)  # fmt: skip


def step_scalars(steps: pa.Table) -> Scalars:
    """What a trial logged while it trained.

    Args:
        steps: table of that name, of one trial.
    """
    return [
        (name, row["step"], float(row[name]))
        for row in steps.to_pylist()
        for name in PER_STEP
        if row[name] is not None
    ]


def final_scalars(summary: Mapping[str, float | None], last: int) -> Scalars:
    """What a trial ended with, at its last step."""
    values = ((name, summary.get(name)) for name in FINAL)
    return [(name, last, float(value)) for name, value in values if value is not None]


def measured_scalars(study: StudyBase, tables: Mapping[str, pa.Table]) -> dict[str, Scalars]:
    """Trial -> what its study's tables say of it, in the default view.

    ``sparsity/<definition>`` and ``density/bitwise`` at every snapshot; at the last one
    ``overlap/<measure>_other_seed``: means over the runs of the same cell with another seed, the
    lifts over the nulls tensor and magnitude geometric ones.

    Args:
        study: the study.
        tables: trials, changes and overlaps.
    """
    found: dict[str, Scalars] = defaultdict(list)
    in_view = pc.field("view") == study.default_view
    for row in _counts(tables["changes"].filter(in_view)):
        trial, step, total = row["trial_id"], row["step"], row["num_elements_sum"]
        changed = {name: row[f"num_changed_{name}_sum"] / total for name in DEFINITIONS}
        found[trial] += [(f"sparsity/{name}", step, 1 - x) for name, x in changed.items()]
        found[trial].append(("density/bitwise", step, changed["bitwise"]))
    whole = in_view & pc.field("module").is_null() & pc.field("tensor").is_null()
    overlaps = tables["overlaps"].filter(whole).to_pandas()
    trials = {row["trial_id"]: row for row in tables["trials"].to_pylist()}
    for trial, values in _other_seeds(overlaps, trials).items():
        last = trials[trial]["num_steps"]
        found[trial] += [(f"overlap/{n}_other_seed", last, v) for n, v in values.items()]
    return dict(found)


def _counts(changes: pa.Table) -> list[dict[str, Any]]:
    names = ["num_elements", *(f"num_changed_{definition}" for definition in DEFINITIONS)]
    keys = ["trial_id", "step"]
    sums = changes.group_by(keys).aggregate([(name, "sum") for name in names])
    rows: list[dict[str, Any]] = sums.sort_by([(key, "ascending") for key in keys]).to_pylist()
    return rows


def _other_seeds(
    overlaps: pd.DataFrame, trials: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, float]]:
    """Trial -> measure -> mean over last snapshots of runs that differ in the seed alone."""
    about = pd.DataFrame(
        {
            "cell": [(t["cell"], t["control"], t["replicate"]) for t in trials.values()],
            "last": [t["num_steps"] for t in trials.values()],
        },
        index=list(trials),
    )
    both = overlaps.join(about.add_suffix("_a"), on="trial_a")
    both = both.join(about.add_suffix("_b"), on="trial_b")
    both = both[
        both["cell_a"].eq(both["cell_b"])
        & both["step_a"].eq(both["last_a"])
        & both["step_b"].eq(both["last_b"])
    ]
    counts = both["num_both"], both["num_a"], both["num_b"]
    lifts = {null: lift(counts[0], both[f"expected_{null}"]) for null in ("tensor", "magnitude")}
    with np.errstate(divide="ignore"):
        logs = {f"lift_{null}": np.log(values) for null, values in lifts.items()}
    measures = pd.DataFrame(
        {"jaccard": jaccard(*counts), "kappa": kappa(*counts, both["num_elements"]), **logs},
        index=both.index,
    )
    sides = [measures.assign(trial=both[f"trial_{side}"]) for side in "ab"]
    means = pd.concat(sides).groupby("trial").mean()
    means[list(logs)] = np.exp(means[list(logs)])
    rows = means.to_dict("index").items()
    return {str(t): {str(n): float(v) for n, v in row.items() if v == v} for t, row in rows}
