"""Rows of what the probe saw between the snapshots, by cell, and of what it cost."""

from collections.abc import Sequence

import pandas as pd

from rlsparse.definitions import PROBE_PARTS, VIEWS
from rlsparse.report.rows import Row, Tables

SPLIT = {
    "untouched": "Untouched",
    "cancelled": "Cancelled",
    "final": "Final",
    "cancelled_of_ever": "Cancelled, of ever changed",
}
CASTS = {f"changed_fraction_{view}": view for view in VIEWS if view != "stored"}
GATE = {
    "gradient_nonzero_fraction": "Gradients not zero",
    "update_below_half_ulp": "Updates below ½ ULP",
    "half_ulp_precision": "Precision",
    "half_ulp_recall": "Recall",
}
PRICES = {
    "steps": "every step: what changed, what ever changed",
    "snapshots": "patches of the snapshots",
    "scores": "scores, and divergences from the base",
    "windows": "windows of k steps",
    "step_masks": "masks of steps",
    "step_patches": "patches of steps",
    "casts": "changes after casts",
    "updates": "gradients and updates",
}


def split_rows(trials: Sequence[Row], tables: Tables) -> list[Row]:
    """Weights never changed, changed but back at the end, and changed at the end, per group.

    Rows with ``group, num_runs`` and the keys of ``SPLIT``: shares of all weights, the last one of
    those that ever changed; means over finished runs.
    """
    columns = ["num_untouched", "num_cancelled", "num_final"]
    frame = tables["trials"].select(["trial_id", *columns]).to_pandas().set_index("trial_id")
    frame = frame.astype("float64").dropna()
    total = frame.sum(axis=1)
    shares = pd.DataFrame({name.removeprefix("num_"): frame[name] / total for name in columns})
    ever = frame["num_cancelled"] + frame["num_final"]
    shares["cancelled_of_ever"] = frame["num_cancelled"] / ever.where(ever > 0)
    return _by_group(shares, trials)


def cast_rows(trials: Sequence[Row], tables: Tables) -> list[Row]:
    """Weights that differ from the base after casts, per group, at the last step: ``CASTS``."""
    frame = _steps(tables, list(CASTS))
    return _by_group(frame.groupby("trial_id").last(), trials)


def gate_rows(trials: Sequence[Row], tables: Tables) -> list[Row]:
    """Gradients and updates against half a ULP, per group: ``GATE``, means over steps and runs."""
    return _by_group(_steps(tables, list(GATE)).groupby("trial_id").mean(), trials)


def price_rows(tables: Tables) -> list[Row]:
    """CPU time of each part of the probe over the finished trials that have it.

    Rows with ``part`` (a key of ``PRICES``), ``num_runs``, ``cpu_s`` (mean over these runs) and
    ``share`` of the CPU time of the same runs.
    """
    columns = {part: f"probe_{part}_cpu_s" for part in PROBE_PARTS}
    frame = tables["trials"].select(["cpu_s", *columns.values()]).to_pandas().astype("float64")
    rows = []
    for part, column in columns.items():
        paid = frame[["cpu_s", column]].dropna()
        if len(paid) and paid["cpu_s"].sum():
            share = paid[column].sum() / paid["cpu_s"].sum()
            mean = float(paid[column].mean())
            rows.append({"part": part, "num_runs": len(paid), "cpu_s": mean, "share": float(share)})
    return rows


def _steps(tables: Tables, columns: list[str]) -> pd.DataFrame:
    if "steps" not in tables:
        return pd.DataFrame(columns=["trial_id", *columns])
    frame: pd.DataFrame = tables["steps"].select(["trial_id", "step", *columns]).to_pandas()
    ordered = frame.dropna(subset=columns, how="all").sort_values("step")
    return ordered.drop(columns="step").astype(dict.fromkeys(columns, "float64"))


def _by_group(runs: pd.DataFrame, trials: Sequence[Row]) -> list[Row]:
    """Means over the finished runs of each group that are among the rows of ``runs``."""
    groups = {t["trial_id"]: t["group"] for t in trials if t["status"] == "finished"}
    found = runs.groupby(runs.index.map(groups))
    means, sizes = found.mean(), found.size()
    return [
        {
            "group": group,
            "num_runs": int(sizes[group]),
            **{name: None if pd.isna(v) else float(v) for name, v in means.loc[group].items()},
        }
        for group in dict.fromkeys(groups.values())
        if group in sizes.index
    ]
