"""Verdicts: what a study's runs say about each of its claims.

The rules, the same for every kind but ``exact``: the unit is the seed (runs that share one are
averaged first); fractions are compared as log odds, densities as log ratios, overlaps as
log(observed / expected); the interval is Student's t. A claim names a region. It is supported if
the interval lies inside and refuted if it lies outside; ``equivalent`` is never refuted. Fewer than
four seeds decide nothing.

Multiplicity: Holm over all such claims, undecidable ones counted as p = 1. A claim's p value is
that of the t test against the edge of its region that is in the way (for ``equivalent`` the larger
of two one-sided tests). With the k-th smallest of m p values the interval has coverage 1 - a, for
``equivalent`` 1 - 2 a, where a = .05 / (m - k + 1): the verdict is reached exactly if the
Holm-adjusted p value, the one reported, is below .05. Post hoc claims are adjusted over all claims,
registered ones among themselves, so that adding claims later changes no registered verdict.

``p_floor`` is what an exact sign-flip test could reach at best with so many seeds; a p value below
it leans on the t distribution.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
from scipy import special

from rlsparse import statistics, tables
from rlsparse.claim_config import (
    AboveNullClaim,
    Claim,
    EquivalentClaim,
    ExactClaim,
    GreaterClaim,
    WithinClaim,
)
from rlsparse.definitions import DEFINITIONS
from rlsparse.evidence import (
    IDENTICAL,
    Evidence,
    Observations,
    Response,
    evidence,
    observe,
    selectors,
)
from rlsparse.identity import canonical_json
from rlsparse.statistics import Floats
from rlsparse.study import Study

ALPHA = 0.05
TINY_CAVEAT = "checks the pipeline, is no evidence about LLMs"

SUPPORTED, REFUTED, UNDECIDED = "supported", "refuted", "undecided"


def judge(
    study: Study,
    registered: Mapping[str, str],
    trials: pa.Table,
    steps: pa.Table,
    tensor_deltas: pa.Table,
    overlaps: pa.Table,
    identical: Mapping[str, bool],
) -> pa.Table:
    """Give every claim of a study its verdict.

    Args:
        study: the study.
        registered: claim id -> ``registered``, ``post hoc`` or ``extended``; an absent claim is
            post hoc.
        trials: table of that name, with the column ``config``.
        steps: table of that name.
        tensor_deltas: table of that name.
        overlaps: table of that name.
        identical: same-seed replicate trial -> whether its patches equal the original's bitwise.

    Returns:
        Table ``claims`` in the order of the study, with the further column ci_level. Estimate,
        interval and margin are fractions (within), odds ratios (greater), density ratios
        (equivalent) or lifts (above_null), and plain values for score_gain. ``num_runs`` counts
        the units: seeds, or runs for ``exact``. ``depends_on_definition`` is null for responses
        that have one definition only.
    """
    seen = observe(study, trials, steps, tensor_deltas, overlaps, identical)
    status = {claim.id: registered.get(claim.id, "post hoc") for claim in study.claims}
    tested = [claim for claim in study.claims if not isinstance(claim, ExactClaim)]
    found = {claim.id: _by_definition(seen, claim) for claim in tested}
    p_values = {
        claim.id: _p_value(claim, seen.parse(claim), next(iter(found[claim.id].values())))
        for claim in tested
    }
    confirmed = {name: p for name, p in p_values.items() if status[name] != "post hoc"}
    adjusted = _holm(p_values) | _holm(confirmed)
    rows = []
    for claim in study.claims:
        row = (
            _judge_exact(seen, claim)
            if isinstance(claim, ExactClaim)
            else _judge_tested(seen, claim, found[claim.id], *adjusted[claim.id])
        )
        selected = seen.selected(claim)
        row |= {"id": claim.id, "source": claim.source, "kind": claim.kind}
        row["registered"] = status[claim.id]
        row["scope"] = _scope(study, selected, seen.parse(claim).view)
        row["note"] = "; ".join(filter(None, [_count(selected), str(row["note"]), claim.note]))
        rows.append(row)
    return tables.from_rows(rows, "claims")


def _count(selected: pd.DataFrame) -> str:
    finished = int((selected["status"] == "finished").sum())
    if finished == len(selected):
        return ""
    return f"{len(selected)} runs planned, {finished} finished"


def _scope(study: Study, selected: pd.DataFrame, view: str) -> str:
    """Where a verdict holds: the settings of its runs, or of the baseline without any."""
    configs = list(selected["config"]) or [study.baseline.model_dump(mode="json")]
    paths = {
        "base": ("model", "source"),
        "task": ("task", "name"),
        "learning rate": ("train", "learning_rate"),
        "steps": ("train", "num_steps"),
        "precision": ("train", "precision"),
    }
    values = {k: sorted({config[a][b] for config in configs}) for k, (a, b) in paths.items()}
    parts = [f"{name} {', '.join(str(v) for v in found)}" for name, found in values.items()]
    caveat = [TINY_CAVEAT] if "tiny" in values["base"] else []
    return "; ".join([*parts, f"view {view}", *caveat])


def _misfit(claim: Claim, response: Response) -> str:
    """Why a kind of claim cannot be about a response, or ""."""
    kinds: tuple[str, ...] = ("sparsity", "score_after", "score_gain")
    if isinstance(claim, ExactClaim):
        kinds = (*kinds, IDENTICAL)
    elif isinstance(claim, EquivalentClaim):
        kinds = ("sparsity",)
    elif isinstance(claim, AboveNullClaim):
        kinds = ("overlap",)
    known = {"sparsity": DEFINITIONS, "overlap": ("bitwise",)}.get(response.kind, (None,))
    if response.kind not in kinds or response.definition not in known:
        return (
            f"a claim of kind {claim.kind} cannot be about {claim.response}: it takes "
            f"{', '.join(kinds)}; sparsity under {', '.join(DEFINITIONS)}, overlap under "
            "bitwise"
        )
    score = claim.at.score if claim.at else None
    if score is not None and (response.kind != "sparsity" or isinstance(claim, ExactClaim)):
        return f"at.score interpolates density, which {claim.kind} {response.kind} cannot use"
    if score == "common" and isinstance(claim, WithinClaim):
        return "at.score common is of pairs of runs; a claim of kind within needs a number"
    if isinstance(claim, GreaterClaim) and response.kind != "score_gain":
        margin = claim.margin
        if margin is not None and margin <= 0:
            return f"margin {margin:g} of {response.name} is an odds ratio, must be above 0"
    return ""


# --- exact -------------------------------------------------------------------------------------


def _judge_exact(seen: Observations, claim: ExactClaim) -> dict[str, object]:
    """Supported if every selected run finished with the value; refuted if any has another."""
    response, selected = seen.parse(claim), seen.selected(claim)
    finished = list(selected.loc[selected["status"] == "finished", "trial_id"])
    several = response.kind == "sparsity"
    definitions = dict.fromkeys([response.definition, *(DEFINITIONS if several else ())])
    values = {
        d: [_value(seen, claim, response._replace(definition=d), trial) for trial in finished]
        for d in definitions
    }
    own = [value for value in values[response.definition] if value is not None]
    differs = [
        str(d) for d, row in values.items() if any(v not in (claim.value, None) for v in row)
    ]
    verdict, note = UNDECIDED, _misfit(claim, response)
    if note:
        pass
    elif selected.empty:
        note = f"no run matches {canonical_json(selectors(claim)[0])}"
    elif differs:
        verdict, note = REFUTED, f"differs under {', '.join(differs)}" if several else ""
    elif len(finished) < len(selected):
        note = "a selected run did not finish"
    elif len(own) < len(finished):
        note = f"{response.name} was measured in {len(own)} of {len(finished)} runs"
    else:
        verdict = SUPPORTED
    return {
        "statistic": f"{response.name} is exactly {claim.value:g} in every run",
        "verdict": verdict,
        "estimate": float(np.mean(own)) if own else None,
        "num_runs": len(own),
        "depends_on_definition": 0 < len(differs) < len(definitions) if several else None,
        "note": note,
    }


def _value(seen: Observations, claim: ExactClaim, response: Response, trial: str) -> float | None:
    if response.kind == IDENTICAL:
        return float(seen.identical[trial]) if trial in seen.identical else None
    rows = seen.of(trial)
    rows = rows[rows["response"] == response.name]
    rows = rows[rows["step"] == claim.at.step] if claim.at else rows[rows["last"]]
    return float(rows["value"].iloc[0]) if len(rows) else None


# --- tested ------------------------------------------------------------------------------------


class _Region(NamedTuple):
    """Where a claim holds, on the scale of its test.

    ``back`` leads to the scale of the report; ``what`` names the estimate.
    """

    low: float
    high: float
    back: Callable[[Floats], Floats]
    what: str


def _region(claim: Claim, response: Response) -> _Region:
    """The claim's region; a TypeError for a kind that has none."""
    margin = _margin(claim, response)
    fraction = response.kind in ("sparsity", "score_after")
    if isinstance(claim, WithinClaim):
        what = f"mean of {response.name}, inside [{claim.low:g}, {claim.high:g}]"
        if not fraction:
            return _Region(claim.low, claim.high, np.asarray, what)
        low, high = special.logit(np.clip([claim.low, claim.high], 0.0, 1.0))
        return _Region(low, high, special.expit, what)
    if isinstance(claim, GreaterClaim):
        if fraction:
            what = f"odds ratio of {response.name}, a over b"
            return _Region(np.log(margin), np.inf, np.exp, what)
        return _Region(margin, np.inf, np.asarray, f"{response.name}, a minus b")
    if isinstance(claim, EquivalentClaim):
        edge = np.log(margin)
        what = f"density ratio by {claim.factor}, {response.name}, two one-sided tests"
        return _Region(-edge, edge, np.exp, what)
    if isinstance(claim, AboveNullClaim):
        what = (
            f"lift over the {claim.null} null between {claim.between}, {response.name}, jackknife"
        )
        return _Region(np.log(margin), np.inf, np.exp, what)
    raise TypeError(f"claim {claim.id} of kind {claim.kind} has no region")


def _margin(claim: Claim, response: Response) -> float:
    """The claim's margin on the scale of its report, its default filled in; nan if it has none."""
    if isinstance(claim, GreaterClaim):
        default = 0.0 if response.kind == "score_gain" else 1.0
        return default if claim.margin is None else claim.margin
    return claim.margin if isinstance(claim, (EquivalentClaim, AboveNullClaim)) else np.nan


def _by_definition(seen: Observations, claim: Claim) -> dict[str | None, Evidence]:
    """Evidence under the claim's own definition, first, and for sparsity under all others."""
    response = seen.parse(claim)
    reason = _misfit(claim, response)
    if reason:
        return {response.definition: Evidence([], reason)}
    others = DEFINITIONS if response.kind == "sparsity" else ()
    definitions = dict.fromkeys([response.definition, *others])
    return {d: evidence(seen, claim, response._replace(definition=d)) for d in definitions}


def _p_value(claim: Claim, response: Response, found: Evidence) -> float:
    """The level at which the claim would just be decided; nan where it cannot be."""
    if found.reason:
        return float("nan")
    region = _region(claim, response)
    p_values = []
    for values in found.contrasts:
        mean = values.mean()
        edges = [edge for edge in (region.low, region.high) if np.isfinite(edge)]
        if region.low < mean < region.high:
            p = max((statistics.t_p_value(values, edge) for edge in edges), default=0.0)
            p_values.append(p / 2 if isinstance(claim, EquivalentClaim) else p)
        elif isinstance(claim, EquivalentClaim):
            p_values.append(1.0)
        else:
            nearest = region.low if mean <= region.low else region.high
            p_values.append(statistics.t_p_value(values, nearest))
    return max(p_values)


def _holm(p_values: Mapping[str, float]) -> dict[str, tuple[float, float, int]]:
    """Per claim its adjusted p value, the level of its interval, and the size of the family."""
    given = list(p_values.values())
    adjusted, levels = statistics.holm(given), statistics.holm_levels(given, ALPHA)
    return {
        name: (float(p), float(level), len(given))
        for name, p, level in zip(p_values, adjusted, levels, strict=True)
    }


def _judge_tested(
    seen: Observations,
    claim: Claim,
    found: Mapping[str | None, Evidence],
    p_value: float,
    alpha: float,
    num_claims: int,
) -> dict[str, object]:
    """Verdict by interval under the claim's definition, and how it fares under the others."""
    response = seen.parse(claim)
    own = found[response.definition]
    row: dict[str, object] = {
        "statistic": claim.response,
        "verdict": UNDECIDED,
        "margin": None if isinstance(claim, WithinClaim) else _margin(claim, response),
        "num_runs": min((values.size for values in own.contrasts), default=0),
        "note": own.reason,
    }
    if _misfit(claim, response):
        return row
    region = _region(claim, response)
    level = 1 - alpha * (2 if isinstance(claim, EquivalentClaim) else 1)
    verdicts = {d: _verdict(claim, region, level, one) for d, one in found.items()}
    verdict, why = verdicts[response.definition]
    num_runs = int(str(row["num_runs"]))
    row |= {
        "statistic": f"{region.what}; t interval over seeds, Holm over {num_claims} claims",
        "verdict": verdict,
        "ci_level": level,
        "p_value": None if np.isnan(p_value) else p_value,
        "p_floor": statistics.sign_flip_floor(num_runs),
    }
    if own.contrasts:
        intervals = [statistics.t_interval(values, level) for values in own.contrasts]
        widest = max(intervals, key=lambda one: np.nan_to_num(max(abs(one[1]), abs(one[2]))))
        with np.errstate(over="ignore"):
            shown = [float(region.back(bound)) for bound in widest]
        names = ("estimate", "ci_low", "ci_high")
        row |= {n: None if np.isnan(v) else v for n, v in zip(names, shown, strict=True)}
    notes = [why, own.remark]
    if verdict != UNDECIDED and p_value < statistics.sign_flip_floor(num_runs):
        notes.append("p is below the floor of an exact sign-flip test")
    if len(found) > 1 and own.contrasts:
        other = {str(d): v for d, (v, _) in verdicts.items() if v != verdict}
        row["depends_on_definition"] = bool(other)
        listed = ", ".join(f"{v} under {d}" for d, v in other.items())
        notes.append(f"depends on the definition: {listed}" if other else "robust to definition")
    row["note"] = "; ".join(filter(None, notes))
    return row


def _verdict(claim: Claim, region: _Region, level: float, found: Evidence) -> tuple[str, str]:
    """Verdict and why."""
    if found.reason:
        return UNDECIDED, found.reason
    bounds = [statistics.t_interval(values, level)[1:] for values in found.contrasts]
    if all(region.low < low and high < region.high for low, high in bounds):
        return SUPPORTED, ""
    beyond = any(high < region.low or low > region.high for low, high in bounds)
    if not beyond:
        return UNDECIDED, "the interval reaches across the margin"
    if isinstance(claim, EquivalentClaim):
        return UNDECIDED, "the interval lies beyond the margin: the runs speak against the claim"
    return REFUTED, ""
