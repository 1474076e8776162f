"""Selection, matching and contrasts on small tables with known answers."""

import json
import time
from collections.abc import Callable

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from scipy import stats

from rlsparse import effects, tables
from rlsparse.config import ModelConfig
from rlsparse.definitions import DEFINITIONS
from rlsparse.effects.responses import responses
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
    kl: Callable[[Trial], float] = lambda trial: 0.02,
    more: Callable[[Trial], dict[str, object]] = lambda trial: {},
    by_definition: Callable[[Trial, str], float] = lambda trial, definition: 1.0,
) -> tuple[pa.Table, pa.Table, pa.Table]:
    """Tables trials, steps, changes: two modules, snapshots at step 10 and 20.

    At step 10 a run has half its density, half its gain in score and half its KL. ``more`` gives
    further columns of trials, ``by_definition`` the factor on density under a definition.
    """
    rows: list[dict[str, object]] = []
    steps: list[dict[str, object]] = []
    changes: list[dict[str, object]] = []
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
            "kl_final": None if lost else kl(trial),
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
                steps[-1]["kl_base"] = share * kl(trial)
                for layer, module in ((0, "q"), (None, "embed")):
                    change = {"trial_id": trial.trial_id, "step": step, "view": "stored"}
                    change |= {"layer": layer, "module": module, "num_elements": N // 2}
                    for name in DEFINITIONS:
                        changed = round(density(trial) * by_definition(trial, name) * share * N)
                        part = changed // 3 if layer is None else changed - changed // 3
                        change[f"num_changed_{name}"] = part
                    changes.append(change)
        steps.append({"trial_id": trial.trial_id, "step": 5, "score": None})
    return (
        tables.from_rows(rows, "trials"),
        tables.from_rows(steps, "steps"),
        tables.from_rows(changes, "changes"),
    )


def odds(density: float) -> float:
    """Log odds of sparsity."""
    return float(np.log((1 - density) / density))


def effects_of(study: Study, *made: pa.Table) -> pd.DataFrame:
    """Primary rows of all weights."""
    frame = all_effects_of(study, *made)
    return frame[frame["method"].isin([effects.MATCHED, effects.RATES]) & frame["module"].isna()]


def all_effects_of(study: Study, *made: pa.Table) -> pd.DataFrame:
    found = responses(*made, study.default_view)
    return effects.effects(study, made[0], found, made[2]).to_pandas()


def pick(frame: pd.DataFrame, **wanted: object) -> pd.Series:
    for name, value in wanted.items():
        frame = frame[frame[name] == value]
    assert len(frame) == 1, frame
    return frame.iloc[0]


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
    assert set(frame.loc[frame["response"] == "failed", "scale"]) == {"identity"}
    assert set(frame.loc[frame["response"] == "kl_final", "scale"]) == {"log"}
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


def test_where_nothing_finished_only_failures_are_compared() -> None:
    made = make_tables(trials_of(FACTORIAL), planted, lambda t: True)
    frame = all_effects_of(FACTORIAL, *made)
    assert set(frame["response"]) == {"failed"}
    assert set(frame["estimate"]) == {0.0}


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


NOISY = make_study(factors={"algorithm.kl_coef": [0.0, 0.04]}, seeds=list(range(10)))


def noisy(trial: Trial) -> float:
    rng = np.random.default_rng([trial.config.seed, trial.cell["algorithm.kl_coef"] == "0.04"])
    shared = np.random.default_rng(trial.config.seed).normal(0, 0.5)
    return float(0.1 * np.exp(shared + rng.normal(0, 0.2)))


def test_sensitivities_of_pooled_rows() -> None:
    made = make_tables(trials_of(NOISY), noisy)
    frame = all_effects_of(NOISY, *made)
    frame = frame[(frame["response"] == "sparsity.bitwise@stored") & frame["module"].isna()]
    frame = frame[frame["layer"].isna()]
    assert frame["method"].tolist() == [effects.MATCHED, effects.UNPAIRED, effects.BOOTSTRAP]
    assert set(frame["method"]) <= effects.METHODS.keys()
    trials = sorted(trials_of(NOISY), key=lambda t: t.config.seed)
    a, b = (
        np.array([odds(round(noisy(t) * N) / N) for t in trials if t.cell == {NESTED: level}])
        for level in ("0.04", "0.0")
    )
    assert np.unique(frame["estimate"].round(9)).size == 1
    matched, unpaired, bootstrap = (row for _, row in frame.iterrows())
    assert matched["estimate"] == pytest.approx((a - b).mean(), rel=1e-4)
    assert matched["correlation"] == pytest.approx(np.corrcoef(a, b)[0, 1], rel=1e-4)
    assert matched["correlation"] > 0.5
    welch = stats.ttest_ind(a, b, equal_var=False)
    assert (unpaired["ci_low"], unpaired["ci_high"]) == pytest.approx(
        tuple(welch.confidence_interval(0.95)), rel=1e-3
    )
    assert unpaired["p_value"] == pytest.approx(welch.pvalue, rel=1e-3)
    width = frame["ci_high"] - frame["ci_low"]
    assert width.iloc[2] < width.iloc[0] < width.iloc[1]  # what matching gains
    assert bootstrap["ci_low"] < bootstrap["estimate"] < bootstrap["ci_high"]
    assert frame["p_adjusted"].isna().tolist() == [False, True, True]
    assert frame["p_floor"].isna().tolist() == [False, True, True]
    assert frame["num_runs"].tolist() == [10, 10, 10]


def test_no_sensitivity_where_cells_are_not_pooled() -> None:
    frame = all_effects_of(FACTORIAL, *make_tables(trials_of(FACTORIAL), planted))
    others = frame[frame["method"] == effects.UNPAIRED]
    assert set(others["within"]) == {"{}"}
    assert not others.duplicated(["response", "factor", "level"]).any()
    assert effects.BOOTSTRAP not in set(frame["method"])  # 4 seeds
    assert "failed" not in set(others["response"])


def test_no_correlation_without_spread() -> None:
    study = make_study(factors={"algorithm.kl_coef": [0.0, 0.04]})
    frame = effects_of(study, *make_tables(trials_of(study), lambda t: 0.1))
    assert frame["correlation"].isna().all()


def test_failure_rate_is_a_response() -> None:
    def failed(trial: Trial) -> bool:
        level, seed = trial.cell["algorithm.kl_coef"], trial.config.seed
        return trial.cell["train.max_grad_norm"] == "null" and level == "0.04" and seed < 3

    frame = effects_of(FACTORIAL, *make_tables(trials_of(FACTORIAL), planted, failed))
    ours = frame[(frame["response"] == "failed") & (frame["level"] == "0.04")]
    assert dict(zip(ours["within"], ours["estimate"], strict=True)) == {
        "{}": 0.375,
        '{"train.max_grad_norm":"1.0"}': 0,
        '{"train.max_grad_norm":"null"}': 0.75,
    }
    assert set(ours["num_runs"]) == {4}
    assert set(ours["method"]) == {effects.RATES}
    assert ours[["ci_low", "ci_high"]].isna().to_numpy().all()
    row = pick(ours, within='{"train.max_grad_norm":"null"}')
    assert row["p_value"] == 0.25  # of 1, 1, 1, 0: 4 of 16 flips have a sum of 3 or more
    assert row["p_adjusted"] == 1
    control = frame[(frame["response"] == "failed") & (frame["factor"] == "control.lr_times_3")]
    assert control["num_runs"].tolist() == [4, 4]
    density = frame[(frame["response"] == "sparsity.bitwise@stored") & (frame["level"] == "0.04")]
    assert pick(density, within="{}")["num_runs"] == 1


def test_layers_and_modules_are_adjusted_together() -> None:
    trials, steps, changes = make_tables(trials_of(NOISY), noisy)
    bf16 = changes.set_column(2, "view", pa.array(["bf16"] * changes.num_rows))
    at = changes.column_names.index("num_changed_bitwise")
    bf16 = bf16.set_column(at, "num_changed_bitwise", pa.array([0] * changes.num_rows))
    frame = all_effects_of(NOISY, trials, steps, pa.concat_tables([changes, bf16]))
    parts = frame[frame["layer"].notna() | frame["module"].notna()]
    keys = [tuple(None if pd.isna(x) else x for x in row)
            for row in parts[["layer", "module"]].to_numpy(object)]  # fmt: skip
    assert keys == [(0, None), (None, "embed"), (None, "q")]
    assert set(parts["response"]) == {"sparsity.bitwise@stored"}
    assert set(parts["method"]) == {effects.PART}
    by_seed = sorted(trials_of(NOISY), key=lambda t: t.config.seed)
    p = []
    for row, third in zip(parts.to_dict("records"), (2, 1, 2), strict=True):
        values = {
            level: np.array([odds(noisy(t) * third / 3 * 2)
                             for t in by_seed if t.cell == {NESTED: level}])
            for level in ("0.04", "0.0")
        }  # fmt: skip
        gaps = values["0.04"] - values["0.0"]
        assert row["estimate"] == pytest.approx(gaps.mean(), rel=1e-3, abs=1e-4)
        low, high = stats.t.interval(0.95, 9, gaps.mean(), stats.sem(gaps))
        assert (row["ci_low"], row["ci_high"]) == pytest.approx((low, high), rel=1e-3)
        assert row["num_runs"] == 10
        p.append(stats.ttest_1samp(gaps, 0).pvalue)
    np.testing.assert_allclose(parts["p_value"], p, rtol=5e-3)
    adjusted = stats.false_discovery_control(parts["p_value"])
    np.testing.assert_allclose(parts["p_adjusted"], adjusted, rtol=1e-9)


def test_five_hundred_runs_take_seconds() -> None:
    study = make_study(
        factors={
            "algorithm.kl_coef": [0.0, 0.01, 0.02, 0.03, 0.04],
            "train.max_grad_norm": [None, 0.5, 1.0, 2.0, 4.0],
            "train.learning_rate": [1e-6, 1e-5],
        },
        seeds=list(range(10)),
    )
    trials = trials_of(study)
    assert len(trials) == 500
    made = make_tables(trials, lambda t: 0.1 + 0.001 * t.config.seed)
    started = time.process_time()
    frame = all_effects_of(study, *made)
    assert time.process_time() - started < 15
    primary = frame[(frame["method"] == effects.MATCHED) | (frame["method"] == effects.RATES)]
    per_response = 4 * (10 + 1) + 4 * (10 + 1) + (25 + 1)
    assert len(primary) == 11 * per_response


def test_surrogates_of_a_control_are_no_runs_of_the_cell_that_they_vary() -> None:
    """They bear its label: {"algorithm": "grpo"}."""
    study = make_study(
        factors={"algorithm": [{"name": "grpo"}, {"name": "sft"}]}, controls=["shuffled_reward"]
    )

    def density(trial: Trial) -> float:
        return 0.01 if trial.role == "surrogate" else 0.2 if "sft" in trial.label else 0.1

    trials = trials_of(study)
    assert sum(trial.role == "surrogate" for trial in trials) == 4
    row = pick(
        effects_of(study, *make_tables(trials, density)),
        response="sparsity.bitwise@stored",
        level="sft",
    )
    assert row["estimate"] == pytest.approx(odds(0.2) - odds(0.1), rel=1e-4, abs=0)
