"""The rules of the kinds of claims: where each holds, and what follows from contrasts.

A claim names a region for each of its contrasts and says that all lie inside. It is supported at
level a if the t interval of each, of coverage 1 - a, lies inside (no correction: all must), and
refuted if the interval of some of its k contrasts, of coverage 1 - a / k, lies outside (Bonferroni:
any will do). ``equivalent`` uses 1 - 2 a (two one-sided tests) and is never refuted.
``interaction`` says that some contrast lies outside, each at a / k.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from scipy import special

from rlsparse.claim_config import (
    AssociatedClaim,
    BelowNullClaim,
    Claim,
    EquivalentClaim,
    ExactClaim,
    GreaterClaim,
    InteractionClaim,
    MonotoneClaim,
    OverlapClaim,
    RecoversClaim,
    ReproducesClaim,
    WithinClaim,
)
from rlsparse.claims.contrasts import Contrast, Obstacle
from rlsparse.claims.observations import IDENTICAL, Response
from rlsparse.definitions import DEFINITIONS
from rlsparse.effects.responses import VALIDATION, Scale, scale_of

MAX_SEEDS = 200
DEFAULT_RATIO, DEFAULT_DIFFERENCE = 1.25, 0.02

Back = Callable[[float], float]
"""From the scale of a test to that of the report."""


def _exp(value: float) -> float:
    return float(np.exp(value))


def _expit(value: float) -> float:
    return float(special.expit(value))


_RATIOS: dict[Scale, Back] = {"log": _exp, "identity": float, "log_odds": _exp}
_MEANS: dict[Scale, Back] = {**_RATIOS, "log_odds": _expit}
_SHORT: dict[Scale, str] = {"log_odds": "odds ratio", "log": "ratio", "identity": "difference"}
_WORDS = {
    "sparsity": "unchanged weights",
    "score_after": "solved problems",
    "score_gain": "the gain in score",
    VALIDATION: "solved validation problems",
    "kl_final": "the KL to the base",
    "failed": "the share of failed runs",
}


class Region(NamedTuple):
    """Where a contrast should lie, on the scale of its test; below ``fails_below`` it does not.

    ``closed``: the edges are part of it, which matters to contrasts without any spread.
    """

    low: float = -np.inf
    high: float = np.inf
    fails_below: float | None = None
    closed: bool = False

    def p_inside(self, contrast: Contrast) -> float:
        """The level at which the interval would just lie inside."""
        if self.closed and contrast.error == 0 and self.low <= contrast.estimate <= self.high:
            return 0.0
        if not self.low < contrast.estimate < self.high:
            return 1.0
        edges = [edge for edge in (self.low, self.high) if np.isfinite(edge)]
        return max((contrast.p_value(edge) for edge in edges), default=0.0)

    def p_outside(self, contrast: Contrast) -> float:
        """The level at which it would just lie outside."""
        low = self.low if self.fails_below is None else self.fails_below
        if low <= contrast.estimate <= self.high:
            return 1.0
        return contrast.p_value(low if contrast.estimate < low else self.high)

    def nearest_edge(self, estimate: float) -> float:
        """Distance from an estimate to the edge that is in the way."""
        return float(min(abs(estimate - edge) for edge in (self.low, self.high)))


@dataclass(frozen=True)
class Rule:
    """What a claim says of its contrasts.

    Attributes:
        scale: how runs are read.
        back: to the scale of the report.
        quantity: what the estimate is, in words.
        statistic: the same with the response's name and how it is compared.
        first: region of the first contrast.
        others: region of all others.
        decides: what the contrasts say: ``all`` lie inside, ``equivalent``, or ``any`` outside.
        margin: of the claim, on the scale of the report, its default filled in.
    """

    scale: Scale
    back: Back
    quantity: str
    statistic: str
    first: Region
    others: Region
    decides: Literal["all", "equivalent", "any"] = "all"
    margin: float | None = None

    def regions(self, contrasts: Sequence[Contrast]) -> list[Region]:
        """The region of each contrast."""
        return [self.others if index else self.first for index in range(len(contrasts))]

    def p_values(self, contrasts: Sequence[Contrast]) -> tuple[float, float]:
        """Levels at which the claim would just be supported, and just be refuted."""
        each = list(zip(self.regions(contrasts), contrasts, strict=True))
        inside = max(region.p_inside(one) for region, one in each)
        outside = min(1.0, len(each) * min(region.p_outside(one) for region, one in each))
        if self.decides == "equivalent":
            return (inside / 2 if inside < 1 else 1.0), 1.0
        return (
            (inside, outside) if self.decides == "all" else (outside, min(1.0, len(each) * inside))
        )

    def coverage(self, alpha: float, num_contrasts: int) -> float:
        """Coverage of the intervals that are shown at a level."""
        factor = {"all": 1.0, "equivalent": 2.0, "any": 1 / max(1, num_contrasts)}[self.decides]
        return 1 - alpha * factor

    def decisive(self, contrasts: Sequence[Contrast]) -> int:
        """Which contrast the verdict hangs on: the one farthest outside, or least inside."""
        each = list(zip(self.regions(contrasts), contrasts, strict=True))
        outside = [region.p_outside(one) for region, one in each]
        if min(outside) < 1:
            return int(np.argmin(outside))
        return int(np.argmax([region.p_inside(one) for region, one in each]))

    def seeds_needed(self, contrasts: Sequence[Contrast], alpha: float) -> str:
        """How many seeds would bring the decisive interval clear of the edge in its way."""
        index = self.decisive(contrasts)
        one, region = contrasts[index], self.regions(contrasts)[index]
        k = len(contrasts) if region.p_outside(one) < 1 or self.decides == "any" else 1
        level = alpha * (2 if self.decides == "equivalent" else 1) / k
        lost = one.num_units - one.df
        n = np.arange(lost + 1, MAX_SEEDS + 1)
        quantile = special.stdtrit(n - lost, 1 - level / 2)
        half = quantile * one.error * np.sqrt(one.num_units / n)
        enough = n[half < region.nearest_edge(one.estimate)]
        if not enough.size:
            return f"more than {MAX_SEEDS} seeds: the estimate lies at the margin"
        return f"about {enough[0]} seeds, if the spread stays"


# --- kinds -------------------------------------------------------------------------------------


def rule(claim: Claim, response: Response) -> Rule:
    """The rule of a claim that ``misfit`` has nothing against.

    Raises:
        TypeError: a kind that has none, such as ``exact``.
    """
    scale = scale_of(response.name)
    short, of, ratio = _SHORT[scale], _WORDS.get(response.kind, ""), scale != "identity"
    if isinstance(claim, WithinClaim | ReproducesClaim):
        return _mean(claim, response, scale)
    if isinstance(claim, OverlapClaim):
        return _overlap(claim, response)
    if isinstance(claim, EquivalentClaim):
        edge = float(np.log(claim.margin))
        region = Region(-edge, edge)
        said = f"density ratio by {claim.factor}, {response.name}, two one-sided tests"
        named = f"density ratio by {claim.factor}"
        return Rule("log", _exp, named, said, region, region, "equivalent", claim.margin)
    if isinstance(claim, RecoversClaim):
        goal = f"a minus b above -{claim.margin:g}, a minus random above 0"
        said = f"difference of {response.name}, {goal}"
        held, beaten = Region(-claim.margin), Region(0.0, fails_below=claim.margin)
        named = "difference in score"
        return Rule("identity", float, named, said, held, beaten, margin=claim.margin)
    if isinstance(claim, GreaterClaim):
        margin = claim.margin if claim.margin is not None else float(ratio)
        region = Region(float(np.log(margin)) if ratio else margin)
        said = f"{short} of {response.name}, a {'over' if ratio else 'minus'} b"
        named = f"{short} of {of}"
        return Rule(scale, _RATIOS[scale], named, said, region, region, margin=margin)
    if isinstance(claim, MonotoneClaim):
        region = Region(0.0) if claim.direction == "increasing" else Region(high=0.0)
        said = f"{short} of {response.name} from each level to the next, all {claim.direction}"
        return Rule(scale, _RATIOS[scale], f"{short} of {of}", said, region, region)
    if isinstance(claim, InteractionClaim):
        default = DEFAULT_RATIO if ratio else DEFAULT_DIFFERENCE
        margin = claim.margin if claim.margin is not None else default
        edge = float(np.log(margin)) if ratio else margin
        region, two = Region(-edge, edge), f"{'ratio' if ratio else 'difference'} of the {short}s"
        said = f"{two} of {response.name} by {claim.factor} over {claim.by}"
        named = f"{two} of {of}"
        return Rule(scale, _RATIOS[scale], named, said, region, region, "any", margin)
    if isinstance(claim, AssociatedClaim):
        positive = claim.sign == "positive"
        region = Region(claim.margin) if positive else Region(high=-claim.margin)
        said = f"slope of {response.name} on {claim.on}, both on the scale of their contrasts"
        named = f"slope of {response.name} on {claim.on}"
        return Rule(scale, float, named, said, region, region, margin=claim.margin)
    raise TypeError(f"claim {claim.id} of kind {claim.kind} has no region")


def _mean(claim: WithinClaim | ReproducesClaim, response: Response, scale: Scale) -> Rule:
    """Rule of a claim about a mean, whose edges are on the response's own scale."""
    if isinstance(claim, WithinClaim):
        edges, margin = np.array([claim.low, claim.high]), None
    else:
        edges, margin = claim.value + claim.margin * np.array([-1.0, 1.0]), claim.margin
    said = f"mean of {response.name}, inside [{edges[0]:g}, {edges[1]:g}]"
    if scale == "log_odds":
        edges = special.logit(np.clip(edges, 0.0, 1.0))
    elif scale == "log":
        with np.errstate(divide="ignore"):
            edges = np.log(np.maximum(edges, 0.0))
    region = Region(float(edges[0]), float(edges[1]), closed=True)
    named = f"mean of {response.name}"
    return Rule(scale, _MEANS[scale], named, said, region, region, margin=margin)


def _overlap(claim: OverlapClaim, response: Response) -> Rule:
    edge = float(np.log(claim.margin))
    region = Region(high=-edge) if isinstance(claim, BelowNullClaim) else Region(edge)
    part = claim.tensor or claim.module
    of = f"{response.name} in {part}" if part else response.name
    nulls = " and ".join(claim.nulls)
    said = f"lift over the {nulls} null between {claim.between}, {of}, jackknife"
    named = f"lift of the overlap{f' in {part}' if part else ''} over the {nulls} null"
    return Rule("identity", _exp, named, said, region, region, margin=claim.margin)


# --- what a claim may be about -----------------------------------------------------------------


def misfit(claim: Claim, response: Response) -> Obstacle | None:
    """Why a kind of claim cannot be about its response, or read it where it says."""
    why = (
        _wrong_response(claim, response)
        or _wrong_place(claim, response)
        or _wrong_margin(claim, response)
    )
    return Obstacle(why, "mend the claim") if why else None


def _wrong_response(claim: Claim, response: Response) -> str:
    kinds: tuple[str, ...] = tuple(_WORDS)
    if isinstance(claim, ExactClaim):
        kinds = (*kinds, IDENTICAL)
    elif isinstance(claim, EquivalentClaim):
        kinds = ("sparsity",)
    elif isinstance(claim, RecoversClaim):
        kinds = ("score_after", "score_gain", VALIDATION)
    elif isinstance(claim, OverlapClaim):
        kinds = ("overlap",)
    known = {"sparsity": DEFINITIONS, "overlap": ("bitwise",)}.get(response.kind, (None,))
    if response.kind in kinds and response.definition in known:
        return ""
    return (
        f"a claim of kind {claim.kind} cannot be about {claim.response}: it takes "
        f"{', '.join(kinds)}; sparsity under {', '.join(DEFINITIONS)}, overlap under bitwise"
    )


def _wrong_place(claim: Claim, response: Response) -> str:
    at = claim.at
    if at is None or at.step is not None:
        return ""
    name, value = ("score", at.score) if at.score is not None else ("kl", at.kl)
    on = (
        Response.parse(claim.on, "stored").kind
        if isinstance(claim, AssociatedClaim)
        else "sparsity"
    )
    if response.kind != "sparsity" or on != "sparsity" or isinstance(claim, ExactClaim):
        return f"at.{name} interpolates density, which {claim.kind} {response.kind} cannot use"
    single = WithinClaim | ReproducesClaim | AssociatedClaim
    if value == "common" and isinstance(claim, single):
        return f"at.{name} common is of pairs of runs; a claim of kind {claim.kind} needs a number"
    return ""


def _wrong_margin(claim: Claim, response: Response) -> str:
    if not isinstance(claim, GreaterClaim | InteractionClaim) or claim.margin is None:
        return ""
    ratio = scale_of(response.name) != "identity"
    least = 1.0 if ratio and isinstance(claim, InteractionClaim) else 0.0
    if claim.margin > least or (isinstance(claim, GreaterClaim) and not ratio):
        return ""
    kind = "an odds ratio" if scale_of(response.name) == "log_odds" else "a ratio"
    kind = kind if ratio else "a difference"
    return f"margin {claim.margin:g} of {response.name} is {kind}, must be above {least:g}"
