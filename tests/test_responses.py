"""Responses on small tables with known answers."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from test_effects import N, make_study, make_tables, odds, trials_of

from rlsparse.claim_config import At
from rlsparse.definitions import DEFINITIONS
from rlsparse.effects import responses


def test_responses_by_hand() -> None:
    study = make_study(seeds=[0])
    made = make_tables(trials_of(study), lambda t: 0.2, score=lambda t: 0.75)
    frame = responses.responses(*made, "stored")
    ours = frame[frame["response"] == "sparsity.bitwise@stored"]
    assert ours[["step", "value", "numerator", "n", "last"]].to_numpy().tolist() == [
        [10, 0.9, 100_000, N, False],
        [20, 0.8, 200_000, N, True],
    ]
    scores = frame[frame["response"] == "score_after"]
    assert scores[["step", "value", "numerator", "last"]].to_numpy().tolist() == [
        [0, 0.25, 128, False],
        [10, 0.5, 256, False],
        [20, 0.75, 384, True],
    ]
    gain = frame[frame["response"] == "score_gain"]
    assert gain["value"].tolist() == [0, 0.25, 0.5]
    kl = frame[frame["response"] == "kl_final"]
    assert kl[["step", "value", "last"]].to_numpy().tolist() == [
        [10, 0.01, False],
        [20, 0.02, True],
    ]
    failed = frame[frame["response"] == "failed"]
    assert failed[["step", "value", "numerator", "n", "last"]].to_numpy().tolist() == [
        [20, 0, 0, 1, True]
    ]
    names = {f"sparsity.{name}@stored" for name in DEFINITIONS}
    others = {"score_after", "score_gain", "kl_final", "failed"}
    assert set(frame["response"]) == names | others
    np.testing.assert_allclose(
        responses.scaled(pd.concat([ours, scores, gain, kl, failed]))[[1, 4, 7, 9, 10]],
        [odds(0.2), np.log(384.5 / 128.5), 0.5, np.log(0.02), 0],
        rtol=1e-5,
    )
    scales = [responses.scale_of(name) for name in ("sparsity.bitwise@bf16", *sorted(others))]
    assert scales == ["log_odds", "identity", "log", "log_odds", "identity"]


def test_validation_scores_are_of_the_last_step_and_of_their_own_problems() -> None:
    of_seed = {0: 0.75, 1: None}
    made = make_tables(
        trials_of(make_study(seeds=[0, 1])), lambda t: 0.2,
        more=lambda t: {
            "score_validation": of_seed[t.config.seed], "num_validation_problems": 64,
        },
    )  # fmt: skip
    frame = responses.responses(*made, "stored")
    ours = frame[frame["response"] == "score_validation"]
    columns = ["step", "value", "numerator", "n", "last"]
    assert ours[columns].to_numpy().tolist() == [[20, 0.75, 48, 64, True]]
    np.testing.assert_allclose(responses.scaled(ours), np.log(48.5 / 16.5))
    assert responses.scale_of("score_validation") == "log_odds"


def test_a_kl_of_zero_or_less_has_no_log() -> None:
    kl = {0: 0.0, 1: -0.001, 2: 0.01}
    made = make_tables(
        trials_of(make_study(seeds=list(kl))), lambda t: 0.2, kl=lambda t: kl[t.config.seed]
    )
    frame = responses.responses(*made, "stored")
    frame = frame[(frame["response"] == "kl_final") & frame["last"]]
    assert sorted(frame["value"]) == sorted(kl.values())
    found = responses.scaled(frame)
    np.testing.assert_allclose(found[~np.isnan(found)], np.log(0.01))
    assert found.size == 3


def test_what_has_not_ended_has_not_failed() -> None:
    status = {0: "planned", 1: "running", 2: "failed", 3: "finished"}
    trials = trials_of(make_study())
    made = make_tables(
        trials, lambda t: 0.2, lambda t: t.config.seed < 3,
        more=lambda t: {"status": status[t.config.seed], "num_steps": None},
    )  # fmt: skip
    frame = responses.responses(*made, "stored")
    failed = frame[frame["response"] == "failed"]
    seeds = {t.trial_id: t.config.seed for t in trials}
    assert dict(zip(failed["trial_id"].map(seeds), failed["value"], strict=True)) == {2: 1, 3: 0}
    assert failed["last"].all()


def test_default_view_comes_first() -> None:
    *made, changes = make_tables(trials_of(make_study(seeds=[0])), lambda t: 0.2)
    at = changes.column_names.index("view")
    again = changes.set_column(at, "view", pa.array(["bf16"] * changes.num_rows))
    both = pa.concat_tables([changes, again])
    for view in ("stored", "bf16"):
        names = list(dict.fromkeys(responses.responses(*made, both, view)["response"]))
        at = [i for i, name in enumerate(names) if "@" in name and not name.endswith(f"@{view}")]
        assert at == list(range(len(names) - 7, len(names)))


RUN = pd.DataFrame(
    {
        "step": [0, 10, 20, 30],
        "log_density": [np.nan, -3.0, -2.0, -1.0],
        "score": [0.1, 0.4, 0.6, 0.5],
        "kl": [0.0, 0.02, np.nan, 0.1],
    }
)


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        (None, -1.0),
        (At(step=20), -2.0),
        (At(score=0.4), -3.0),
        (At(score=0.45), -2.75),
        (At(score=0.5), -2.5),  # first reached between 10 and 20, not at 30
        (At(score=0.6), -2.0),
        (At(kl=0.02), -3.0),
        (At(kl=0.04), -2.5),  # between 10 and 30: not measured at 20
        (At(kl=0.1), -1.0),
    ],
)
def test_density_at(at: At | None, expected: float) -> None:
    value, why = responses.density_at(RUN, at)
    assert value == pytest.approx(expected)
    assert why == ""


@pytest.mark.parametrize(
    ("run", "at", "why"),
    [
        (RUN, At(step=15), "no snapshot at step 15; there are 10, 20, 30"),
        (RUN, At(score=0.7), "score 0.7 is not reached"),
        (RUN, At(score=0.05), "reached before the first snapshot"),
        (RUN, At(score=0.3), "reached before the first snapshot"),
        (RUN, At(score="common"), "not a number"),
        (RUN.iloc[:1], None, "nothing measured"),
        (RUN.assign(score=np.nan), At(score=0.3), "not reached"),
    ],
)
def test_density_that_cannot_be_had_says_why(run: pd.DataFrame, at: At | None, why: str) -> None:
    value, found = responses.density_at(run, at)
    assert value is None
    assert why in found


def test_common_is_what_both_reach() -> None:
    other = RUN.assign(score=[0.1, 0.5, 0.2, 0.2], kl=[0, 0.3, 0.2, np.nan])
    for runs in ((RUN, other), (other, RUN)):
        assert responses.common(*runs, "score") == 0.5
        assert responses.common(*runs, "kl") == 0.1
        assert np.isnan(responses.common(runs[0], runs[1].assign(kl=np.nan), "kl"))


def test_snapshots_join_density_and_score() -> None:
    study = make_study(seeds=[0])
    (trial,) = trials_of(study)
    made = make_tables([trial], lambda t: 0.2)
    frame = responses.responses(*made, "stored")
    table = responses.snapshots(frame, trial.trial_id, "sparsity.bitwise@stored")
    assert table["step"].tolist() == [0, 10, 20]
    np.testing.assert_allclose(np.exp(table["log_density"]), [np.nan, 0.1, 0.2], rtol=1e-4)
    assert table["score"].tolist() == [0.25, 0.375, 0.5]
    assert table["kl"].tolist() == [0, 0.01, 0.02]
    without = frame[frame["response"] != "kl_final"]
    table = responses.snapshots(without, trial.trial_id, "sparsity.bitwise@stored")
    assert table["kl"].isna().all()
    assert responses.snapshots(frame, "nobody", "sparsity.bitwise@stored").empty


def test_layers_modules_and_chunks_are_summed() -> None:
    trials, steps, changes = make_tables(trials_of(make_study(seeds=[0, 1])), lambda t: 0.2)
    rng = np.random.default_rng(0)
    counts = rng.integers(0, N // 2, changes.num_rows)
    at = changes.column_names.index("num_changed_abs_1e-06")
    changes = changes.set_column(at, "num_changed_abs_1e-06", pa.array(counts))
    frame = responses.responses(trials, steps, changes, "stored")
    ours = frame[frame["response"] == "sparsity.abs_1e-06@stored"]
    for trial, step, found in zip(ours["trial_id"], ours["step"], ours["numerator"], strict=True):
        rows = [
            count
            for count, name, where in zip(
                counts, changes["trial_id"].to_pylist(), changes["step"].to_pylist(), strict=True
            )
            if (name, where) == (trial, step)
        ]
        assert (len(rows), found) == (2, sum(rows))
    assert len(ours) == 4


def test_what_trials_hold_of_the_end_counts() -> None:
    made = make_tables(
        trials_of(make_study(seeds=[0])), lambda t: 0.2,
        more=lambda t: {"score_after": 0.625, "kl_final": 0.5},
    )  # fmt: skip
    last = responses.responses(*made, "stored").query("last")
    found = dict(zip(last["response"], last["value"], strict=True))
    assert (found["score_after"], found["score_gain"], found["kl_final"]) == (0.625, 0.375, 0.5)
