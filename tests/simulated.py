"""Thousands of simulated studies with known truth, fast enough to count how often they are wrong.

Tables hold many studies at once: the runs of one plan, and in each *view* the numbers of another
study; or, where runs fail or views do not reach, *copies* of the plan, each as an algorithm of its
own, whose fields are never pooled. Neither shares more than names with the others.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from unittest import mock

import numpy as np
import pandas as pd
import pyarrow as pa
from pydantic import TypeAdapter
from scipy import special
from test_effects import make_study, trials_of

from rlsparse import claims, effects, tables
from rlsparse.claim_config import Claim
from rlsparse.claims import cases
from rlsparse.claims.evidence import Design
from rlsparse.claims.observations import Observations, observe
from rlsparse.definitions import DEFINITIONS
from rlsparse.effects.responses import responses
from rlsparse.identity import canonical_json
from rlsparse.levels import put
from rlsparse.schemas import SCHEMAS
from rlsparse.study import Study, Trial

KL, CLIP = "algorithm.kl_coef", "train.max_grad_norm"
NUM_WEIGHTS = 10**9
NUM_STEPS = 20
NUM_BOTH = 10**7
BATCH = 500
"""Studies that share their tables."""
COPIES = 50
SEEDS, RUN = 0.5, 0.15
"""Spread, in log odds, of what the runs of a seed share and of what each has alone."""
TWO = {KL: [0.0, 0.04]}
SPARSITY = "sparsity.bitwise@stored"
SPREADS = {"runs": (0.1, 0.05, 0.1), "seeds": (0.2, 0.0, 0.02), "pairs": (0.0, 0.0, 0.1)}
"""Of log excess: what runs of a seed share, what each has alone, what a pair has alone."""
NOTHING = [SCHEMAS[name].empty_table() for name in ("trials", "steps", "changes", "overlaps")]
_, NO_STEPS, NO_CHANGES, NO_OVERLAPS = NOTHING


class Plan:
    """The planned runs of a study, T of them, in order of their names."""

    def __init__(self, **fields: object) -> None:
        self.study: Study = make_study(**fields)
        self.trials = sorted(trials_of(self.study), key=lambda trial: trial.trial_id)
        self.names = [trial.trial_id for trial in self.trials]
        self.seeds = np.array([trial.config.seed for trial in self.trials])
        self._configs = [trial.config.model_dump(mode="json") for trial in self.trials]

    def at(self, of: Callable[[Trial], object]) -> np.ndarray:
        """A number of each run, [T]."""
        return np.array([of(trial) for trial in self.trials], np.float64)

    def level(self, factor: str, level: str) -> np.ndarray:
        """1 for runs at a level, else 0, [T]."""
        return self.at(lambda trial: trial.cell.get(factor) == level)

    def by_seed(self, rng: np.random.Generator, num: int, spread: float) -> np.ndarray:
        """Normal effects that the runs of a seed share, [num, T]."""
        return rng.normal(0, spread, (num, int(self.seeds.max()) + 1))[:, self.seeds]

    def noise(self, rng: np.random.Generator, num: int, spread: float) -> np.ndarray:
        """Normal effects that each run has alone, [num, T]."""
        return rng.normal(0, spread, (num, len(self.trials)))

    def pair_noise(self, rng: np.random.Generator, num: int, spread: float) -> np.ndarray:
        """Normal effects that each pair of runs has alone, [num, P]."""
        found: np.ndarray = rng.normal(0, spread, (num, self.pairs().shape[1]))
        return found

    def excess(self, rng: np.random.Generator, num: int, spreads: str) -> np.ndarray:
        """Log excess of pairs, [num, P]: what both runs have, added, and noise; see ``SPREADS``."""
        seed, run, pair = SPREADS[spreads]
        a, b = self.pairs()
        alone = self.by_seed(rng, num, seed) + self.noise(rng, num, run)
        return alone[:, a] + alone[:, b] + self.pair_noise(rng, num, pair)

    def pairs(self) -> np.ndarray:
        """Places of the runs of all pairs, [2, P]."""
        return np.array(list(itertools.combinations(range(len(self.trials)), 2))).T

    def place(self, seed: int, level: str) -> int:
        """Which run has a seed and a level of the KL coefficient."""
        at = (self.seeds == seed) & (self.level(KL, level) > 0)
        return int(np.flatnonzero(at)[0])

    # --- tables --------------------------------------------------------------------------------

    def runs(self, copies: int = 0, **columns: Sequence[object]) -> pa.Table:
        """Table ``trials`` of the plan, or of copies of it; further columns are [copies * T]."""
        rows: list[dict[str, object]] = []
        for copy in range(copies) if copies else (None,):
            for trial, config in zip(self.trials, self._configs, strict=True):
                cell = dict(trial.cell)
                if copy is not None:
                    cell["algorithm.name"] = f"grpo{copy}"
                    config = put(config, "algorithm.name", f"grpo{copy}")
                row = {
                    "trial_id": named(trial.trial_id, copy),
                    "status": "finished",
                    "cell": canonical_json(cell),
                    "config": canonical_json(config),
                    "label": trial.label,
                    "seed": trial.config.seed,
                    "replicate": trial.replicate,
                    "role": trial.role,
                    "control": trial.control,
                    "num_steps": NUM_STEPS,
                    "num_eval_problems": 512,
                    "score_before": 0.25,
                }
                rows.append(row | {name: column[len(rows)] for name, column in columns.items()})
        return tables.from_rows(rows, "trials")

    def changes(self, density: np.ndarray) -> pa.Table:
        """Table ``changes`` of studies whose last snapshots have these densities, [views, T].

        Those of runs that failed are nan.
        """
        num, runs = density.shape
        return changes_of(self.names * num, np.repeat(views(num), runs), density.reshape(-1))

    def changes_of_copies(self, density: np.ndarray) -> pa.Table:
        """The same of copies, [copies, T]."""
        names = [named(name, copy) for copy in range(len(density)) for name in self.names]
        return changes_of(names, ["stored"] * density.size, density.reshape(-1))

    def overlaps(
        self, excess: np.ndarray, *, copies: bool = False, density: float = 0.1
    ) -> pa.Table:
        """Table ``overlaps`` whose pairs have this log excess over magnitude, [views, P]."""
        num, each = excess.shape
        size = excess.size
        suffixes = range(num) if copies else [None] * num
        a, b = (
            [named(self.names[place], copy) for copy in suffixes for place in side]
            for side in self.pairs()
        )
        rows = {
            "trial_a": a, "step_a": np.full(size, NUM_STEPS),
            "trial_b": b, "step_b": np.full(size, NUM_STEPS),
            "definition": ["bitwise"] * size,
            "view": ["stored"] * size if copies else np.repeat(views(num), each),
            "num_elements": np.full(size, NUM_WEIGHTS),
            "num_a": np.full(size, round(density * NUM_WEIGHTS)),
            "num_b": np.full(size, round(density * NUM_WEIGHTS)),
            "num_both": np.full(size, NUM_BOTH),
            "expected_magnitude": (NUM_BOTH + 0.5) / np.exp(excess.reshape(-1)) - 0.5,
        }  # fmt: skip
        schema = SCHEMAS["overlaps"]
        rows |= {f.name: pa.nulls(size, f.type) for f in schema if f.name not in rows}
        return tables.check(pa.table(rows), "overlaps")


def named(trial: str, copy: int | None) -> str:
    """Name of a run, or of a copy of it."""
    return trial if copy is None else f"{trial}-{copy}"


def views(num: int) -> list[str]:
    """Names of that many studies; the first is the default view."""
    return ["stored", *(f"v{i}" for i in range(1, num))]


def changes_of(
    names: Sequence[str], view: Sequence[str], density: np.ndarray, layer: int = 0
) -> pa.Table:
    """Table ``changes``, a row per run and view; all definitions agree."""
    there = ~np.isnan(density)
    size, density = int(there.sum()), density[there]
    names, view = (pa.array(column).filter(pa.array(there)) for column in (names, view))
    changed = pa.array(np.rint(NUM_WEIGHTS * density).astype(np.int64))
    columns = {
        "trial_id": names, "step": np.full(size, NUM_STEPS), "view": view,
        "layer": np.full(size, layer), "module": ["q"] * size,
        "num_elements": np.full(size, NUM_WEIGHTS),
        **{f"num_changed_{name}": changed for name in DEFINITIONS},
        "sum_sq_before": np.ones(size), "sum_sq_delta": np.ones(size),
    }  # fmt: skip
    return tables.check(pa.table(columns), "changes")


def density(log_odds: np.ndarray) -> np.ndarray:
    """Of what has these log odds of sparsity."""
    found: np.ndarray = special.expit(-log_odds)
    return found


# --- effects -----------------------------------------------------------------------------------


def effects_of(plan: Plan, log_odds: np.ndarray) -> pd.DataFrame:
    """Rows of ``effects`` about bitwise sparsity of all studies, [views, T] log odds of it."""
    runs, changes = plan.runs(), plan.changes(density(log_odds))
    frame = responses(runs, NO_STEPS, changes, "stored")
    frame = frame[frame["response"].str.startswith("sparsity.bitwise@")]
    found = effects.effects(plan.study, runs, frame, changes).to_pandas()
    return found[found["module"].isna() & found["layer"].isna()]


# --- claims ------------------------------------------------------------------------------------


def claim(kind: str, **fields: object) -> Claim:
    """A claim, ``c`` unless told otherwise."""
    found: Claim = TypeAdapter(Claim).validate_python({"id": "c", "kind": kind, **fields})
    return found


GREATER = claim("greater", a={KL: 0.04}, b={KL: 0.0})


class Studies:
    """Studies of one plan, by view, for which ``judge`` indexes tables only once.

    Which runs a claim compares is found once, too, as it is the same in all views; and verdicts
    under other definitions are left out, as these agree.
    """

    def __init__(
        self,
        plan: Plan,
        stated: Sequence[Claim],
        runs: pa.Table,
        changes: pa.Table = NO_CHANGES,
        overlaps: pa.Table = NO_OVERLAPS,
    ) -> None:
        self._study = plan.study.model_copy(update={"claims": tuple(stated)})
        self._seen = observe(self._study, runs, NO_STEPS, changes, overlaps)
        self._designs: dict[str, Design] = {}

    def judge(
        self,
        chosen: Sequence[str],
        registered: Mapping[str, str] | None = None,
        *,
        allow_missing: bool = False,
    ) -> pd.DataFrame:
        """Rows of ``claims.judge`` of the studies in some views, which their claims do not name."""
        stated = self._study.claims
        status = {one.id: "registered" for one in stated} if registered is None else registered
        parts = []
        with (
            mock.patch.object(claims, "observe", self._observe),
            mock.patch.object(cases, "design", self._design),
            only_bitwise(),
        ):
            for view in chosen:
                named = [
                    one.model_copy(update={"response": f"{one.response}@{view}"}) for one in stated
                ]
                study = self._study.model_copy(update={"claims": tuple(named)})
                self._seen = dataclasses.replace(self._seen, views=(view,))
                parts.append(claims.judge(study, status, *NOTHING, allow_missing=allow_missing))
        return pa.concat_tables(parts).to_pandas()

    def _observe(self, *_: object) -> Observations:
        return self._seen

    def _design(self, seen: Observations, one: Claim) -> Design:
        if one.id not in self._designs:
            self._designs[one.id] = _DESIGN(seen, one)
        return self._designs[one.id]


_DESIGN = cases.design


def verdicts(
    plan: Plan, one: Claim, density: np.ndarray, **columns: Sequence[object]
) -> pd.DataFrame:
    """Rows on a claim of studies with these densities, [views, T]; columns of ``trials`` [T]."""
    studies = Studies(plan, [one], plan.runs(**columns), plan.changes(density))
    return studies.judge(views(len(density)))


def only_bitwise() -> AbstractContextManager[object]:
    """Claims are judged under one definition only."""
    return mock.patch.object(cases, "DEFINITIONS", ("bitwise",))


# --- what is asserted --------------------------------------------------------------------------


def recovered(estimates: pd.Series, truth: float) -> None:
    """The estimates have the right mean."""
    assert abs(estimates.mean() - truth) < 4 * estimates.std() / np.sqrt(estimates.size)


def at_most(hits: pd.Series | np.ndarray, limit: float) -> None:
    """The rate of hits does not exceed the limit."""
    assert np.mean(hits) <= limit + 3 * np.sqrt(limit * (1 - limit) / hits.size)


def coverage(rows: pd.DataFrame, truth: float) -> float:
    """Share of intervals that hold the truth."""
    return float(((rows["ci_low"] <= truth) & (truth <= rows["ci_high"])).mean())


def is_valid(p_values: pd.Series) -> None:
    """P(p <= a) <= a."""
    for level in (0.05, 0.125, 0.25):
        at_most(p_values <= level, level)
