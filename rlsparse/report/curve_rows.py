"""Rows of what changes along training, with the size of a weight, and the rank of updates."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import pyarrow.compute as pc
from numpy.typing import NDArray

from rlsparse.definitions import MIN_EXPONENT, NUM_EXPONENTS, STEP_WINDOWS
from rlsparse.report.rows import Row, Tables, of_one_cell, rows_of
from rlsparse.study import StudyBase

MAX_POINTS = 60
"""Points of a curve; a longer one is averaged over as many equal stretches of steps."""
MIN_BIN_WEIGHTS = 100
"""Bins of |w| with fewer weights are not shown: their density is mostly chance."""
RANK_BINS = 20


def curve_rows(trials: Sequence[Row], outside: Sequence[Row], tables: Tables) -> list[Row]:
    """Curves along training, per group of finished trials: mean and range over its runs.

    Args:
        trials: the runs to show (``rows.trial_rows``).
        outside: result of ``pairs.outside_rows``.
        tables: ``steps`` is read.

    Returns:
        Rows with ``measure`` (density, score, outside, step_density, step_outside, loss, reward),
        ``group, step, mean, low, high, num_runs``, at the steps that every run of the group has.
    """
    snapshots = pd.DataFrame(
        [
            {"trial_id": t["trial_id"], "step": p["step"], "score": p["score"],
             "density": None if p["sparsity"] is None else 1 - p["sparsity"]}
            for t in trials
            for p in t["snapshots"]
        ],
        columns=["trial_id", "step", "score", "density"],
    )  # fmt: skip
    early = pd.DataFrame(outside, columns=["trial_id", "step", "outside"])
    groups = _groups(trials)
    each = _logged(tables, "update_sparsity_k1")
    each = each.assign(step_density=1 - each["update_sparsity_k1"])
    share = _logged(tables, "outside_final").rename(columns={"outside_final": "step_outside"})
    rows = []
    for measure, frame in (
        ("density", snapshots), ("score", snapshots), ("outside", early),
        ("step_density", each), ("step_outside", share),
        ("loss", _logged(tables, "loss")), ("reward", _logged(tables, "reward")),
    ):  # fmt: skip
        rows += _curves(measure, frame, groups)
    return rows


def window_rows(trials: Sequence[Row], tables: Tables) -> list[Row]:
    """Density of the change over k steps against k, per group of finished trials.

    Rows with ``group, k, num_runs, mean, low, high`` (over runs; of each the mean over its windows,
    which do not overlap). Without any where no run was measured over more than one step.
    """
    if "steps" not in tables:
        return []
    groups = _groups(trials)
    columns = [f"update_sparsity_k{k}" for k in STEP_WINDOWS]
    frame = tables["steps"].select(["trial_id", *columns]).to_pandas()
    means = 1 - frame.groupby("trial_id")[columns].mean()
    means = means.assign(group=means.index.map(groups)).dropna(subset=["group"])
    if means[columns[1:]].isna().all(axis=None):
        return []
    stats = means.groupby("group")[columns].agg(["count", "mean", "min", "max"])
    return [
        {"group": group, "k": k, "num_runs": int(count), "mean": mean, "low": low, "high": high}
        for group in dict.fromkeys(groups.values())
        if group in stats.index
        for k, column in zip(STEP_WINDOWS, columns, strict=True)
        for count, mean, low, high in [stats.loc[group, column].tolist()]
        if count
    ]


def _groups(trials: Sequence[Row]) -> dict[str, str]:
    return {t["trial_id"]: t["group"] for t in trials if t["status"] == "finished"}


def _logged(tables: Tables, measure: str) -> pd.DataFrame:
    """Trial, step and one measure of table ``steps``, averaged within stretches of steps."""
    if "steps" not in tables:
        return pd.DataFrame(columns=["trial_id", "step", measure])
    frame = tables["steps"].select(["trial_id", "step", measure]).to_pandas()
    frame = frame[frame[measure].notna() & (frame["step"] > 0)]
    longest = frame["step"].max() if len(frame) else 0
    width = max(1, int(np.ceil(longest / MAX_POINTS)))
    middles = (frame["step"] - 1) // width * width + (width + 1) // 2
    means: pd.DataFrame = frame.assign(step=middles).groupby(["trial_id", "step"]).mean()
    return means.reset_index()


def _curves(measure: str, frame: pd.DataFrame, groups: dict[str, str]) -> list[Row]:
    known = frame.assign(group=frame["trial_id"].map(groups)).dropna(subset=["group", measure])
    if known.empty:
        return []
    known = known.astype({measure: np.float64})
    runs = known.groupby("group")["trial_id"].nunique()
    stats = known.groupby(["group", "step"])[measure].agg(["mean", "min", "max", "size"])
    place = {group: i for i, group in enumerate(dict.fromkeys(groups.values()))}
    return [
        {
            "measure": measure,
            "group": row["group"],
            "step": int(row["step"]),
            "mean": float(row["mean"]),
            "low": float(row["min"]),
            "high": float(row["max"]),
            "num_runs": int(row["size"]),
        }
        for row in sorted(
            stats.reset_index().to_dict("records"), key=lambda r: (place[r["group"]], r["step"])
        )
        if row["size"] == runs[row["group"]]
    ]


def magnitude_rows(study: StudyBase, tables: Tables, trials: Sequence[Row]) -> list[Row]:
    """Density of the weights of each power of two, per group, at the last snapshots.

    Rows with ``group``, ``exponent`` (2^exponent < |before| < 2^(exponent + 1)), ``num_elements``,
    ``density`` and ``rounding_threshold``: the |w| below which one Adam step of the learning rate
    exceeds half the spacing of bf16, 256 * learning rate (the spacing at |w| is between |w| / 256
    and |w| / 128).
    """
    groups = {t["trial_id"]: t for t in trials if t["status"] == "finished"}
    inside = slice(1, 1 + NUM_EXPONENTS)
    sums: dict[str, NDArray[np.int64]] = {}
    thresholds: dict[str, float] = {}
    for row in rows_of(tables, "magnitudes"):
        trial = groups.get(row["trial_id"])
        if trial is None or row["view"] != study.default_view:
            continue
        counts = np.array([row["magnitude_histogram_changed"], row["magnitude_histogram"]])
        sums[trial["group"]] = sums.get(trial["group"], 0) + counts[:, inside]
        thresholds[trial["group"]] = 256 * (trial["learning_rate"] or 0.0)
    order = dict.fromkeys(t["group"] for t in trials)
    return [
        {
            "group": group,
            "exponent": int(MIN_EXPONENT + i),
            "num_elements": int(sums[group][1, i]),
            "density": float(sums[group][0, i] / sums[group][1, i]),
            "rounding_threshold": thresholds[group],
        }
        for group in order
        if group in sums
        for i in np.flatnonzero(sums[group][1] >= MIN_BIN_WEIGHTS)
    ]


def rank_rows(study: StudyBase, tables: Tables, trials: Sequence[Row]) -> list[Row]:
    """Histograms of the rank of updates and of their nulls, per algorithm, over all matrices.

    Of the studied runs, of one cell of each algorithm (``rows.of_one_cell``).

    Rows with ``algorithm, statistic`` (``rank``, of ``torch.linalg.matrix_rank``; ``energy rank``,
    of 99 % of the squared norm), ``kind`` (update, null), ``low``, ``high`` (edges, as shares of
    the full rank), ``num_matrices`` and ``share`` of the matrices of that kind.
    """
    names = {t["trial_id"]: t["algorithm"] for t in of_one_cell(trials)}
    if "spectra" not in tables or not tables["spectra"].num_rows:
        return []
    columns = ["trial_id", "step_after", "kind", "shape", "energy_rank", "rank_share_default"]
    spectra = tables["spectra"]
    frame = spectra.filter(pc.equal(spectra["view"], study.default_view)).select(columns)
    runs: pd.DataFrame = frame.to_pandas()
    runs = runs.assign(algorithm=runs["trial_id"].map(names)).dropna(subset=["algorithm"])
    runs = runs[runs["step_after"] == runs.groupby("trial_id")["step_after"].transform("max")]
    full = np.array([min(shape) if len(shape) else 0 for shape in runs["shape"]], np.float64)
    energy = runs["energy_rank"].to_numpy(np.float64) / np.where(full > 0, full, np.nan)
    runs["rank"], runs["energy rank"] = runs["rank_share_default"], energy
    edges = np.round(np.linspace(0, 1, RANK_BINS + 1), 9)
    rows = []
    for (algorithm, kind), of_kind in runs.groupby(["algorithm", "kind"], sort=False):
        for statistic in ("rank", "energy rank"):
            values = of_kind[statistic].dropna().to_numpy(np.float64)
            counts, _ = np.histogram(values, edges)
            rows += [
                {
                    "algorithm": algorithm,
                    "statistic": statistic,
                    "kind": kind,
                    "low": float(low),
                    "high": float(high),
                    "num_matrices": int(count),
                    "share": float(count / max(values.size, 1)),
                }
                for low, high, count in zip(edges, edges[1:], counts, strict=False)
                if count
            ]
    return rows
