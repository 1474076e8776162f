"""How factors move the overlap of masks: less across levels than within, beyond what a seed does.

Pairs of runs are dependent, as each run is in many, and runs of one seed share prompts: the unit is
the seed. Only pairs of different seeds are compared, so that shared prompts are not the reason, and
only seeds that have all runs, so that everything is balanced: what a run shares with all others
then cancels between pairs across levels and pairs within. A bootstrap over pairs is not offered: it
covers 60 %.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from rlsparse import tables
from rlsparse.effects.selection import FINISHED, Pair, apart, contrasts, having, with_configs
from rlsparse.identity import canonical_json
from rlsparse.levels import MASK, level_label, tags_of
from rlsparse.statistics import (
    CI_LEVEL,
    Floats,
    holm,
    jackknife,
    label_swap,
    label_swap_floor,
    t_interval,
    without_nan,
)
from rlsparse.study import StudyBase

ACROSS = "pairs of seeds, jackknife by seed, swapped labels"
WITHIN = "pairs of seeds, jackknife by seed"
METHODS: dict[str, str] = {
    ACROSS: "log excess of pairs of runs across two levels minus that within the levels; Student t "
    "over the pseudo-values of leaving out a seed with all its pairs; p by swapping the labels of "
    "the two levels within seeds, adjusted by Holm within a factor",
    WITHIN: "log excess of pairs of runs of one level, with the same interval",
}
"""Methods of rows of table ``effects`` whose response is an overlap."""

OTHER_SEED = "other seed"
"""``reference`` of rows about pairs within one level."""

_COLUMNS = ["trial_a", "step_a", "trial_b", "step_b"]
_COLUMNS += ["num_a", "num_b", "num_both", "expected_magnitude"]


def overlap_effects(study: StudyBase, trials: pa.Table, overlaps: pa.Table) -> pa.Table:
    """What each level of each factor does to the overlap with runs at its reference.

    Overlap is the log excess over what the magnitude null expects, log((observed + .5) /
    (expected + .5)), of all weights in last snapshots in the default view. A contrast is the mean
    over pairs of one run at the level and one at the reference, minus the mean over pairs within a
    level (both levels equally), among pairs of different seeds that agree in all other factors:
    below 0 the factor moves the subnetwork more than a seed does. Contrasts are averaged over
    combinations of the other factors, with equal weights, over seeds that have them all; as in
    ``effects.effects``, fields of different algorithms or tasks stay apart (``within``).

    The interval is a jackknife that leaves out a seed with all its runs, t with (seeds - 1) df.
    Leaving out one run at a time takes runs of one seed for independent: where these share prompts,
    intervals within a level cover 70-85 % over 2-3 combinations of the other factors, those of
    seeds 93-99 % (simulated at 4 and 6 seeds). The permutation swaps the two levels' labels of a
    seed, of all its runs at once (`statistics.label_swap`).

    Args:
        study: gives factors and reference levels.
        trials: table of that name, with the column ``config``.
        overlaps: table of that name.

    Returns:
        Rows of table ``effects``, response ``overlap.bitwise@<view>``, scale log; also one per
        level with the reference ``OTHER_SEED``: the mean log excess within the level, how much
        seeds share. ``num_runs`` counts seeds. Runs without a changed weight are left out. Table
        ``overlaps`` has no runs under a mask, so that the mask is no factor here.
    """
    runs = with_configs(trials)
    excess = _excess(overlaps, runs, study.default_view)
    shared = {"response": f"overlap.bitwise@{study.default_view}", "scale": "log"}
    rows: list[dict[str, object]] = []
    for factor, family in contrasts(study, runs).items():
        if factor == MASK:
            continue
        made = [
            {"level": one.level, "reference": one.reference, "within": within}
            | _across(_known(pairs, excess), excess)
            for one in family
            for within, pairs in one.groups.items()
        ]
        adjusted = holm([row["p_value"] for row in made])  # type: ignore[arg-type]
        made = [row | {"p_adjusted": p} for row, p in zip(made, adjusted, strict=True)]
        if factor in study.factors:
            made += _levels(study, runs, factor, excess)
        rows += [shared | {"factor": factor} | row for row in made]
    return tables.from_rows([*map(without_nan, rows)], "effects")


def _excess(overlaps: pa.Table, runs: pd.DataFrame, view: str) -> pd.DataFrame:
    """Log excess of all pairs of runs, symmetric [trials, trials]; nan where there is none."""
    named = pc.and_(pc.equal(overlaps["definition"], "bitwise"), pc.equal(overlaps["view"], view))
    whole = pc.and_(pc.is_null(overlaps["tensor"]), pc.is_null(overlaps["module"]))
    pairs = overlaps.filter(pc.and_(named, whole)).select(_COLUMNS).to_pandas()
    end = runs.set_index("trial_id")["num_steps"].to_dict()
    is_last = (pairs["step_a"] == pairs["trial_a"].map(end)) & (
        pairs["step_b"] == pairs["trial_b"].map(end)
    )
    moved = (pairs["num_a"] > 0) & (pairs["num_b"] > 0)
    pairs = pairs[is_last & moved & (pairs["trial_a"] != pairs["trial_b"])]
    value = np.log((pairs["num_both"] + 0.5) / (pairs["expected_magnitude"] + 0.5))
    index = pd.Index(runs["trial_id"])
    matrix = np.full((index.size, index.size), np.nan)
    a, b = index.get_indexer(pairs["trial_a"]), index.get_indexer(pairs["trial_b"])
    matrix[a, b] = matrix[b, a] = value
    return pd.DataFrame(matrix, index, index)


def _known(pairs: Sequence[Pair], excess: pd.DataFrame) -> list[Pair]:
    """Matched pairs of runs that both overlap with others."""
    known = set(excess.index[excess.notna().any()])
    return [pair for pair in pairs if {pair.a, pair.b} <= known]


def _across(pairs: Sequence[Pair], excess: pd.DataFrame) -> dict[str, object]:
    """Across levels minus within, of matched pairs of runs."""
    a, b = ([pair[side] for pair in pairs] for side in (0, 1))
    across = excess.loc[a, b].to_numpy() + excess.loc[b, a].to_numpy()
    within = excess.loc[a, a].to_numpy() + excess.loc[b, b].to_numpy()
    gaps = _between_seeds(pairs, (across - within) / 2)
    return _interval(ACROSS, gaps) | {
        "p_value": label_swap(gaps),
        "p_floor": label_swap_floor(len(gaps)),
    }


def _levels(
    study: StudyBase, runs: pd.DataFrame, factor: str, excess: pd.DataFrame
) -> list[dict[str, object]]:
    """Rows of pairs within each level."""
    plain = having(runs, factor)
    plain = plain[plain["status"].isin(FINISHED)]
    rows: list[dict[str, object]] = []
    for level in dict.fromkeys(map(level_label, study.factors[factor])):
        at = plain[np.array([cell[factor] == level for cell in plain["cell"]], bool)]
        columns = zip(at["trial_id"], at["seed"], at["cell"], strict=True)
        runs_at = [Pair(t, t, int(seed), canonical_json(cell)) for t, seed, cell in columns]
        for within, group in apart(plain, tags_of(factor), runs_at).items():
            ours = _known(group, excess)
            names = [pair.a for pair in ours]
            shared = _between_seeds(ours, excess.loc[names, names].to_numpy())
            row = {"level": level, "reference": OTHER_SEED, "within": within}
            rows.append(row | _interval(WITHIN, shared))
    return rows


def _between_seeds(pairs: Sequence[Pair], values: Floats) -> Floats:
    """Mean of values between two seeds, over what is held fixed, in the seeds that have all.

    Args:
        pairs: P matched pairs of runs, or runs.
        values: [P, P], between two of them; read where both agree in what is held fixed.

    Returns:
        [seeds, seeds], 0 on the diagonal; without seeds if a value is missing, as the overlap of
        runs of different bases is.
    """
    withins = sorted({pair.within for pair in pairs})
    at: dict[tuple[int, str], list[int]] = {}
    for i, pair in enumerate(pairs):
        at.setdefault((pair.seed, pair.within), []).append(i)
    seeds = sorted({pair.seed for pair in pairs})
    seeds = [seed for seed in seeds if all((seed, within) in at for within in withins)]
    means = np.zeros((len(seeds), len(seeds)))
    for i, seed in enumerate(seeds):
        for j, other in enumerate(seeds[:i]):
            blocks = [values[np.ix_(at[seed, w], at[other, w])].mean() for w in withins]
            means[i, j] = means[j, i] = np.mean(blocks)
    return np.zeros((0, 0)) if np.isnan(means).any() else means


def _interval(method: str, between: Floats) -> dict[str, object]:
    """Mean over pairs of seeds [seeds, seeds] and its jackknife interval."""
    rows, columns = np.triu_indices(len(between), 1)
    values = between[rows, columns]
    units = [{int(i), int(j)} for i, j in zip(rows, columns, strict=True)]
    pseudo = jackknife(values, units) if units else values
    _, low, high = t_interval(pseudo)
    return {
        "method": method,
        "estimate": float(values.mean()) if values.size else float("nan"),
        "ci_low": float(low),
        "ci_high": float(high),
        "ci_level": CI_LEVEL,
        "num_runs": len(between) if values.size else 0,
    }
