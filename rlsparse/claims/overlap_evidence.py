"""What pairs of masks say on a claim: log(observed / expected) under each of its nulls.

Pairs are dependent, as each run is in many; leaving out one seed with all its pairs at a time gives
the standard error (``statistics.jackknife``). With one cell that is leaving out one run. Counts get
a continuity of .5, so that masks without common weights stay finite.
"""

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np

from rlsparse.claim_config import Null, OverlapClaim
from rlsparse.claims.contrasts import MORE_SEEDS, Contrast, Evidence, Obstacle
from rlsparse.claims.observations import Observations, Response, Settings
from rlsparse.definitions import NULLS
from rlsparse.effects import selection
from rlsparse.levels import MASK, under_mask
from rlsparse.statistics import Floats, jackknife
from rlsparse.study import MIN_SEEDS, SURROGATES

MAX_OVERLAP_DENSITY = 0.5

STRONGER: dict[Null, tuple[Null, ...]] = {
    "uniform": ("tensor", "magnitude", "update_size", "margins"),
    "tensor": ("magnitude", "update_size", "margins"),
    "magnitude": ("update_size",),
    "update_size": (),
    "margins": (),
    "surrogate": ("magnitude", "update_size"),
}
"""Null -> those that hold fixed what it does and more, see ``definitions.NULLS``; a claim decided
under it is compared with these. ``surrogate`` holds fixed other things, and is compared with the
two that account for most."""

EMPTY = Obstacle("a mask is empty, so nothing can overlap", "runs that change some weights")
UNDER_MASK = Obstacle(
    f"trials under {MASK} are left out of overlaps: the mask forces which weights they share",
    f"select the runs that train all weights with where: {{{MASK}: null}}",
)

Ends = tuple[Any, Any]
"""Two runs as dictionaries, rows of ``Observations.by_id``."""


class _Lacking(Exception):
    """Something that the evidence needs is not there."""

    def __init__(self, why: str, remedy: str = "") -> None:
        super().__init__(why)
        self.obstacle = Obstacle(why, remedy)


def overlap_pairs(seen: Observations, claim: OverlapClaim) -> list[Ends]:
    """Runs that differ in what the claim says alone, of the seeds whose runs all finished."""
    runs = seen.sides(claim)["where"]
    incomplete = set(runs.loc[runs["status"] != "finished", "seed"])
    return selection.run_pairs(runs[~runs["seed"].isin(incomplete)], claim.between)


def left_out_pairs(seen: Observations, claim: OverlapClaim, pairs: Sequence[Ends]) -> str:
    """What missing runs cost: pairs beside those of ``overlap_pairs``, and any worst case."""
    runs = seen.sides(claim)["where"].assign(status="finished")  # as if all had
    planned = len(selection.run_pairs(runs, claim.between))
    return (
        f"{planned - len(pairs)} of {planned} pairs left out, as only seeds whose runs all "
        "finished enter; no worst case is computed for overlaps"
    )


def overlap_evidence(
    seen: Observations, claim: OverlapClaim, response: Response, pairs: Sequence[Ends]
) -> Evidence:
    """One contrast per null: the log excess over it, as jackknife pseudo-values over seeds.

    Against ``surrogate`` the excess of a pair over the magnitude null counts less the mean of what
    either run has with the surrogate runs of the other's seed, at equal learning rate and steps.

    Args:
        seen: the study's tables.
        claim: the claim.
        response: its response.
        pairs: result of ``overlap_pairs``.
    """
    if not pairs:
        why = f"no two finished runs, of seeds that are complete, differ in {claim.between} alone"
        return Evidence(obstacles=(Obstacle(why, f"runs that differ in {claim.between}"),))
    bases = [{seen.settings[run["trial_id"]].base for run in ends} - {None} for ends in pairs]
    if any(len(base) > 1 for base in bases):
        why = "masks of different bases have no weights in common to overlap in"
        return Evidence(obstacles=(Obstacle(why, "runs of one base"),))
    units = [{int(run["seed"]) for run in ends} for ends in pairs]
    try:
        rows = np.array([_row(seen, claim, response, *ends) for ends in pairs])
        excess = {null: _excess(seen, rows, null) for null in NULLS}
        named = {
            null: _over_surrogates(seen, claim, response, pairs, excess["magnitude"])
            if null == "surrogate"
            else _measured(excess[null], null)
            for null in claim.nulls
        }
    except _Lacking as lacking:
        return Evidence(obstacles=(lacking.obstacle,))
    unfit = tuple(_unfit(seen, rows, units))
    if EMPTY in unfit:
        return Evidence(obstacles=unfit)
    known = {null: e for null, e in (excess | named).items() if not np.isnan(e).any()}
    lifts = [f"{null} {np.exp(e.mean()):.3g}" for null, e in known.items()]
    served = _served(seen, rows, pairs) if "update_size" in known else ""
    if served:
        lifts.append(f"update sizes of {served}")
    remark = (
        f"null {', '.join(claim.nulls)}; lift over {len(pairs)} pairs by null: {', '.join(lifts)}"
    )
    contrasts = [
        Contrast.of(jackknife(values, units), f"{null} null" if len(named) > 1 else "")
        for null, values in named.items()
    ]
    return Evidence(tuple(contrasts), unfit, (remark,))


def known_nulls(
    seen: Observations, claim: OverlapClaim, response: Response, pairs: Sequence[Ends]
) -> list[Null]:
    """Nulls that the table has for all these pairs."""
    try:
        rows = np.array([_row(seen, claim, response, *ends) for ends in pairs], np.int64)
    except _Lacking:
        return []
    nulls: tuple[Null, ...] = get_args(Null)
    measured = [null for null in nulls if null in NULLS and rows.size]
    return [null for null in measured if not np.isnan(_excess(seen, rows, null)).any()]


def _row(seen: Observations, claim: OverlapClaim, response: Response, a: Any, b: Any) -> int:
    """Row of two runs in ``overlap_counts``."""
    step = claim.at.step if claim.at else None
    ends = sorted((run["trial_id"], step or int(run["num_steps"])) for run in (a, b))
    key = (response.definition, response.view, *ends[0], *ends[1], claim.module, claim.tensor)
    if key not in seen.overlap_rows:
        part = claim.tensor or claim.module
        of_part = f" in {part}" if part else ""
        why = f"table overlaps lacks the pair {ends[0]}, {ends[1]}{of_part}"
        also = f", of a model that has {part}" if part else ""
        raise _Lacking(why, f"snapshots of all these runs there, in this view{also}")
    return seen.overlap_rows[key]


def _served(seen: Observations, rows: np.ndarray, pairs: Sequence[Ends]) -> str:
    """The runs whose update sizes the null of that name holds fixed, and what they are."""
    compared = {_algorithm(run) for ends in pairs for run in ends}
    kinds: dict[str, list[str]] = {}
    for trial in sorted({str(seen.update_size_of[row]) for row in rows} & seen.by_id.keys()):
        run = seen.by_id[trial]
        kind = "real runs of another algorithm"
        if _is_surrogate(run):
            kind = "surrogates"
        elif _algorithm(run) in compared:
            kind = "real runs of the same algorithm"
        kinds.setdefault(kind, []).append(f"s{run['seed']}")
    return ", ".join(f"{kind} ({' '.join(sorted(runs))})" for kind, runs in kinds.items())


def _algorithm(run: Any) -> str:
    return str(next(iter(selection.value_at(run, "algorithm.name")), "unknown"))


def _excess(seen: Observations, rows: np.ndarray, null: str) -> Floats:
    counts = seen.overlap_counts
    expected = counts[f"expected_{null}"][rows]
    result: Floats = np.log((counts["num_both"][rows] + 0.5) / (expected + 0.5))
    return result


def _measured(excess: Floats, null: str) -> Floats:
    missing = int(np.isnan(excess).sum())
    if missing:
        why = f"table overlaps has no {null} null for {missing} of {excess.size} pairs"
        needs = "a further seed, whose run gives the update sizes" if null == "update_size" else ""
        raise _Lacking(why, needs)
    return excess


def _unfit(seen: Observations, rows: np.ndarray, units: Sequence[set[int]]) -> list[Obstacle]:
    """What forbids a verdict on these masks."""
    counts = seen.overlap_counts
    smaller = np.minimum(counts["num_a"][rows], counts["num_b"][rows])
    if (smaller == 0).any():
        return [EMPTY]
    if (smaller > MAX_OVERLAP_DENSITY * counts["num_elements"][rows]).any():
        most = MAX_OVERLAP_DENSITY
        why = f"both densities of a pair exceed {most}: overlap is near its ceiling"
        return [Obstacle(why, "earlier snapshots, or a smaller learning rate")]
    num_seeds = len(set().union(*units))
    if num_seeds < MIN_SEEDS:
        return [Obstacle(f"{num_seeds} seeds with pairs, {MIN_SEEDS} are needed", MORE_SEEDS)]
    return []


# --- surrogates --------------------------------------------------------------------------------


def _over_surrogates(
    seen: Observations,
    claim: OverlapClaim,
    response: Response,
    pairs: Sequence[Ends],
    excess: Floats,
) -> Floats:
    """Excess of each pair less the mean excess of its runs with each other's surrogates."""
    ours = {run["trial_id"] for ends in pairs for run in ends}
    surrogates: dict[tuple[int, Settings], list[Any]] = {}
    for trial, run in seen.by_id.items():
        serves = trial not in ours and seen.finished(trial) and not under_mask(run["config"])
        if serves and _is_surrogate(run):
            surrogates.setdefault(_alike(seen, run), []).append(run)

    def with_stand_ins(run: Any, other: Any) -> Floats:
        """Excess of a run with each surrogate that stands in for ``other``."""
        found = surrogates.get(_alike(seen, other), [])
        if not found:
            _, settings = _alike(seen, other)
            why = (
                f"no finished surrogate run of seed {other['seed']} at learning rate "
                f"{settings.learning_rate} and {settings.num_steps} steps"
            )
            raise _Lacking(why, "add surrogate controls, such as random_reward")
        rows = np.array([_row(seen, claim, response, run, surrogate) for surrogate in found])
        return _excess(seen, rows, "magnitude")

    stood_in = [
        np.mean([with_stand_ins(a, b).mean(), with_stand_ins(b, a).mean()]) for a, b in pairs
    ]
    found: Floats = excess - np.array(stood_in)
    return found


def _is_surrogate(run: Any) -> bool:
    reward = selection.value_at(run, "algorithm.reward")
    return run["role"] == "surrogate" or bool(set(reward) & set(SURROGATES.values()))


def _alike(seen: Observations, run: Any) -> tuple[int, Settings]:
    """What a run and its surrogates share."""
    settings = seen.settings[run["trial_id"]]
    return int(run["seed"]), settings._replace(batch_size=None)
