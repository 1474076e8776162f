"""What table ``overlaps`` says, as rows: by what runs differ in, over each null, by module.

Lifts are averaged as logarithms, so that the excess that each null explains adds up. Pairs share
runs, so no interval is given here: verdicts come from the claims.
"""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import pyarrow.compute as pc

from rlsparse.definitions import NESTED_NULLS, NULLS
from rlsparse.identity import canonical_json
from rlsparse.overlap import jaccard, kappa, one_sided
from rlsparse.report.pairs import AGAIN, DIMENSIONS, Floats, log_ratio
from rlsparse.report.rows import Row, Tables, in_order, parsed, rows_of
from rlsparse.study import StudyBase

RANDOM = "a random mask"


def with_lifts(trials: Sequence[Row], pairs: pd.DataFrame) -> list[Row]:
    """Trials with their mean lift with the other seeds of their cell.

    ``overlap_lift`` is observed / expected from the density of each tensor, averaged as it is;
    ``magnitude_lift`` over the magnitude null, averaged as a logarithm.
    """
    seeds = pairs[pairs["relation"] == "other seed"]
    ends = pd.concat([seeds.assign(run=seeds["a"]), seeds.assign(run=seeds["b"])])
    tensor = np.exp(ends["log_tensor"]).groupby(ends["run"]).mean()
    magnitude = np.exp(ends["log_magnitude"].groupby(ends["run"]).mean())
    return [
        {
            **trial,
            "overlap_lift": _number(tensor.get(i, np.nan)),
            "magnitude_lift": _number(magnitude.get(i, np.nan)),
        }
        for i, trial in enumerate(trials)
    ]


def relation_rows(pairs: pd.DataFrame) -> list[Row]:
    """Overlap of all weights by what the runs differ in, the fewest differences first.

    Keys: ``relation, num_pairs, one_sided, jaccard, kappa, odds_ratio, max_lift`` (the largest
    that the densities allow under the uniform null), ``lift``, ``low``, ``high`` (by null: mean
    and range over pairs) and ``explained`` (``explained_by``). The last row sets a random mask of
    the second run's density in each tensor in the place of that run; of such masks only the first
    two nulls say what to expect.
    """
    whole = pairs[pairs["relation"] != ""]
    groups = {str(name): group for name, group in whole.groupby("relation")}
    found = [_relation_row(name, groups[name]) for name in sorted(groups, key=_order)]
    real = whole[~whole["relation"].isin([AGAIN]) & whole["num_both_random"].notna()]
    if len(real):
        random = real.assign(num_both=real["num_both_random"])
        for null in NULLS:
            lifts = log_ratio(random["num_both"], random[f"expected_{null}"])
            random[f"log_{null}"] = lifts if null in NESTED_NULLS[:2] else np.nan
        found.append(_relation_row(RANDOM, random))
    return found


def _order(relation: str) -> tuple[bool, int, int]:
    dimensions = relation.removeprefix("other ").split(" + ")
    place = DIMENSIONS.index(dimensions[0]) if dimensions[0] in DIMENSIONS else -1
    return relation.startswith("surrogate"), len(dimensions), place


def _relation_row(relation: str, pairs: pd.DataFrame) -> Row:
    both, a, b, n = (pairs[k] for k in ("num_both", "num_a", "num_b", "num_elements"))
    with np.errstate(divide="ignore", invalid="ignore"):
        odds = both * (n - a - b + both) / ((a - both) * (b - both))
        largest: pd.Series = n / np.maximum(a, b)
    sides = np.concatenate([one_sided(both, a), one_sided(both, b)])
    logs = {null: pairs[f"log_{null}"] for null in NULLS}
    return {
        "relation": relation,
        "num_pairs": len(pairs),
        "one_sided": _mean(sides),
        "jaccard": _mean(jaccard(both, a, b)),
        "kappa": _mean(kappa(both, a, b, n)),
        "odds_ratio": _exp(_mean(np.log(odds.where(np.isfinite(odds) & (odds > 0))))),
        "max_lift": _exp(_mean(np.log(largest.where(np.isfinite(largest))))),
        "lift": {null: _exp(_mean(log)) for null, log in logs.items()},
        "low": {null: _exp(_number(log.min())) for null, log in logs.items()},
        "high": {null: _exp(_number(log.max())) for null, log in logs.items()},
        "explained": explained_by(pairs),
    }


def explained_by(pairs: pd.DataFrame) -> Row:
    """How much of the log excess over chance each nested null explains, and what is left.

    log(observed / uniform) = log(tensor / uniform) + log(magnitude / tensor) + ... + log(observed /
    last), averaged over the pairs that have all nulls; without any, over those that have the first
    three.

    Returns:
        ``tensor``, ``magnitude``, ``update_size`` (None where there is none), ``left``, ``total``
        and ``num_pairs``.
    """
    for chain in (NESTED_NULLS, NESTED_NULLS[:-1]):
        known = pairs.dropna(subset=[f"log_{null}" for null in chain])
        if len(known):
            break
    logs = [_mean(known[f"log_{null}"]) for null in chain]
    steps: Row = dict.fromkeys((*NESTED_NULLS[1:], "left", "total"))
    if len(known):
        for null, (before, after) in zip(chain[1:], itertools.pairwise(logs), strict=True):
            steps[null] = (before or 0.0) - (after or 0.0)
        steps |= {"left": logs[-1], "total": logs[0]}
    return {**steps, "num_pairs": len(known)}


def module_rows(trials: Sequence[Row], pairs: pd.DataFrame, modules: pd.DataFrame) -> list[Row]:
    """Lift between the seeds of a cell, per algorithm and module (``all`` first), by null.

    Args:
        trials: the runs.
        pairs: result of ``pairs_of``.
        modules: result of ``module_pairs``.
    """
    seeds = pairs[pairs["relation"] == "other seed"].assign(module="all")
    algorithms = np.array([t["algorithm"] for t in trials], object)
    named = pd.concat([seeds, modules])
    named = named.assign(algorithm=algorithms[named["a"].to_numpy(np.int64)])
    logs = [f"log_{null}" for null in NULLS]
    means = named.groupby(["algorithm", "module"], sort=False)[logs].mean()
    order = ["all", *in_order(set(named["module"]) - {"all"})]
    rows = [
        {
            "algorithm": row["algorithm"],
            "module": row["module"],
            "lift": {null: _exp(_number(row[f"log_{null}"])) for null in NULLS},
        }
        for row in means.reset_index().to_dict("records")
    ]
    first = list(dict.fromkeys(algorithms))
    return sorted(rows, key=lambda r: (order.index(r["module"]), first.index(r["algorithm"])))


def run_matrix(trials: Sequence[Row], pairs: pd.DataFrame) -> list[Row]:
    """A row per pair of runs: ``a``, ``b`` (trial ids), lifts by null, one-sided, Jaccard.

    A run whose mask is empty (learning rate 0) has no overlap and is left out.
    """
    whole = pairs[pairs[["num_a", "num_b"]].min(axis=1) > 0]
    return [
        {
            "a": trials[row["a"]]["trial_id"],
            "b": trials[row["b"]]["trial_id"],
            "relation": row["relation"],
            "lift": {null: _exp(_number(row[f"log_{null}"])) for null in NULLS},
            "share_of_a": row["num_both"] / row["num_a"],
            "share_of_b": row["num_both"] / row["num_b"],
            "jaccard": row["num_both"] / (row["num_a"] + row["num_b"] - row["num_both"]),
        }
        for row in whole.to_dict("records")
    ]


def cell_matrix(trials: Sequence[Row], pairs: pd.DataFrame, groups: Sequence[str]) -> list[Row]:
    """A row per pair of ``groups``, with the mean lift by null over runs of different seeds.

    Runs of one seed share their batches, and overlap for that reason alone: with them, two groups
    would seem nearer to each other than to themselves.
    """
    place = {group: i for i, group in enumerate(groups)}
    of_trial = np.array([place.get(t["group"], -1) for t in trials], np.int64)
    ends = np.sort(of_trial[pairs[["a", "b"]].to_numpy(np.int64)], axis=1)
    logs = [f"log_{null}" for null in NULLS]
    named = pairs.assign(first=ends[:, 0], second=ends[:, 1])
    seeds = np.array([t["seed"] for t in trials])[pairs[["a", "b"]].to_numpy(np.int64)]
    kept = named[
        (seeds[:, 0] != seeds[:, 1]) & (named["first"] >= 0) & named["log_uniform"].notna()
    ]
    grouped = kept.groupby(["first", "second"])
    means = grouped[logs].mean().assign(num_pairs=grouped.size())
    return [
        {
            "a": groups[row["first"]],
            "b": groups[row["second"]],
            "num_pairs": int(row["num_pairs"]),
            "lift": {null: _exp(_number(row[f"log_{null}"])) for null in NULLS},
        }
        for row in means.reset_index().to_dict("records")
    ]


def third_runs(study: StudyBase, tables: Tables, trials: Sequence[Row]) -> list[Row]:
    """The independent runs of which null update_size takes the size of updates.

    Returns:
        Rows with ``trial_id, role`` (of the trial), ``kind`` (the control's name, or what groups
        the run) and ``seed``, in the order of the trials; empty where the null was not computed.
    """
    if (table := tables.get("overlaps")) is None:
        return []
    used = set(table.filter(pc.equal(table["view"], study.default_view))["update_size_of"].unique()
               .to_pylist())  # fmt: skip
    return [
        {
            **{key: trial[key] for key in ("trial_id", "role", "seed")},
            "kind": trial["control"] or trial["group"],
        }
        for trial in trials
        if trial["trial_id"] in used
    ]


def consensus_rows(study: StudyBase, tables: Tables, groups: Mapping[str, str]) -> list[Row]:
    """Weights changed in exactly k of the R seeds of a cell at its last step, beside the nulls.

    Args:
        study: gives the view.
        tables: ``consensus`` is read.
        groups: canonical JSON of a cell -> its group.

    Returns:
        Rows with ``group, num_runs, k, share`` and ``expected`` (by null), as shares of all
        weights; of whole models only.
    """
    known = [
        {**row, "group": groups[cell]}
        for row in rows_of(tables, "consensus")
        if row["view"] == study.default_view and row["module"] is None and row["num_elements"]
        for cell in [canonical_json(parsed(row["cell"]))]
        if cell in groups
    ]
    last: dict[str, int] = {}
    for row in known:
        last[row["group"]] = max(row["step"], last.get(row["group"], 0))
    place = {group: i for i, group in enumerate(groups.values())}
    return [
        {
            **{key: row[key] for key in ("group", "num_runs", "k")},
            "share": row["num_changed"] / row["num_elements"],
            "expected": {
                null: None if row[f"expected_{null}"] is None
                else row[f"expected_{null}"] / row["num_elements"]
                for null in NESTED_NULLS[:-1]
            },
        }
        for row in sorted(known, key=lambda row: (place[row["group"]], row["k"]))
        if row["step"] == last[row["group"]]
    ]  # fmt: skip


def _mean(values: Floats | pd.Series) -> float | None:
    known = np.asarray(values, np.float64)
    known = known[np.isfinite(known)]
    return float(known.mean()) if known.size else None


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _exp(value: float | None) -> float | None:
    return None if value is None else float(np.exp(value))
