"""What the analysis concluded, as rows: claims, effects, terms and means of the factorial model."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from operator import itemgetter

from scipy.special import stdtr, stdtrit

from rlsparse.effects.overlap_effects import OTHER_SEED
from rlsparse.effects.responses import VALIDATION
from rlsparse.report.rows import Row, Tables, parsed, rows_of

_LIFT = "observed / expected"
_SCALES = {
    "odds ratio": "odds ratio",
    "density ratio": "density ratio",
    "ratio": "ratio",
    "difference": "difference",
    "slope": "slope",
    "lift": _LIFT,
    "mean of score_gain": "difference",
    "mean of kl_final": "nats",
}
"""How a statistic begins -> scale on which the claims table gives its numbers."""
_OF_KIND = {"above_null": _LIFT, "below_null": _LIFT, "equivalent": "density ratio"}
_EXACT_TESTS = ("sign flips", "swapped labels")
_OF_SCALE = {"log_odds": "odds ratio", "log": "ratio"}

PRIMARY = "sparsity.bitwise"


def claim_rows(tables: Tables) -> list[Row]:
    """One row per claim: the columns of the claims table, and the ``scale`` of its numbers.

    ``own_scope`` are the parts of its scope that not all claims share (``shared_scope``),
    ``qualifier`` what its outcome says behind the verdict (why it is undecided, what a subnetwork
    recovers), and ``alternatives`` a mapping.
    """
    claims = rows_of(tables, "claims")
    shared = shared_scope(claims)
    return [
        {
            **row,
            "scale": _claim_scale(row["kind"], row["statistic"] or ""),
            "qualifier": _qualifier(row),
            "own_scope": [part for part in _scope(row) if part not in shared],
            "alternatives": parsed(row.get("alternatives")),
        }
        for row in claims
    ]


def shared_scope(claims: Sequence[Row]) -> list[str]:
    """Parts of the scope (base, task, steps, ...) that most claims share, said once for them.

    A claim with another value says its own.
    """
    parts = Counter(part for claim in claims for part in _scope(claim))
    return [part for part, times in parts.items() if times > len(claims) / 2]


def _scope(claim: Row) -> list[str]:
    settings, *remarks = (claim["scope"] or "").split("; ")
    return [part for part in (*settings.split(", "), *remarks) if part]


def _claim_scale(kind: str, statistic: str) -> str:
    said = (scale for start, scale in _SCALES.items() if statistic.startswith(start))
    return next(said, _OF_KIND.get(kind, "fraction"))


def _qualifier(claim: Row) -> str:
    outcome, verdict = claim.get("outcome") or "", f"{claim['verdict']}, "
    if not outcome.startswith(verdict):
        return ""
    words = outcome.removeprefix(verdict).removesuffix(f" ({claim['scope']})").removeprefix("as ")
    return words if claim["estimate"] is None else words.rpartition(": ")[0]


# --- effects ---------------------------------------------------------------------------------


def effect_rows(tables: Tables) -> list[Row]:
    """One row per effect: the columns of the table, ``within`` parsed, its interval made readable.

    ``contrast`` says what is compared;
    ``shown_scale`` is ``odds ratio``, ``ratio`` or ``difference``; ``shown``, ``shown_low`` and
    ``shown_high`` are the estimate and its interval on it. Bitwise sparsity comes first, then
    overlap and what is no sparsity, then the other definitions; an effect within the only
    combination of other factors is its pooled row, and left out. ``exact_test`` names the exact
    test that ``p_value`` is of ("" for others), ``p_shown`` is the p of the t test of the interval
    then, and ``p_value`` where there is none.
    """
    effects = rows_of(tables, "effects")
    contrast = itemgetter("response", "factor", "level", "layer", "module", "method")
    combinations = Counter(contrast(row) for row in effects if row["within"] != "{}")
    effects = [r for r in effects if r["within"] == "{}" or combinations[contrast(r)] > 1]
    shown = [
        {
            **row,
            "within": parsed(row["within"]),
            "contrast": _contrast(row),
            **_tests(row),
            **_shown(row, "estimate", "ci_low", "ci_high"),
        }
        for row in effects
    ]
    return sorted(shown, key=lambda row: _rank(row["response"]))


def _contrast(row: Row) -> str:
    if row["reference"] == OTHER_SEED:
        return f"{row['level']}, between its seeds"
    return f"{row['level']} against {row['reference']}"


def _tests(row: Row) -> Row:
    """The exact test of a row, and the p to show first.

    That of the interval: |t| = |estimate| / (half width / t quantile), df = seeds - 1.
    """
    exact = next((name for name in _EXACT_TESTS if name in (row["method"] or "")), "")
    known = [row[key] for key in ("estimate", "ci_low", "ci_high", "ci_level")]
    if not exact or None in known or row["num_runs"] < 2 or row["ci_high"] <= row["ci_low"]:
        return {"exact_test": exact, "p_shown": row["p_value"]}
    estimate, low, high, level = known
    df = row["num_runs"] - 1
    error = (high - low) / 2 / stdtrit(df, (1 + level) / 2)
    return {"exact_test": exact, "p_shown": float(2 * stdtr(df, -abs(estimate) / error))}


def is_primary(response: str) -> bool:
    """Whether a response is neither another definition of unchanged nor what tunes runs."""
    is_other = response.startswith("sparsity.") and not response.startswith(PRIMARY)
    return not is_other and response != VALIDATION


def _rank(response: str) -> int:
    return 0 if response.startswith(PRIMARY) else 1 if is_primary(response) else 2


def _shown(row: Row, *keys: str) -> Row:
    """Estimate and ends of a contrast, from the log of a ratio to the ratio."""
    scale = _OF_SCALE.get(row["scale"], "difference")
    back: Callable[[float], float] = _exp if scale != "difference" else float
    names = ("shown", "shown_low", "shown_high")
    return {"shown_scale": scale} | {
        name: None if row[key] is None else back(row[key])
        for name, key in zip(names, keys, strict=True)
    }


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


# --- factorial model -------------------------------------------------------------------------


def term_rows(tables: Tables) -> list[Row]:
    """Terms of the factorial models, bitwise sparsity first."""
    return sorted(rows_of(tables, "terms"), key=lambda row: _rank(row["response"]))


def mean_rows(tables: Tables) -> list[Row]:
    """Estimated marginal means: the columns of the table and ``shown*``, back from log odds."""
    rows = []
    for row in rows_of(tables, "means"):
        back = {"log_odds": _expit, "log": _exp}.get(row["scale"], float)
        keys = {"shown": "estimate", "shown_low": "ci_low", "shown_high": "ci_high"}
        shown = {k: None if row[v] is None else back(row[v]) for k, v in keys.items()}
        rows.append({**row, "is_fraction": row["scale"] == "log_odds", **shown})
    return sorted(rows, key=lambda row: _rank(row["response"]))


def _expit(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value > -700 else 0.0


def levels_of(row: Row) -> dict[str, str]:
    """Factor levels that an effect is about: its own, and those held fixed."""
    return {**row["within"], row["factor"]: row["level"]}
