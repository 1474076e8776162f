"""Studies with planted answers, and the verdicts on their claims."""

import itertools
from collections.abc import Callable, Mapping

import numpy as np
import pyarrow as pa
from test_effects import N, make_study, make_tables, trials_of

from rlsparse import claims, tables
from rlsparse.study import Study, Trial

FACTORS = {"algorithm.kl_coef": [0.0, 0.04], "train.max_grad_norm": [None, 1.0]}
CONTROLS = ["lr_zero", "same_seed", "lr_times_3"]
NOISE = np.random.default_rng(0).normal(0, 0.03, 10)
OF_STUDY = ("baseline", "factors", "controls", "seeds", "views")
NO_OVERLAPS = tables.SCHEMAS["overlaps"].empty_table()


def study_of(*given: Mapping[str, object], **fields: object) -> Study:
    listed = [{"id": f"c{i}", **claim} for i, claim in enumerate(given)]
    return make_study(**{"factors": FACTORS, "controls": CONTROLS, "claims": listed} | fields)


def kl(trial: Trial) -> float:
    return float(trial.config.algorithm.kl_coef)  # type: ignore[union-attr]


def density(trial: Trial) -> float:
    """Moved by the seed, by three times the learning rate, and hardly by the factors."""
    seed, clipped = trial.config.seed, trial.config.train.max_grad_norm is not None
    noise = NOISE[seed] + 0.1 * NOISE[(seed + 3) % 10] * (kl(trial) > 0)
    noise += 0.1 * NOISE[(seed + 5) % 10] * clipped
    by = {"lr_zero": 0.0, "lr_times_3": 2.5}.get(str(trial.control), 1.0)
    return float(by * 0.1 * np.exp(noise))


def about(trial: Trial) -> dict[str, object]:
    realised = 0.5 / (1 + kl(trial) * 20) + 0.01 * trial.config.seed
    clipped = 0 if trial.config.train.max_grad_norm is None else 7
    identical = True if trial.control == "same_seed" else None
    return {"kl_final": realised, "num_clipped_steps": clipped, "identical": identical}


def judge(
    study: Study,
    density: Callable[[Trial], float] = density,
    *,
    registered: Mapping[str, str] | None = None,
    overlaps: pa.Table = NO_OVERLAPS,
    allow_missing: bool = False,
    num_dropped: int = 0,
    **made: Callable[..., object],
) -> list[dict[str, object]]:
    """Rows of table ``claims``; ``made`` goes to ``make_tables``."""
    if registered is None:
        registered = {claim.id: "registered" for claim in study.claims}
    parts = make_tables(trials_of(study), density, **{"more": about} | made)  # type: ignore[arg-type]
    table = claims.judge(
        study, registered, *parts, overlaps, allow_missing=allow_missing, num_dropped=num_dropped
    )
    assert tables.check(table, "claims").equals(table)
    return list(table.to_pylist())


def one(claim: Mapping[str, object], *given: object, **fields: object) -> dict[str, object]:
    """The verdict on one claim; of the fields, ``OF_STUDY`` go to the study."""
    about_study = {name: fields.pop(name) for name in OF_STUDY if name in fields}
    (row,) = judge(study_of(claim, **about_study), *given, **fields)  # type: ignore[arg-type]
    return row


def undecided(claim: Mapping[str, object], why: str, *given: object, **fields: object) -> None:
    """The claim is, and says why."""
    row = one(claim, *given, **fields)
    assert row["verdict"] == "undecided"
    assert why in str(row["note"])


def within(low: float, high: float, **more: object) -> dict[str, object]:
    return {"kind": "within", "low": low, "high": high, **more}


CLIPPED = {
    "kind": "greater",
    "a": {"train.max_grad_norm": 1.0},
    "b": {"train.max_grad_norm": None},
}


def clip_lowers(trial: Trial) -> float:
    """A density that gradient clipping halves."""
    steady = 1 + 0.02 * NOISE[trial.config.seed + 4 * (kl(trial) > 0)]
    return 0.1 * float(steady) * (0.5 if trial.config.train.max_grad_norm else 1.0)


KL = {"kind": "equivalent", "factor": "algorithm.kl_coef"}
CLIP = {"kind": "equivalent", "factor": "train.max_grad_norm"}
ABOVE = {"kind": "above_null", "where": {"algorithm.kl_coef": 0.0, "train.max_grad_norm": None}}


def noisy(lift: float) -> Callable[[Trial, Trial], float]:
    """Lifts that vary with the seeds around ``lift``."""
    return lambda a, b: lift * float(np.exp(NOISE[a.config.seed] + NOISE[b.config.seed]))


def overlaps_of(
    study: Study, lift: Callable[[Trial, Trial], float], share: float = 0.1
) -> pa.Table:
    """Overlaps of all pairs; ``lift`` is over magnitude, the other nulls expect half as much."""
    rows: list[dict[str, object]] = []
    trials = sorted(trials_of(study), key=lambda trial: trial.trial_id)
    for a, b in itertools.combinations(trials, 2):
        expected = share**2 * N
        row: dict[str, object] = {"trial_a": a.trial_id, "step_a": 20, "definition": "bitwise"}
        row |= {"trial_b": b.trial_id, "step_b": 20, "view": "stored", "num_elements": N}
        row |= {"num_a": int(share * N), "num_b": int(share * N)}
        row |= {"num_both": round(expected * lift(a, b)), "expected_magnitude": expected}
        row |= {"expected_uniform": expected / 2, "expected_tensor": expected / 2}
        rows += [row, row | {"module": "q", "num_both": 0}]
    return tables.from_rows(rows, "overlaps")
