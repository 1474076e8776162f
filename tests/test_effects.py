"""Selection, matching and contrasts on small tables with known answers."""

import json
from collections.abc import Callable

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from rlsparse import effects, tables
from rlsparse.claim_config import At
from rlsparse.config import ModelConfig
from rlsparse.definitions import DEFINITIONS
from rlsparse.identity import canonical_json
from rlsparse.study import Study, Trial, expand

N = 1_000_000
GRPO, NESTED = "algorithm.name", "algorithm.kl_coef"


def make_study(**fields: object) -> Study:
    base = {
        "name": "s",
        "question": "?",
        "baseline": {"algorithm": {"name": "grpo", "kl_coef": 0.0}, "train": {"num_steps": 20}},
        "seeds": [0, 1, 2, 3],
    }
    return Study.model_validate(base | fields)


def trials_of(study: Study) -> list[Trial]:
    def fingerprint(model: ModelConfig) -> str:
        return model.source

    return expand(study, fingerprint=fingerprint, data_version=lambda config: "1")


def make_tables(
    trials: list[Trial],
    density: Callable[[Trial], float],
    failed: Callable[[Trial], bool] = lambda trial: False,
    score: Callable[[Trial], float] = lambda trial: 0.5,
    more: Callable[[Trial], dict[str, object]] = lambda trial: {},
    by_definition: Callable[[Trial, str], float] = lambda trial, definition: 1.0,
) -> tuple[pa.Table, pa.Table, pa.Table]:
    """Tables trials, steps, tensor_deltas: two chunks, snapshots at step 10 and 20.

    At step 10 a run has half its density and half its gain in score. ``more`` gives further columns
    of trials, ``by_definition`` the factor on density under a definition.
    """
    rows: list[dict[str, object]] = []
    steps: list[dict[str, object]] = []
    deltas: list[dict[str, object]] = []
    for trial in trials:
        lost = failed(trial)
        row = {
            "trial_id": trial.trial_id,
            "status": "failed" if lost else "finished",
            "cell": canonical_json(trial.cell),
            "config": canonical_json(trial.config.model_dump(mode="json")),
            "label": trial.label,
            "seed": trial.config.seed,
            "replicate": trial.replicate,
            "role": trial.role,
            "control": trial.control,
            "num_steps": 20,
            "num_eval_problems": 512,
            "score_before": 0.25,
            "score_after": None if lost else score(trial),
        }
        rows.append(row | more(trial))
        if lost:
            continue
        for step, share in ((0, 0.0), (10, 0.5), (20, 1.0)):
            value = 0.25 + share * (score(trial) - 0.25)
            steps.append({"trial_id": trial.trial_id, "step": step, "score": value})
            if step:
                for chunk in (0, 1):
                    delta = {"trial_id": trial.trial_id, "step_after": step, "view": "stored"}
                    delta |= {"chunk": chunk, "num_elements": N // 2}
                    for name in DEFINITIONS:
                        changed = round(density(trial) * by_definition(trial, name) * share * N)
                        part = changed // 3 if chunk else changed - changed // 3
                        delta[f"num_changed_{name}"] = part
                    deltas.append(delta)
        steps.append({"trial_id": trial.trial_id, "step": 5, "score": None})
    return (
        tables.from_rows(rows, "trials"),
        tables.from_rows(steps, "steps"),
        tables.from_rows(deltas, "tensor_deltas"),
    )


def odds(density: float) -> float:
    """Log odds of sparsity."""
    return float(np.log((1 - density) / density))


def effects_of(study: Study, *made: pa.Table) -> pd.DataFrame:
    found = effects.responses(*made, study.default_view)
    return effects.effects(study, made[0], found).to_pandas()


def pick(frame: pd.DataFrame, **wanted: object) -> pd.Series:
    for name, value in wanted.items():
        frame = frame[frame[name] == value]
    assert len(frame) == 1, frame
    return frame.iloc[0]


def test_responses_by_hand() -> None:
    study = make_study(seeds=[0])
    made = make_tables(trials_of(study), lambda t: 0.2, score=lambda t: 0.75)
    frame = effects.responses(*made, "stored")
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
    names = {f"sparsity.{name}@stored" for name in DEFINITIONS}
    assert set(frame["response"]) == names | {"score_after", "score_gain"}
    np.testing.assert_allclose(
        effects.scaled(pd.concat([ours, scores, gain]))[[1, 4, 7]],
        [odds(0.2), np.log(384.5 / 128.5), 0.5],
        rtol=1e-5,
    )


def test_default_view_comes_first() -> None:
    *made, deltas = make_tables(trials_of(make_study(seeds=[0])), lambda t: 0.2)
    again = deltas.set_column(3, "view", pa.array(["bf16"] * deltas.num_rows))
    both = pa.concat_tables([deltas, again])
    for view in ("stored", "bf16"):
        names = list(dict.fromkeys(effects.responses(*made, both, view)["response"]))
        at = [i for i, name in enumerate(names) if "@" in name and not name.endswith(f"@{view}")]
        assert at == list(range(len(names) - 7, len(names)))


RUN = pd.DataFrame(
    {
        "step": [0, 10, 20, 30],
        "log_density": [np.nan, -3.0, -2.0, -1.0],
        "score": [0.1, 0.4, 0.6, 0.5],
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
    ],
)
def test_density_at(at: At | None, expected: float) -> None:
    value, why = effects.density_at(RUN, at)
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
    value, found = effects.density_at(run, at)
    assert value is None
    assert why in found


def test_common_score() -> None:
    assert effects.common_score(RUN, RUN.assign(score=[0.1, 0.5, 0.2, 0.2])) == 0.5
    assert np.isnan(effects.common_score(RUN, RUN.assign(score=np.nan)))


def test_snapshots_join_density_and_score() -> None:
    study = make_study(seeds=[0])
    (trial,) = trials_of(study)
    made = make_tables([trial], lambda t: 0.2)
    frame = effects.responses(*made, "stored")
    table = effects.snapshots(frame, trial.trial_id, "sparsity.bitwise@stored")
    assert table["step"].tolist() == [0, 10, 20]
    np.testing.assert_allclose(np.exp(table["log_density"]), [np.nan, 0.1, 0.2], rtol=1e-4)
    assert table["score"].tolist() == [0.25, 0.375, 0.5]
    assert effects.snapshots(frame, "nobody", "sparsity.bitwise@stored").empty


FACTORIAL = make_study(
    factors={"algorithm.kl_coef": [0.0, 0.04, 0.1], "train.max_grad_norm": [None, 1.0]},
    controls=["lr_times_3"],
)


def planted(trial: Trial) -> float:
    """KL .04 lowers density, more so with clipping; seeds shift it; lr x 3 doubles it."""
    density = 0.1 + 0.01 * trial.config.seed
    if trial.cell["algorithm.kl_coef"] == "0.04":
        density /= 1.5 if trial.cell["train.max_grad_norm"] == "null" else 2.0
    return density * (2 if trial.control else 1)


def test_planted_effects_are_recovered() -> None:
    frame = effects_of(FACTORIAL, *make_tables(trials_of(FACTORIAL), planted))
    ours = frame[frame["response"] == "sparsity.bitwise@stored"]
    base = 0.1 + 0.01 * np.arange(4)
    gaps = {
        clip: [odds(d / by) - odds(d) for d in base] for clip, by in (("null", 1.5), ("1.0", 2))
    }
    kl = {"factor": "algorithm.kl_coef", "level": "0.04", "reference": "0.0"}
    for clip, gap in gaps.items():
        row = pick(ours, **kl, within=canonical_json({"train.max_grad_norm": clip}))
        assert row["estimate"] == pytest.approx(np.mean(gap), rel=1e-4)
        assert row["ci_low"] < row["estimate"] < row["ci_high"]
        assert (row["p_value"], row["p_floor"], row["num_runs"]) == (0.125, 0.125, 4)
        half = 3.182446 * np.std(gap, ddof=1) / 2
        assert row["ci_high"] - row["estimate"] == pytest.approx(half, rel=1e-2)
    pooled = pick(ours, **kl, within="{}")
    by_seed = np.mean(list(gaps.values()), axis=0)
    assert pooled["estimate"] == pytest.approx(by_seed.mean(), rel=1e-4)
    half = 3.182446 * by_seed.std(ddof=1) / 2
    assert pooled["ci_high"] - pooled["estimate"] == pytest.approx(half, rel=1e-2)
    assert pooled["p_adjusted"] == 0.75  # Holm over 2 levels x (2 combinations + pooled)
    none = pick(ours, factor="algorithm.kl_coef", level="0.1", within="{}")
    assert (none["estimate"], none["p_value"], none["p_adjusted"]) == (0, 1, 1)
    control = ours[ours["factor"] == "control.lr_times_3"]
    assert len(control) == 2
    assert control["estimate"].iloc[0] == pytest.approx(
        np.mean([odds(2 * d) - odds(d) for d in base]), rel=1e-4
    )
    assert control["estimate"].nunique() == 1
    assert control["p_adjusted"].tolist() == [0.125, 0.125]  # one test, shown twice
    assert set(frame.loc[frame["response"] == "score_gain", "scale"]) == {"identity"}
    assert set(ours["scale"]) == {"log_odds"}


def test_reference_is_the_baselines_level() -> None:
    study = make_study(
        baseline={"algorithm": {"name": "grpo", "kl_coef": 0.04}, "train": {"num_steps": 20}},
        factors={"algorithm.kl_coef": [0.0, 0.04]},
    )
    frame = effects_of(study, *make_tables(trials_of(study), lambda t: 0.1))
    assert set(frame["level"]) == {"0.0"}
    assert set(frame["reference"]) == {"0.04"}


def test_lost_runs_cost_their_seed_in_pooled_contrasts() -> None:
    def failed(trial: Trial) -> bool:
        clipped = trial.cell["train.max_grad_norm"] == "1.0"
        return trial.config.seed == 1 and clipped and trial.cell["algorithm.kl_coef"] == "0.04"

    frame = effects_of(FACTORIAL, *make_tables(trials_of(FACTORIAL), planted, failed))
    kl = frame[(frame["factor"] == "algorithm.kl_coef") & (frame["level"] == "0.04")]
    kl = kl[kl["response"] == "sparsity.bitwise@stored"]
    assert dict(zip(kl["within"], kl["num_runs"], strict=True)) == {
        "{}": 3,
        '{"train.max_grad_norm":"1.0"}': 3,
        '{"train.max_grad_norm":"null"}': 4,
    }


def test_level_that_failed_everywhere_has_a_row() -> None:
    def failed(trial: Trial) -> bool:
        return trial.cell["algorithm.kl_coef"] == "0.1"

    frame = effects_of(FACTORIAL, *make_tables(trials_of(FACTORIAL), planted, failed))
    lost = frame[(frame["level"] == "0.1") & (frame["response"] == "score_after")]
    assert lost[["within", "num_runs"]].to_numpy().tolist() == [["{}", 0]]
    assert lost[["estimate", "ci_low", "p_value"]].isna().to_numpy().all()


def test_row_order_does_not_matter() -> None:
    made = make_tables(trials_of(FACTORIAL), planted)
    rng = np.random.default_rng(0)
    shuffled = [t.take(pa.array(rng.permutation(t.num_rows))) for t in made]
    assert effects_of(FACTORIAL, *shuffled).equals(effects_of(FACTORIAL, *made))


def test_nothing_finished_is_an_empty_or_null_table() -> None:
    made = make_tables(trials_of(FACTORIAL), planted, lambda t: True)
    assert effects_of(FACTORIAL, *made).empty


def test_fields_of_different_algorithms_are_not_pooled() -> None:
    """``beta`` of DPO lowers density by half, that of SimPO raises it as much: not a zero."""
    study = make_study(
        baseline={"algorithm": {"name": "dpo"}, "train": {"num_steps": 20}},
        factors={
            "algorithm": [{"name": "dpo"}, {"name": "simpo"}, {"name": "grpo"}],
            "algorithm.beta": [0.1, 2.0],
            "train.max_grad_norm": [None, 1.0],
        },
    )

    def density(trial: Trial) -> float:
        by = {"dpo": 0.5, "simpo": 2.0, "grpo": 1.0}[trial.config.algorithm.name]
        moved = trial.cell.get("algorithm.beta") == "2.0"
        return 0.1 * (by if moved else 1) * (1 + 0.01 * trial.config.seed)

    frame = effects_of(study, *make_tables(trials_of(study), density))
    beta = frame[(frame["factor"] == "algorithm.beta")
                 & (frame["response"] == "sparsity.bitwise@stored")]  # fmt: skip
    held = [json.loads(text) for text in beta["within"]]
    assert sorted(map(canonical_json, held)) == sorted(
        canonical_json(within)
        for name in ("dpo", "simpo")
        for within in (
            {"algorithm.name": name},
            {"algorithm": name, "train.max_grad_norm": "null"},
            {"algorithm": name, "train.max_grad_norm": "1.0"},
        )
    )
    for name, by in (("dpo", 0.5), ("simpo", 2.0)):
        row = pick(beta, within=canonical_json({"algorithm.name": name}))
        gap = np.mean([odds(0.1 * by * (1 + 0.01 * s)) - odds(0.1 * (1 + 0.01 * s))
                       for s in range(4)])  # fmt: skip
        assert row["estimate"] == pytest.approx(gap, rel=1e-3)
        assert row["num_runs"] == 4
    clip = frame[frame["factor"] == "train.max_grad_norm"]
    assert "{}" in set(clip["within"])  # not a field of the algorithm


def test_a_field_of_one_algorithm_is_pooled_over_the_rest() -> None:
    study = make_study(
        factors={"algorithm.name": ["grpo", "sft"], "algorithm.kl_coef": [0.0, 0.04]}
    )
    frame = effects_of(study, *make_tables(trials_of(study), lambda t: 0.1))
    kl = frame[(frame["factor"] == "algorithm.kl_coef") & (frame["response"] == "score_after")]
    assert set(kl["within"]) == {"{}", '{"algorithm.name":"grpo"}'}


def test_surrogates_enter_only_where_the_reward_is_the_factor() -> None:
    study = make_study(
        factors={"algorithm.reward": ["task", "random"], "train.max_grad_norm": [None, 1.0]},
        controls=["shuffled_reward", "lr_times_3"],
    )

    def density(trial: Trial) -> float:
        return 0.4 if trial.role == "surrogate" else 0.1

    frame = effects_of(study, *make_tables(trials_of(study), density))
    ours = frame[frame["response"] == "sparsity.bitwise@stored"]
    reward = pick(ours, factor="algorithm.reward", within="{}")
    assert (reward["level"], reward["num_runs"]) == ("random", 4)
    assert reward["estimate"] == pytest.approx(odds(0.4) - odds(0.1), rel=1e-4)
    clip = ours[ours["factor"] == "train.max_grad_norm"]
    assert set(clip["within"]) == {"{}", '{"algorithm.reward":"task"}'}
    plain = make_study(controls=["shuffled_reward", "lr_times_3"])
    frame = effects_of(plain, *make_tables(trials_of(plain), density))
    control = frame[frame["response"] == "sparsity.bitwise@stored"]
    assert set(control["factor"]) == {"control.lr_times_3"}
    assert set(control["estimate"]) == {0.0}
