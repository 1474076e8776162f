"""A claim with all that the runs say on it, and the verdict that this amounts to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from rlsparse import statistics
from rlsparse.claim_config import Claim, OverlapClaim, RecoversClaim, ReproducesClaim
from rlsparse.claims.contrasts import MORE_SEEDS, Contrast, Evidence, Missing, Obstacle
from rlsparse.claims.evidence import Design, design, evidence
from rlsparse.claims.observations import Observations, Response
from rlsparse.claims.overlap_evidence import STRONGER, known_nulls, left_out_pairs
from rlsparse.claims.rules import Rule, misfit, rule
from rlsparse.claims.words import NUM_NAMED, interpolated, interval, number, scope
from rlsparse.definitions import DEFINITIONS
from rlsparse.effects.responses import FAILED
from rlsparse.effects.selection import ENDED, FINISHED
from rlsparse.identity import canonical_json
from rlsparse.study import MIN_SEEDS, StudyBase

SUPPORTED, REFUTED, UNDECIDED = "supported", "refuted", "undecided"
RERUN = "run the missing trials"
CONTRARY = "the interval lies beyond the margin: the runs speak against the claim"
NOTHING = "nothing in sight: the estimate lies beyond the margin, which never refutes"


@dataclass(frozen=True)
class Case:
    """A claim other than ``exact``, with the evidence on it.

    Attributes:
        selected: all runs that it is about, of any status.
        rule: None if the claim makes no sense.
        own: evidence under the claim's own definition, view and nulls.
        alternatives: under all others, by name.
        bounds: with stand-ins for missing runs, the lowest and the highest contrasts.
        lost: how many runs are missing, in words, or "".
    """

    study: StudyBase
    claim: Claim
    response: Response
    selected: pd.DataFrame
    rule: Rule | None
    own: Evidence
    alternatives: Mapping[str, Evidence]
    bounds: tuple[Evidence, ...] = ()
    lost: str = ""

    @property
    def p_value(self) -> float:
        """The level at which the claim would just be decided; nan where it cannot be."""
        if self.rule is None or self.own.obstacles:
            return float("nan")
        return min(self.rule.p_values(self.own.contrasts))

    def row(self, p_value: float, alpha: float, num_claims: int) -> dict[str, object]:
        """Row of table ``claims``, but for what is the same for all kinds.

        Args:
            p_value: adjusted.
            alpha: level of the claim's test, see ``statistics.holm_levels``.
            num_claims: size of the family.
        """
        contrasts = self.own.contrasts
        verdict, why = self._verdict(alpha)
        num_runs = min((one.num_units for one in contrasts), default=0)
        where = scope(self.study, self.selected, self.response.view, self.claim.at)
        row: dict[str, object] = {
            "statistic": self.claim.response,
            "scope": where,
            "verdict": verdict,
            "num_runs": num_runs,
            "would_decide": self._would_decide(verdict, why, alpha),
        }
        reading = ""
        if self.rule is not None:
            index = self.rule.decisive(contrasts) if contrasts else 0
            label = f" ({contrasts[index].label})" if contrasts and contrasts[index].label else ""
            level = self.rule.coverage(alpha, len(contrasts))
            row |= {
                "statistic": f"{self.rule.statistic}{label}{interpolated(self.claim.at)}; "
                f"t interval over seeds, Holm over {num_claims} claims",
                "margin": self.rule.margin,
                "ci_level": level,
                "p_value": None if np.isnan(p_value) else p_value,
                "p_floor": statistics.sign_flip_floor(num_runs),
            }
            if contrasts:
                shown = _reported(self.rule, contrasts[index], level)
                names = ("estimate", "ci_low", "ci_high")
                row |= {n: None if np.isnan(v) else v for n, v in zip(names, shown, strict=True)}
                if not np.isnan(shown[0]):
                    reading = f": {self.rule.quantity}{label} {interval(*shown)}"
        named = verdict + (
            f", as {why}" if verdict == UNDECIDED else self._recovery(verdict, alpha)
        )
        row["outcome"] = f"{named}{reading} ({where})"
        notes = ["" if self.lost and self.lost in why else self.lost, why, *self.own.remarks]
        notes += [self._both(alpha), self._prediction(), self._bounds()]
        floor = statistics.sign_flip_floor(num_runs)
        if verdict != UNDECIDED and p_value < floor:
            notes.append(f"rests on t: {num_runs} seeds give an exact test p {floor:g} at best")
        row |= self._robustness(verdict, alpha, notes)
        row["note"] = "; ".join(filter(None, notes))
        return row

    def _both(self, alpha: float) -> str:
        """All comparisons of a claim that recovers; the row has the numbers of one."""
        rule, contrasts = self.rule, self.own.contrasts
        if rule is None or len(contrasts) < 2 or not isinstance(self.claim, RecoversClaim):
            return ""
        level, shown = rule.coverage(alpha, len(contrasts)), contrasts[rule.decisive(contrasts)]
        each = [f"{c.label} {interval(*_reported(rule, c, level))}" for c in contrasts]
        return f"the estimate is of {shown.label}; {', '.join(each)}"

    def _verdict(self, alpha: float) -> tuple[str, str]:
        """The verdict, and why there is none."""
        if self.rule is None or self.own.obstacles:
            first = [CONTRARY] if self._contrary(alpha) else []
            whys = dict.fromkeys([*first, *(one.why for one in self.own.obstacles)])
            return UNDECIDED, "; ".join(whys)
        verdict = decide(self.rule, self.own, alpha)
        if verdict == UNDECIDED:
            return verdict, _across(self.rule, self.own.contrasts, alpha)
        worst = [decide(self.rule, one, alpha) for one in self.bounds]
        if set(worst) <= {verdict}:
            return verdict, ""
        return UNDECIDED, (
            f"depends on the missing runs: {verdict} without them, {worst[0]} and {worst[1]} with "
            "the lowest and the highest contrast that they could give"
        )

    def _would_decide(self, verdict: str, why: str, alpha: float) -> str | None:
        if verdict != UNDECIDED:
            return None
        if self.rule is None or self.own.obstacles:
            remedies = dict.fromkeys(one.remedy for one in self.own.obstacles)
            if RERUN not in remedies and self._contrary(alpha):
                return NOTHING
            return "; ".join(filter(None, remedies)) or None
        if why.startswith("depends on the missing"):
            return RERUN
        if self.rule.decides == "equivalent" and self._beyond():
            return NOTHING
        return self.rule.seeds_needed(self.own.contrasts, alpha)

    def _beyond(self) -> bool:
        """Whether the estimate that the verdict hangs on lies outside its region."""
        assert self.rule is not None
        index = self.rule.decisive(self.own.contrasts)
        region = self.rule.regions(self.own.contrasts)[index]
        return region.p_outside(self.own.contrasts[index]) < 1

    def _contrary(self, alpha: float) -> bool:
        """Whether runs speak against a claim that no runs refute."""
        if self.rule is None or self.rule.decides != "equivalent" or not self.own.contrasts:
            return False
        return _across(self.rule, self.own.contrasts, alpha) == CONTRARY

    def _recovery(self, verdict: str, alpha: float) -> str:
        """Which of its outcomes a decided claim of kind ``recovers`` has."""
        if not isinstance(self.claim, RecoversClaim) or self.rule is None:
            return ""
        if verdict == SUPPORTED:
            return ", recovers and specific"
        held = self.own.contrasts[0]
        if self.rule.first.p_outside(held) * len(self.own.contrasts) < alpha:
            return ", does not recover"
        if self.rule.first.p_inside(held) < alpha:
            return ", recovers but not specific"
        return ", not specific, and whether it recovers is open"

    def _prediction(self) -> str:
        """Where one further run would lie, beside a published single value."""
        if not isinstance(self.claim, ReproducesClaim) or self.rule is None:
            return ""
        for one in self.own.contrasts:
            low, high = one._replace(error=one.error * np.sqrt(one.num_units + 1)).interval(0.95)
            bounds = [number(self.rule.back(end)) for end in (low, high)]
            return f"95% prediction interval of one further run [{', '.join(bounds)}]"
        return ""

    def _bounds(self) -> str:
        if not self.bounds or self.rule is None:
            return ""
        index = self.rule.decisive(self.own.contrasts)
        ends = [_reported(self.rule, one.contrasts[index], 0.95)[0] for one in self.bounds]
        span = " to ".join(number(end) for end in sorted(ends))
        return f"with the missing runs at the extremes seen the estimate is {span}"

    def _robustness(self, verdict: str, alpha: float, notes: list[str]) -> dict[str, object]:
        """Columns on how the claim fares under the alternatives; says it in ``notes``, too."""
        rule = self.rule
        if rule is None or not self.alternatives:
            return {"alternatives": "{}"}
        verdicts = {name: decide(rule, one, alpha) for name, one in self.alternatives.items()}
        what = "null" if isinstance(self.claim, OverlapClaim) else "definition"
        other: dict[str, list[str]] = {}
        for name, found in verdicts.items():
            if found != verdict:
                other.setdefault(found, []).append(name)
        listed = [
            f"{found} under {', '.join(under[:NUM_NAMED])}"
            + (f" and {len(under) - NUM_NAMED} more" if len(under) > NUM_NAMED else "")
            for found, under in other.items()
        ]
        if other:
            notes.append(f"depends on the {what}: {'; '.join(listed)}")
        elif verdict != UNDECIDED:
            notes.append(f"robust to the {what}")
        return {"depends_on_definition": bool(other), "alternatives": canonical_json(verdicts)}


def decide(rule: Rule, found: Evidence, alpha: float) -> str:
    """The verdict at a level."""
    if found.obstacles:
        return UNDECIDED
    inside, outside = rule.p_values(found.contrasts)
    return SUPPORTED if inside < alpha else REFUTED if outside < alpha else UNDECIDED


def _across(rule: Rule, contrasts: Sequence[Contrast], alpha: float) -> str:
    """Why contrasts decide nothing."""
    index = rule.decisive(contrasts)
    region = rule.regions(contrasts)[index]
    level = rule.coverage(alpha, len(contrasts))
    if contrasts[index].error == 0 and region.nearest_edge(contrasts[index].estimate) == 0:
        return "all seeds lie exactly on the margin"
    if rule.decides == "any" or not region.p_outside(contrasts[index]) < 1 - level:
        return "the interval reaches across the margin"
    if rule.decides == "equivalent":
        return CONTRARY
    k = len(contrasts)
    return (
        f"one of {k} intervals lies beyond the margin, but not with coverage 1 - {alpha:.3g} / {k}"
    )


def _reported(rule: Rule, one: Contrast, level: float) -> tuple[float, float, float]:
    with np.errstate(over="ignore"):
        low, high = one.interval(level)
        return rule.back(one.estimate), rule.back(low), rule.back(high)


# --- gathering ---------------------------------------------------------------------------------


def make_case(seen: Observations, claim: Claim, *, allow_missing: bool) -> Case:
    """Gather the evidence on a claim other than ``exact``."""
    response = seen.parse(claim)
    wrong = misfit(claim, response)
    if wrong:
        selected = pd.concat(seen.sides(claim).values()).drop_duplicates("trial_id")
        return Case(seen.study, claim, response, selected, None, Evidence(obstacles=(wrong,)), {})
    found, its_rule = design(seen, claim), rule(claim, response)
    selected = found.selected

    def read(claim: Claim, response: Response, missing: Missing = Missing.LEFT_OUT) -> Evidence:
        return evidence(seen, claim, response, found, its_rule.scale, missing)

    own, lost = read(claim, response), _lost(selected, response)
    if lost:
        own = own._replace(obstacles=_completed(own.obstacles, selected))
    if lost and not allow_missing:
        refused = Obstacle(f"{lost}; --allow-missing judges the complete cases", RERUN)
        own = own._replace(obstacles=(refused, *own.obstacles))
        return Case(seen.study, claim, response, selected, its_rule, own, {}, lost=lost)
    bounds: tuple[Evidence, ...] = ()
    if lost and isinstance(claim, OverlapClaim):
        lost = f"{lost}: {left_out_pairs(seen, claim, found.pairs)}"
    elif lost and not own.obstacles:
        bounds = tuple(read(claim, response, end) for end in (Missing.LOW, Missing.HIGH))
    others = _alternatives(seen, claim, response, found) if own.contrasts else {}
    alternatives = {name: read(*other) for name, other in others.items()}
    return Case(seen.study, claim, response, selected, its_rule, own, alternatives, bounds, lost)


def _completed(obstacles: Sequence[Obstacle], selected: pd.DataFrame) -> tuple[Obstacle, ...]:
    """Obstacles of a claim that lacks runs: where all planned seeds would do, no more are asked."""
    enough = selected["seed"].nunique() >= MIN_SEEDS
    return tuple(
        one._replace(remedy=RERUN) if enough and one.remedy == MORE_SEEDS else one
        for one in obstacles
    )


def _lost(selected: pd.DataFrame, response: Response) -> str:
    """How many of the selected runs are missing, in words, or ""."""
    ended = selected["status"].isin(ENDED if response.kind == FAILED else FINISHED)
    if ended.all():
        return ""
    failed = int((selected.loc[~ended, "status"] == "failed").sum())
    return f"{int((~ended).sum())} of {len(selected)} runs are missing (failed {failed})"


def _alternatives(
    seen: Observations, claim: Claim, response: Response, found: Design
) -> dict[str, tuple[Claim, Response]]:
    """What the claim could have named instead: definitions and views, or nulls, by name."""
    if isinstance(claim, OverlapClaim):
        stronger = set.intersection(*(set(STRONGER[null]) for null in claim.nulls))
        return {
            null: (claim.model_copy(update={"null": null}), response)
            for null in known_nulls(seen, claim, response, found.pairs)
            if null in stronger and null not in claim.nulls
        }
    if response.kind != "sparsity":
        return {}
    views = dict.fromkeys([response.view, *seen.views])
    return {
        f"{definition}@{view}": (claim, response._replace(definition=definition, view=view))
        for view in views
        for definition in DEFINITIONS
        if (definition, view) != (response.definition, response.view)
    }
