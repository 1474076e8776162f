"""What stands in the way of a contrast."""

import pyarrow as pa
from planted_claims import (
    CLIP,
    CLIPPED,
    KL,
    NO_OVERLAPS,
    NOISE,
    about,
    clip_lowers,
    density,
    judge,
    kl,
    one,
    study_of,
    undecided,
    within,
)
from test_effects import make_tables, trials_of

from rlsparse import claims, tables
from rlsparse.identity import canonical_json
from rlsparse.study import Trial

# --- runs that learned nothing -----------------------------------------------------------------


def idle(trial: Trial) -> bool:
    """No run with gradient clipping ever had a reward."""
    return trial.config.train.max_grad_norm is not None


def test_runs_that_learned_nothing_are_not_sparse() -> None:
    why = "changed no weight at all (no signal, or all rounded away): "
    none = lambda t: 0.0 if idle(t) else density(t)  # noqa: E731
    row = one(CLIPPED, none)
    ids = sorted(t.trial_id for t in trials_of(study_of(CLIPPED)) if idle(t))
    assert row["verdict"] == "undecided"
    assert row["note"] == f"8 of the 16 runs {why}{', '.join(ids[:3])}, ..."
    once = lambda t: 0.0 if idle(t) and t.config.seed == 1 and kl(t) else clip_lowers(t)  # noqa: E731
    undecided(CLIPPED, f"1 of the 16 runs {why}", once)
    undecided({**CLIPPED, "response": "sparsity.abs_1e-05"}, f"1 of the 16 runs {why}", once)
    undecided(within(0, 1), f"8 of the 16 runs {why}", none)
    undecided(CLIP, f"train.max_grad_norm = null: 8 of the 16 runs {why}", none)
    control = lambda t: 0.0 if t.control == "lr_times_3" else density(t)  # noqa: E731
    undecided(KL, f"no sign of sensitivity: lr_times_3: 4 of the 8 runs {why}", control)


def test_runs_that_moved_only_below_a_tolerance_are_evidence() -> None:
    """Unchanged within 1e-5, or in a coarser view, is not untrained; no learning rate neither."""
    above = lambda t, d: float(d == "bitwise" or not idle(t))  # noqa: E731
    claim = {**CLIPPED, "response": "sparsity.abs_1e-05"}
    assert one(claim, clip_lowers, by_definition=above)["verdict"] == "supported"
    untrained = {"algorithm": {"name": "grpo"}, "train": {"num_steps": 20, "learning_rate": 0.0}}
    off = study_of(CLIPPED, baseline=untrained)
    none = lambda t: 0.0 if idle(t) else clip_lowers(t)  # noqa: E731
    assert judge(off, none)[0]["verdict"] == "supported"
    study = study_of({**CLIPPED, "response": "sparsity.bitwise@bf16"})
    trials, steps, stored = make_tables(trials_of(study), clip_lowers, more=about)
    coarse = make_tables(trials_of(study), none)[2]
    at = coarse.schema.get_field_index("view")
    coarse = coarse.set_column(at, coarse.field(at), pa.array(["bf16"] * coarse.num_rows))
    deltas = pa.concat_tables([stored, coarse])
    table = claims.judge(study, {}, trials, steps, deltas, NO_OVERLAPS, allow_missing=False)
    assert table["verdict"].to_pylist() == ["supported"]


def test_runs_are_read_where_the_claim_reads_them() -> None:
    study = study_of({**CLIPPED, "at": {"step": 10}}, CLIPPED)
    trials = trials_of(study)
    tables_of = make_tables(trials, clip_lowers, more=about)
    slow = {trial.trial_id for trial in trials if idle(trial)}
    rows = tables_of[2].to_pylist()
    for row in rows:
        if row["trial_id"] in slow and row["step"] == 10:
            row |= {name: 0 for name in row if name.startswith("num_changed_")}
    deltas = tables.from_rows(rows, "changes")
    found = claims.judge(study, {}, *tables_of[:2], deltas, NO_OVERLAPS, allow_missing=False)
    assert found["verdict"].to_pylist() == ["undecided", "supported"]


# --- what runs that are compared must share ----------------------------------------------------


def changed_config(trial: Trial, section: str, field: str, value: object) -> dict[str, object]:
    config = trial.config.model_dump(mode="json")
    config[section][field] = value
    return about(trial) | {"config": canonical_json(config)}


def longer(trial: Trial) -> dict[str, object]:
    """Clipped runs are said to end at step 10."""
    clipped = trial.config.train.max_grad_norm is not None
    return about(trial) | ({"num_steps": 10} if clipped else {})


def test_unequal_steps_are_refused_unless_compared_at_a_step_or_a_score() -> None:
    why = "unequal budgets, train.num_steps are compared (10 and 20) in 8 of 8 comparisons"
    undecided(CLIPPED, why, clip_lowers, more=longer)
    row = one(CLIPPED, clip_lowers, more=longer)
    assert "compare at: {score: common}" in str(row["would_decide"])
    for at in ({"step": 10}, {"score": 0.4}, {"score": "common"}):
        assert "budget" not in str(one({**CLIPPED, "at": at}, clip_lowers, more=longer)["note"])
    undecided(CLIP, "unequal budgets, train.num_steps", more=longer)


def test_unequal_batches_are_refused_at_a_step_too() -> None:
    def bigger(trial: Trial) -> dict[str, object]:
        clipped = trial.config.train.max_grad_norm is not None
        return changed_config(trial, "train", "batch_size", 64 if clipped else 32)

    for at in (None, {"step": 10}):
        why = "unequal budgets, train.batch_size are compared (32 and 64)"
        undecided({**CLIPPED, "at": at}, why, clip_lowers, more=bigger)
    row = one({**CLIPPED, "at": {"score": "common"}}, clip_lowers, more=bigger)
    assert "budget" not in str(row["note"])


def by_size(trial: Trial) -> float:
    return 3.2 / trial.config.train.batch_size * (1 + 0.1 * float(NOISE[trial.config.seed]))


def test_a_budget_that_is_what_is_compared_is_fine() -> None:
    factors = {"train.batch_size": [32, 64]}
    claim = {"kind": "greater", "a": {"train.batch_size": 64}, "b": {"train.batch_size": 32}}
    assert one(claim, by_size, factors=factors)["verdict"] == "supported"


def test_runs_of_different_bases_are_not_compared() -> None:
    def based(trial: Trial) -> dict[str, object]:
        clipped = trial.config.train.max_grad_norm is not None
        return changed_config(trial, "model", "source", "other" if clipped else "tiny")

    for at in (None, {"score": "common"}):
        why = "runs of different bases are compared (other and tiny) in 8 of 8"
        undecided({**CLIPPED, "at": at}, why, clip_lowers, more=based)
    undecided(CLIP, "runs of different bases are compared", more=based)
    factors = {"model.source": ["tiny", "smollm2-135m"]}
    a, b = ({"model.source": source} for source in factors["model.source"])
    claim = {"kind": "greater", "a": a, "b": b}
    by = {"tiny": 1.0, "smollm2-135m": 2.0}
    dense = lambda t: 0.1 * by[t.config.model.source] * (1 + 0.1 * float(NOISE[t.config.seed]))  # noqa: E731
    assert one(claim, dense, factors=factors, controls=[])["verdict"] == "supported"
