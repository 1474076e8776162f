"""Runs made elsewhere as the analysis sees them: as trials, and as tables.

What nobody measured is null, and claims that need it say so.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from rlsparse import tables
from rlsparse.definitions import MIN_EXPONENT, NUM_EXPONENTS
from rlsparse.errors import ConfigError
from rlsparse.identity import canonical_json
from rlsparse.levels import Scalar, canonical_path, level_label
from rlsparse.pair_table import PairFile, PairRow
from rlsparse.study import SURROGATES, Control, PairStudy, Role, run_label

UNMATCHED = "no column seed: runs are not matched"


@dataclass(frozen=True)
class PairRun:
    """A run made elsewhere, as the analysis sees it.

    Attributes:
        rows: its snapshots, in order of the steps.
        config: what is known of its configuration, nested.
        cell: factor path -> level label; a factor that the run does not have is absent.
    """

    trial_id: str
    rows: tuple[PairRow, ...]
    config: dict[str, Any]
    cell: dict[str, str]
    role: Role
    control: Control | None

    @property
    def before(self) -> str:
        """Its base, as given."""
        return self.rows[0].before

    @property
    def seed(self) -> int:
        """Its seed."""
        return int(self.config["seed"])

    @property
    def algorithm(self) -> str:
        """What trained it."""
        return str(self.config["algorithm"]["name"])

    @property
    def replicate(self) -> int:
        """1 for the rerun under the same seed, else 0."""
        return int(self.control == "same_seed")

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps of its snapshots."""
        return tuple(row.step for row in self.rows)

    @property
    def score_before(self) -> float | None:
        """Score of its base."""
        return self.rows[0].score_before

    @property
    def label(self) -> str:
        """See ``study.run_label``."""
        return run_label(self.algorithm, self.seed, self.cell, self.control)


def described(study: PairStudy, pairs: PairFile) -> PairStudy:
    """A study as its file states it, with what its pairs say: factors, settings, a note."""
    claims = study.claims
    if not pairs.has_seeds:
        claims = tuple(
            claim.model_copy(update={"note": "; ".join(filter(None, [claim.note, UNMATCHED]))})
            for claim in claims
        )
    update = {
        "pairs": str(pairs.path),
        "factors": pairs.factors,
        "settings": {**study.settings, **pairs.constants},
        "claims": claims,
    }
    return study.model_copy(update=update)


def pair_runs(study: PairStudy, pairs: PairFile) -> tuple[PairRun, ...]:
    """The runs of a study, in the order of its pairs.

    A run is of role baseline where all its factors are at the reference level, surrogate where its
    reward carries no information, unlike the reference's.

    Raises:
        ConfigError: nothing says which algorithm made a run.
    """
    reference = {path: study.reference_level(path) for path in study.factors}
    runs = []
    for rows in pairs.runs:
        first = rows[0]
        config: dict[str, Any] = {"model": {"source": first.before}}
        config["train"] = {"num_steps": rows[-1].step}
        for path, value in {**study.settings, **first.values}.items():
            config = _placed(config, canonical_path(path).split("."), value)
        if "name" not in config.get("algorithm", {}):
            raise ConfigError(
                f"{pairs.path}:{first.line}: no algorithm; add a column algorithm, or "
                "`settings: {algorithm: ...}` to the study"
            )
        rate = config["train"].get("learning_rate", 0.0)
        if not isinstance(rate, int | float):
            raise ConfigError(
                f"{pairs.path}:{first.line}: train.learning_rate {rate!r} is not a number"
            )
        cell = {p: level_label(first.values[p]) for p in study.factors if p in first.values}
        after = [[row.step, row.after] for row in rows]
        identity = [first.before, after, first.values, first.seed]
        runs.append(
            PairRun(
                trial_id=hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:12],
                rows=rows,
                config={**config, "seed": first.seed},
                cell=cell,
                role=_role(first, cell, reference),
                control=first.control,
            )
        )
    return tuple(runs)


def _placed(config: dict[str, Any], keys: Sequence[str], value: Scalar) -> dict[str, Any]:
    """``config`` with ``value`` at a path whose upper parts may be missing."""
    head, *rest = keys
    inner = _placed(config.get(head, {}), rest, value) if rest else value
    return {**config, head: inner}


def _role(row: PairRow, cell: Mapping[str, str], reference: Mapping[str, str]) -> Role:
    reward = cell.get("algorithm.reward")
    without = reward in SURROGATES.values() and reward != reference["algorithm.reward"]
    if row.control in SURROGATES or (row.control is None and without):
        return "surrogate"
    if row.control:
        return "control"
    return "baseline" if all(reference[p] == label for p, label in cell.items()) else "factor"


# --- tables ----------------------------------------------------------------------------------


def trials_table(
    study: PairStudy,
    runs: Iterable[PairRun],
    status: Mapping[str, tuple[str, str | None]],
    bases: Mapping[str, str],
    medians: Mapping[str, float],
) -> pa.Table:
    """Table ``trials``; what nobody measured is null.

    Further columns: ``config``, ``label``, ``base`` and ``factor.<path>``, as of own trials.

    Args:
        study: the study.
        runs: its runs.
        status: trial_id -> status, and the error of a failed one.
        bases: trial_id -> fingerprint of its base, of those that were measured.
        medians: fingerprint -> median |w| of the base.
    """
    rows = []
    for run in runs:
        train, last = run.config["train"], run.rows[-1]
        rate = train.get("learning_rate")
        base = bases.get(run.trial_id)
        median = medians[base] if base else None
        state, error = status[run.trial_id]
        rows.append(
            {
                "trial_id": run.trial_id,
                "status": state,
                "error": error,
                "cell": canonical_json(run.cell),
                "algorithm": run.algorithm,
                "seed": run.seed,
                "replicate": run.replicate,
                "role": run.role,
                "control": run.control,
                "precision": train.get("precision"),
                "learning_rate": rate,
                "num_steps": last.step,
                "score_base": run.score_before,
                "score_before": run.score_before,
                "score_after": last.score,
                "num_eval_problems": last.num_eval_problems,
                "gate_ratio": 256 * rate / median if rate is not None and median else None,
                "kl_final": last.kl,
                "config": canonical_json(run.config),
                "label": run.label,
                "base": base,
                **{f"factor.{path}": run.cell.get(path) for path in study.factors},
            }
        )
    return tables.from_rows(rows, "trials")


def steps_table(runs: Iterable[PairRun]) -> pa.Table:
    """Table ``steps``: one row per snapshot, and step 0, where the KL to the base is 0."""
    rows: list[dict[str, object]] = []
    for run in runs:
        knows_kl = any(row.kl is not None for row in run.rows)
        start = {"score": run.score_before, "kl_base": 0.0 if knows_kl else None}
        rows.append({"trial_id": run.trial_id, "step": 0, **start})
        rows += [
            {"trial_id": run.trial_id, "step": row.step, "score": row.score, "kl_base": row.kl}
            for row in run.rows
        ]
    return tables.from_rows(rows, "steps")


def median_magnitude(base_tensors: pa.Table) -> float:
    """Median |w| of a base, from the histograms of table ``base_tensors``; nan without weights.

    Interpolated linearly within its power of two, so a few per cent off.
    """
    histograms = [
        np.array(row, np.int64) for row in base_tensors["magnitude_histogram"].to_pylist()
    ]
    if not histograms:
        return math.nan
    zeros, *rest = np.sum(histograms, axis=0)
    exact, between = rest[NUM_EXPONENTS:], rest[:NUM_EXPONENTS]
    half, seen = (zeros + sum(rest)) / 2, zeros
    if half <= seen:
        return 0.0
    for index in range(NUM_EXPONENTS):
        edge = 2.0 ** (MIN_EXPONENT + index)
        seen += exact[index]
        if half <= seen:
            return edge
        if half <= seen + between[index]:
            return float(edge * (1 + (half - seen) / between[index]))
        seen += between[index]
    return math.nan
