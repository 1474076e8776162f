"""A small study for tests of the report: its tables, with numbers that can be checked by hand."""

import itertools
import json
import math
import random

from rlsparse import tables
from rlsparse.definitions import DEFINITIONS, MIN_EXPONENT, NUM_MAGNITUDE_BINS
from rlsparse.study import Study

ALGORITHMS = {"sft": 0.55, "dpo": 0.2, "grpo": 0.13}
SEEDS = (0, 1, 2, 3)
MODULES = ("q", "k", "v", "o", "gate", "up", "down", "norm")
PARTS = [*((i, m) for i in range(4) for m in MODULES), (None, "embed"), (None, "norm")]
SIZE = 4096
SNAPSHOTS = (50, 150)
HOSTILE = '<script>alert("x")</script>'


def make_study(**changes):
    return Study.model_validate(
        {
            "name": "algorithms",
            "question": "Does reinforcement learning change fewer weights than supervised tuning?",
            "baseline": {"algorithm": {"name": "grpo"}, "train": {"precision": "bf16-mixed"}},
            "factors": {"algorithm.name": list(ALGORITHMS)},
            "seeds": list(SEEDS),
            "controls": ["lr_zero", "same_seed", "lr_times_3"],
        }
        | changes
    )


def trial(algorithm, seed, control=None, **changes):
    rate = {"lr_zero": 0.0, "lr_times_3": 3e-5}.get(control, 1e-5)
    label = f"{algorithm} s{seed}" + (f" {control}" if control else "")
    return {
        "trial_id": f"{algorithm}{seed}{control or ''}",
        "status": "finished",
        "cell": json.dumps({"algorithm.name": algorithm}),
        "algorithm": algorithm,
        "seed": seed,
        "replicate": int(control == "same_seed"),
        "role": "control" if control else "baseline" if algorithm == "grpo" else "factor",
        "control": control,
        "precision": "bf16-mixed",
        "learning_rate": rate,
        "num_steps": 150,
        "score_base": 0.41,
        "score_before": 0.412,
        "score_after": 0.55 + 0.01 * seed,
        "score_gain_se": 0.021,
        "gate_ratio": rate * 17000,
        "label": label,
        "config": json.dumps({"model": {"source": "tiny"}}),
    } | changes


def all_trials():
    rows = [trial(a, s) for a in ALGORITHMS for s in SEEDS]
    rows += [trial(a, 0, c) for c in ("lr_zero", "same_seed") for a in ALGORITHMS]
    rows += [trial("grpo", s, "lr_times_3") for s in SEEDS]
    error = "TrialError: the loss is NaN at step 12; lower train.learning_rate"
    rows[3] |= {"status": "failed", "error": error, "score_after": None}
    return rows


def density(row):
    scale = {"lr_zero": 0, "lr_times_3": 1.7}.get(row["control"], 1)
    return scale * ALGORITHMS.get(row["algorithm"], 0.3)


def change_rows(trials):
    """Table ``changes``: a row per trial, snapshot, layer and module."""
    rows = []
    for row in trials:
        draw = random.Random(row["trial_id"].removesuffix("same_seed"))
        for step in SNAPSHOTS:
            for layer, module in PARTS:
                share = density(row) * (step / 150) ** 0.5 * draw.uniform(0.8, 1.2)
                changed = int(SIZE * share * {"norm": 0, "embed": 0.2}.get(module, 1))
                counts = {
                    f"num_changed_{d}": int(changed * 0.7**i) for i, d in enumerate(DEFINITIONS)
                }
                place = {"layer": layer, "module": module, "num_elements": SIZE, "view": "stored"}
                rows.append({"trial_id": row["trial_id"], "step": step} | place | counts)
    return rows


def magnitude_rows(trials):
    """Table ``magnitudes``: half the weights of each of four bins changed; one bin is too small."""
    zeros = [0] * NUM_MAGNITUDE_BINS
    rows = []
    for row in trials:
        total, changed = list(zeros), list(zeros)
        for i, exponent in enumerate(range(-12, -8)):
            total[1 + exponent - MIN_EXPONENT] = 1000
            changed[1 + exponent - MIN_EXPONENT] = 1000 - 250 * i
        total[1 - 20 - MIN_EXPONENT] = 99
        rows.append(
            {"trial_id": row["trial_id"], "step": 150, "view": "stored", "ulp_histogram": [],
             "magnitude_histogram": total, "magnitude_histogram_changed": changed}
        )  # fmt: skip
    return rows


def step_rows(trials):
    rows = [{"trial_id": r["trial_id"], "step": 25, "loss": 1.0} for r in trials]
    for row in trials:
        for step in (0, *SNAPSHOTS):
            score = 0.41 + (0.14 + 0.01 * row["seed"]) * (step / 150) ** 0.5
            rows.append({"trial_id": row["trial_id"], "step": step, "score": score})
    return rows


def overlap_table(trials):
    """All pairs of finished trials, overall and by module, and the snapshots of each."""
    rows = []
    done = sorted((t for t in trials if t["status"] == "finished"), key=lambda t: t["trial_id"])
    for i, a in enumerate(done):
        rows.append(
            {"trial_a": a["trial_id"], "trial_b": a["trial_id"], "step_a": 50, "step_b": 150,
             "definition": "bitwise", "view": "stored", "num_elements": 100_000, "num_a": 5_000,
             "num_b": 9_000, "num_both": 4_000 + 100 * a["seed"]}
        )  # fmt: skip
        for b in done[i + 1 :]:
            pair = {"trial_a": a["trial_id"], "trial_b": b["trial_id"], "step_a": 150}
            pair |= {"step_b": 150, "definition": "bitwise", "view": "stored"}
            for module in (None, *MODULES):
                size = 100_000 if module is None else 10_000
                share_a, share_b = density(a), density(b)
                lift = 1.9 - 0.05 * a["seed"] if a["algorithm"] == b["algorithm"] else 1.3
                expected = size * share_a * share_b
                rows.append(
                    pair
                    | {
                        "module": module,
                        "num_elements": size,
                        "num_a": int(size * share_a),
                        "num_b": int(size * share_b),
                        "num_both": int(expected * min(lift, 1 / max(share_a, share_b, 0.01))),
                        "num_both_random": int(expected),
                        "expected_uniform": expected,
                        "expected_tensor": expected * 1.1,
                        "expected_magnitude": expected * 1.5,
                        "expected_update_size": expected * 1.6 if module is None else None,
                    }
                )
    return rows


def consensus_rows():
    """Table ``consensus`` of the cell of grpo, of all weights and of one module."""
    shared = {"cell": '{"algorithm.name": "grpo"}', "algorithm": "grpo", "step": 150}
    shared |= {"view": "stored", "num_runs": 4, "num_elements": 1000}
    return [
        shared | {"k": k, "num_changed": changed, "module": module, "expected_uniform": 2.0,
                  "expected_tensor": 3.0, "expected_magnitude": 4.0}
        for module in (None, "q")
        for k, changed in enumerate((700, 100, 80, 70, 50))
    ]  # fmt: skip


def spectrum_rows(trials):
    """Table ``spectra``: updates of full rank, nulls of nine tenths of it."""
    return [
        {"trial_id": t["trial_id"], "step_before": 0, "step_after": 150, "view": "stored",
         "tensor": f"t{i}", "module": "q", "shape": [40, 20], "kind": kind,
         "rank_share_default": 1.0 if kind == "update" else 0.9, "energy_rank": 7}
        for t in trials[:2]
        for i in range(3)
        for kind in ("update", "null")
    ]  # fmt: skip


def claim(**changes):
    return {
        "id": "rl-is-sparser-than-sft",
        "source": "2505.11711 section 4",
        "kind": "greater",
        "statistic": "odds ratio of sparsity.bitwise@stored, a over b; t interval over seeds",
        "scope": "base tiny, task chain_sum, learning rate 1e-05, 150 steps, view stored; "
        "no evidence",
        "registered": "registered",
        "verdict": "supported",
        "estimate": 8.0,
        "ci_low": 6.05,
        "ci_high": 11.0,
        "margin": 1.0,
        "p_value": 0.00002,
        "p_floor": 0.125,
        "num_runs": 4,
        "depends_on_definition": False,
        "outcome": "grpo is sparser than sft",
        "alternatives": json.dumps({"abs_1e-05@stored": "supported"}),
        "ci_level": 0.99,
        "note": "",
    } | changes


NO_NUMBERS = dict.fromkeys(("estimate", "ci_low", "ci_high", "p_value", "p_floor"), math.nan)
CLAIMS = [
    claim(),
    claim(
        **NO_NUMBERS,
        id="kl-has-limited-effect",
        kind="equivalent",
        registered="post hoc",
        verdict="undecided",
        margin=1.25,
        depends_on_definition=None,
        would_decide="runs at three times the learning rate",
        statistic="density ratio by algorithm.kl_coef, sparsity.bitwise@stored; t interval",
        outcome="undecided, the factor did not act (base tiny, task chain_sum, "
        "learning rate 1e-05, 150 steps, view stored; no evidence)",
        note="the factor did not act: realised KL does not differ between its levels",
    ),
    claim(
        **NO_NUMBERS | {"estimate": 1.0},
        id="lr-zero-changes-nothing",
        kind="exact",
        statistic="sparsity.bitwise@stored is exactly 1 in every run",
        scope="base tiny, task chain_sum, learning rate 0.0, 150 steps, view stored; no evidence",
        margin=None,
    ),
    claim(
        id="subnetwork-recurs",
        kind="above_null",
        statistic="overlap.bitwise@stored / magnitude null",
        verdict="refuted",
        estimate=1.02,
        ci_low=0.97,
        ci_high=1.06,
        p_value=0.3,
        margin=1.1,
        depends_on_definition=True,
    ),
]


def effect(level, estimate, **changes):
    return {
        "response": "sparsity.bitwise@stored",
        "factor": "algorithm.name",
        "level": level,
        "reference": "grpo",
        "within": "{}",
        "method": "paired t",
        "scale": "log_odds",
        "estimate": estimate,
        "ci_low": estimate - 0.2,
        "ci_high": estimate + 0.2,
        "ci_level": 0.95,
        "p_value": 0.125,
        "p_floor": 0.125,
        "p_adjusted": 0.25,
        "correlation": 0.8,
        "num_runs": 4,
    } | changes


EFFECTS = [
    effect("sft", -2.0),
    effect("dpo", -0.5),
    effect("dpo", 0.02, response="score_gain", scale="identity"),
    effect("dpo", -0.4, layer=3),
    effect("dpo", -0.6, module="q"),
    effect("dpo", -0.3, response="sparsity.abs_1e-05@stored"),
]
TERMS = [
    {"response": "sparsity.bitwise@stored", "term": "algorithm.name", "df": 2, "df_residual": 6,
     "sum_sq": 3.25, "f_value": 31.5, "p_value": 0.0007, "p_adjusted": 0.0014, "omega_sq": 0.83,
     "num_runs": 11, "note": "unbalanced"},
]  # fmt: skip
MEANS = [
    {"response": "sparsity.bitwise@stored", "factor": "algorithm.name", "level": level,
     "scale": "log_odds", "estimate": estimate, "ci_low": estimate - 0.5, "num_runs": 4,
     "ci_high": estimate + 0.5, "ci_level": 0.95}
    for level, estimate in (("grpo", 2.0), ("dpo", 1.0), ("sft", 0.0))
]  # fmt: skip
PROVENANCE = {
    "command": "rlsparse run ablations/algorithms.yaml",
    "git_commit": "685df50",
    "study_sha256": "5" * 64,
    "claims_sha256": "7" * 64,
    "versions": {"rlsparse": "0.1.0", "torch": "2.6.0"},
    "hosts": ["node-a", "node-b"],
    "wall_s": 5400.0,
    "cpu_s": 90.0,
    "allow_missing": True,
}


def make_tables(trials=None, **changes):
    trials = all_trials() if trials is None else trials
    rows = {
        "trials": trials,
        "steps": step_rows(trials),
        "changes": change_rows(trials),
        "magnitudes": magnitude_rows(trials),
        "overlaps": overlap_table(trials),
        "consensus": consensus_rows(),
        "spectra": spectrum_rows(trials),
        "effects": EFFECTS,
        "terms": TERMS,
        "means": MEANS,
        "claims": CLAIMS,
    } | changes
    return {name: tables.from_rows(list(part), name) for name, part in rows.items()}


def many_cells():
    """Runs of one algorithm, two factors with long names and six seeds: 24."""
    rows = []
    for kl, clip in itertools.product(("0.0", "0.04"), ("null", "1.0")):
        cell = json.dumps({"algorithm.kl_coef": kl, "train.max_grad_norm": clip})
        for s in range(6):
            label = f"grpo s{s} kl_coef={kl} max_grad_norm={clip}"
            rows.append(trial("grpo", s, trial_id=label, cell=cell, label=label))
    return rows
