"""Arrow schemas of all tables: the contract between the stages. Read this first.

A table is a Parquet file or a folder of Parquet files. Fractions lie in [0, 1], ``num_*`` are
counts, ``*_s`` seconds, ``*_bytes`` bytes. A chunk is a run of consecutive whole rows of a tensor's
2-D view, at most 2^22 elements, starting at a multiple of 64 elements (``start`` is its first
element in the flat tensor); all trials of a base share the same chunks.
"""

import pyarrow as pa

from rlsparse.definitions import (
    AGREEMENT_DEFINITIONS,
    DEFINITIONS,
    PROBE_PARTS,
    RANK_TOLERANCES,
    STEP_WINDOWS,
    VIEWS,
)

SCHEMA_VERSION = "3"
OLDER_VERSIONS = frozenset({"2"})
"""Versions that are still read; columns that they lack are null."""

_counts = pa.list_(pa.int64())
_key = [("tensor", pa.string()), ("layer", pa.int32()), ("module", pa.string())]
_chunk = [("chunk", pa.int32()), ("start", pa.int64()), ("num_elements", pa.int64())]


def _floats(*names: str) -> list[tuple[str, pa.DataType]]:
    return [(name, pa.float64()) for name in names]


def _schema(fields: list[tuple[str, pa.DataType]]) -> pa.Schema:
    return pa.schema(fields, metadata={"rlsparse_schema": SCHEMA_VERSION})


SCHEMAS: dict[str, pa.Schema] = {
    # One row per planned trial, failed ones included. A column `factor.<path>` per factor, holding
    # the level's label (null where the factor does not exist for the trial), follows these.
    "trials": _schema(
        [
            ("trial_id", pa.string()),
            ("status", pa.string()),  # planned, running, finished, failed
            ("error", pa.string()),
            ("cell", pa.string()),  # JSON object: factor path -> level label
            ("algorithm", pa.string()),
            ("seed", pa.int64()),
            ("replicate", pa.int32()),
            ("role", pa.string()),  # baseline, factor, control, surrogate
            ("control", pa.string()),  # name of the control (`study.Control`), or null
            ("precision", pa.string()),
            ("learning_rate", pa.float64()),
            ("num_steps", pa.int64()),
            *_floats("score_base", "score_before", "score_after"),
            # Of the weights that were trained, if there was a mask; else null.
            ("mask_density", pa.float64()),  # of all weights
            ("num_in_mask", pa.int64()),
            ("mask_fingerprint", pa.string()),  # of `masks.fingerprint`
            # Paired standard error of score_after - score_before, over the problems.
            ("score_gain_se", pa.float64()),
            ("num_eval_problems", pa.int64()),
            # After the last step, on problems of the split validation; null where none were asked.
            ("score_validation", pa.float64()),
            ("num_validation_problems", pa.int64()),
            ("gate_ratio", pa.float64()),  # 256 * learning_rate / median |w|
            ("num_clipped_steps", pa.int64()),
            ("kl_final", pa.float64()),  # KL(trained || base) per token, on samples of the trained
            ("patch_bytes", pa.int64()),
            # All weights of the trained model (tied ones once), looked at after every step: those
            # that never differed from the base, those that did but not at the end, the others.
            ("num_untouched", pa.int64()),
            ("num_cancelled", pa.int64()),
            ("num_final", pa.int64()),
            ("wall_s", pa.float64()),
            ("cpu_s", pa.float64()),
            # Of cpu_s, what each part of the probe took; null where it was not asked for.
            *((f"probe_{part}_cpu_s", pa.float64()) for part in PROBE_PARTS),
            ("peak_bytes", pa.int64()),  # of the process (CPU) or of the GPU, while the trial ran
            # What ``costs`` expected of the last two before the trial began; time on a CPU alone.
            ("estimated_peak_bytes", pa.int64()),
            ("estimated_cpu_s", pa.float64()),
            ("attempts", pa.int32()),
            ("host", pa.string()),
            ("versions", pa.string()),  # JSON object
            # Of a same-seed replicate: whether all its patches equal the original's bitwise.
            ("identical", pa.bool_()),
        ]
    ),
    # One row per optimizer step, and step 0 with the score before training. `score` is null except
    # at snapshots.
    "steps": _schema(
        [
            ("trial_id", pa.string()),
            ("step", pa.int64()),
            *_floats("loss", "reward", "kl", "entropy"),
            ("grad_norm", pa.float64()),  # before clipping
            ("clipped_fraction", pa.float64()),  # share of optimizer steps clipped since last row
            ("learning_rate", pa.float64()),
            ("num_tokens", pa.int64()),  # cumulative
            ("data_nll", pa.float64()),
            ("score", pa.float64()),
            ("kl_base", pa.float64()),  # as trials.kl_final, of this step; as rare as score
            # Share of all weights (tied ones once) whose stored bits equal those of k steps before:
            # S_k of arXiv 2602.03839. Every step for k = 1; else at multiples of k, where
            # `probe.k_steps` has it.
            *((f"update_sparsity_k{k}", pa.float64()) for k in STEP_WINDOWS),
            # Share that differed from the base after this step or any before it.
            ("ever_changed_fraction", pa.float64()),
            # Share of what this step changed (against the step before) that is equal to the base
            # after the last step; null without `probe.step_masks`, or where nothing changed.
            ("outside_final", pa.float64()),
            # Share of all weights, as they are trained (fp32 masters where there are some), that
            # differ from the base bitwise after both are cast to the view; at snapshots, with
            # `probe.casts`.
            *((f"changed_fraction_{view}", pa.float64()) for view in VIEWS if view != "stored"),
            # Of the weights that are trained, at multiples of `probe.update_interval`: share whose
            # gradient is not zero; share that the optimizer moved by less than half a bf16 ULP of
            # the weight before the step; and how well "by at least half a ULP" tells which weights
            # this step changed in bf16, bitwise: the share of those told that changed, and the
            # share of those changed that were told (null where there are none).
            *_floats("gradient_nonzero_fraction", "update_below_half_ulp"),
            *_floats("half_ulp_precision", "half_ulp_recall"),
        ]
    ),
    # What a trial scored, one row per evaluation; step 0 is before training.
    "eval": _schema(
        [
            ("trial_id", pa.string()),
            ("step", pa.int64()),
            ("split", pa.string()),  # test; validation after the last step
            ("num_correct", pa.float64()),
            ("num_problems", pa.int64()),
            ("score", pa.float64()),
            # Paired standard error of score - that of step 0; null of validation.
            ("gain_se", pa.float64()),
        ]
    ),
    "base_tensors": _schema(
        [
            ("base", pa.string()),
            *_key,
            ("shape", pa.list_(pa.int64())),
            ("dtype", pa.string()),
            *_chunk,
            ("sum_sq", pa.float64()),
            ("magnitude_histogram", _counts),
        ]
    ),
    # One row per trial x snapshot x view x tensor chunk; step_before is 0, the base.
    "tensor_deltas": _schema(
        [
            ("trial_id", pa.string()),
            ("step_before", pa.int64()),
            ("step_after", pa.int64()),
            ("view", pa.string()),
            *_key,
            ("dtype", pa.string()),
            *_chunk,
            *((f"num_changed_{name}", pa.int64()) for name in DEFINITIONS),
            ("ulp_histogram", _counts),
            ("magnitude_histogram_changed", _counts),
            *_floats("sum_sq_before", "sum_sq_delta", "sum_abs_delta", "max_abs_delta"),
            ("num_sign_flips", pa.int64()),
            ("num_zero_sign_flips", pa.int64()),
            ("num_nonfinite", pa.int64()),
            ("num_nan", pa.int64()),
        ]
    ),
    # Sums of tensor_deltas over tensors, for all that is said of runs.
    "changes": _schema(
        [
            ("trial_id", pa.string()),
            ("step", pa.int64()),
            ("view", pa.string()),
            ("layer", pa.int32()),  # null outside the layers
            ("module", pa.string()),
            ("num_elements", pa.int64()),
            *((f"num_changed_{name}", pa.int64()) for name in DEFINITIONS),
            ("sum_sq_before", pa.float64()),
            ("sum_sq_delta", pa.float64()),
        ]
    ),
    # Last snapshots: weights changed by |before|, beside all weights, summed over tensors.
    "magnitudes": _schema(
        [
            ("trial_id", pa.string()),
            ("step", pa.int64()),
            ("view", pa.string()),
            ("magnitude_histogram", _counts),
            ("magnitude_histogram_changed", _counts),
            ("ulp_histogram", _counts),
        ]
    ),
    # One row per matrix and view: changed weights per row and per column of its 2-D view.
    "stripes": _schema(
        [
            ("trial_id", pa.string()),
            ("step_before", pa.int64()),
            ("step_after", pa.int64()),
            ("view", pa.string()),
            *_key,
            ("num_rows", pa.int64()),
            ("num_columns", pa.int64()),
            ("row_counts", _counts),
            ("column_counts", _counts),
        ]
    ),
    # Packed masks of bitwise change: bit i of byte j is element start + 8 * j + i.
    "masks": _schema(
        [
            ("trial_id", pa.string()),
            ("step", pa.int64()),
            ("kind", pa.string()),  # snapshot, ever_changed; step, in files of trials
            ("view", pa.string()),
            *_key,
            *_chunk,
            ("mask", pa.large_binary()),
        ]
    ),
    # One row per unordered pair of runs, and module (null = all weights) or tensor. Pairs: last
    # snapshots of all trials and those at steps that claims name (trial_a < trial_b), and the
    # snapshots of one trial (trial_a = trial_b, step_a < step_b; all weights only). Tensors: those
    # that claims name. The expected_* are counts that num_both has under each null, on average.
    "overlaps": _schema(
        [
            ("trial_a", pa.string()),
            ("step_a", pa.int64()),
            ("trial_b", pa.string()),
            ("step_b", pa.int64()),
            ("definition", pa.string()),
            ("view", pa.string()),
            ("tensor", pa.string()),
            ("module", pa.string()),
            ("num_elements", pa.int64()),
            ("num_a", pa.int64()),
            ("num_b", pa.int64()),
            ("num_both", pa.int64()),
            ("num_both_random", pa.int64()),  # of a with a random mask of b's count in each tensor
            *_floats("expected_uniform", "expected_tensor", "expected_magnitude"),
            ("expected_update_size", pa.float64()),  # null without an independent run
            ("expected_margins", pa.float64()),
            ("update_size_of", pa.string()),  # trial_id of the independent run
        ]
    ),
    # Weights changed in exactly k of the R runs of a cell that differ in the seed alone.
    "consensus": _schema(
        [
            ("cell", pa.string()),  # JSON object, as in trials
            ("algorithm", pa.string()),
            ("step", pa.int64()),
            ("view", pa.string()),
            ("module", pa.string()),  # null = all weights
            ("num_runs", pa.int32()),  # R
            ("k", pa.int32()),
            ("num_elements", pa.int64()),
            ("num_changed", pa.int64()),  # weights changed in exactly k runs
            *_floats("expected_uniform", "expected_tensor", "expected_magnitude"),
        ]
    ),
    # Last weights of two trials, theta and those of the reference, in the stored format: two rows
    # per pair of `agreement.trial_pairs`. No such table where no trial has a mask.
    "agreement": _schema(
        [
            ("trial_id", pa.string()),
            ("reference", pa.string()),  # trial_id
            ("relation", pa.string()),  # subnetwork, rerun, other seed
            ("scope", pa.string()),  # all; changed: what the reference changed, bitwise
            ("num_elements", pa.int64()),
            *((f"num_equal_{name}", pa.int64()) for name in AGREEMENT_DEFINITIONS),
            # The same of the base and the reference: what agrees without any training.
            *((f"num_base_equal_{name}", pa.int64()) for name in AGREEMENT_DEFINITIONS),
            ("sum_sq_difference", pa.float64()),  # ||theta - reference||^2
            ("sum_sq_update", pa.float64()),  # ||reference - base||^2
        ]
    ),
    # What it takes to sync weights: one row per trial with `probe.step_patches`, window of k steps
    # and way to send it (`sync_costs.WAYS`). Times are of one thread, on `host`.
    "syncs": _schema(
        [
            ("trial_id", pa.string()),
            ("k", pa.int32()),
            ("step_before", pa.int64()),
            ("step_after", pa.int64()),
            ("way", pa.string()),
            ("num_elements", pa.int64()),
            ("num_changed", pa.int64()),
            ("dense_bytes", pa.int64()),
            ("size_bytes", pa.int64()),
            ("encode_s", pa.float64()),
            ("apply_s", pa.float64()),
            ("host", pa.string()),
        ]
    ),
    # One row per matrix and kind: `update`, and its `null`, a random matrix of single representable
    # steps of the same density. Null where a statistic is undefined; see `spectrum.Spectrum`.
    "spectra": _schema(
        [
            ("trial_id", pa.string()),
            ("step_before", pa.int64()),
            ("step_after", pa.int64()),
            ("view", pa.string()),
            *_key,
            ("shape", pa.list_(pa.int64())),
            ("dtype", pa.string()),
            ("kind", pa.string()),
            ("method", pa.string()),  # exact, gram
            ("seed", pa.int64()),
            ("num_elements", pa.int64()),
            ("num_nonfinite", pa.int64()),
            ("num_changed", pa.int64()),
            *((f"rank_{name}", pa.int64()) for name in RANK_TOLERANCES),
            *((f"rank_share_{name}", pa.float64()) for name in RANK_TOLERANCES),
            ("energy_rank", pa.int64()),  # of 99 % of the squared norm
            *_floats("entropy_rank", "stable_rank", "frobenius_norm", "sigma_max", "nss"),
            ("nss_random", pa.float64()),  # of Gaussian noise of the same norm
            ("principal_rank", pa.int64()),
            ("cosines_left", pa.list_(pa.float64())),
            ("cosines_right", pa.list_(pa.float64())),
            *_floats("top_1pct_share", "top_10pct_share", "mask_share"),
            *_floats("principal_lift", "principal_lift_in_decile", "low_lift"),
            *_floats("low_lift_in_decile", "row_dispersion", "column_dispersion"),
            *_floats("untouched_row_share", "untouched_column_share"),
            *_floats("top_row_share", "top_column_share"),
            ("looks_like_adapter", pa.bool_()),
        ]
    ),
    # Contrasts of one level with the reference, see `effects.effects`; rows of a layer or a module
    # are adjusted by Benjamini-Hochberg over all of these of a contrast, the others by Holm.
    "effects": _schema(
        [
            ("response", pa.string()),
            ("factor", pa.string()),
            ("level", pa.string()),
            ("reference", pa.string()),
            ("within", pa.string()),  # JSON object: the other factors, held fixed
            ("layer", pa.int32()),  # null = all
            ("module", pa.string()),  # null = all
            ("method", pa.string()),  # see `METHODS` of effects and overlap_effects
            ("scale", pa.string()),  # of the estimate: log_odds, log, identity
            *_floats("estimate", "ci_low", "ci_high", "ci_level"),
            ("p_value", pa.float64()),
            ("p_floor", pa.float64()),  # the smallest p that the test can give
            ("p_adjusted", pa.float64()),
            ("correlation", pa.float64()),  # of the two levels over seeds: what matching gains from
            ("num_runs", pa.int64()),  # matched pairs
        ]
    ),
    # Terms of the factorial model of each response: type II F tests.
    "terms": _schema(
        [
            ("response", pa.string()),
            ("term", pa.string()),  # a factor, `a : b`, or `seed`
            ("df", pa.int64()),
            ("df_residual", pa.int64()),
            *_floats("sum_sq", "f_value", "p_value"),
            ("p_adjusted", pa.float64()),  # Holm, over the terms of one response
            ("omega_sq", pa.float64()),  # partial
            ("num_runs", pa.int64()),
            ("note", pa.string()),
        ]
    ),
    # Estimated marginal means of that model, on the scale of the response.
    "means": _schema(
        [
            ("response", pa.string()),
            ("factor", pa.string()),
            ("level", pa.string()),
            ("scale", pa.string()),
            *_floats("estimate", "ci_low", "ci_high", "ci_level"),
            ("num_runs", pa.int64()),
        ]
    ),
    "claims": _schema(
        [
            ("id", pa.string()),
            ("source", pa.string()),
            ("kind", pa.string()),
            ("statistic", pa.string()),
            ("scope", pa.string()),
            ("registered", pa.string()),  # registered, post hoc, extended
            ("verdict", pa.string()),  # supported, refuted, undecided
            ("outcome", pa.string()),  # the verdict in words, with its scope
            *_floats("estimate", "ci_low", "ci_high", "ci_level"),
            *_floats("margin", "p_value", "p_floor"),
            ("num_runs", pa.int64()),
            ("depends_on_definition", pa.bool_()),
            ("alternatives", pa.string()),  # JSON object: definition@view or null -> verdict
            ("would_decide", pa.string()),  # what would decide an undecided claim
            ("note", pa.string()),
        ]
    ),
}
