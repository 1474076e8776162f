"""What a study compares: pairs, groups of runs, and the independent run of each pair."""

import json

import pytest
from planted_masks import a_run

from rlsparse.claim_config import AboveNullClaim, At, BelowNullClaim
from rlsparse.overlap.comparison import compare, references
from rlsparse.study import StudyBase


def study(*claims: AboveNullClaim | BelowNullClaim) -> StudyBase:
    return StudyBase(name="study", question="?", claims=claims)


def pairs(comparison, which: str = "pairs") -> list[tuple]:
    return [
        (*comparison.runs[a], *comparison.runs[b]) for a, b in getattr(comparison, which).T.tolist()
    ]


def test_last_snapshots_and_those_that_claims_name() -> None:
    runs = [a_run("b", 0, steps=(3, 9)), a_run("a", 1, steps=(3, 6, 9)), a_run("c", 2, steps=(6,))]
    plain = compare(study(), runs, "bf16")
    assert plain.view == "bf16"
    assert pairs(plain) == [("a", 9, "b", 9), ("a", 9, "c", 6), ("b", 9, "c", 6)]
    within = [("b", 3, "b", 9), ("a", 3, "a", 6), ("a", 3, "a", 9), ("a", 6, "a", 9)]
    assert pairs(plain, "pairs_within") == within
    claims = (
        AboveNullClaim(id="one", kind="above_null", at=At(step=3), module="q"),
        BelowNullClaim(id="two", kind="below_null", at=At(step=3), tensor="t"),
        BelowNullClaim(id="three", kind="below_null", at=At(score="common"), module="k"),
    )
    named = compare(study(*claims), runs, "bf16")
    assert pairs(named) == [*pairs(plain), ("a", 3, "b", 3)]
    assert (named.tensors, named.modules) == (("t",), ("k", "q"))


def test_a_named_step_that_is_the_last_of_all_adds_nothing() -> None:
    runs = [a_run("a", 0), a_run("b", 1)]
    claim = AboveNullClaim(id="one", kind="above_null", at=At(step=9))
    assert pairs(compare(study(claim), runs, "stored")) == [("a", 9, "b", 9)]


def test_groups_differ_in_the_seed_alone() -> None:
    other = {"cell": {"algorithm.name": "dpo"}, "algorithm": "dpo"}
    surrogate = {"role": "surrogate", "control": "random_reward"}
    runs = [
        a_run("r0", 0), a_run("r1", 1), a_run("r1again", 1, replicate=1, control="same_seed"),
        a_run("r7again", 7, replicate=1),
        a_run("longer", 2, steps=(12,)), a_run("d0", 0, **other), a_run("s0", 0, **surrogate),
        a_run("s1", 1, **surrogate), a_run("x0", 0, role="control", control="lr_times_3"),
        a_run("x1", 1, role="control", control="lr_times_3"), a_run("r1twice", 1),
    ]  # fmt: skip
    comparison = compare(study(), runs, "stored")
    found = [
        (json.loads(g.cell), g.algorithm, g.step, [comparison.runs[place][0] for place in g.runs])
        for g in comparison.groups
    ]
    cell = {"algorithm.name": "grpo"}
    assert found == [
        (cell, "grpo", 9, ["r0", "r1"]),
        (cell | {"control": "random_reward"}, "grpo", 9, ["s0", "s1"]),
    ]


def test_update_sizes_are_of_surrogates_first_then_of_the_baseline() -> None:
    surrogate = {"role": "surrogate", "control": "random_reward"}
    runs = [
        a_run("r0", 0), a_run("r1", 1), a_run("r1again", 1, replicate=1), a_run("r2", 2),
        a_run("f3", 3, role="factor"), a_run("r4", 4), a_run("r5", 5),
    ]  # fmt: skip
    assert references(runs) == ("r0", "r1", "r2")
    assert references([*runs, a_run("s1", 1, **surrogate)]) == ("s1", "r0", "r2")
    every = [a_run(f"s{seed}", seed, **surrogate) for seed in range(4)]
    assert references([*runs, *every]) == ("s0", "s1", "s2")
    assert references([a_run("gone", 0, after={}), a_run("r1", 1)]) == ("r1",)


def test_runs_under_a_mask_are_compared_with_themselves_alone() -> None:
    """Two seeds under one mask share what it forces, and no null expects that."""
    masked = {"masked": True, "cell": {"train.mask": "random"}, "steps": (3, 9)}
    full = [a_run(f"r{seed}", seed, steps=(3, 9)) for seed in (2, 3)]
    runs = [a_run("m0", 0, **masked), a_run("m1", 1, role="surrogate", **masked), *full]
    claim = AboveNullClaim(id="early", kind="above_null", at=At(step=3))
    comparison = compare(study(claim), runs, "stored")
    assert pairs(comparison) == [("r2", 9, "r3", 9), ("r2", 3, "r3", 3)]
    own = [(run.trial_id, 3, run.trial_id, 9) for run in runs]
    assert pairs(comparison, "pairs_within") == own
    assert [[comparison.runs[at][0] for at in g.runs] for g in comparison.groups] == [["r2", "r3"]]
    assert comparison.references == ("r2", "r3")
    alone = compare(study(claim), runs[:2], "stored")
    assert (pairs(alone), alone.groups, alone.references) == ([], (), ())


def test_the_independent_run_has_another_seed_than_both() -> None:
    runs = [a_run(f"r{seed}", seed) for seed in range(4)] + [a_run("again0", 0, replicate=1)]
    comparison = compare(study(), runs, "stored")
    chosen = {
        (a, b): place
        for (a, _, b, _), place in zip(
            pairs(comparison), comparison.reference_of.tolist(), strict=True
        )
    }
    assert comparison.references == ("r0", "r1", "r2")
    assert chosen["r0", "r1"] == 2
    assert chosen["r0", "r2"] == chosen["again0", "r2"] == 1
    assert chosen["r1", "r2"] == chosen["r1", "r3"] == chosen["r2", "r3"] == 0
    assert chosen["again0", "r0"] == 1
    two = compare(study(), runs[:2], "stored")
    assert two.reference_of.tolist() == [-1]


@pytest.mark.parametrize("runs", [[], [a_run("a", 0)]])
def test_too_few_runs_to_compare(runs: list) -> None:
    comparison = compare(study(), runs, "stored")
    assert (comparison.runs, comparison.moments, comparison.groups) == ((), (), ())
    assert comparison.reference_of.size == 0
