"""What a study's runs say on each claim, before any verdict: one number per unit, or why not.

A new kind of claim gets its branch in ``evidence`` here, and its region in ``claims``.
"""

import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa

from rlsparse import effects, responses, selection
from rlsparse.claim_config import AboveNullClaim, At, Claim, EquivalentClaim, GreaterClaim
from rlsparse.identity import canonical_json
from rlsparse.levels import Scalar, level_label, tags_of
from rlsparse.selection import Pair
from rlsparse.statistics import Floats, jackknife, odds_unchanged, t_interval
from rlsparse.study import MIN_SEEDS, Study

NULLS = ("uniform", "tensor", "magnitude")
MAX_OVERLAP_DENSITY = 0.5
SENSITIVITY_LEVEL = 0.9
NUM_NAMED = 3
IDENTICAL = "identical_replicates"
KL_COEF = "algorithm.kl_coef"


class Response(NamedTuple):
    """A claim's response, taken apart.

    ``kind`` is sparsity, overlap, score_after, score_gain or identical_replicates.
    """

    kind: str
    definition: str | None
    view: str

    @property
    def name(self) -> str:
        """As in the response column of ``responses.responses``."""
        return f"{self.kind}.{self.definition}@{self.view}" if self.definition else self.kind


class Evidence(NamedTuple):
    """What the runs say under one definition.

    Attributes:
        contrasts: arrays of one value per unit; the claim is about the mean of each.
        reason: why there can be no verdict, or "".
        remark: what the reader should know besides.
    """

    contrasts: list[Floats]
    reason: str = ""
    remark: str = ""


@dataclass(frozen=True)
class Observations:
    """A study's tables, indexed for claims; made by ``observe``."""

    study: Study
    runs: pd.DataFrame
    responses: dict[str, pd.DataFrame]  # by trial; "" has no rows
    overlaps: dict[tuple[object, ...], pd.Series]  # by definition, view and the two runs
    identical: Mapping[str, bool]
    first_change: dict[str, float]  # by trial, step of the first snapshot with a changed weight
    cache: dict[tuple[str, str], pd.DataFrame] = field(default_factory=dict)

    def of(self, trial: str) -> pd.DataFrame:
        """Rows of ``responses.responses`` of one trial."""
        return self.responses.get(trial, self.responses[""])

    def snapshots(self, trial: str, response: str) -> pd.DataFrame:
        """See ``responses.snapshots``."""
        if (trial, response) not in self.cache:
            self.cache[trial, response] = responses.snapshots(self.of(trial), trial, response)
        return self.cache[trial, response]

    def column(self, trial: str, name: str) -> float:
        """A number of table ``trials``; nan where null."""
        return float(self.runs.loc[self.runs["trial_id"] == trial, name].iloc[0])

    def parse(self, claim: Claim) -> Response:
        """The claim's response, with the study's default view filled in."""
        name, _, view = claim.response.partition("@")
        kind, _, definition = name.partition(".")
        return Response(kind, definition or None, view or self.study.default_view)

    def sides(self, claim: Claim) -> list[pd.DataFrame]:
        """Runs of any status, one selection for each of ``selectors``."""
        return [selection.select(self.runs, one, claim.varied) for one in selectors(claim)]

    def selected(self, claim: Claim) -> pd.DataFrame:
        """All runs that a claim is about, of any status."""
        result: pd.DataFrame = pd.concat(self.sides(claim)).drop_duplicates("trial_id")
        return result


def observe(
    study: Study,
    trials: pa.Table,
    steps: pa.Table,
    tensor_deltas: pa.Table,
    overlaps: pa.Table,
    identical: Mapping[str, bool],
) -> Observations:
    """Index the tables of a study; the arguments are those of ``claims.judge``."""
    frame = responses.responses(trials, steps, tensor_deltas, study.default_view)
    bitwise = frame[frame["response"].str.startswith("sparsity.bitwise@")]
    changed = bitwise["step"].where(bitwise["numerator"] > 0, np.inf)
    pairs = overlaps.to_pandas()
    pairs = pairs[pairs["tensor"].isna() & pairs["module"].isna()]
    names = ["definition", "view", "trial_a", "step_a", "trial_b", "step_b"]
    keys = zip(*(pairs[name] for name in names), strict=True)
    return Observations(
        study,
        selection.with_configs(trials),
        {"": frame.iloc[:0], **{str(name): rows for name, rows in frame.groupby("trial_id")}},
        dict(zip(keys, (row for _, row in pairs.iterrows()), strict=True)),
        identical,
        {str(name): float(step.min()) for name, step in changed.groupby(bitwise["trial_id"])},
    )


def selectors(claim: Claim) -> list[dict[str, Scalar]]:
    """What selects the claim's runs: one selector, or one per side."""
    if isinstance(claim, GreaterClaim):
        return [{**claim.where, **claim.a}, {**claim.where, **claim.b}]
    if claim.response == IDENTICAL:
        return [{"control": "same_seed", **claim.where}]
    return [claim.where]


def evidence(seen: Observations, claim: Claim, response: Response) -> Evidence:
    """What the runs say on a claim (other than ``exact``) under one definition.

    Args:
        seen: the study's tables.
        claim: the claim.
        response: one that fits the claim.

    Returns:
        Contrasts on the scale of the claim's test: log odds of fractions, log ratios of densities,
        log(observed / expected) overlap.
    """
    sides = seen.sides(claim)
    for selector, runs in zip(selectors(claim), sides, strict=True):
        if runs.empty:
            return Evidence([], f"no run matches {canonical_json(selector)}")
    if isinstance(claim, EquivalentClaim):
        return _equivalent(seen, claim, response, sides[0])
    if isinstance(claim, AboveNullClaim):
        return _above_null(seen, claim, response, sides[0])
    scale = odds_unchanged if response.kind == "sparsity" else float
    if isinstance(claim, GreaterClaim):
        tags = tags_of(*claim.a, *claim.b) if set(claim.a) == set(claim.b) else []
        pairs = selection.matched_pairs(sides[0], sides[1], [*claim.a, *claim.b], tags)
        groups = selection.apart(pd.concat(sides), tags, pairs)
        return _joined(
            {
                name: _contrast(seen, claim.at, response, group, lambda a, b: scale(a) - scale(b))
                for name, group in groups.items()
            }
        )
    runs = sides[0][sides[0]["status"] == "finished"]
    columns = zip(runs["trial_id"], runs["seed"], runs["cell"], strict=True)
    pairs = [Pair(t, t, int(seed), canonical_json(cell)) for t, seed, cell in columns]
    return _contrast(seen, claim.at, response, pairs, lambda a, _: scale(a))


def _contrast(
    seen: Observations,
    at: At | None,
    response: Response,
    pairs: Sequence[Pair],
    value: Callable[[float, float], float] = operator.sub,
) -> Evidence:
    """One contrast: by seed, ``value`` of what ``_read`` gives for the two runs of a pair."""
    read = [_read_pair(seen, at, response, pair) for pair in pairs]
    values = selection.by_seed(pairs, [value(a, b) for a, b, _ in read])
    reason, remark = _completeness(values, [why for _, _, why in read])
    unmoved = _unmoved(seen, at, pairs) if response.kind == "sparsity" else ""
    return Evidence([values], "; ".join(filter(None, [unmoved, reason])), remark)


def _unmoved(seen: Observations, at: At | None, pairs: Sequence[Pair]) -> str:
    """Which runs trained without changing any weight in any view, or "".

    They are no evidence: what learned nothing, as GRPO without any reward, is not sparse.
    """
    end = at.step if at and at.step else np.finfo(np.float64).max
    trials = sorted({trial for pair in pairs for trial in pair[:2]})
    runs = seen.runs.set_index("trial_id").loc[trials]
    rates = [config["train"]["learning_rate"] for config in runs["config"]]
    still = [
        t for t, r in zip(trials, rates, strict=True) if r and seen.first_change.get(t, 0) > end
    ]
    if not still:
        return ""
    names = ", ".join(still[:NUM_NAMED]) + (", ..." if len(still) > NUM_NAMED else "")
    count = f"{len(still)} of the {len(trials)} runs changed no weight at all"
    return f"{count} (no signal, or all rounded away): {names}"


def _joined(parts: Mapping[str, Evidence]) -> Evidence:
    """Contrasts that must all hold; what is said of each bears its name, but for ``{}``."""
    reasons = [f"{n}: {p.reason}".removeprefix("{}: ") for n, p in parts.items() if p.reason]
    remarks = [f"{n}: {p.remark}".removeprefix("{}: ") for n, p in parts.items() if p.remark]
    contrasts = [values for part in parts.values() for values in part.contrasts]
    return Evidence(contrasts, "; ".join(reasons), "; ".join(remarks))


def _completeness(values: Floats, whys: Sequence[str]) -> tuple[str, str]:
    """Reason and remark for values by seed that come from as many readings as ``whys``."""
    counted = Counter(why for why in whys if why).items()
    missing = "; ".join(f"{why} ({number} of {len(whys)})" for why, number in sorted(counted))
    if values.size >= MIN_SEEDS:
        return "", missing
    few = f"{values.size} seeds with complete matched runs, {MIN_SEEDS} are needed"
    return f"{few}: {missing}" if missing else few, ""


def _read(
    seen: Observations, at: At | None, response: Response, trial: str
) -> tuple[float | None, str]:
    """Log density of a run, or its score on the scale of contrasts; None and why if missing."""
    if response.kind == "sparsity":
        return responses.density_at(seen.snapshots(trial, response.name), at)
    rows = seen.of(trial)
    rows = rows[rows["response"] == response.name]
    rows = rows[rows["step"] == at.step] if at else rows[rows["last"]]
    if rows.empty:
        return None, f"no {response.name}" + (f" at step {at.step}" if at else "")
    value = float(responses.scaled(rows)[0])
    return (None, "num_eval_problems is not known") if np.isnan(value) else (value, "")


def _read_pair(
    seen: Observations, at: At | None, response: Response, pair: Pair
) -> tuple[float, float, str]:
    nan = float("nan")
    if at and at.score == "common":
        runs = [seen.snapshots(trial, response.name) for trial in (pair.a, pair.b)]
        common = responses.common_score(*runs)
        if np.isnan(common):
            return nan, nan, "a run has no score"
        at = At(score=common)
    a, why_a = _read(seen, at, response, pair.a)
    b, why_b = (a, why_a) if pair.a == pair.b else _read(seen, at, response, pair.b)
    return (nan, nan, why_a or why_b) if a is None or b is None else (a, b, "")


# --- equivalent --------------------------------------------------------------------------------


def _equivalent(
    seen: Observations, claim: EquivalentClaim, response: Response, runs: pd.DataFrame
) -> Evidence:
    """One contrast per level of the factor against its reference, in each algorithm that has it."""
    factor = claim.factor
    if factor not in seen.study.factors:
        known = ", ".join(seen.study.factors) or "none"
        return Evidence([], f"the study does not vary {factor}; its factors: {known}")
    runs = runs[np.array([factor in cell for cell in runs["cell"]], bool)]
    reference = seen.study.reference_level(factor)
    present = {cell[factor] for cell in runs["cell"]}
    labels = dict.fromkeys(level_label(level) for level in seen.study.factors[factor])
    levels = [label for label in labels if label in present and label != reference]
    if not levels or reference not in present:
        return Evidence([], f"the selected runs do not vary {factor} from {reference}")
    tags, groups = tags_of(factor), dict[str, dict[str, list[Pair]]]()
    for level in levels:
        pairs = selection.factor_pairs(runs, factor, level, reference)
        for name, group in selection.apart(runs, tags, pairs).items():
            where = "" if name == "{}" else f" within {name}"
            groups.setdefault(name, {})[f"{factor} = {level}{where}"] = group
    each = {label: group for group_of in groups.values() for label, group in group_of.items()}
    found = _joined({k: _contrast(seen, claim.at, response, pairs) for k, pairs in each.items()})
    inert = {_inert(seen, claim, response, group_of) for group_of in groups.values()}
    reasons = [found.reason, *sorted(inert), _insensitive(seen, claim, response)]
    remarks = [found.remark, _unmeasured(seen, factor, each)]
    return Evidence(found.contrasts, *("; ".join(filter(None, x)) for x in (reasons, remarks)))


def _inert(
    seen: Observations,
    claim: EquivalentClaim,
    response: Response,
    pairs: Mapping[str, Sequence[Pair]],
) -> str:
    """Why the factor cannot be said to have acted, or ""."""
    every = [pair for group in pairs.values() for pair in group]
    read = [_read_pair(seen, claim.at, response, pair) for pair in every]
    read = [one for one in read if not one[2]]
    if read and all(a == b for a, b, _ in read):
        return (
            f"the factor did not act: runs at all its levels have exactly the same {response.name}"
        )
    if claim.factor == "train.max_grad_norm":
        trials = {trial for pair in every for trial in pair[:2]}
        if not any(seen.column(trial, "num_clipped_steps") > 0 for trial in trials):
            return "the factor did not act: no step of any run was clipped"
    if claim.factor == KL_COEF and not _unmeasured(seen, KL_COEF, pairs):
        for group in pairs.values():
            kl = [seen.column(p.a, "kl_final") - seen.column(p.b, "kl_final") for p in group]
            if set(np.sign(selection.by_seed(group, kl))) in ({1.0}, {-1.0}):
                return ""
        return "the factor did not act: no level moves the realised KL one way at every seed"
    return ""


def _unmeasured(seen: Observations, factor: str, pairs: Mapping[str, Sequence[Pair]]) -> str:
    """In how many runs the KL is missing that would show that the factor acted, or ""."""
    if factor != KL_COEF:
        return ""
    trials = {trial for group in pairs.values() for pair in group for trial in pair[:2]}
    missing = sum(np.isnan(seen.column(trial, "kl_final")) for trial in trials)
    return f"the realised KL was not measured in {missing} of {len(trials)} runs" if missing else ""


def _insensitive(seen: Observations, claim: EquivalentClaim, response: Response) -> str:
    """Why the study could not have seen an effect beyond the margin, or ""."""
    pairs = effects.control_pairs(seen.runs)
    if not pairs:
        return "no sign of sensitivity: no finished lr_times_3 control; add it to controls"
    found = _contrast(seen, claim.at, response, pairs)
    if found.reason:
        return f"no sign of sensitivity: lr_times_3: {found.reason}"
    mean, low, high = t_interval(found.contrasts[0], SENSITIVITY_LEVEL)
    edge = np.log(claim.margin)
    if low > edge or high < -edge:
        return ""
    return (
        f"not sensitive: three times the learning rate moves density by {np.exp(mean):.3g}, "
        f"{SENSITIVITY_LEVEL:.0%} interval {np.exp(low):.3g} to {np.exp(high):.3g}, not by more "
        f"than {claim.margin:g}"
    )


# --- above_null --------------------------------------------------------------------------------


def _above_null(
    seen: Observations, claim: AboveNullClaim, response: Response, runs: pd.DataFrame
) -> Evidence:
    """Log excess over the null, as jackknife pseudo-values of the mean over pairs.

    Pairs are dependent, as each run is in many; leaving out one seed with all its pairs at a time
    gives the standard error. With one cell that is leaving out one run. Counts get a continuity of
    .5, so that masks without common weights stay finite.
    """
    runs = runs[runs["status"] == "finished"]
    pairs = selection.run_pairs(runs, claim.between)
    if not pairs:
        return Evidence([], f"no two finished runs differ in {claim.between} alone")
    if claim.between.startswith("model"):
        return Evidence([], "masks of different bases have no weights in common to overlap in")
    rows = []
    for ends in pairs:
        keys = sorted(
            (run["trial_id"], claim.at.step if claim.at else run["num_steps"]) for run in ends
        )
        row = seen.overlaps.get((response.definition, response.view, *keys[0], *keys[1]))
        if row is None:
            return Evidence([], f"table overlaps lacks the pair {keys[0]}, {keys[1]}")
        rows.append(row)
    counts = pd.DataFrame(rows)
    units = [{int(run["seed"]) for run in ends} for ends in pairs]
    both = counts["num_both"].to_numpy(np.float64)
    expected = {null: counts[f"expected_{null}"].to_numpy(np.float64) for null in NULLS}
    excess = {null: np.log((both + 0.5) / (expected[null] + 0.5)) for null in NULLS}
    lifts = [f"{null} {np.exp(excess[null].mean()):.3g}" for null in NULLS]
    remark = f"null {claim.null}; lift over {len(pairs)} pairs by null: {', '.join(lifts)}"
    values = jackknife(excess[claim.null], units)
    smaller = counts[["num_a", "num_b"]].min(axis=1)
    reason = ""
    if (smaller == 0).any():
        reason = "a mask is empty, so nothing can overlap"
    elif (smaller > MAX_OVERLAP_DENSITY * counts["num_elements"]).any():
        reason = (
            f"both densities of a pair exceed {MAX_OVERLAP_DENSITY}: overlap is near its ceiling"
        )
    elif values.size < MIN_SEEDS:
        reason = f"{len(set().union(*units))} seeds with pairs, {MIN_SEEDS} are needed"
    return Evidence([values], reason, remark)
