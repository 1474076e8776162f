"""How factors move responses: contrasts between matched runs, intervals, corrections.

The unit of analysis is the seed: runs of the same seed share prompts and data order, so their
differences are averaged first and the intervals are over seeds.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from rlsparse import tables
from rlsparse.effects.responses import FAILED, scale_of, scaled
from rlsparse.effects.selection import ENDED, Contrast, Pair, contrasts, seed_means, with_configs
from rlsparse.statistics import (
    CI_LEVEL,
    MIN_BOOTSTRAP,
    Floats,
    benjamini_hochberg,
    bootstrap_interval,
    holm,
    log_odds,
    sign_flip,
    sign_flip_floor,
    t_interval,
    t_p_value,
    welch,
    without_nan,
)
from rlsparse.study import StudyBase

MATCHED = "matched by seed, t interval, exact sign flips"
UNPAIRED = "unpaired (Welch)"
BOOTSTRAP = "matched by seed, percentile bootstrap"
PART = "matched by seed, t interval and test"
RATES = "matched by seed, exact sign flips"
METHODS: dict[str, str] = {
    MATCHED: "primary: Student t over seeds of the differences within a seed, p by flipping their "
    "signs, adjusted by Holm within a response and factor",
    UNPAIRED: "sensitivity: the same seeds' means of both levels as if they were not matched",
    BOOTSTRAP: f"sensitivity, from {MIN_BOOTSTRAP} seeds: resampled differences within a seed",
    PART: "one layer or module: Student t over seeds, p by Student's t test, adjusted by "
    "Benjamini-Hochberg over all layers and modules of a contrast",
    RATES: "failure rates, which are 0 or 1 per run: no interval, else as matched",
}
"""Methods of table ``effects``; ``overlap_effects.METHODS`` has those of overlaps."""

_MIN_CORRELATED = 3
_Row = dict[str, object]


def effects(study: StudyBase, trials: pa.Table, frame: pd.DataFrame, changes: pa.Table) -> pa.Table:
    """What each level of each factor does against its reference, matched by seed.

    Rows are per response, factor, level and combination of the other factors (``within``), and
    pooled over these (``within`` = ``{}``: differences averaged within a seed first). Fields of
    algorithms and of tasks are not pooled over several of these, whose fields of one name are
    different things: such rows are within ``{"algorithm.name": ...}``. ``METHODS`` says how each
    row was made; a pooled row over a single combination is the same test as the row of that
    combination and counts once. Pooled rows are followed by their sensitivities, which are not
    adjusted, and bitwise sparsity in the default view also by a row per layer and per module. The
    control lr_times_3 is the factor ``control.lr_times_3``. Surrogates are compared only where the
    reward is the factor. The failure rate is compared among all runs that have ended, everything
    else among finished ones.

    Args:
        study: the study; gives factors and reference levels.
        trials: table of that name, with the column ``config``.
        frame: result of ``responses``; only last snapshots are used.
        changes: table of that name.

    Returns:
        Table ``effects``. ``num_runs`` counts seeds; a level without any pair has a pooled row with
        num_runs 0.
    """
    runs = with_configs(trials)
    last = frame[frame["last"]]
    finished, ended = contrasts(study, runs), contrasts(study, runs, ENDED)
    rows: list[_Row] = []
    for response, of_response in last.groupby("response", sort=False):
        values = dict(zip(of_response["trial_id"], scaled(of_response), strict=True))
        families = ended if response == FAILED else finished
        for factor, family in families.items():
            shared = {"response": response, "factor": factor, "scale": scale_of(str(response))}
            tests = _rates if response == FAILED else _matched
            rows += [shared | row for row in _family(family, values, tests)]
    parts = _parts(changes, runs, study.default_view)
    response = f"sparsity.bitwise@{study.default_view}"
    for factor, family in finished.items():
        shared = {"response": response, "factor": factor, "scale": scale_of(response)}
        rows += [shared | row for contrast in family for row in _part_rows(contrast, parts)]
    return tables.from_rows([*map(without_nan, rows)], "effects")


# --- all weights -------------------------------------------------------------------------------


def _family(
    family: Sequence[Contrast],
    values: Mapping[str, float],
    tests: Callable[[Floats], Iterator[_Row]],
) -> Iterator[_Row]:
    """Rows of one response and factor.

    Args:
        family: the factor's contrasts.
        values: trial -> response, on its scale.
        tests: gives the primary row, then its sensitivities, of both levels' values [seeds, 2].
    """
    rows: list[_Row] = []
    shown: list[tuple[str, list[_Row]]] = []  # pooled within, or "", and the sensitivities
    for contrast in family:
        for pooled, pairs in contrast.groups.items():
            parts = {w: [p for p in pairs if p.within == w] for w in {p.within for p in pairs}}
            if len(parts) != 1:
                parts[pooled] = pairs
            for within, part in sorted(parts.items()):
                made = tests(_sides(part, values))
                named = {"level": contrast.level, "reference": contrast.reference}
                rows.append(next(made) | named | {"within": within})
                is_pooled = len(parts) == 1 or within == pooled
                others = [row | named | {"within": pooled} for row in made] if is_pooled else []
                shown.append((pooled if is_pooled else "", others))
    adjusted = holm([row["p_value"] for row in rows])  # type: ignore[arg-type]
    for row, p, (pooled, others) in zip(rows, adjusted, shown, strict=True):
        row["p_adjusted"] = p
        yield row
        if pooled and row["within"] != pooled:
            yield row | {"within": pooled}
        yield from others


def _sides(pairs: Sequence[Pair], values: Mapping[str, float]) -> Floats:
    """Mean values of the level and of the reference, [seeds, 2], in the seeds that have all."""
    nan = float("nan")
    both = [(values.get(pair.a, nan), values.get(pair.b, nan)) for pair in pairs]
    means = seed_means(pairs, np.array(both, np.float64).reshape(-1, 2))
    complete: Floats = means[~np.isnan(means).any(axis=1)]
    return complete


def _matched(sides: Floats) -> Iterator[_Row]:
    gaps = sides[:, 0] - sides[:, 1]
    flips = {"p_value": sign_flip(gaps), "p_floor": sign_flip_floor(gaps.size)}
    correlation = {"correlation": _correlation(sides)}
    yield _interval(MATCHED, gaps, *map(float, t_interval(gaps))) | flips | correlation
    if gaps.size > 1:
        *interval, p = welch(sides[:, 0], sides[:, 1])
        yield _interval(UNPAIRED, gaps, *interval) | {"p_value": p}
    if gaps.size >= MIN_BOOTSTRAP:
        yield _interval(BOOTSTRAP, gaps, *bootstrap_interval(gaps))


def _rates(sides: Floats) -> Iterator[_Row]:
    gaps = sides[:, 0] - sides[:, 1]
    yield {
        "method": RATES,
        "estimate": float(gaps.mean()) if gaps.size else None,
        "p_value": sign_flip(gaps),
        "p_floor": sign_flip_floor(gaps.size),
        "num_runs": gaps.size,
    }


def _interval(method: str, gaps: Floats, estimate: float, low: float, high: float) -> _Row:
    return {
        "method": method,
        "estimate": estimate,
        "ci_low": low,
        "ci_high": high,
        "ci_level": CI_LEVEL,
        "num_runs": gaps.size,
    }


def _correlation(sides: Floats) -> float:
    """Pearson's, over seeds; nan where it says nothing: below 3 seeds, or a level is constant."""
    if len(sides) < _MIN_CORRELATED or (np.ptp(sides, axis=0) == 0).any():
        return float("nan")
    a, b = sides.T
    return float(np.corrcoef(a, b)[0, 1])


# --- layers and modules ------------------------------------------------------------------------


class _Parts(NamedTuple):
    """Layers and modules as (layer, None) or (None, module), and their values by trial."""

    keys: list[tuple[int | None, str | None]]
    values: pd.DataFrame  # index trial, a column per key


def _parts(changes: pa.Table, runs: pd.DataFrame, view: str) -> _Parts:
    """Log odds of bitwise sparsity in last snapshots."""
    names = ["trial_id", "step", "layer", "module", "num_elements", "num_changed_bitwise"]
    counts = changes.filter(pc.equal(changes["view"], view)).select(names).to_pandas()
    end = runs.set_index("trial_id")["num_steps"].to_dict()
    counts = counts[counts["step"] == counts["trial_id"].map(end)]
    found = []
    for by in ("layer", "module"):
        sums = counts.groupby(["trial_id", by])[names[-2:]].sum()
        odds = pd.Series(-log_odds(sums[names[-1]], sums[names[-2]]), sums.index)
        found.append(odds.unstack(by))
    layers, modules = found
    keys: list[tuple[int | None, str | None]] = [
        (layer, None) for layer in layers.columns.astype(np.int64).tolist()
    ]
    keys += [(None, module) for module in modules.columns.tolist()]
    return _Parts(keys, pd.concat(found, axis=1))


def _part_rows(contrast: Contrast, parts: _Parts) -> Iterator[_Row]:
    """Rows of all layers and modules of one contrast, pooled over the other factors."""
    for within, pairs in contrast.groups.items():
        a, b = (
            parts.values.reindex(side).to_numpy()
            for side in ([pair.a for pair in pairs], [pair.b for pair in pairs])
        )
        rows: list[_Row] = []
        for (layer, module), gaps in zip(parts.keys, seed_means(pairs, a - b).T, strict=True):
            known = gaps[~np.isnan(gaps)]
            about = {"within": within, "layer": layer, "module": module}
            about |= {"level": contrast.level, "reference": contrast.reference}
            row = _interval(PART, known, *map(float, t_interval(known)))
            rows.append(row | about | {"p_value": t_p_value(known, 0)})
        adjusted = benjamini_hochberg([row["p_value"] for row in rows])  # type: ignore[arg-type]
        yield from (row | {"p_adjusted": p} for row, p in zip(rows, adjusted, strict=True))
