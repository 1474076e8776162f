"""The factorial model against statsmodels, and by hand where designs have holes."""

import itertools
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
import statsmodels.formula.api as smf
from scipy import stats
from statsmodels.stats.anova import anova_lm
from statsmodels.stats.multitest import multipletests
from test_effects import make_study, make_tables, pick, trials_of

from rlsparse.effects.factorial import factorial
from rlsparse.effects.responses import responses
from rlsparse.study import Study, Trial

KL, CLIP = "algorithm.kl_coef", "train.max_grad_norm"
TWO_WAY = {KL: [0.0, 0.04, 0.1], CLIP: [None, 1.0]}
NAMES = {"seed": "C(seed)", KL: "C(kl)", CLIP: "C(clip)", f"{KL} : {CLIP}": "C(kl):C(clip)"}


def noise(trial: Trial) -> float:
    """A score of a run: effects of all factors, of the seed, and noise."""
    text = "/".join([str(trial.config.seed), trial.config.algorithm.name, *trial.cell.values()])
    own = np.random.default_rng(list(text.encode())).normal(0, 0.05)
    levels = sum(0.03 * i * len(label) for i, label in enumerate(trial.cell.values()))
    return float(0.4 + levels + 0.02 * trial.config.seed + own)


def never(trial: Trial) -> bool:
    return False


def fit(
    study: Study,
    failed: Callable[[Trial], bool] = never,
    score: Callable[[Trial], float] = noise,
    response: str = "score_gain",
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Terms, means and finished runs (seed, kl, clip, algorithm, y)."""
    trials = trials_of(study)
    made = make_tables(trials, lambda t: 0.1 * score(t), failed, score, kl=score)
    terms, means = factorial(study, made[0], responses(*made, "stored"))
    data = pd.DataFrame(
        [
            {
                "seed": t.config.seed,
                "kl": t.cell.get(KL, "none"),
                "clip": t.cell.get(CLIP),
                "algorithm": t.config.algorithm.name,
                "y": score(t) - 0.25,
            }
            for t in trials
            if t.role in ("baseline", "factor") and not failed(t)
        ]
    )
    found, average = terms.to_pandas(), means.to_pandas()
    return found[found["response"] == response], average[average["response"] == response], data


def lost(trial: Trial) -> bool:
    """Some runs, more of them at a KL coefficient of .1."""
    return hash_of(trial) % (3 if trial.cell.get(KL) == "0.1" else 7) == 0


def hash_of(trial: Trial) -> int:
    return trial.config.seed * 5 + len("".join(trial.cell.values()))


@pytest.mark.parametrize("failed", [never, lost])
@pytest.mark.parametrize("interactions", [(), ((CLIP, KL),)])
def test_terms_equal_statsmodels(
    failed: Callable[[Trial], bool], interactions: tuple[tuple[str, str], ...]
) -> None:
    study = make_study(
        factors=TWO_WAY,
        interactions=interactions,
        seeds=[0, 1, 2, 3, 4],
        controls=["lr_times_3", "shuffled_reward", "same_seed", "lr_zero"],
    )
    terms, _, data = fit(study, failed)
    formula = "y ~ C(seed) + C(kl) + C(clip)" + (" + C(kl):C(clip)" if interactions else "")
    model = smf.ols(formula, data).fit()
    oracle = anova_lm(model, typ=2)
    assert terms["term"].tolist() == list(NAMES)[: 3 + len(interactions)]
    for row in terms.to_dict("records"):
        expected = oracle.loc[NAMES[row["term"]]]
        assert (row["df"], row["df_residual"]) == (expected["df"], model.df_resid)
        assert row["sum_sq"] == pytest.approx(expected["sum_sq"], rel=1e-8)
        assert row["f_value"] == pytest.approx(expected["F"], rel=1e-8)
        assert row["p_value"] == pytest.approx(expected["PR(>F)"], rel=1e-7)
        mean_sq = model.mse_resid
        omega = (expected["sum_sq"] - expected["df"] * mean_sq) / (
            expected["sum_sq"] + (len(data) - expected["df"]) * mean_sq
        )
        assert row["omega_sq"] == pytest.approx(omega, rel=1e-8)
        assert row["num_runs"] == len(data)
        assert row["note"] == ""
    assert len(data) == (30 if failed is never else 30 - sum(map(lost, plain(study))))


def plain(study: Study) -> list[Trial]:
    return [t for t in trials_of(study) if t.role in ("baseline", "factor")]


def test_unbalanced_test_is_unbalanced() -> None:
    study = make_study(factors=TWO_WAY, seeds=[0, 1, 2, 3, 4])
    count = sum(map(lost, plain(study)))
    assert 5 <= count <= 12


LEVELS = {"seed": [0, 1, 2, 3, 4], "kl": ["0.0", "0.04", "0.1"], "clip": ["null", "1.0"]}


def dummies(data: pd.DataFrame, interaction: bool) -> np.ndarray:
    """Columns of a model with treatment coding."""
    own = {n: [data[n] == one for one in LEVELS[n][1:]] for n in LEVELS}
    columns = [np.ones(len(data)), *(c for name in LEVELS for c in own[name])]
    if interaction:
        columns += [a & b for a in own["kl"] for b in own["clip"]]
    return np.array(columns, float).T


@pytest.mark.parametrize("interaction", [True, False])
def test_marginal_means_equal_statsmodels(interaction: bool) -> None:
    """Predictions over the whole grid, averaged."""
    study = make_study(
        factors=TWO_WAY, interactions=((KL, CLIP),) if interaction else (), seeds=LEVELS["seed"]
    )
    _, means, data = fit(study, lost)
    model = sm.OLS(data["y"], dummies(data, interaction)).fit()
    grid = pd.DataFrame(itertools.product(*LEVELS.values()), columns=list(LEVELS))
    assert len(means) == 5
    for name, factor in (("kl", KL), ("clip", CLIP)):
        for level in LEVELS[name]:
            row = pick(means, factor=factor, level=level, within="{}")
            at = dummies(grid[grid[name] == level], interaction).mean(axis=0)
            expected = model.t_test(at)
            assert row["estimate"] == pytest.approx(expected.effect[0], rel=1e-8)
            assert (row["ci_low"], row["ci_high"]) == pytest.approx(
                tuple(expected.conf_int()[0]), rel=1e-8
            )
            assert row["num_runs"] == (data[name] == level).sum()
            assert (row["scale"], row["note"]) == ("identity", "")
    assert means["level"].tolist() == [*LEVELS["kl"], *LEVELS["clip"]]  # in order of the study


def test_balanced_marginal_means_are_means() -> None:
    study = make_study(factors=TWO_WAY, seeds=LEVELS["seed"])
    _, means, data = fit(study)
    for level in LEVELS["kl"]:
        row = pick(means, factor=KL, level=level)
        assert row["estimate"] == pytest.approx(data.loc[data["kl"] == level, "y"].mean(), rel=1e-9)


def test_failures_at_one_seed_do_not_bias_marginal_means() -> None:
    """Seeds differ much; at the level .1 the low ones are lost: its raw mean is far too high."""

    def score(trial: Trial) -> float:
        return 0.3 + 0.1 * trial.config.seed + (0.05 if trial.cell[KL] == "0.1" else 0)

    def failed(trial: Trial) -> bool:
        return trial.cell[KL] == "0.1" and trial.config.seed < 2

    study = make_study(factors=TWO_WAY)
    _, means, data = fit(study, failed, score)
    gap = pick(means, level="0.1")["estimate"] - pick(means, level="0.0")["estimate"]
    assert gap == pytest.approx(0.05, rel=1e-9)
    assert pick(means, level="0.0")["estimate"] == pytest.approx(0.3 + 0.15 - 0.25, rel=1e-9)
    assert data.groupby("kl")["y"].mean()["0.1"] - 0.2 > 0.1


NESTED = make_study(
    factors={
        "algorithm.name": ["grpo", "sft"],
        KL: [0.0, 0.04, 0.1],
        CLIP: [None, 1.0],
    },
)


@pytest.mark.parametrize("failed", [never, lost])
def test_nested_factor_equals_contrasts_within(failed: Callable[[Trial], bool]) -> None:
    """Against models of statsmodels whose columns are written out by hand."""
    terms, means, data = fit(NESTED, failed)
    assert set(data["kl"]) == {"0.0", "0.04", "0.1", "none"}
    grpo = (data["algorithm"] == "grpo").to_numpy(float)
    clip = (data["clip"] == "1.0").to_numpy(float)
    seeds = [(data["seed"] == s).to_numpy(float) for s in (1, 2, 3)]
    kl = [(data["kl"] == level).to_numpy(float) for level in ("0.04", "0.1")]
    ones = np.ones(len(data))

    def ols(*columns: np.ndarray):
        return sm.OLS(data["y"], np.array([ones, *columns]).T).fit()

    full = ols(*seeds, grpo, clip, *kl)
    reduced = {
        "seed": ols(grpo, clip, *kl),
        "algorithm.name": ols(*seeds, clip),  # without what is nested in it
        KL: ols(*seeds, grpo, clip),
        CLIP: ols(*seeds, grpo, *kl),
    }
    with_it = dict.fromkeys(reduced, full) | {"algorithm.name": ols(*seeds, clip, grpo)}
    assert terms["term"].tolist() == list(reduced)
    for row in terms.to_dict("records"):
        small, large = reduced[row["term"]], with_it[row["term"]]
        df = small.df_resid - large.df_resid
        assert (row["df"], row["df_residual"]) == (df, full.df_resid)
        assert row["sum_sq"] == pytest.approx(small.ssr - large.ssr, rel=1e-8)
        f = (small.ssr - large.ssr) / df / full.mse_resid
        assert row["p_value"] == pytest.approx(stats.f.sf(f, df, full.df_resid), rel=1e-7)
    assert pick(terms, term=KL)["note"] == "nested in algorithm.name"
    assert pick(terms, term="algorithm.name")["note"] == ""
    mean_seeds = np.full(3, 0.25)
    third, half = 1 / 3, 0.5
    wanted = {
        ("algorithm.name", "grpo"): [1, *mean_seeds, 1, half, third, third],
        ("algorithm.name", "sft"): [1, *mean_seeds, 0, half, 0, 0],
        (KL, "0.0"): [1, *mean_seeds, 1, half, 0, 0],
        (KL, "0.1"): [1, *mean_seeds, 1, half, 0, 1],
        # Algorithms count alike, though three cells of four are GRPO's.
        (CLIP, "1.0"): [1, *mean_seeds, half, 1, third / 2, third / 2],
    }
    for (factor, level), combination in wanted.items():
        row = pick(means, factor=factor, level=level)
        expected = full.t_test(np.array(combination, float))
        assert row["estimate"] == pytest.approx(expected.effect[0], rel=1e-8)
        assert row["ci_low"] == pytest.approx(expected.conf_int()[0][0], rel=1e-8)


def test_fields_of_two_algorithms_are_nested_in_each() -> None:
    """``beta`` of DPO halves the score gain, that of SimPO doubles it: no null effect."""
    study = make_study(
        baseline={"algorithm": {"name": "dpo"}, "train": {"num_steps": 20}},
        factors={"algorithm": [{"name": "dpo"}, {"name": "simpo"}], "algorithm.beta": [0.1, 2.0]},
    )

    def score(trial: Trial) -> float:
        sign = 1 if trial.config.algorithm.name == "dpo" else -1
        moved = sign * 0.1 if trial.cell["algorithm.beta"] == "2.0" else 0
        return 0.4 + moved + 0.1 * noise(trial)

    terms, means, data = fit(study, score=score)
    beta = pick(terms, term="algorithm.beta")
    assert beta["df"] == 2
    assert beta["note"] == "nested in algorithm"
    assert beta["p_value"] < 1e-3
    assert pick(terms, term="algorithm")["df"] == 1
    found = {
        (row["within"], row["level"]): row["estimate"]
        for row in means[means["factor"] == "algorithm.beta"].to_dict("records")
    }
    labels = np.array([t.cell["algorithm.beta"] for t in trials_of(study)])
    for name in ("dpo", "simpo"):
        for level in ("0.1", "2.0"):
            at = (data["algorithm"] == name).to_numpy() & (labels == level)
            assert found[f'{{"algorithm.name":"{name}"}}', level] == pytest.approx(
                data["y"][at].mean(), rel=1e-8
            )
    assert len(found) == 4


def test_interaction_of_a_nested_factor() -> None:
    """What GRPO's clipping does beyond SFT's is not what KL does to clipping."""

    def score(trial: Trial) -> float:
        both = trial.config.algorithm.name == "grpo" and trial.cell[CLIP] == "1.0"
        return 0.4 + 0.1 * both + 0.001 * noise(trial)

    study = NESTED.model_copy(update={"interactions": ((KL, CLIP),)})
    terms, _, _ = fit(study, score=score)
    row = pick(terms, term=f"{KL} : {CLIP}")
    assert (row["df"], row["note"]) == (2, "nested in algorithm.name")
    assert row["sum_sq"] < 1e-6
    study = NESTED.model_copy(
        update={"interactions": ((KL, CLIP), (CLIP, "algorithm.name"), ("algorithm.name", KL))}
    )
    terms, _, _ = fit(study, score=score)
    own = pick(terms, term=f"algorithm.name : {CLIP}")
    assert own["df"] == 1
    assert own["sum_sq"] == pytest.approx(0.1**2 * 32 * 3 / 4 / 4 / 4, rel=0.05)
    assert pick(terms, term=f"{KL} : {CLIP}")["df"] == 2
    # All that KL does, it does within its algorithm.
    assert pick(terms, term=f"algorithm.name : {KL}")["df"] == 0


def test_empty_cells_say_so() -> None:
    """KL .1 failed everywhere under clipping: one contrast of the interaction is lost."""

    def failed(trial: Trial) -> bool:
        return trial.cell[KL] == "0.1" and trial.cell[CLIP] == "1.0"

    study = make_study(factors=TWO_WAY, interactions=((KL, CLIP),))
    terms, means, data = fit(study, failed)
    row = pick(terms, term=f"{KL} : {CLIP}")
    assert row["df"] == 1
    assert row["note"] == "1 of 2 degrees of freedom can be told, cells have no measured run"
    lost_mean = pick(means, level="0.1")
    assert np.isnan(lost_mean["estimate"])
    assert "not estimable" in lost_mean["note"]
    assert lost_mean["num_runs"] == 4
    assert np.isnan(pick(means, level="1.0")["estimate"])  # averages over the lost cell
    assert not np.isnan(pick(means, level="0.04")["estimate"])
    cell = (data["kl"] == "0.04") & (data["clip"] == "null")
    other = (data["kl"] == "0.04") & (data["clip"] == "1.0")
    expected = (data["y"][cell].mean() + data["y"][other].mean()) / 2
    assert pick(means, level="0.04")["estimate"] == pytest.approx(expected, rel=1e-8)
    without, additive, _ = fit(make_study(factors=TWO_WAY), failed)
    assert not additive["estimate"].isna().any()  # the model without interaction fills the hole
    assert (without["note"] == "").all()


def test_a_level_that_failed_everywhere() -> None:
    terms, means, _ = fit(make_study(factors=TWO_WAY), lambda t: t.cell[KL] == "0.1")
    row = pick(terms, term=KL)
    assert row["df"] == 1
    assert row["note"] == "1 of 2 degrees of freedom can be told, cells have no measured run"
    assert np.isnan(pick(means, level="0.1")["estimate"])
    assert pick(means, level="0.1")["num_runs"] == 0
    assert np.isnan(pick(means, level="1.0")["estimate"])  # it averages over KL coefficients


def test_aliased_factors_are_named() -> None:
    """Only the diagonal finished: nobody can tell one factor from the other."""

    def failed(trial: Trial) -> bool:
        return (trial.cell[CLIP] == "1.0") != (trial.cell[KL] == "0.04")

    study = make_study(factors={KL: [0.0, 0.04], CLIP: [None, 1.0]})
    terms, means, _ = fit(study, failed)
    for name, other in ((KL, CLIP), (CLIP, KL)):
        row = pick(terms, term=name)
        assert row["df"] == 0
        assert row["note"] == (
            f"0 of 1 degrees of freedom can be told, the rest is aliased with {other}"
        )
        assert row[["sum_sq", "f_value", "p_value", "p_adjusted"]].isna().all()
    assert means["estimate"].isna().all()


def test_a_term_without_effect_is_not_negative_by_rounding() -> None:
    """All seeds have equal means here, and sums of squares are differences of larger ones."""
    found = [
        fit(
            make_study(factors={KL: [0.0, 0.1]}, seeds=list(range(n))),
            score=lambda t: (
                0.1
                + 0.7 * float(t.cell[KL])
                + 0.013 * (-1) ** (t.config.seed + (t.cell[KL] == "0.1"))
            ),
        )[0]
        for n in range(2, 9)
    ]
    assert all((terms["f_value"].dropna() >= 0).all() for terms in found)


def test_seed_lost_everywhere_costs_one_degree_of_freedom() -> None:
    terms, means, data = fit(make_study(factors=TWO_WAY), lambda t: t.config.seed == 2)
    assert pick(terms, term="seed")["df"] == 2
    assert "2 of 3" in pick(terms, term="seed")["note"]
    assert not means["estimate"].isna().any()
    expected = data.loc[data["kl"] == "0.1", "y"].mean()
    assert pick(means, level="0.1")["estimate"] == pytest.approx(expected, rel=1e-8)


def test_saturated_or_constant_gives_no_test() -> None:
    study = make_study(factors={KL: [0.0, 0.04]}, seeds=[0])
    terms, means, _ = fit(study)
    row = pick(terms, term=KL)
    assert (row["df"], row["df_residual"]) == (1, 0)
    assert row["note"] == "no residual degrees of freedom"
    assert row[["f_value", "p_value", "omega_sq"]].isna().all()
    assert not means["estimate"].isna().any()
    assert means["ci_low"].isna().all()
    terms, _, _ = fit(make_study(factors=TWO_WAY), score=lambda t: 0.3)
    assert set(terms["note"]) == {"no residual spread"}
    assert terms["p_value"].isna().all()


def test_holm_is_over_factors_and_interactions() -> None:
    study = make_study(factors=TWO_WAY, interactions=((KL, CLIP),))
    terms, _, _ = fit(study)
    assert np.isnan(pick(terms, term="seed")["p_adjusted"])
    own = terms[terms["term"] != "seed"]
    expected = multipletests(own["p_value"], method="holm")[1]
    np.testing.assert_allclose(own["p_adjusted"], expected, rtol=1e-12)
    assert len(own) == 3


def test_interactions_of_claims_count() -> None:
    claim = {"id": "a", "kind": "interaction", "factor": CLIP, "by": KL}
    other = {"id": "b", "kind": "interaction", "factor": CLIP, "by": "train.batch_size"}
    study = make_study(factors=TWO_WAY, claims=[claim, other], interactions=[(KL, CLIP)])
    terms, _, _ = fit(study)
    assert terms["term"].tolist() == ["seed", KL, CLIP, f"{KL} : {CLIP}"]


def test_every_response_is_modelled_on_its_scale() -> None:
    study = make_study(factors=TWO_WAY)
    trials = trials_of(study)
    made = make_tables(trials, lambda t: 0.1 * noise(t), score=noise, kl=noise)
    terms, means = (
        table.to_pandas() for table in factorial(study, made[0], responses(*made, "stored"))
    )
    scales = dict(zip(means["response"], means["scale"], strict=True))
    assert scales == {
        "sparsity.bitwise@stored": "log_odds",
        "score_after": "log_odds",
        "score_gain": "identity",
        "kl_final": "log",
    }
    assert list(dict.fromkeys(terms["response"])) == list(scales)
    kl = pick(means, response="kl_final", level="0.1")
    expected = np.mean([np.log(noise(t)) for t in trials if t.cell[KL] == "0.1"])
    assert kl["estimate"] == pytest.approx(expected, rel=1e-8)
    nothing = make_tables(trials, noise, lambda t: True)
    assert all(
        table.num_rows == 0 for table in factorial(study, nothing[0], responses(*nothing, "stored"))
    )


def test_surrogates_are_not_modelled() -> None:
    study = make_study(factors={"algorithm.reward": ["task", "random"], **TWO_WAY})
    terms, means, _ = fit(study)
    row = pick(terms, term="algorithm.reward")
    assert (row["df"], row["note"]) == (0, "a single level")
    assert set(terms["num_runs"]) == {24}
    assert means[means["factor"] == "algorithm.reward"]["level"].tolist() == ["task"]


def test_intervals_of_means_cover_and_p_is_uniform_under_the_null() -> None:
    study = make_study(factors={KL: [0.0, 0.04], CLIP: [None, 1.0]})
    trials = [t for t in trials_of(study) if not (t.config.seed == 1 and t.cell[CLIP] == "1.0")]
    made = make_tables(trials, lambda t: 0.1)
    frame = responses(*made, "stored")
    frame = frame[(frame["response"] == "score_gain") & frame["last"]]
    seeds = {t.trial_id: t.config.seed for t in trials}
    base = 0.3 + 0.1 * frame["trial_id"].map(seeds).to_numpy()
    rng = np.random.default_rng(0)
    covered, p = [], []
    for _ in range(200):
        drawn = frame.assign(value=base + rng.normal(0, 0.1, len(frame)))
        terms, means = (table.to_pandas() for table in factorial(study, made[0], drawn))
        row = pick(means, level="1.0")
        covered.append(row["ci_low"] < 0.3 + 0.15 < row["ci_high"])
        p.append(pick(terms, term=KL)["p_value"])
    assert np.mean(covered) == pytest.approx(0.95, abs=0.035)
    assert np.mean(np.array(p) < 0.2) == pytest.approx(0.2, abs=0.065)
