"""Arms that are tuned before they are compared: each at the level of a factor that validates best.

An arm is what a side of a claim selects, apart from the tuned factor and the seed. Its level is
chosen by validation scores at the tuning seeds, and it is compared at all others: neither a test
score nor any run that is compared has a part in the choice, so that an arm with more levels, or
with luckier ones, gains nothing on the seeds that are tested.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from rlsparse.claim_config import SidesClaim
from rlsparse.claims.contrasts import Obstacle
from rlsparse.effects.responses import VALIDATION
from rlsparse.identity import canonical_json
from rlsparse.levels import ordered_labels
from rlsparse.study import StudyBase

_DIGITS = 12
"""Means of scores that agree in so many are equal: (.1 + .2) / 2 and .15 are two floats."""


class Arm(NamedTuple):
    """Runs that are alike but for the tuned factor and the seed.

    Attributes:
        cell: the other factors: path -> label of the level; and ``control``, if they are one.
        scores: label of each level, in the order in which ties go -> mean validation score at the
            tuning seeds; nan where a run at one of them did not finish. The label is "" where the
            runs do not have the factor.
        num_unscored: runs at the tuning seeds that finished without a validation score.
        fresh: its runs at the chosen level, of any status, at all other seeds.
    """

    cell: dict[str, str]
    scores: dict[str, float]
    num_unscored: int
    fresh: pd.DataFrame

    @property
    def level(self) -> str | None:
        """See ``best``."""
        return best(self.scores)


def best(scores: Mapping[str, float]) -> str | None:
    """The level with the highest score, the first of equal ones; None if all are nan.

    One that has no rival needs no score.
    """
    if len(scores) == 1:
        return next(iter(scores))
    known = {level: round(score, _DIGITS) for level, score in scores.items() if score == score}
    return max(known, key=known.__getitem__, default=None)


def arms(runs: pd.DataFrame, path: str, levels: Sequence[str], seeds: Collection[int]) -> list[Arm]:
    """Choose a level for each arm of a side.

    Args:
        runs: rows of ``selection.with_configs``, of any status.
        path: the tuned factor.
        levels: labels of all its levels, in the order in which ties go.
        seeds: the tuning seeds.
    """
    keys = np.array(
        [
            canonical_json(_apart_from(path, cell, control))
            for cell, control in zip(runs["cell"], runs["control"], strict=True)
        ]
    )
    labels = np.array([cell.get(path, "") for cell in runs["cell"]])
    tuning = runs["seed"].isin(seeds).to_numpy()
    scored = runs[VALIDATION].notna().to_numpy() | (runs["status"] != "finished").to_numpy()
    found = []
    for key in sorted(set(keys)):
        own = keys == key
        there = [level for level in ("", *levels) if level in labels[own]]
        scores = {one: _mean_score(runs[own & tuning & (labels == one)], seeds) for one in there}
        fresh = runs[own & ~tuning & (labels == best(scores))]
        found.append(Arm(json.loads(key), scores, int((own & tuning & ~scored).sum()), fresh))
    return found


def _apart_from(path: str, cell: Mapping[str, str], control: object) -> dict[str, str]:
    """What tells arms apart. A control bears the labels of the cell that it varies."""
    others = {other: label for other, label in cell.items() if other != path}
    return others | ({"control": control} if isinstance(control, str) else {})


def _mean_score(runs: pd.DataFrame, seeds: Collection[int]) -> float:
    """Mean validation score of runs at the tuning seeds; nan unless all are there and finished."""
    complete = set(runs["seed"]) == set(seeds) and (runs["status"] == "finished").all()
    return float(runs[VALIDATION].mean(skipna=False)) if complete else np.nan


class Tuned(NamedTuple):
    """The runs that a claim compares, by side; with obstacles, all that it selects."""

    sides: Mapping[str, pd.DataFrame]
    obstacles: tuple[Obstacle, ...] = ()
    remarks: tuple[str, ...] = ()


def tuned(study: StudyBase, claim: SidesClaim, sides: Mapping[str, pd.DataFrame]) -> Tuned:
    """Choose the levels of a claim's arms; without ``tune`` its sides are as they are.

    Args:
        study: gives the order of levels.
        claim: the claim.
        sides: rows of ``selection.with_configs`` by side.

    Returns:
        Obstacles where there is nothing to choose between, or nothing to choose by; a remark that
        says what was chosen, and how the other levels did.
    """
    if claim.tune is None:
        return Tuned(sides)
    levels = ordered_labels(study.factors.get(claim.tune, []))
    found = {
        side: arms(runs, claim.tune, levels, claim.tuning_seeds) for side, runs in sides.items()
    }
    rivals = {name: arm for name, arm in _named(found).items() if len(arm.scores) > 1}
    if not rivals:
        why = f"no side has several levels of {claim.tune} to choose from"
        return Tuned(sides, (Obstacle(why, "mend the claim"),))
    if num := sum(arm.num_unscored for arm in rivals.values()):
        why = f"{num} runs at the tuning seeds have no validation score to choose by"
        return Tuned(sides, (Obstacle(why, "a study with task.num_validation_problems above 0"),))
    remarks = (_told(claim, rivals),)
    without = [name for name, arm in rivals.items() if arm.level is None]
    if without:
        why = f"no level of {claim.tune} has all its runs at the tuning seeds: {'; '.join(without)}"
        return Tuned(sides, (Obstacle(why, "runs at the tuning seeds that finish"),), remarks)
    fresh = {side: pd.concat([arm.fresh for arm in of]) for side, of in found.items()}
    return Tuned(fresh, remarks=remarks)


def _named(found: Mapping[str, Sequence[Arm]]) -> dict[str, Arm]:
    """Arms by side and the levels in which they differ: ``random (mask=random(final))``."""
    every = [arm.cell for of in found.values() for arm in of]
    paths = list(dict.fromkeys(path for cell in every for path in cell))
    differ = {
        path: path.removesuffix(".name").split(".", 1)[-1]
        for path in paths
        if len({cell.get(path) for cell in every}) > 1
    }
    named: dict[str, Arm] = {}
    for side, of in found.items():
        for arm in of:
            labels = [f"{differ[path]}={arm.cell[path]}" for path in differ if path in arm.cell]
            named[f"{side} ({', '.join(labels)})" if labels else side] = arm
    return named


def _told(claim: SidesClaim, rivals: Mapping[str, Arm]) -> str:
    """What was chosen, and of what."""
    seeds = ", ".join(map(str, claim.tuning_seeds))
    each = [
        f"{name} {arm.level or 'none'} of "
        + ", ".join(f"{level} ({_score(score)})" for level, score in arm.scores.items())
        for name, arm in rivals.items()
    ]
    return f"{claim.tune} tuned on validation at seeds {seeds}: {'; '.join(each)}"


def _score(score: float) -> str:
    return f"{score:.3f}" if score == score else "a run is missing"
