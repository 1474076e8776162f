"""What could mislead: seeds added until it fits, runs that fail, comparisons that are none.

Found numbers are those of the time of writing, as in ``test_simulation``.
"""

import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import special
from simulated import (
    BATCH,
    CLIP,
    COPIES,
    GREATER,
    KL,
    NO_STEPS,
    RUN,
    SEEDS,
    SPARSITY,
    TWO,
    Plan,
    Studies,
    at_most,
    claim,
    coverage,
    density,
    recovered,
    verdicts,
    views,
)

from pipelines import collect, record
from pipelines.storage import Storage
from rlsparse import effects
from rlsparse.effects.factorial import factorial
from rlsparse.effects.responses import responses
from rlsparse.errors import TrialError
from rlsparse.identity import canonical_json
from rlsparse.levels import put
from rlsparse.patch import PATCH_FILE, TensorPair, write_patch
from rlsparse.study import Trial
from rlsparse.tables import snapshot_folder

pytestmark = pytest.mark.slow


# --- optional stopping -------------------------------------------------------------------------


def test_seeds_added_until_supported_are_marked(tmp_path: Path) -> None:
    """4000 studies without effect, looked at after 4, 7, 12 and 20 seeds.

    Found: 6.6 % are supported at some look, where one look has 2.5 %; 2.3 % at the first, as
    registered; the other 4.3 % all bear the mark ``extended``.
    """
    looks = (4, 7, 12, 20)
    plans = [Plan(factors=TWO, seeds=range(num), claims=[GREATER.model_dump()]) for num in looks]
    storage, rng = Storage(str(tmp_path)), np.random.default_rng(19)
    study = plans[0].study
    record.write(storage, study, study.seeds, command=None, has_begun=False, more={})
    verdicts_seen, last = [], plans[-1]
    for _ in range(8):
        x = 2 + last.by_seed(rng, BATCH, SEEDS) + last.noise(rng, BATCH, RUN)
        stopped = pd.Series("", index=views(BATCH))
        for plan in plans:
            study = plan.study
            record.write(storage, study, study.seeds, command=None, has_begun=True, more={})
            status = record.registration(storage, study, study.seeds).standing
            own = [last.names.index(name) for name in plan.names]
            studies = Studies(plan, [GREATER], plan.runs(), plan.changes(density(x[:, own])))
            going = stopped.index[stopped == ""]
            rows = studies.judge(going, status)
            marks = rows["registered"] + f" {len(study.seeds)}"
            stopped[going] = np.where(rows["verdict"] == "supported", marks, "")
        verdicts_seen.append(stopped)
    found = pd.concat(verdicts_seen)
    assert (found != "").mean() > 0.05
    at_most(found == "registered 4", 0.025)
    beyond = found[(found != "") & (found != "registered 4")]
    assert set(beyond) == {"extended 7", "extended 12", "extended 20"}


# --- runs that fail ----------------------------------------------------------------------------


def _judged_with_losses(
    plan: Plan, rng: np.random.Generator, num: int, steepness: float
) -> pd.DataFrame:
    """Verdicts on studies of 8 seeds without effect, in which dense runs fail.

    Level .04 varies more between runs, so that more of its runs are dense, and fail. Seeds are
    sorted by which of their runs failed, so that studies share tables.
    """
    is_a = plan.level(KL, "0.04") > 0
    x = 2 + plan.by_seed(rng, num, 0.3) + plan.noise(rng, num, 1.0) * np.where(is_a, 0.6, RUN)
    fails = rng.random(x.shape) < special.expit(-steepness * (x - 1.7))
    grid = [[plan.place(seed, level) for level in ("0.04", "0.0")] for seed in range(8)]
    x, fails = x[:, grid], fails[:, grid]  # [num, seeds, 2]
    order = np.argsort(2 * fails[..., 0] + fails[..., 1], axis=1, kind="stable")[..., None]
    flat = np.array(grid).reshape(-1)
    sorted_x, sorted_fails = (
        np.take_along_axis(one, order, axis=1).reshape(num, -1)[:, np.argsort(flat)]
        for one in (x, fails)
    )
    patterns, which = np.unique(sorted_fails, axis=0, return_inverse=True)
    rows = []
    for number, lost in enumerate(patterns):
        changed = np.where(lost, np.nan, density(sorted_x[which.reshape(-1) == number]))
        status = np.where(lost, "failed", "finished").tolist()
        studies = Studies(plan, [GREATER], plan.runs(status=status), plan.changes(changed))
        refused = studies.judge(["stored"]).iloc[0]
        if lost.any():
            assert refused["verdict"] == "undecided"
            assert f"{lost.sum()} of 16 runs are missing (failed {lost.sum()})" in refused["note"]
        rows.append(studies.judge(views(len(changed)), allow_missing=True))
    found = pd.concat(rows, ignore_index=True)
    without = found["note"].str.extract(r"missing runs: (\w+) without them")[0]
    return found.assign(complete=found["verdict"].where(without.isna(), without))


@pytest.mark.parametrize(("steepness", "num"), [(4.0, 4000), (1000.0, 1000)])
def test_runs_that_fail_where_they_are_dense_do_not_mislead(steepness: float, num: int) -> None:
    """5000 studies; without ``allow_missing`` all with a lost run are undecided.

    Found: complete seeds alone would support 5.8 % falsely, with the bounds it is 2.0 %. Where all
    runs beyond a limit fail, nothing that was seen stands for them: 10.7 % become 4.2 %, more than
    the 2.5 % of one side (and 8-9 % if level .04 spreads by 1 instead of .6): bounds over the range
    seen are no worst case.
    """
    plan, rng = Plan(factors=TWO, seeds=range(8)), np.random.default_rng(20)
    found = _judged_with_losses(plan, rng, num, steepness)
    assert (found["complete"] == "supported").mean() > 0.05
    at_most(found["verdict"] != "undecided", 0.05)
    if steepness < 1000:
        at_most(found["verdict"] == "supported", 0.025)


def test_unbalanced_grids_do_not_bias() -> None:
    """2000 studies of 8 seeds whose dense cell loses 40 % of its runs.

    The factor has an effect of .4 there and none elsewhere, .2 on average. Found: raw means differ
    by .304; matched contrasts are .199 (4.8 seeds are complete on average; 95.1 % covered), the
    factorial model's means .198 apart. Failure rates of .399 in the dense cell of a true .4, .1995
    of .2 over both.
    """
    factors, crossed = {**TWO, CLIP: [1.0, None]}, [[KL, CLIP]]
    plan, rng = (
        Plan(factors=factors, interactions=crossed, seeds=range(8)),
        np.random.default_rng(21),
    )
    kl, clip = plan.level(KL, "0.04"), plan.level(CLIP, "null")
    parts, raw, modelled = [], [], []
    for _ in range(2000 // COPIES):
        x = 2 - 1.2 * clip + 0.4 * kl * clip + plan.by_seed(rng, COPIES, SEEDS)
        x = x + plan.noise(rng, COPIES, RUN)
        lost = (rng.random(x.shape) < 0.4) & (kl * clip > 0)
        status = np.where(lost, "failed", "finished").reshape(-1).tolist()
        runs = plan.runs(COPIES, status=status)
        changes = plan.changes_of_copies(np.where(lost, np.nan, density(x)))
        frame = responses(runs, NO_STEPS, changes, "stored")
        frame = frame[frame["response"].isin([SPARSITY, "failed"])]
        parts.append(effects.effects(plan.study, runs, frame, changes).to_pandas())
        kept = np.where(lost, np.nan, x)
        raw.append(np.nanmean(kept[:, kl > 0], axis=1) - np.nanmean(kept[:, kl == 0], axis=1))
        for copy in range(10):
            own = runs.slice(copy * len(plan.names), len(plan.names))
            ours = frame[frame["trial_id"].isin(own["trial_id"].to_pylist())]
            means = factorial(plan.study, own, ours)[1].to_pandas()
            means = means[means["factor"] == KL].set_index("level")["estimate"]
            modelled.append(means["0.04"] - means["0.0"])
    assert np.concatenate(raw).mean() > 0.25
    recovered(pd.Series(modelled).dropna(), 0.2)
    rows = pd.concat(parts)
    rows = rows[(rows["factor"] == KL) & rows["layer"].isna() & rows["module"].isna()]
    is_pooled = ~rows["within"].str.contains(CLIP) & (rows["within"] != "{}")
    matched = rows[is_pooled & (rows["method"] == effects.MATCHED) & (rows["num_runs"] > 1)]
    recovered(matched["estimate"], 0.2)
    assert coverage(matched, 0.2) == pytest.approx(0.95, rel=0, abs=0.015)
    rates = rows[rows["method"] == effects.RATES]
    dense = rates[rates["within"].str.contains('"train.max_grad_norm":"null"')]
    recovered(dense["estimate"], 0.4)
    recovered(rates.loc[~rates["within"].str.contains(CLIP), "estimate"], 0.2)


# --- guards ------------------------------------------------------------------------------------

NUM_GUARDED = 250


def test_a_seed_that_reaches_nothing_is_found(tmp_path: Path) -> None:
    """60 studies of 8 runs; in each other one, two runs of a cell left the same weights."""
    plan, rng = Plan(factors=TWO), np.random.default_rng(25)
    before = np.zeros(64, np.uint16)
    for number in range(60):
        storage = Storage(str(tmp_path / f"study{number}"))
        after = {trial: (rng.random(64) < 0.3).astype(np.uint16) for trial in plan.names}
        seeds = rng.choice(4, 2, replace=False)
        alike = [plan.names[plan.place(int(seed), rng.choice(["0.0"]))] for seed in seeds]
        if number % 2:
            after[alike[1]] = after[alike[0]]
        for trial in plan.names:
            folder = tmp_path / f"{number}-{trial}"
            snapshot = folder / snapshot_folder(20)
            snapshot.mkdir(parents=True)
            pair = TensorPair("w", "bf16", (8, 8), before, after[trial])
            write_patch(snapshot / PATCH_FILE, [pair], base_fingerprint="b")
            storage.publish(folder, f"trials/{trial}")
        left = SimpleNamespace(storage=storage, finished=lambda: plan.trials)
        if number % 2:
            with pytest.raises(TrialError, match="seed not plumbed") as raised:
                collect.check_seeds(left)
            assert [t in str(raised.value) for t in plan.names] == [t in alike for t in plan.names]
        else:
            collect.check_seeds(left)


def changed(plan: Plan, path: str, value: object) -> list[str]:
    """The column ``config`` with a field changed in the runs at KL .04."""

    def config(trial: Trial) -> str:
        own = trial.config.model_dump(mode="json")
        return canonical_json(put(own, path, value) if trial.cell[KL] == "0.04" else own)

    return [config(trial) for trial in plan.trials]


@pytest.mark.parametrize(
    ("path", "value", "why"),
    [
        ("model.source", "other", "runs of different bases are compared"),
        ("train.batch_size", 7, "unequal budgets, train.batch_size"),
    ],
)
def test_unlike_runs_are_not_compared(path: str, value: object, why: str) -> None:
    """Of 250 studies with a large effect all are decided, none where runs are not alike."""
    plan, rng = Plan(factors=TWO), np.random.default_rng(26)
    x = density(2 + 3 * plan.level(KL, "0.04") + plan.noise(rng, NUM_GUARDED, RUN))
    assert set(verdicts(plan, GREATER, x)["verdict"]) == {"supported"}
    found = verdicts(plan, GREATER, x, config=changed(plan, path, value))
    assert set(found["verdict"]) == {"undecided"}
    assert found["note"].str.contains(why).all()


@pytest.mark.parametrize(
    ("path", "share", "why"),
    [
        ("model.source", 0.1, "masks of different bases"),
        ("", 0.6, "both densities of a pair exceed 0.5"),
    ],
)
def test_overlaps_that_cannot_be_compared_are_not(path: str, share: float, why: str) -> None:
    """Of 250 studies with a lift of 1.6 all are decided, none of another base or too dense."""
    plan, rng = Plan(factors=TWO), np.random.default_rng(27)
    one = claim("above_null", response="overlap.bitwise", between=KL)
    excess = 0.5 + plan.excess(rng, NUM_GUARDED, "pairs")

    def judged(share: float, **columns: list[str]) -> pd.DataFrame:
        overlaps = plan.overlaps(excess, density=share)
        studies = Studies(plan, [one], plan.runs(**columns), overlaps=overlaps)
        return studies.judge(views(NUM_GUARDED))

    assert (judged(0.1)["verdict"] == "supported").mean() > 0.99
    found = judged(share, **({"config": changed(plan, path, "other")} if path else {}))
    assert set(found["verdict"]) == {"undecided"}
    assert found["note"].str.contains(why).all()


@pytest.mark.parametrize(
    ("defect", "why"),
    [
        ("no control", "no finished lr_times_3 control"),
        ("control moves nothing", "not sensitive"),
        ("same numbers", "exactly the same"),
        ("same KL", "no level moves the realised KL one way"),
        ("nothing clipped", "no step of any run was clipped"),
    ],
)
def test_equivalence_of_what_did_not_act_is_not_supported(defect: str, why: str) -> None:
    """Of 250 studies without effect all are supported, none that could not have seen one."""
    is_clip = defect == "nothing clipped"
    factors = {CLIP: [1.0, None]} if is_clip else TWO
    controls = [] if defect == "no control" else ["lr_times_3"]
    plan, rng = Plan(factors=factors, controls=controls), np.random.default_rng(28)
    sound = Plan(factors=factors, controls=["lr_times_3"])
    one = claim("equivalent", factor=CLIP if is_clip else KL)

    def judged(plan: Plan, defect: str) -> pd.DataFrame:
        control = plan.at(lambda trial: trial.control == "lr_times_3")
        log = np.log(0.02) + plan.by_seed(rng, NUM_GUARDED, SEEDS)
        noise = plan.noise(rng, NUM_GUARDED, 0.03) * (defect != "same numbers")
        moved = control * np.log(1.0 if defect == "control moves nothing" else 2.5)
        other = plan.seeds % 2 if defect == "same KL" else plan.level(KL, "0.04")
        sign = np.where(plan.level(KL, "0.04") > 0, 1, -1)
        realised = 0.02 * np.exp(0.1 * other * sign)
        clipped = np.full(len(plan.names), 0 if defect == "nothing clipped" else 5)
        return verdicts(
            plan,
            one,
            np.exp(log + noise + moved),
            kl_final=realised,
            num_clipped_steps=clipped.tolist(),
        )

    assert (judged(sound, "")["verdict"] == "supported").mean() > 0.99
    found = judged(plan, defect)
    assert set(found["verdict"]) == {"undecided"}
    assert found["note"].str.contains(why).all()


def test_an_inert_kl_coefficient_may_pass_as_acting() -> None:
    """All ways in which noise may move the KL at 4 seeds: 2 of 16 point one way, and pass.

    With one level and 4 seeds the guard is a sign test at 12.5 %.
    """
    plan, rng = Plan(factors=TWO, controls=["lr_times_3"]), np.random.default_rng(29)
    control = plan.at(lambda trial: trial.control == "lr_times_3")
    log = np.log(0.02) + control * np.log(2.5) + plan.noise(rng, 1, 0.03)
    passed = []
    for signs in itertools.product([-1, 1], repeat=4):
        moved = 0.1 * np.array(signs)[plan.seeds] * plan.level(KL, "0.04")
        one = claim("equivalent", factor=KL)
        (verdict,) = verdicts(plan, one, np.exp(log), kl_final=np.exp(moved))["verdict"]
        passed.append(verdict == "supported")
    assert np.flatnonzero(passed).tolist() == [0, 15]
