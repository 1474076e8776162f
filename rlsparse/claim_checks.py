"""Finds in a study, before any training, what would leave its claims undecided after it."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rlsparse.claim_config import (
    AssociatedClaim,
    Claim,
    EquivalentClaim,
    ExactClaim,
    InteractionClaim,
    MonotoneClaim,
    OverlapClaim,
    ReproducesClaim,
    SidesClaim,
    WithinClaim,
)
from rlsparse.claims.observations import Response
from rlsparse.claims.overlap_evidence import UNDER_MASK
from rlsparse.claims.rules import misfit
from rlsparse.definitions import DEFINITIONS, MODULES, VIEWS
from rlsparse.effects.responses import VALIDATION
from rlsparse.errors import nearest
from rlsparse.levels import MASK, canonical_path, level_label, paths_of, touches, under_mask
from rlsparse.pair_runs import PairRun
from rlsparse.study import SURROGATES, StudyBase, StudyError, Trial, left_out
from rlsparse.variants import Location

_MEASURED = (
    "score_after",
    "score_gain",
    VALIDATION,
    "kl_final",
    "failed",
    *(f"sparsity.{name}" for name in DEFINITIONS),
)
_RESPONSES = (*_MEASURED, "identical_replicates", "overlap.bitwise")
_FRACTIONS = ("sparsity", "score_after", VALIDATION, "failed", "identical_replicates")
_COLUMNS = ("role", "control", "replicate")
_NUM_VALIDATION = "task.num_validation_problems"
_NOWHERE = object()


class _Planned(NamedTuple):
    """What selectors see of a trial."""

    role: str
    control: str | None
    replicate: int
    config: dict[str, Any]
    cell: dict[str, str]
    steps: tuple[int, ...]

    def matches(self, selector: Mapping[str, object], varied: str) -> bool:
        """Whether a claim's selector names it."""
        is_asked = self.role not in left_out(selector, varied)
        return is_asked and all(self.value(path) == value for path, value in selector.items())

    def value(self, path: str) -> Any:
        """What it has at a selector's path; ``_NOWHERE`` if it has no such path."""
        if path in _COLUMNS:
            return getattr(self, path)
        node: Any = self.config
        for part in canonical_path(path).split("."):
            if not isinstance(node, dict) or part not in node:
                return _NOWHERE
            node = node[part]
        return level_label(node) if canonical_path(path) == MASK and node is not None else node


def config_of(trial: Trial | PairRun) -> dict[str, Any]:
    """The configuration of a trial as nested dictionaries."""
    return trial.config if isinstance(trial, PairRun) else trial.config.model_dump(mode="json")


def _steps(trial: Trial | PairRun) -> tuple[int, ...]:
    """Steps of its snapshots."""
    return trial.steps if isinstance(trial, PairRun) else trial.config.snapshot_steps


def paths(trials: Sequence[Trial | PairRun]) -> list[str]:
    """Dotted paths of all fields that any trial has."""
    return sorted({path for trial in trials for path in paths_of(config_of(trial))})


def check_claims(study: StudyBase, trials: Sequence[Trial | PairRun]) -> None:
    """Check the names in claims, and that each of their selectors matches a planned trial.

    Raises:
        StudyError: a claim names what is not there; with the nearest name.
    """
    planned = [
        _Planned(t.role, t.control, t.replicate, config_of(t), t.cell, _steps(t)) for t in trials
    ]
    for index, pair in enumerate(study.interactions):
        for factor in pair:
            _check_factor(study, "interactions", factor, ("interactions", index))
        if pair[0] == pair[1]:
            raise StudyError(f"interactions: {pair[0]} with itself; name two factors").at(
                "interactions", index
            )
    for index, claim in enumerate(study.claims):
        here = ("claims", index)
        _check_response(claim, claim.response, _RESPONSES, (*here, "response"))
        if isinstance(claim, AssociatedClaim):
            _check_response(claim, claim.on, _MEASURED, (*here, "on"))
            on, response = (
                (name, view or study.default_view)
                for name, _, view in (text.partition("@") for text in (claim.on, claim.response))
            )
            if on == response:
                raise StudyError(
                    f"claims: {claim.id}: {claim.on} is the response itself, which any runs "
                    "support; name another response"
                ).at(*here, "on")
        if isinstance(claim, EquivalentClaim | MonotoneClaim | InteractionClaim):
            _check_factor(study, f"claims: {claim.id}", claim.factor, (*here, "factor"))
        if isinstance(claim, InteractionClaim):
            _check_factor(study, f"claims: {claim.id}", claim.by, (*here, "by"))
            if claim.factor == claim.by:
                raise StudyError(
                    f"claims: {claim.id}: {claim.by} cannot interact with itself; name two factors"
                ).at(*here, "by")
        if isinstance(claim, OverlapClaim):
            _check_overlap(study, claim, planned, here)
        _check_sides(claim, planned, here)
        _check_validation(claim, planned, here)
        if isinstance(claim, SidesClaim) and claim.tune is not None:
            _check_tuning(study, claim, claim.tune, planned, here)
        _check_numbers(claim, here)
        _check_varied(claim, planned, here)
        wrong = misfit(claim, Response.parse(claim.response, study.default_view))
        if wrong is not None:
            raise StudyError(f"claims: {claim.id}: {wrong.why}").at(*here)
        if isinstance(claim, EquivalentClaim):
            _check_sensitivity(study, claim, planned, here)
        if isinstance(claim, AssociatedClaim):
            _check_slopes(claim, planned, here)


def _check_response(claim: Claim, response: str, known: Sequence[str], place: Location) -> None:
    name, at, view = response.partition("@")
    if name not in known:
        raise StudyError(f"claims: {claim.id}: unknown response {name}; {nearest(name, known)}").at(
            *place
        )
    if at and view not in VIEWS:
        raise StudyError(f"claims: {claim.id}: unknown view {view}; {nearest(view, VIEWS)}").at(
            *place
        )


def _check_factor(study: StudyBase, who: str, factor: str, place: Location) -> None:
    if factor not in study.factors:
        hint = nearest(factor, list(study.factors)) if study.factors else "its factors: none"
        raise StudyError(
            f"{who} names the factor {factor}, which this study does not vary; {hint}"
        ).at(*place)


def _check_overlap(
    study: StudyBase, claim: OverlapClaim, planned: Sequence[_Planned], here: Location
) -> None:
    between = canonical_path(claim.between)
    factors = [factor for factor in study.factors if factor != MASK]
    if between != "seed" and not any(touches(canonical_path(f), between) for f in factors):
        known = ["seed", *factors]
        raise StudyError(
            f"claims: {claim.id}: runs do not differ in {claim.between}; "
            f"{nearest(claim.between, known)}"
        ).at(*here, "between")
    selected = [trial for trial in planned if trial.matches(claim.where, claim.varied)]
    if any(under_mask(trial.config) for trial in selected):
        raise StudyError(f"claims: {claim.id}: {UNDER_MASK.why}; {UNDER_MASK.remedy}").at(
            *here, "where"
        )
    if claim.module is not None and claim.module not in MODULES:
        raise StudyError(
            f"claims: {claim.id}: unknown module {claim.module}; {nearest(claim.module, MODULES)}"
        ).at(*here, "module")
    if "surrogate" in claim.nulls and not any(
        trial.role == "surrogate" or trial.value("algorithm.reward") in SURROGATES.values()
        for trial in planned
        if not under_mask(trial.config)
    ):
        raise StudyError(
            f"claims: {claim.id}: null surrogate needs runs whose reward carries no information; "
            f"add one of the controls {', '.join(SURROGATES)}, or the factor algorithm.reward"
        ).at(*here, "null")


def _check_sensitivity(
    study: StudyBase, claim: EquivalentClaim, planned: Sequence[_Planned], here: Location
) -> None:
    """A study that could not see an effect supports no equivalence."""
    if "lr_times_3" not in {*study.controls, *(trial.control for trial in planned)}:
        raise StudyError(
            f"claims: {claim.id}: equivalence needs a sign that the study can see an effect; add "
            "the control lr_times_3"
        ).at(*here)


def _check_slopes(claim: AssociatedClaim, planned: Sequence[_Planned], here: Location) -> None:
    """Slopes are taken over the runs of each seed, or over seeds of one run each."""
    selected = [trial for trial in planned if trial.matches(claim.where, claim.varied)]
    most = max(Counter(str(trial.value("seed")) for trial in selected).values(), default=0)
    if most == 2:  # of one, slopes are over seeds
        raise StudyError(
            f"claims: {claim.id}: no seed has the 3 runs that a slope takes; select runs of one "
            "cell, for a slope over seeds, or of three"
        ).at(*here)


def _check_sides(claim: Claim, planned: Sequence[_Planned], here: Location) -> None:
    chosen: dict[str, set[int]] = {}
    for side, selector in claim.sides.items():
        given = {"where": claim.where} | {side: getattr(claim, side)}
        for field, path, value in ((f, p, v) for f, of in given.items() for p, v in of.items()):
            _check_selector(claim.id, path, value, planned, (*here, field, path))
        places = {i for i, one in enumerate(planned) if one.matches(selector, claim.varied)}
        selected = [planned[i] for i in sorted(places)]
        if not selected:
            raise StudyError(f"claims: {claim.id}: no planned trial has {selector}").at(*here, side)
        for other, theirs in chosen.items():
            if both := places & theirs:
                raise StudyError(
                    f"claims: {claim.id}: {other} and {side} select {len(both)} runs in common; "
                    "say in both what tells them apart"
                ).at(*here, side)
        chosen[side] = places
        there = sorted({step for trial in selected for step in trial.steps})
        if claim.at is not None and claim.at.step is not None and claim.at.step not in there:
            raise StudyError(
                f"claims: {claim.id}: no selected trial has a snapshot at step {claim.at.step}; "
                f"there: {', '.join(map(str, there))}; further ones: probe.snapshots"
            ).at(*here, "at", "step")


def _check_validation(claim: Claim, planned: Sequence[_Planned], here: Location) -> None:
    """Runs whose validation scores a claim reads must have some."""
    texts = {"response": claim.response, "on": getattr(claim, "on", "")}
    fields = [field for field, text in texts.items() if text.partition("@")[0] == VALIDATION]
    fields += ["tune"] if getattr(claim, "tune", None) is not None else []
    for field, (side, selector) in itertools.product(fields, claim.sides.items()):
        selected = [trial for trial in planned if trial.matches(selector, claim.varied)]
        if any(trial.value(_NUM_VALIDATION) in (0, _NOWHERE) for trial in selected):
            raise StudyError(
                f"claims: {claim.id}: {field} asks for validation scores, which the runs of {side} "
                f"do not have; set {_NUM_VALIDATION} (runs made elsewhere have none)"
            ).at(*here, field)


def _check_tuning(
    study: StudyBase, claim: SidesClaim, tune: str, planned: Sequence[_Planned], here: Location
) -> None:
    """What is tuned must be a factor that no side fixes, at seeds that every side has."""
    _check_factor(study, f"claims: {claim.id}: tune", tune, (*here, "tune"))
    left: set[int] = set()
    for side, selector in claim.sides.items():
        selected = [trial for trial in planned if trial.matches(selector, claim.varied)]
        fixed = [path for path in selector if _is_part(path, tune)]
        if fixed and len({trial.cell.get(tune) for trial in selected}) < 2:
            field = side if fixed[0] in claim.given[side] else "where"
            raise StudyError(
                f"claims: {claim.id}: {field} fixes {tune}, which the claim tunes; leave "
                f"{fixed[0]} out of {field}"
            ).at(*here, field, fixed[0])
        seeds = sorted({int(trial.value("seed")) for trial in selected})
        left |= {*seeds} - {*claim.tuning_seeds}
        others = [str(seed) for seed in claim.tuning_seeds if seed not in seeds]
        if others:
            raise StudyError(
                f"claims: {claim.id}: tuning_seeds {', '.join(others)}: no such seeds; those of "
                f"{side}: {', '.join(map(str, seeds))}"
            ).at(*here, "tuning_seeds")
    if not left:
        raise StudyError(
            f"claims: {claim.id}: tuning_seeds are all seeds there are, which leaves none to "
            "compare; leave four or more out, or add seeds"
        ).at(*here, "tuning_seeds")


def _check_numbers(claim: Claim, here: Location) -> None:
    """Bounds in their order, and fractions between 0 and 1."""
    if isinstance(claim, WithinClaim):
        if claim.low >= claim.high:
            raise StudyError(
                f"claims: {claim.id}: low {claim.low:g} must be below high {claim.high:g}"
            ).at(*here, "low")
        name, value = "low", max(claim.low, 0.0)
    elif isinstance(claim, ReproducesClaim | ExactClaim):
        name, value = "value", claim.value
    else:
        return
    kind = claim.response.partition("@")[0].partition(".")[0]
    if kind in _FRACTIONS and not 0 <= value <= 1:
        raise StudyError(
            f"claims: {claim.id}: {name} {value:g} of {claim.response} is a fraction between 0 and "
            "1, not a percentage"
        ).at(*here, name)


def _check_varied(claim: Claim, planned: Sequence[_Planned], here: Location) -> None:
    """A claim's ``where`` must not fix what the claim is to compare."""
    if isinstance(claim, OverlapClaim):
        paths_compared = [canonical_path(claim.between)]
    elif isinstance(claim, InteractionClaim):
        paths_compared = [claim.factor, claim.by]
    elif isinstance(claim, EquivalentClaim | MonotoneClaim):
        paths_compared = [claim.factor]
    else:
        return
    selected = [trial for trial in planned if trial.matches(claim.where, claim.varied)]
    for path in paths_compared:
        fixed = [one for one in claim.where if _is_part(one, path)]
        levels = {trial.cell.get(path, str(trial.value(path))) for trial in selected}
        if fixed and len(levels) < 2:
            raise StudyError(
                f"claims: {claim.id}: where fixes {path}, in which the claim compares runs; leave "
                f"{fixed[0]} out of where"
            ).at(*here, "where", fixed[0])


def _is_part(path: str, factor: str) -> bool:
    """Whether a selector's path lies inside or around a factor, or is its algorithm or task."""
    named = canonical_path(path)
    return touches(named, factor) or touches(named, canonical_path(factor))


def _check_selector(
    claim_id: str, path: str, value: object, planned: Sequence[_Planned], place: Location
) -> None:
    values = [found for trial in planned if (found := trial.value(path)) is not _NOWHERE]
    if not values:
        fields = {name for trial in planned for name in paths_of(trial.config)}
        known = sorted([*fields, *_COLUMNS])
        raise StudyError(f"claims: {claim_id}: unknown selector {path}; {nearest(path, known)}").at(
            *place
        )
    if value not in values:
        there = ", ".join(sorted({str(found) for found in values}))
        raise StudyError(
            f"claims: {claim_id}: no planned trial has {path} {value}; there: {there}"
        ).at(*place)
