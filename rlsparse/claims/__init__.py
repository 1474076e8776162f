"""Verdicts: what a study's runs say about each of its claims.

The unit is the seed (runs that share one are averaged first); fractions are compared as log odds,
densities and KL as log ratios, overlaps as log(observed / expected); the interval is Student's t.
Which interval decides what is in ``rules``. Fewer than four seeds decide nothing. Sides may be
tuned first, on validation scores at seeds of their own (``tuning``).

Multiplicity: Holm over all claims but ``exact`` ones, undecidable ones counted as p = 1. A claim's
p value is the level at which it would just be decided, so that a verdict is reached exactly if the
Holm-adjusted p value, the one reported, is below .05. Post hoc claims are adjusted over all claims,
registered ones among themselves, so that adding claims later changes no registered verdict; claims
that were registered and dropped since count as p = 1 in both, so that dropping some gains nothing.

Missing runs: a claim about runs that did not finish is undecided. If they are allowed to be
missing, the seeds that are complete decide, unless the verdict changes when each missing value is
replaced by the smallest or the largest one seen on its side. Overlaps have no such worst case:
there only seeds enter whose runs all finished.

``p_floor`` is what an exact sign-flip test could reach at best with so many seeds; a p value below
it leans on the t distribution.
"""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from rlsparse import statistics, tables
from rlsparse.claim_config import ExactClaim
from rlsparse.claims.cases import REFUTED, SUPPORTED, UNDECIDED, Case, make_case
from rlsparse.claims.observations import IDENTICAL, Observations, Response, observe
from rlsparse.claims.rules import misfit
from rlsparse.claims.words import scope
from rlsparse.definitions import DEFINITIONS
from rlsparse.effects.responses import FAILED
from rlsparse.effects.selection import ENDED, FINISHED
from rlsparse.identity import canonical_json
from rlsparse.study import StudyBase

ALPHA = 0.05


def judge(
    study: StudyBase,
    registered: Mapping[str, str],
    trials: pa.Table,
    steps: pa.Table,
    changes: pa.Table,
    overlaps: pa.Table,
    *,
    allow_missing: bool,
    num_dropped: int = 0,
) -> pa.Table:
    """Give every claim of a study its verdict.

    Args:
        study: the study.
        registered: claim id -> ``registered``, ``post hoc`` or ``extended``; an absent claim is
            post hoc.
        trials: table of that name, with the column ``config``.
        steps: table of that name.
        changes: table of that name.
        overlaps: table of that name.
        allow_missing: judge claims about runs of which some did not finish by the complete seeds.
        num_dropped: tested claims that were registered, but are not among the study's any more.

    Returns:
        Table ``claims`` in the order of the study. Estimate, interval and margin are on the scale
        of the report: the response's own for means, ratios (odds ratios of fractions) or plain
        differences for contrasts, lifts for overlaps; of several contrasts, those of the one that
        the verdict hangs on. ``num_runs`` counts the units: seeds, or runs for ``exact``.
        ``depends_on_definition`` is whether any of ``alternatives`` has another verdict: other
        definitions and views, or stronger nulls; null where there are none.
    """
    seen = observe(study, trials, steps, changes, overlaps)
    status = {claim.id: registered.get(claim.id, "post hoc") for claim in study.claims}
    cases: list[Case] = [
        make_case(seen, claim, allow_missing=allow_missing)
        for claim in study.claims
        if not isinstance(claim, ExactClaim)
    ]
    p_values = {case.claim.id: case.p_value for case in cases}
    confirmed = {name: p for name, p in p_values.items() if status[name] != "post hoc"}
    adjusted = _holm(p_values, num_dropped) | _holm(confirmed, num_dropped)
    tested = {case.claim.id: case.row(*adjusted[case.claim.id]) for case in cases}
    rows = []
    for claim in study.claims:
        row = _exact(seen, claim) if isinstance(claim, ExactClaim) else tested[claim.id]
        row |= {"id": claim.id, "source": claim.source, "kind": claim.kind}
        row |= {"registered": status[claim.id]}
        row["note"] = "; ".join(filter(None, [str(row["note"]), claim.note]))
        rows.append(row)
    return tables.from_rows(rows, "claims")


def _holm(p_values: Mapping[str, float], num_dropped: int) -> dict[str, tuple[float, float, int]]:
    """Per claim its adjusted p value, the level of its interval, and the size of the family."""
    given = [*p_values.values(), *[1.0] * num_dropped]
    adjusted, levels = statistics.holm(given), statistics.holm_levels(given, ALPHA)
    return {
        name: (float(p), float(level), len(given))
        for name, p, level in zip(p_values, adjusted, levels, strict=False)
    }


# --- exact -------------------------------------------------------------------------------------


def _exact(seen: Observations, claim: ExactClaim) -> dict[str, object]:
    """Supported if every selected run finished with the value; refuted if any has another."""
    response, selected = seen.parse(claim), seen.sides(claim)["where"]
    ended = selected["status"].isin(ENDED if response.kind == FAILED else FINISHED)
    finished = list(selected.loc[ended, "trial_id"])
    names = DEFINITIONS if response.kind == "sparsity" else ()
    definitions = dict.fromkeys([response.definition, *names])
    values = {
        d: [_value(seen, claim, response._replace(definition=d), trial) for trial in finished]
        for d in definitions
    }
    own = [value for value in values[response.definition] if not np.isnan(value)]
    differs = [d for d, row in values.items() if any(v != claim.value and v == v for v in row)]
    wrong = misfit(claim, response)
    verdict, note, remedy = UNDECIDED, "", "run the missing trials"
    if wrong:
        note, remedy = wrong
    elif selected.empty:
        note, remedy = f"no run matches {canonical_json(claim.sides['where'])}", "runs that match"
    elif differs:
        verdict, note = REFUTED, f"differs under {', '.join(map(str, differs))}" if names else ""
    elif len(finished) < len(selected):
        note = "a selected run did not finish"
    elif len(own) < len(finished):
        note = f"{response.name} was measured in {len(own)} of {len(finished)} runs"
        remedy = f"{response.name} of every run"
    else:
        verdict = SUPPORTED
    lost = len(selected) - len(finished)
    count = f"{len(selected)} runs planned, {len(finished)} finished" if lost else ""
    others = {
        d: REFUTED if d in differs else verdict for d in definitions if d != response.definition
    }
    where = scope(seen.study, selected, response.view, claim.at)
    why = f", as {note}" if note else ""
    return {
        "statistic": f"{response.name} is exactly {claim.value:g} in every run",
        "scope": where,
        "verdict": verdict,
        "outcome": f"{verdict}{why}: {response.name} is {claim.value:g} in "
        f"{sum(value == claim.value for value in own)} of {len(selected)} runs ({where})",
        "estimate": float(np.mean(own)) if own else None,
        "num_runs": len(own),
        "depends_on_definition": 0 < len(differs) < len(definitions) if names else None,
        "alternatives": canonical_json({f"{d}@{response.view}": v for d, v in others.items()}),
        "would_decide": remedy if verdict == UNDECIDED else None,
        "note": "; ".join(filter(None, [count, note])),
    }


def _value(seen: Observations, claim: ExactClaim, response: Response, trial: str) -> float:
    """What a finished run has; nan where it was not measured."""
    if response.kind == IDENTICAL:
        return seen.number(trial, "identical")
    return seen.read(trial, response, claim.at, "identity")[0]
