"""Rows of what syncing weights to inference servers would have taken, by steps per sync and way."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from rlsparse.report.rows import Row, Tables

LINKS_GBIT_S = (1.0, 10.0, 100.0)
"""Links for which pauses are given, unless others are asked for."""
EARLY_STEPS = 20
"""The first steps can be the densest (2602.03839), while Adam's moments fill."""
SHOWN_K = (1, 8, 64)
"""Steps per sync of which all ways are shown."""


def size_rows(trials: Sequence[Row], tables: Tables) -> list[Row]:
    """Sizes of syncs as ``relative`` patches, per group of finished trials and steps per sync k.

    Rows with ``group, k, num_windows, density`` (median), ``size_bytes`` and ``share`` (of those of
    all weights), each with ``p50, p95, max``, and ``early, late``: the median share of windows that
    end by ``EARLY_STEPS``, and of the others (None where there are none).
    """
    frame = _frame(trials, tables)
    found = []
    for (group, k), own in _split(frame[frame["way"] == "relative"], "group", "k"):
        share = own["size_bytes"] / own["dense_bytes"]
        early = own["step_after"] <= EARLY_STEPS
        found.append({
            "group": group, "k": int(k), "num_windows": len(own),
            "density": float((own["num_changed"] / own["num_elements"]).median()),
            "size_bytes": _spread(own["size_bytes"]), "share": _spread(share),
            "early": float(share[early].median()) if early.any() else None,
            "late": None if early.all() else float(share[~early].median()),
        })  # fmt: skip
    return found


def way_rows(
    trials: Sequence[Row], tables: Tables, links: Sequence[float] = LINKS_GBIT_S
) -> list[Row]:
    """What each way to sync takes, per group and k of 1, 8, 64: medians over the same windows.

    Rows with ``group, k, way, num_windows, size_bytes, times_smaller`` (than all weights),
    ``bytes_per_change, dense_from`` (share of changed weights from which all of them would be
    smaller; None where they never are), ``encode_bytes_s, apply_bytes_s`` (bytes of all weights per
    second, one thread) and ``pauses``: link in Gbit/s -> seconds to move and apply a sync, if
    nothing goes on meanwhile.
    """
    frame = _frame(trials, tables)
    in_all_ways = frame.loc[frame["way"] == "dense", ["trial_id", "k", "step_after"]]
    frame = frame[frame["k"].isin(SHOWN_K)].merge(in_all_ways, on=[*in_all_ways.columns])
    found = []
    for (group, k, way), own in _split(frame, "group", "k", "way"):
        middle = own[["size_bytes", "dense_bytes", "encode_s", "apply_s"]].median()
        size, dense = float(middle["size_bytes"]), float(middle["dense_bytes"])
        each = (own["size_bytes"] / own["num_changed"].astype(float)).median()
        itemsize = dense / float(own["num_elements"].median())
        is_patch, dense_from = np.isfinite(each), itemsize / float(each)
        found.append({
            "group": group, "k": int(k), "way": way, "num_windows": len(own),
            "size_bytes": size, "times_smaller": dense / size,
            "bytes_per_change": float(each) if is_patch else None,
            "dense_from": dense_from if dense_from < 1 else None,
            "encode_bytes_s": dense / float(middle["encode_s"]),
            "apply_bytes_s": dense / float(middle["apply_s"]),
            "pauses": {link: 8e-9 * size / link + float(middle["apply_s"]) for link in links},
        })  # fmt: skip
    return found


def step_rows(trials: Sequence[Row], tables: Tables) -> list[Row]:
    """What the sync of one step takes, as a share of all weights' bytes, per group: mean over runs.

    Rows with ``group, step, share``.
    """
    frame = _frame(trials, tables)
    own = frame[(frame["way"] == "relative") & (frame["k"] == 1)]
    return [
        {"group": group, "step": int(step), "share": float(share.mean())}
        for (group, step), same in _split(own, "group", "step_after")
        for share in [same["size_bytes"] / same["dense_bytes"]]
    ]


def _split(frame: pd.DataFrame, *columns: str) -> Iterator[tuple[Any, pd.DataFrame]]:
    yield from frame.groupby([*columns], sort=False)


def _frame(trials: Sequence[Row], tables: Tables) -> pd.DataFrame:
    """Table ``syncs`` of these trials, with their groups, in their order."""
    if "syncs" not in tables:
        columns = ("trial_id", "group", "way", "k", "step_after", "num_changed", "num_elements")
        return pd.DataFrame(columns=[*columns, "size_bytes", "dense_bytes"])
    groups = {t["trial_id"]: t["group"] for t in trials if t["status"] == "finished"}
    frame: pd.DataFrame = tables["syncs"].to_pandas()
    place = {name: number for number, name in enumerate(groups)}
    frame = frame.assign(group=frame["trial_id"].map(groups), place=frame["trial_id"].map(place))
    return frame.dropna(subset=["group"]).sort_values(["place", "k", "step_after"], kind="stable")


def _spread(values: pd.Series) -> Row:
    ends = values.quantile([0.5, 0.95, 1.0]).tolist()
    return dict(zip(("p50", "p95", "max"), map(float, ends), strict=True))
