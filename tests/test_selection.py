"""Which runs a claim is about, and which are alike but for what is compared."""

import json

import numpy as np
import pytest
from test_effects import make_study, make_tables, trials_of

from rlsparse.effects import selection
from rlsparse.effects.selection import Pair
from rlsparse.identity import canonical_json
from rlsparse.study import Study


def runs_of(study: Study):
    return selection.with_configs(make_tables(trials_of(study), lambda t: 0.1)[0])


NESTED_STUDY = make_study(
    factors={
        "algorithm.name": ["grpo", "sft"],
        "algorithm.kl_coef": [0.0, 0.04],
        "train.max_grad_norm": [None, 1.0],
    },
    controls=["lr_zero", "same_seed", "lr_times_3"],
)


def test_select() -> None:
    runs = selection.with_configs(make_tables(trials_of(NESTED_STUDY), lambda t: 0.1)[0])
    count = {
        '{}': 24,
        '{"algorithm": "sft"}': 8,
        '{"algorithm.name": "grpo", "train.max_grad_norm": null}': 8,
        '{"train.max_grad_norm": 1, "seed": 2}': 3,
        '{"algorithm.kl_coef": 0.04}': 8,
        '{"algorithm.beta": 0.1}': 0,
        '{"role": "baseline"}': 4,
        '{"control": "lr_times_3"}': 4,
        '{"control": "lr_zero", "algorithm": "sft"}': 1,
        '{"control": null}': 24,
        '{"replicate": 1}': 2,
        '{"replicate": 0}': 30,
        '{"no.such.path": null}': 0,
    }  # fmt: skip
    assert {key: len(selection.select(runs, json.loads(key))) for key in count} == count


def test_nested_factors_match_on_what_both_have() -> None:
    runs = selection.with_configs(make_tables(trials_of(NESTED_STUDY), lambda t: 0.1)[0])
    plain = runs[runs["role"] != "control"]
    pairs = selection.factor_pairs(plain, "algorithm.name", "sft", "grpo")
    assert len(pairs) == 4 * 2 * 2  # seed x clipping x the KL coefficient of the GRPO run
    clip = dict(
        zip(runs["trial_id"], (c["train.max_grad_norm"] for c in runs["cell"]), strict=True)
    )
    for pair in pairs:
        held = json.loads(pair.within)
        assert held.keys() == {"algorithm.kl_coef", "train.max_grad_norm"}
        assert clip[pair.a] == clip[pair.b] == held["train.max_grad_norm"]
    assert len(selection.factor_pairs(plain, "algorithm.kl_coef", "0.04", "0.0")) == 4 * 2
    assert selection.matched_pairs(plain, plain, ["train.batch_size"]) == []
    controls = selection.control_pairs(NESTED_STUDY, runs)
    assert {p.within for p in controls} == {
        canonical_json(
            {"algorithm.name": "grpo", "algorithm.kl_coef": "0.0", "train.max_grad_norm": "null"}
        )
    }
    assert len(controls) == 4


def test_levels_of_the_grid_serve_as_the_control() -> None:
    """3e-6 is three times the baseline's 1e-6; 9e-6 is three times 3e-6 only."""
    factors = {"train.learning_rate": [1e-6, 3e-6, 9e-6], "train.max_grad_norm": [None, 1.0]}
    baseline = {"algorithm": {"name": "grpo"}, "train": {"learning_rate": 1e-6}}
    given = {"factors": factors, "baseline": baseline}
    study = make_study(**given, controls=["lr_times_3"])
    runs = runs_of(study)
    assert not (runs["control"] == "lr_times_3").any()
    cells = {
        row["trial_id"]: (
            row["seed"],
            row["config"]["train"]["learning_rate"],
            row["cell"]["train.max_grad_norm"],
        )
        for row in runs.to_dict("records")
    }
    found = [cells[p.a] + cells[p.b] for p in selection.control_pairs(study, runs)]
    own = baseline_clip(study)
    assert sorted(found) == [(s, 3e-6, own, s, 1e-6, own) for s in range(4)]
    without = make_study(**given)
    assert selection.control_pairs(without, runs_of(without)) == []
    other = baseline | {"train": {"learning_rate": 5e-6}}
    beside = make_study(factors=factors, baseline=other, controls=["lr_times_3"])
    rates = {p.b: p.a for p in selection.control_pairs(beside, runs_of(beside))}
    assert len(rates) == 4 * 2 * 2  # seed x clipping x (3e-6 over 1e-6, 9e-6 over 3e-6)


def baseline_clip(study: Study) -> str:
    value = study.baseline.train.max_grad_norm
    return "null" if value is None else str(value)


def test_mapping_levels_are_ignored_with_their_parts() -> None:
    study = make_study(
        factors={"algorithm": [{"name": "grpo", "kl_coef": 0.0}, {"name": "grpo", "kl_coef": 0.04}]}
    )
    runs = selection.with_configs(make_tables(trials_of(study), lambda t: 0.1)[0])
    sides = [selection.select(runs, {"algorithm.kl_coef": level}) for level in (0.04, 0.0)]
    assert len(selection.matched_pairs(*sides)) == 0
    assert len(selection.matched_pairs(*sides, ["algorithm.kl_coef"])) == 4
    assert len(selection.matched_pairs(*sides, ["algorithm"])) == 4


def test_by_seed_averages_and_drops_incomplete_seeds() -> None:
    pairs = [Pair("a", "b", seed, within) for seed in (3, 1, 2) for within in ("x", "y")]
    values = [1.0, 3.0, 5.0, 7.0, 9.0, np.nan]
    assert selection.by_seed(pairs, values).tolist() == [6.0, 2.0]
    assert selection.by_seed(pairs[:5], values[:5]).tolist() == [6.0, 2.0]
    assert selection.by_seed([], []).size == 0


SURROGATES = make_study(
    factors={"algorithm.reward": ["task", "random"]},
    controls=["lr_zero", "shuffled_reward"],
)


@pytest.mark.parametrize(
    ("selector", "varied", "count"),
    [
        ({}, "", 4),
        ({}, "algorithm.reward", 8 + 4),
        ({}, "algorithm", 8 + 4),
        ({}, "algorithm.name", 4),
        ({"algorithm.reward": "random"}, "", 4),
        ({"algorithm.reward": "task"}, "", 4),  # without lr_zero, a control
        ({"algorithm": "grpo"}, "", 4),
        ({"role": "surrogate"}, "", 8),
        ({"control": "shuffled_reward"}, "", 4),
        ({"task": "chain_sum", "seed": 1}, "", 1),
    ],
)
def test_surrogates_are_left_out_unless_asked_for(selector, varied, count):
    assert len(selection.select(runs_of(SURROGATES), selector, varied)) == count


BETA = make_study(
    factors={
        "algorithm": [{"name": "dpo"}, {"name": "simpo"}, {"name": "simpo", "gamma": 2.0}],
        "algorithm.beta": [0.1, 2.0],
    },
)


def test_a_field_of_an_algorithm_is_compared_within_it():
    """Although the mapping ``algorithm`` lies around ``algorithm.beta``."""
    runs = runs_of(BETA)
    pairs = selection.factor_pairs(runs, "algorithm.beta", "2.0", "0.1")
    assert len(pairs) == 3 * 4
    labels = {row["trial_id"]: row["cell"]["algorithm"] for row in runs.to_dict("records")}
    assert {(labels[p.a], labels[p.b]) for p in pairs} == {
        (label, label) for label in ("dpo", "simpo", "simpo(gamma=2.0)")
    }
    groups = selection.apart(runs, ["algorithm.name"], pairs)
    assert {name: len(group) for name, group in groups.items()} == {
        '{"algorithm.name":"dpo"}': 4, '{"algorithm.name":"simpo"}': 8,
    }  # fmt: skip
    assert selection.apart(runs, [], pairs) == {"{}": pairs}
    algorithms = selection.factor_pairs(runs, "algorithm", "simpo", "dpo")
    assert len(algorithms) == 2 * 4


def test_a_field_of_a_task_is_compared_within_it():
    study = make_study(
        factors={"task": [{"name": "chain_sum"}, {"name": "products"}], "task.num_digits": [1, 2]}
    )
    runs = runs_of(study)
    pairs = selection.factor_pairs(runs, "task.num_digits", "2", "1")
    tasks = {row["trial_id"]: row["config"]["task"]["name"] for row in runs.to_dict("records")}
    assert {(tasks[p.a], tasks[p.b]) for p in pairs} == {
        ("chain_sum", "chain_sum"), ("products", "products"),
    }  # fmt: skip
    assert list(selection.apart(runs, ["task.name"], pairs)) == [
        '{"task.name":"chain_sum"}', '{"task.name":"products"}',
    ]  # fmt: skip
    assert len(selection.factor_pairs(runs, "task", "products", "chain_sum")) == 2 * 4


def test_paths_that_are_held_must_agree():
    runs = runs_of(BETA)
    low, high = (selection.select(runs, {"algorithm.beta": beta}) for beta in (0.1, 2.0))
    free = selection.matched_pairs(high, low, ["algorithm.beta"])
    held = selection.matched_pairs(high, low, ["algorithm.beta"], ["algorithm.name"])
    assert (len(free), len(held)) == (3 * 3 * 4, (1 + 2 * 2) * 4)
