"""Contrasts between matched runs: one value per seed, and what stands in the way of a verdict."""

import enum
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import special

from rlsparse.claim_config import At
from rlsparse.claims.observations import UNFINISHED, Observations, Response
from rlsparse.effects import responses, selection
from rlsparse.effects.responses import Scale
from rlsparse.effects.selection import Pair
from rlsparse.levels import touches
from rlsparse.statistics import Floats
from rlsparse.study import MIN_SEEDS

NUM_NAMED = 3
MORE_SEEDS = f"more seeds: {MIN_SEEDS} are needed"


class Item(NamedTuple):
    """What is compared at one seed: the sum of the runs ``plus`` less that of the runs ``minus``.

    ``within`` is the JSON of the factors that are held fixed.
    """

    seed: int
    within: str
    plus: tuple[str, ...]
    minus: tuple[str, ...] = ()

    @property
    def trials(self) -> tuple[str, ...]:
        """All runs."""
        return self.plus + self.minus


class Contrast(NamedTuple):
    """An estimate over independent units and its Student t distribution.

    Attributes:
        label: which one of several of a claim, or "".
        estimate: nan without units.
        error: its standard error; nan below two units.
        df: degrees of freedom.
        num_units: seeds.
    """

    label: str
    estimate: float
    error: float
    df: int
    num_units: int

    @classmethod
    def of(cls, values: Floats, label: str = "") -> "Contrast":
        """The mean of one value per unit."""
        n = values.size
        error = values.std(ddof=1) / np.sqrt(n) if n > 1 else np.nan
        return cls(label, float(values.mean()) if n else np.nan, float(error), n - 1, n)

    def interval(self, level: float) -> tuple[float, float]:
        """Interval of that coverage."""
        if self.df < 1:
            return float("nan"), float("nan")
        half = float(special.stdtrit(self.df, (1 + level) / 2)) * self.error
        return self.estimate - half, self.estimate + half

    def p_value(self, null: float) -> float:
        """Two-sided p that the mean is ``null``; without spread 0, or 1 where it is."""
        if self.df < 1:
            return float("nan")
        distance = abs(self.estimate - null)
        if self.error == 0 or np.isinf(distance):
            return float(distance == 0)
        return float(2 * special.stdtr(self.df, -distance / self.error))


class Obstacle(NamedTuple):
    """Why there can be no verdict, and what would help; the latter may be ""."""

    why: str
    remedy: str = ""


class Evidence(NamedTuple):
    """What the runs say on a claim; with obstacles they decide nothing."""

    contrasts: tuple[Contrast, ...] = ()
    obstacles: tuple[Obstacle, ...] = ()
    remarks: tuple[str, ...] = ()


class Missing(enum.Enum):
    """What stands in for runs that did not finish.

    ``LOW`` and ``HIGH`` take, of the values seen on the same side, the one that makes the contrast
    smallest or largest.
    """

    LEFT_OUT = enum.auto()
    LOW = enum.auto()
    HIGH = enum.auto()


@dataclass(frozen=True)
class Reader:
    """How a claim reads its runs.

    ``compared`` are the paths in which the runs of an item are meant to differ.
    """

    seen: Observations
    response: Response
    at: At | None
    scale: Scale
    compared: tuple[str, ...] = ()
    missing: Missing = Missing.LEFT_OUT
    cache: dict[tuple[str, At | None], tuple[float, str]] = field(default_factory=dict)

    def values(self, items: Sequence[Item]) -> tuple[Floats, list[str]]:
        """Per item its value (nan where a run cannot be read) and why there is none, or ""."""
        if not items:
            return np.empty(0), []
        rows = [self._read(item) for item in items]
        whys = [next((why for _, why in row if why), "") for row in rows]
        width = len(items[0].plus)
        values = np.array([[value for value, _ in row] for row in rows], np.float64)
        lost = np.array([[why == UNFINISHED for _, why in row] for row in rows], bool)
        plus = self._filled(values[:, :width], lost[:, :width], Missing.LOW)
        minus = self._filled(values[:, width:], lost[:, width:], Missing.HIGH)
        return plus.sum(axis=1) - minus.sum(axis=1), whys

    def _filled(self, values: Floats, lost: npt.NDArray[np.bool_], smallest: Missing) -> Floats:
        """Values with stand-ins; ``smallest`` says when these are the smallest ones seen."""
        known = values[~np.isnan(values)]
        if self.missing is Missing.LEFT_OUT or not known.size:
            return values
        return np.where(lost, known.min() if self.missing is smallest else known.max(), values)

    def _read(self, item: Item) -> list[tuple[float, str]]:
        """Value, or nan and why, of each run of an item in order."""
        if self.at is None or "common" not in (self.at.score, self.at.kl):
            return [self._read_run(trial, self.at) for trial in item.trials]
        pairs = [self._at_common(*pair) for pair in zip(item.plus, item.minus, strict=True)]
        return [a for a, _ in pairs] + [b for _, b in pairs]

    def _read_run(self, trial: str, at: At | None) -> tuple[float, str]:
        key = (trial, at)
        if key not in self.cache:
            self.cache[key] = self.seen.read(trial, self.response, at, self.scale)
        return self.cache[key]

    def _at_common(self, a: str, b: str) -> list[tuple[float, str]]:
        """Both runs where they reach the highest score, or KL, that both reach."""
        assert self.at is not None
        axis: Literal["score", "kl"] = "score" if self.at.score is not None else "kl"
        if not (self.seen.finished(a) and self.seen.finished(b)):
            return [(np.nan, UNFINISHED)] * 2
        common = responses.common(self.seen.track(a), self.seen.track(b), axis)
        if np.isnan(common):
            return [(np.nan, f"a run has no {axis}")] * 2
        at = At(score=common) if axis == "score" else At(kl=common)
        return [self._read_run(trial, at) for trial in (a, b)]


def contrast(reader: Reader, items: Sequence[Item], label: str = "") -> Evidence:
    """One contrast: the mean over seeds of the items' values.

    Args:
        reader: how to read runs.
        items: what is compared, all of the same numbers of runs.
        label: which one of the claim's contrasts it is.
    """
    values, whys = reader.values(items)
    units = selection.by_seed([Pair("", "", i.seed, i.within) for i in items], values)
    counted = Counter(why for why in whys if why).items()
    lost = "; ".join(f"{why} ({number} of {len(whys)})" for why, number in sorted(counted))
    obstacles = [
        *unmoved(reader, {t for item in items for t in item.trials}),
        *_unequal(reader, items),
    ]
    if units.size < MIN_SEEDS:
        few = f"{units.size} seeds with complete matched runs, {MIN_SEEDS} are needed"
        remedy = f"what is missing: {lost}" if lost and not units.size else MORE_SEEDS
        obstacles.append(Obstacle(f"{few}: {lost}" if lost else few, remedy))
        lost = ""
    return Evidence((Contrast.of(units, label),), tuple(obstacles), (lost,) if lost else ())


def unmoved(reader: Reader, trials: Collection[str]) -> list[Obstacle]:
    """Which runs trained without changing any weight in any view, if sparsity is asked for.

    They are no evidence: what learned nothing, as GRPO without any reward, is not sparse.
    """
    if reader.response.kind != "sparsity":
        return []
    seen, at = reader.seen, reader.at
    end = at.step if at and at.step else np.finfo(np.float64).max
    ran = sorted(trial for trial in trials if seen.finished(trial))
    still = [
        trial
        for trial in ran
        if seen.settings[trial].learning_rate != 0 and seen.first_change.get(trial, 0) > end
    ]
    if not still:
        return []
    names = ", ".join(still[:NUM_NAMED]) + (", ..." if len(still) > NUM_NAMED else "")
    count = f"{len(still)} of the {len(ran)} runs changed no weight at all"
    why = f"{count} (no signal, or all rounded away): {names}"
    return [Obstacle(why, "runs that learn: a higher learning rate, or a task with some reward")]


def _unequal(reader: Reader, items: Sequence[Item]) -> list[Obstacle]:
    """What the runs of an item should share, but do not: the base, the steps, the batch size."""
    held = {"base": "model.source"}
    if reader.at is None or reader.at.step is not None:
        held["batch_size"] = "train.batch_size"
    if reader.at is None:
        held["num_steps"] = "train.num_steps"
    found = []
    for name, path in held.items():
        if any(touches(path, compared) for compared in reader.compared):
            continue
        of = {t: getattr(reader.seen.settings[t], name) for item in items for t in item.trials}
        if len(set(of.values())) < 2:
            continue
        each = [{of[trial] for trial in item.trials} - {None} for item in items]
        unequal = [values for values in each if len(values) > 1]
        if unequal:
            shown = " and ".join(sorted(str(value) for value in unequal[0]))
            what = "runs of different bases" if name == "base" else f"unequal budgets, {path}"
            why = f"{what} are compared ({shown}) in {len(unequal)} of {len(items)} comparisons"
            other = "" if name == "base" else ", or compare at: {score: common}"
            found.append(Obstacle(why, f"runs of one {path}{other}"))
    return found


def joined(parts: Mapping[str, Evidence]) -> Evidence:
    """Contrasts that must all hold; what is said of each bears its name, but for ``{}``."""

    def named(name: str, text: str) -> str:
        return text if name == "{}" else f"{name}: {text}"

    return Evidence(
        tuple(one for part in parts.values() for one in part.contrasts),
        tuple(
            one._replace(why=named(name, one.why))
            for name, part in parts.items()
            for one in part.obstacles
        ),
        tuple(named(name, text) for name, part in parts.items() for text in part.remarks),
    )
