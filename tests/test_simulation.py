"""How often intervals cover, p values mislead and verdicts are wrong, on studies of known truth.

Each test's docstring says what was found when it was written; seeds are fixed, so that it is found
again. A rate may exceed its limit by three Monte Carlo standard errors, no more.
"""

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from simulated import (
    CLIP,
    KL,
    NO_STEPS,
    Plan,
    Studies,
    changes_of,
    claim,
    density,
    effects_of,
    views,
)

from rlsparse import effects, overlap_effects
from rlsparse.factorial import factorial
from rlsparse.identity import canonical_json
from rlsparse.responses import responses

pytestmark = pytest.mark.slow

BATCH = 500
SEED_SPREAD, RUN_SPREAD = 0.5, 0.15


def note(*what):
    with open("/tmp/sim/notes.txt", "a") as f:
        print(*what, file=f)


def error(values: np.ndarray) -> float:
    """Monte Carlo standard error of a mean."""
    return float(values.std(ddof=1) / np.sqrt(values.size))


def recovered(estimates: np.ndarray, truth: float) -> None:
    """The mean of the estimates is the truth, up to Monte Carlo error."""
    assert abs(estimates.mean() - truth) < 3.5 * error(estimates), (estimates.mean(), truth)


def at_most(hits: np.ndarray, limit: float) -> float:
    """The rate of hits, which does not exceed the limit."""
    rate = float(np.mean(hits))
    assert rate <= limit + 3 * np.sqrt(limit * (1 - limit) / hits.size), (rate, limit)
    return rate


def covered(rows: pd.DataFrame, truth: float) -> np.ndarray:
    """Which of the intervals hold the truth."""
    return ((rows["ci_low"] <= truth) & (truth <= rows["ci_high"])).to_numpy()


# --- planted effects ---------------------------------------------------------------------------

CROSSED = {"factors": {KL: [0.0, 0.04, 0.1], CLIP: [1.0, None]}}
BY_KL, BY_CLIP, BY_BOTH = 0.3, -0.2, 0.25


def crossed_effects(plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """Log odds by the factors alone, and what they do only together; [T] each."""
    kl, clip = plan.level(KL, "0.04"), plan.level(CLIP, "null")
    return BY_KL * kl + BY_CLIP * clip, BY_BOTH * kl * clip


def test_matched_contrasts_recover_planted_effects() -> None:
    """4000 studies, 4 seeds, 3 x 2 cells, effects of the seed three times the noise of a run."""
    plan, rng = Plan(**CROSSED), np.random.default_rng(1)
    truth = 2 + sum(crossed_effects(plan))
    parts = []
    for _ in range(8):
        seeds = plan.by_seed(rng, BATCH, SEED_SPREAD)
        parts.append(effects_of(plan, truth + seeds + plan.noise(rng, BATCH, RUN_SPREAD)))
    found = pd.concat(parts)
    each = found[found["method"] == effects.MATCHED].groupby(["factor", "level", "within"])
    clip = {name: canonical_json({CLIP: name}) for name in ("1.0", "null")}
    kl = {name: canonical_json({KL: name}) for name in ("0.0", "0.04", "0.1")}
    planted = {
        (KL, "0.04", clip["1.0"]): BY_KL,
        (KL, "0.04", clip["null"]): BY_KL + BY_BOTH,
        (KL, "0.04", "{}"): BY_KL + BY_BOTH / 2,
        (KL, "0.1", clip["1.0"]): 0.0,
        (KL, "0.1", clip["null"]): 0.0,
        (KL, "0.1", "{}"): 0.0,
        (CLIP, "null", kl["0.0"]): BY_CLIP,
        (CLIP, "null", kl["0.04"]): BY_CLIP + BY_BOTH,
        (CLIP, "null", kl["0.1"]): BY_CLIP,
        (CLIP, "null", "{}"): BY_CLIP + BY_BOTH / 3,
    }
    assert set(each.groups) == set(planted)
    for key, rows in each:
        assert len(rows) == 8 * BATCH
        recovered(rows["estimate"].to_numpy(), planted[key])
        cells = {"{}": 2 if key[0] == KL else 3}.get(key[2], 1)
        spread = RUN_SPREAD * np.sqrt(2 / 4 / cells)  # no trace of what the seeds do
        assert rows["estimate"].std() == pytest.approx(spread, rel=0.05, abs=0)
        coverage = covered(rows, planted[key]).mean()
        note("recover", key, rows["estimate"].mean(), planted[key], coverage, rows["correlation"].mean())
        assert coverage == pytest.approx(0.95, rel=0, abs=0.01)


def test_factorial_model_recovers_planted_effects_and_interactions() -> None:
    """1000 studies of three responses."""
    plan, rng = Plan(**CROSSED, interactions=[[KL, CLIP]]), np.random.default_rng(2)
    alone, together = crossed_effects(plan)
    terms, means, shifts, contrasts = [], [], [], []
    for _ in range(1000):
        shift = plan.by_seed(rng, 3, SEED_SPREAD)
        noise = plan.noise(rng, 3, RUN_SPREAD)
        sparsity, score, kl = shift + noise + np.array([2 + alone + together, alone, 0 * alone])
        solved = rng.binomial(512, density(-score)) / 512
        runs = plan.runs(score_after=solved, kl_final=0.02 * np.exp(kl))
        changes = plan.changes(density(sparsity)[None])
        frame = responses(runs, NO_STEPS, changes, "stored")
        keep = ["sparsity.bitwise@stored", "score_after", "score_gain", "kl_final"]
        frame = frame[frame["response"].isin(keep)]
        found = factorial(plan.study, runs, frame)
        terms.append(found[0].to_pandas())
        means.append(found[1].to_pandas())
        shifts.append(shift.mean(axis=1))
        contrasts.append(effects.effects(plan.study, runs, frame, changes).to_pandas())
    t, m, c = pd.concat(terms), pd.concat(means), pd.concat(contrasts)
    t = t.set_index(["response", "term"])
    note("terms", t.groupby(level=[0, 1])[["omega_sq", "p_value", "sum_sq"]].mean().to_string())
    for r in t.index.unique():
        note("reject", r, (t.loc[[r], "p_value"] <= .05).mean(), (t.loc[[r], "p_adjusted"] <= .05).mean())
    note("means", m.groupby(["response", "factor", "level"])[["estimate"]].agg(["mean", "std"]).to_string())
    c = c[c["method"] == effects.MATCHED]
    note("contrasts", c.groupby(["response", "factor", "level", "within"])[["estimate"]].agg(["mean", "std", "count"]).to_string())


# --- intervals and verdicts --------------------------------------------------------------------

TWO = {KL: [0.0, 0.04]}


@pytest.mark.parametrize("num_seeds", [4, 5, 8])
def test_intervals_of_matched_contrasts_cover(num_seeds: int) -> None:
    plan, rng = Plan(factors=TWO, seeds=range(num_seeds)), np.random.default_rng(num_seeds)
    for spread in (SEED_SPREAD, 0.0):
        parts = []
        for _ in range(12):
            x = 2 + 0.3 * plan.level(KL, "0.04") + plan.by_seed(rng, BATCH, spread)
            parts.append(effects_of(plan, x + plan.noise(rng, BATCH, RUN_SPREAD)))
        found = pd.concat(parts)
        for method, rows in found.groupby("method"):
            note("cover", num_seeds, spread, method, covered(rows, 0.3).mean(), len(rows), (rows.ci_high - rows.ci_low).mean())


def verdicts_of(plan, rng, rounds, x, one, **given):
    rows = []
    for _ in range(rounds):
        studies = Studies(plan, plan.runs(**given), plan.changes(x()))
        rows += [studies.judge(view, [one])[0] for view in views(BATCH)]
    return pd.DataFrame(rows)


def test_greater() -> None:
    plan, rng = Plan(factors=TWO), np.random.default_rng(3)
    one = claim("greater", a={KL: 0.04}, b={KL: 0.0})

    def x():
        return density(2 + plan.by_seed(rng, BATCH, SEED_SPREAD) + plan.noise(rng, BATCH, RUN_SPREAD))

    rows = verdicts_of(plan, rng, 8, x, one)
    note("greater", rows.verdict.value_counts(normalize=True).to_dict())


def test_equivalent() -> None:
    plan, rng = Plan(factors=TWO, controls=["lr_times_3"]), np.random.default_rng(4)
    one = claim("equivalent", factor=KL)
    kl = plan.level(KL, "0.04")
    control = plan.at(lambda t: t.control == "lr_times_3")

    def x():
        log = np.log(.1) + plan.by_seed(rng, BATCH, SEED_SPREAD) + plan.noise(rng, BATCH, 0.05)
        return np.exp(log + np.log(1.25) * kl + np.log(2.5) * control)

    rows = verdicts_of(plan, rng, 8, x, one, kl_final=0.02 / (1 + kl))
    note("equivalent", rows.verdict.value_counts(normalize=True).to_dict(), rows.note[rows.verdict=="undecided"].iloc[0])


@pytest.mark.parametrize("num_true", [0, 3])
def test_holm(num_true) -> None:
    levels = [0.01 * i for i in range(12)]
    plan, rng = Plan(factors={KL: levels}), np.random.default_rng(5)
    stated = [claim("greater", id=f"c{i}", a={KL: levels[2*i+1]}, b={KL: levels[2*i]}) for i in range(6)]
    real = sum(plan.level(KL, repr(levels[2*i+1])) for i in range(num_true)) if num_true else 0
    wrong = []
    for _ in range(4):
        x = 2 + 3 * real + plan.by_seed(rng, BATCH, SEED_SPREAD) + plan.noise(rng, BATCH, RUN_SPREAD)
        studies = Studies(plan, plan.runs(), plan.changes(density(x)))
        for view in views(BATCH):
            rows = studies.judge(view, stated)
            wrong.append([r["verdict"] for r in rows])
    wrong = np.array(wrong)
    note("holm", num_true, (wrong[:, num_true:] != "undecided").any(axis=1).mean(), (wrong[:, :num_true] == "supported").mean() if num_true else "")
