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
from rlsparse.levels import level_label, tags_of
from rlsparse.responses import scaled
from rlsparse.selection import Pair, apart, by_seed, factor_pairs, matched_pairs, with_configs
from rlsparse.statistics import (
    CI_LEVEL,
    Floats,
    holm,
    sign_flip,
    sign_flip_floor,
    t_interval,
)
from rlsparse.study import Study, left_out

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
        reference = study.reference_level(factor)
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
