"""What a study's runs say on each claim, before any verdict.

``design`` finds the runs that a claim compares, ``evidence`` reads them: under the claim's own
definition and, for how robust a verdict is, under all others. A new kind of claim gets its branch
in both, and its region in ``rules``.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from rlsparse.claim_config import (
    AssociatedClaim,
    Claim,
    EquivalentClaim,
    ExactClaim,
    InteractionClaim,
    MonotoneClaim,
    OverlapClaim,
    RecoversClaim,
    ReproducesClaim,
    SidesClaim,
    WithinClaim,
)
from rlsparse.claims.contrasts import (
    MORE_SEEDS,
    Contrast,
    Evidence,
    Item,
    Missing,
    Obstacle,
    Reader,
    contrast,
    joined,
    unmoved,
)
from rlsparse.claims.equivalence import equivalent
from rlsparse.claims.observations import Observations, Response
from rlsparse.claims.overlap_evidence import UNDER_MASK, Ends, overlap_evidence, overlap_pairs
from rlsparse.claims.tuning import Tuned, tuned
from rlsparse.effects import selection
from rlsparse.effects.responses import Scale, scale_of
from rlsparse.effects.selection import Pair
from rlsparse.identity import canonical_json
from rlsparse.levels import ordered_labels, tags_of, under_mask
from rlsparse.statistics import Floats
from rlsparse.study import MIN_SEEDS

MIN_RUNS_OF_SLOPE = 3
MEND = "mend the claim"
PLANNED = ("planned", "running", "finished", "failed")
"""All runs are matched: one that did not finish is a value that is missing."""

Groups = dict[str, dict[str, list[Item]]]
"""Items by what must not be pooled (JSON; ``{}`` for nothing), then by contrast."""


class Design(NamedTuple):
    """The runs that a claim compares.

    Attributes:
        selected: all runs that it is about, of any status.
        groups: matched runs of any status; of ``associated`` single runs.
        pairs: of overlap claims.
        obstacles: why there is nothing to compare.
        remarks: how the runs were chosen.
    """

    selected: pd.DataFrame
    groups: Groups
    pairs: Sequence[Ends] = ()
    obstacles: tuple[Obstacle, ...] = ()
    remarks: tuple[str, ...] = ()


# --- which runs --------------------------------------------------------------------------------


def design(seen: Observations, claim: Claim) -> Design:
    """Find the runs that a claim compares; see ``Design``."""
    sides = seen.sides(claim)
    selected = pd.concat(sides.values()).drop_duplicates("trial_id")
    for side, runs in sides.items():
        if runs.empty:
            why = f"no run matches {canonical_json(claim.sides[side])}"
            return Design(selected, {}, obstacles=(Obstacle(why, "runs that match"),))
    if isinstance(claim, OverlapClaim):
        if selected["config"].map(under_mask).any():
            return Design(selected, {}, obstacles=(UNDER_MASK,))
        return Design(selected, {}, overlap_pairs(seen, claim))
    if isinstance(claim, EquivalentClaim | MonotoneClaim | InteractionClaim):
        return _of_levels(seen, claim, selected)
    if isinstance(claim, SidesClaim):
        return _of_sides(claim, tuned(seen.study, claim, sides))
    runs = selected
    columns = zip(runs["trial_id"], runs["seed"], runs["cell"], strict=True)
    alone = [Item(int(seed), canonical_json(cell), (trial,)) for trial, seed, cell in columns]
    return Design(selected, {"{}": {"{}": alone}})


def _of_sides(claim: SidesClaim, found: Tuned) -> Design:
    """``a`` against the other sides, each at its tuned level if it is tuned."""
    sides, groups = found.sides, {}
    selected = pd.concat(sides.values()).drop_duplicates("trial_id")
    if isinstance(claim, RecoversClaim):
        groups = {"{}": _against_random(claim, sides)}
    else:
        tags = tags_of(*claim.a, *claim.b) if set(claim.a) == set(claim.b) else []
        pairs = selection.matched_pairs(sides["a"], sides["b"], claim.compared, tags, PLANNED)
        apart = selection.apart(selected, tags, pairs)
        groups = {name: {name: _items(of)} for name, of in apart.items()}
    return Design(selected, groups, obstacles=found.obstacles, remarks=found.remarks)


def _items(pairs: Sequence[Pair]) -> list[Item]:
    return [Item(pair.seed, pair.within, (pair.a,), (pair.b,)) for pair in pairs]


def _against_random(
    claim: RecoversClaim, sides: Mapping[str, pd.DataFrame]
) -> dict[str, list[Item]]:
    """``a`` against ``b``, then against each cell of ``random``."""

    def matched(a: pd.DataFrame, b: pd.DataFrame) -> list[Item]:
        return _items(selection.matched_pairs(a, b, claim.compared, statuses=PLANNED))

    random = sides["random"]
    cells = random["cell"].map(canonical_json)
    of_cell = dict(zip(cells, random["cell"], strict=True))
    paths = {path for cell in of_cell.values() for path in cell}
    differ = {p for p in paths if len({cell.get(p) for cell in of_cell.values()}) > 1}
    found = {"a minus b": matched(sides["a"], sides["b"])}
    for key in sorted(of_cell):
        which = {path: label for path, label in of_cell[key].items() if path in differ}
        label = "a minus random" + (f" at {canonical_json(which)}" if which else "")
        found[label] = matched(sides["a"], random[cells == key])
    return found


def _of_levels(
    seen: Observations,
    claim: EquivalentClaim | MonotoneClaim | InteractionClaim,
    selected: pd.DataFrame,
) -> Design:
    """Levels of a factor against its reference, or against the level before."""
    runs = selected
    for factor in claim.compared:
        if factor not in seen.study.factors:
            known = ", ".join(seen.study.factors) or "none"
            why = f"the study does not vary {factor}; its factors: {known}"
            return Design(selected, {}, obstacles=(Obstacle(why, MEND),))
        runs = runs[np.array([factor in cell for cell in runs["cell"]], bool)]
    factor, reference = claim.factor, seen.study.reference_level(claim.factor)
    levels = _present(seen, runs, factor)
    if isinstance(claim, MonotoneClaim):
        steps = [(high, low) for low, high in itertools.pairwise(levels)]
    else:
        levels = [level for level in levels if level != reference]
        steps = [
            (level, reference) for level in levels if reference in _present(seen, runs, factor)
        ]
    if not steps:
        start = "" if isinstance(claim, MonotoneClaim) else f" from {reference}"
        why = f"the selected runs do not vary {factor}{start}"
        return Design(selected, {}, obstacles=(Obstacle(why, f"runs that vary {factor}"),))
    groups: Groups = {}
    for level, start in steps:
        pairs = selection.factor_pairs(runs, factor, level, start, PLANNED)
        for name, of_group in selection.apart(runs, tags_of(*claim.compared), pairs).items():
            where = "" if name == "{}" else f" within {name}"
            if isinstance(claim, InteractionClaim):
                found = _differences(seen, claim, runs, of_group)
            else:
                since = f" against {start}" if isinstance(claim, MonotoneClaim) else ""
                found = {f"{factor} = {level}{since}": _items(of_group)}
            for label, items in found.items():
                at = f"{factor} = {level}, " if isinstance(claim, InteractionClaim) else ""
                groups.setdefault(name, {})[f"{at}{label}{where}"] = items
    if not any(groups.values()):
        why = f"the selected runs do not vary {' and '.join(claim.compared)} together"
        return Design(selected, {}, obstacles=(Obstacle(why, "runs that cross both factors"),))
    return Design(selected, groups)


def _present(seen: Observations, runs: pd.DataFrame, factor: str) -> list[str]:
    """Labels of a factor's levels that the runs have, in order."""
    there = {cell[factor] for cell in runs["cell"]}
    return [label for label in ordered_labels(seen.study.factors[factor]) if label in there]


def _differences(
    seen: Observations, claim: InteractionClaim, runs: pd.DataFrame, pairs: Sequence[Pair]
) -> dict[str, list[Item]]:
    """Pairs at each level of ``by`` less those at its reference, matched by seed and the rest."""
    by, reference = claim.by, seen.study.reference_level(claim.by)
    at: dict[str, dict[int, list[tuple[Pair, dict[str, str]]]]] = {}
    for pair in pairs:
        cells = [seen.by_id[trial]["cell"] for trial in (pair.a, pair.b)]
        rest = {k: v for k, v in (cells[0] | cells[1]).items() if k not in claim.compared}
        by_seed = at.setdefault(cells[0].get(by, ""), {})
        by_seed.setdefault(pair.seed, []).append((pair, rest))
    found: dict[str, list[Item]] = {}
    for level in [one for one in _present(seen, runs, by) if one != reference]:
        found[f"{by} = {level}"] = [
            Item(seed, canonical_json(rest | other), (one.a, base.b), (one.b, base.a))
            for seed, here in sorted(at.get(level, {}).items())
            for one, rest in here
            for base, other in at.get(reference, {}).get(seed, [])
            if all(rest[path] == other[path] for path in rest.keys() & other.keys())
        ]
    return found


# --- what they say -----------------------------------------------------------------------------


def evidence(
    seen: Observations,
    claim: Claim,
    response: Response,
    found: Design,
    scale: Scale,
    missing: Missing = Missing.LEFT_OUT,
) -> Evidence:
    """What the runs say on a claim (other than ``exact``) under one definition.

    Args:
        seen: the study's tables.
        claim: the claim.
        response: one that fits the claim.
        found: result of ``design``.
        scale: how the response is compared.
        missing: what stands in for runs that did not finish; overlap claims leave them out.

    Returns:
        Contrasts on ``scale``; of overlap claims log(observed / expected).
    """
    if found.obstacles or isinstance(claim, ExactClaim):
        return Evidence(obstacles=found.obstacles, remarks=found.remarks)
    if isinstance(claim, OverlapClaim):
        return overlap_evidence(seen, claim, response, found.pairs)
    reader = Reader(seen, response, claim.at, scale, claim.compared, missing)
    if isinstance(claim, EquivalentClaim):
        return equivalent(reader, claim, found.groups)
    each = {label: items for group in found.groups.values() for label, items in group.items()}
    if isinstance(claim, AssociatedClaim):
        return _associated(reader, claim, each["{}"])
    if isinstance(claim, WithinClaim | ReproducesClaim):
        return contrast(reader, each["{}"])
    names = {label: "" if label == "{}" else label for label in each}
    read = joined({k: contrast(reader, items, names[k]) for k, items in each.items()})
    return read._replace(remarks=(*found.remarks, *read.remarks))


def _associated(reader: Reader, claim: AssociatedClaim, items: Sequence[Item]) -> Evidence:
    """The slope over runs of each seed; over seeds where each has one run."""
    on = Response.parse(claim.on, reader.seen.study.default_view)
    # A missing run stands at the far end of `on`, where it bends the slope most.
    far = Missing.LEFT_OUT if reader.missing is Missing.LEFT_OUT else Missing.HIGH
    along = Reader(reader.seen, on, reader.at, scale_of(on.name), missing=far)
    (x, why_x), (y, why_y) = along.values(items), reader.values(items)
    known = ~np.isnan(x + y)
    seeds = np.array([item.seed for item in items])[known]
    x, y = x[known], y[known]
    lost = sorted({why for why in (*why_x, *why_y) if why})
    remarks = (
        (f"{'; '.join(lost)} (in {int((~known).sum())} of {known.size} runs)",) if lost else ()
    )
    obstacles = unmoved(reader, {trial for item in items for trial in item.trials})
    counts = np.unique(seeds, return_counts=True)[1]
    if counts.size and (counts == 1).all():
        found = _regressed(x, y)
        remarks = (*remarks, "least squares over one run per seed")
    else:
        found = Contrast.of(_slopes(seeds, x, y))
        remarks = (*remarks, "slopes within seeds")
    if found.num_units < MIN_SEEDS:
        per_seed = f"{MIN_RUNS_OF_SLOPE} runs that differ in {on.name}"
        few = f"{found.num_units} seeds have a slope, {MIN_SEEDS} are needed: it takes {per_seed}"
        enough = counts.size >= MIN_SEEDS
        obstacles.append(
            Obstacle(few, f"more runs of each seed: {per_seed}" if enough else MORE_SEEDS)
        )
    elif found.num_units < counts.size:
        left = counts.size - found.num_units
        remarks = (*remarks, f"{left} seeds with fewer than {MIN_RUNS_OF_SLOPE} runs left out")
    return Evidence((found,), tuple(obstacles), remarks)


def _slopes(seeds: np.ndarray, x: Floats, y: Floats) -> Floats:
    """Least squares slope of each seed with enough runs that differ in x."""
    groups = [(x[seeds == seed], y[seeds == seed]) for seed in np.unique(seeds)]
    return np.array(
        [
            stats.linregress(xs, ys).slope
            for xs, ys in groups
            if xs.size >= MIN_RUNS_OF_SLOPE and np.ptp(xs) > 0
        ]
    )


def _regressed(x: Floats, y: Floats) -> Contrast:
    if x.size < MIN_RUNS_OF_SLOPE or np.ptp(x) == 0:
        return Contrast("", np.nan, np.nan, 0, 0)
    line = stats.linregress(x, y)
    return Contrast("", float(line.slope), float(line.stderr), x.size - 2, x.size)
