"""Whether runs can show that a factor does nothing: it acted, and the study would have seen it."""

from collections.abc import Mapping, Sequence

import numpy as np

from rlsparse.claim_config import EquivalentClaim
from rlsparse.claims.contrasts import Evidence, Item, Obstacle, Reader, contrast, joined
from rlsparse.effects import selection
from rlsparse.effects.selection import Pair

SENSITIVITY_LEVEL = 0.9
KL_COEF = "algorithm.kl_coef"
OTHER_LEVELS = "levels that make the factor act"


def equivalent(
    reader: Reader, claim: EquivalentClaim, groups: Mapping[str, Mapping[str, Sequence[Item]]]
) -> Evidence:
    """One contrast per level of the factor against its reference, in each algorithm that has it.

    Args:
        reader: how to read runs.
        claim: the claim.
        groups: by what must not be pooled, then by level: matched pairs.
    """
    each = {label: items for group in groups.values() for label, items in group.items()}
    found = joined({label: contrast(reader, items, label) for label, items in each.items()})
    inert = {_inert(reader, claim, group) for group in groups.values()} - {""}
    every = [item for items in each.values() for item in items]
    return Evidence(
        found.contrasts,
        (
            *found.obstacles,
            *(Obstacle(why, OTHER_LEVELS) for why in sorted(inert)),
            *_insensitive(reader, claim),
        ),
        (*found.remarks, *_unmeasured(reader, claim.factor, every)),
    )


def _inert(reader: Reader, claim: EquivalentClaim, groups: Mapping[str, Sequence[Item]]) -> str:
    """Why the factor cannot be said to have acted, or ""."""
    seen, every = reader.seen, [item for items in groups.values() for item in items]
    values, _ = reader.values(every)
    values = values[~np.isnan(values)]
    if values.size and not values.any():
        name = reader.response.name
        return f"the factor did not act: runs at all its levels have exactly the same {name}"
    if claim.factor == "train.max_grad_norm":
        trials = {trial for item in every for trial in item.trials}
        if not any(seen.number(trial, "num_clipped_steps") > 0 for trial in trials):
            return "the factor did not act: no step of any run was clipped"
    if claim.factor == KL_COEF and not _unmeasured(reader, KL_COEF, every):
        for items in groups.values():
            kl = [
                seen.number(item.plus[0], "kl_final") - seen.number(item.minus[0], "kl_final")
                for item in items
            ]
            pairs = [Pair("", "", item.seed, item.within) for item in items]
            if set(np.sign(selection.by_seed(pairs, kl))) in ({1.0}, {-1.0}):
                return ""
        return "the factor did not act: no level moves the realised KL one way at every seed"
    return ""


def _unmeasured(reader: Reader, factor: str, items: Sequence[Item]) -> list[str]:
    """In how many runs the KL is missing that would show that the factor acted."""
    if factor != KL_COEF:
        return []
    seen = reader.seen
    trials = {trial for item in items for trial in item.trials if seen.finished(trial)}
    missing = sum(np.isnan(seen.number(trial, "kl_final")) for trial in trials)
    said = f"the realised KL was not measured in {missing} of {len(trials)} runs"
    return [said] if missing else []


def _insensitive(reader: Reader, claim: EquivalentClaim) -> list[Obstacle]:
    """Why the study could not have seen an effect beyond the margin."""
    add = "add the control lr_times_3"
    pairs = reader.seen.controls
    if not pairs:
        why = "no sign of sensitivity: no finished lr_times_3 control; add it to controls"
        return [Obstacle(why, add)]
    items = [Item(pair.seed, pair.within, (pair.a,), (pair.b,)) for pair in pairs]
    found = contrast(reader, items)
    if found.obstacles:
        return [
            Obstacle(
                f"no sign of sensitivity: lr_times_3: {one.why}",
                one.remedy and f"for the control lr_times_3, {one.remedy}",
            )
            for one in found.obstacles
        ]
    moved, edge = found.contrasts[0], np.log(claim.margin)
    low, high = moved.interval(SENSITIVITY_LEVEL)
    if low > edge or high < -edge:
        return []
    why = (
        "not sensitive: three times the learning rate moves density by "
        f"{np.exp(moved.estimate):.3g}, {SENSITIVITY_LEVEL:.0%} interval {np.exp(low):.3g} to "
        f"{np.exp(high):.3g}, not by more than {claim.margin:g}"
    )
    return [Obstacle(why, "a setting in which the learning rate moves density by more")]
