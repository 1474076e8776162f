"""Which masks of a study are compared with which: the same on one machine and on many."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlsparse.claim_config import OverlapClaim
from rlsparse.identity import canonical_json
from rlsparse.study import StudyBase

MAX_REFERENCES = 3
"""Independent runs that give update sizes; of three seeds, one is neither of any two."""

RULES = 2
"""Which runs are compared, and how; raised where that changes, so that studies count anew."""

Run = tuple[str, int]
"""A mask: (trial_id, step)."""


@dataclass(frozen=True)
class MeasuredRun:
    """A run whose masks have been measured.

    Attributes:
        trial_id: its name.
        base: fingerprint of its base.
        source: where its base lies: one of ``models.NAMES``, a folder, a hub id or a URL.
        cell: factor path -> level label.
        algorithm: name of the algorithm.
        seed: its seed.
        replicate: 0, or the number of the rerun under the same seed.
        role: baseline, factor, control or surrogate.
        control: name of the control, or None.
        num_steps: steps of training.
        steps: snapshots that have masks, ascending; the last is the run's end.
        after: step -> patch or checkpoint of the weights then; absolute path or URL.
        masked: whether it trained the weights of a mask alone (``levels.under_mask``).
    """

    trial_id: str
    base: str
    source: str
    cell: Mapping[str, str]
    algorithm: str
    seed: int
    replicate: int
    role: str
    control: str | None
    num_steps: int
    steps: tuple[int, ...]
    after: Mapping[int, str]
    masked: bool = False


class Group(NamedTuple):
    """Runs of one cell that differ in the seed alone, at their last snapshots.

    ``runs`` are places in ``Comparison.runs``.
    """

    cell: str
    algorithm: str
    step: int
    runs: tuple[int, ...]


@dataclass(frozen=True)
class Comparison:
    """What is compared of the masks of one base in one view.

    Attributes:
        view: number format of the masks.
        runs: all masks that are needed, in order.
        seeds: trial_id -> seed.
        moments: sets of places in ``runs``; within each, all pairs are compared with all nulls: the
            last snapshots, and those of each step that a claim names.
        trajectories: likewise the snapshots of each trial, all weights only.
        groups: for the consensus.
        references: trials whose last update gives update sizes, the first choice first.
        tensors: tensors that claims name, for rows of their own.
        modules: modules that claims name.
    """

    view: str
    runs: tuple[Run, ...]
    seeds: Mapping[str, int]
    moments: tuple[tuple[int, ...], ...]
    trajectories: tuple[tuple[int, ...], ...]
    groups: tuple[Group, ...] = ()
    references: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()

    @cached_property
    def compared(self) -> tuple[int, ...]:
        """Places of the runs of all moments."""
        return tuple(sorted(set(itertools.chain(*self.moments))))

    @cached_property
    def pairs(self) -> NDArray[np.int64]:
        """Places of the two runs of each pair of the moments, set after set; shape [2, P]."""
        return _pairs(self.moments)

    @cached_property
    def pairs_within(self) -> NDArray[np.int64]:
        """Likewise of the trajectories."""
        return _pairs(self.trajectories)

    @cached_property
    def reference_of(self) -> NDArray[np.int64]:
        """Place in ``references`` of the independent run of each pair of moments, or -1.

        It is the first of another seed than both runs of the pair.
        """
        seeds = np.array([self.seeds[trial] for trial, _ in self.runs], np.int64)
        own = seeds[self.pairs]
        chosen = np.full(own.shape[1], -1, np.int64)
        for place, trial in reversed(list(enumerate(self.references))):
            chosen[(own != self.seeds[trial]).all(axis=0)] = place
        return chosen


def _pairs(sets: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    parts = [np.zeros((2, 0), np.int64)]
    for places in sets:
        parts.append(np.asarray(places, np.int64)[np.array(np.triu_indices(len(places), 1))])
    return np.concatenate(parts, axis=1)


def asked(study: StudyBase) -> dict[str, list[Any]]:
    """What claims and views ask to be compared: the other words of claims have no say."""
    claims = [claim for claim in study.claims if isinstance(claim, OverlapClaim)]
    return {
        "views": list(study.measured_views),
        "steps": sorted({c.at.step for c in claims if c.at is not None and c.at.step is not None}),
        "tensors": sorted({claim.tensor for claim in claims if claim.tensor}),
        "modules": sorted({claim.module for claim in claims if claim.module}),
    }


def compare(study: StudyBase, runs: Sequence[MeasuredRun], view: str) -> Comparison:
    """What a study compares of the runs of one base.

    A run under a mask is compared with its own earlier snapshots alone: the mask forces which
    weights it shares with others, and no null knows what could be trained.

    Args:
        study: its claims name steps, tensors and modules.
        runs: finished runs of one base, each once; controls and replicates too.
        view: number format of the masks.
    """
    named = asked(study)
    full = [run for run in runs if not run.masked]
    last = [(run.trial_id, run.steps[-1]) for run in full]
    at_steps = [[(run.trial_id, s) for run in full if s in run.steps] for s in named["steps"]]
    moments = [last, *at_steps]
    moments = [
        one for place, one in enumerate(moments) if len(one) > 1 and one not in moments[:place]
    ]
    trajectories = [[(run.trial_id, s) for s in run.steps] for run in runs if len(run.steps) > 1]
    groups = [group for group in _by_cell(full).values() if len(group) > 1]
    masks = sorted(set(itertools.chain(*moments, *trajectories)))
    places = {mask: place for place, mask in enumerate(masks)}

    def placed(sets: Iterable[Iterable[Run]]) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(sorted(places[mask] for mask in one)) for one in sets)

    ends = placed([(run.trial_id, run.steps[-1]) for run in group] for group in groups)
    return Comparison(
        view=view,
        runs=tuple(masks),
        seeds={run.trial_id: run.seed for run in runs},
        moments=placed(moments),
        trajectories=placed(trajectories),
        groups=tuple(
            Group(_cell(group[0]), group[0].algorithm, group[0].steps[-1], members)
            for group, members in zip(groups, ends, strict=True)
        ),
        references=references(full),
        tensors=tuple(named["tensors"]),
        modules=tuple(named["modules"]),
    )


def references(runs: Sequence[MeasuredRun]) -> tuple[str, ...]:
    """Runs that give update sizes, each of another seed: surrogates, then runs of the baseline."""
    baseline = [run for run in runs if run.role == "baseline" and run.replicate == 0]
    chosen: dict[int, str] = {}
    for run in [*(run for run in runs if run.role == "surrogate"), *baseline]:
        if run.after.get(run.steps[-1]):
            chosen.setdefault(run.seed, run.trial_id)
    return tuple(chosen.values())[:MAX_REFERENCES]


def _by_cell(runs: Iterable[MeasuredRun]) -> dict[tuple[str, str, int], list[MeasuredRun]]:
    """Runs that differ in the seed alone; of each seed the first."""
    cells: dict[tuple[str, str, int], dict[int, MeasuredRun]] = {}
    for run in runs:
        if run.replicate == 0 and run.role != "control":
            key = (_cell(run), run.algorithm, run.steps[-1])
            cells.setdefault(key, {}).setdefault(run.seed, run)
    return {key: list(found.values()) for key, found in cells.items()}


def _cell(run: MeasuredRun) -> str:
    """JSON of the cell; that of a surrogate which a control added says so."""
    cell = dict(run.cell)
    if run.control is not None:
        cell["control"] = run.control
    return canonical_json(cell)
