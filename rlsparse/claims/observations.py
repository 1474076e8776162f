"""A study's tables, indexed for claims: its runs, what was measured of each, overlaps of pairs."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from rlsparse.claim_config import At, ClaimBase, OverlapClaim
from rlsparse.definitions import NULLS
from rlsparse.effects import responses, selection
from rlsparse.effects.responses import FAILED, Scale
from rlsparse.statistics import Floats, log_density, odds_unchanged
from rlsparse.study import StudyBase

IDENTICAL = "identical_replicates"
UNFINISHED = "the run did not finish"

NAN = float("nan")


class Response(NamedTuple):
    """A claim's response, taken apart.

    ``kind`` is sparsity, overlap, score_after, score_gain, score_validation, kl_final, failed or
    identical_replicates.
    """

    kind: str
    definition: str | None
    view: str

    @property
    def name(self) -> str:
        """As in the response column of ``responses.responses``."""
        return f"{self.kind}.{self.definition}@{self.view}" if self.definition else self.kind

    @classmethod
    def parse(cls, text: str, default_view: str) -> "Response":
        """Take the text of a claim apart, with the study's default view filled in."""
        name, _, view = text.partition("@")
        kind, _, definition = name.partition(".")
        return cls(kind, definition or None, view or default_view)


class Reading(NamedTuple):
    """One measured value of one run on each scale; nan where it has none there.

    ``log`` of sparsity is that of the density.
    """

    identity: float
    log_odds: float
    log: float


class Settings(NamedTuple):
    """What runs that are compared must share; None where it is not known."""

    base: str | None
    learning_rate: float | None
    num_steps: int | None
    batch_size: int | None


@dataclass(frozen=True)
class Observations:
    """A study's tables, indexed for claims; made by ``observe``.

    Attributes:
        study: the study.
        runs: result of ``selection.with_configs``.
        by_id: rows of ``runs`` by trial.
        settings: by trial.
        readings: by trial and response, then by step; ``None`` is the trial's last step.
        frames: rows of ``responses.responses`` by trial.
        overlap_rows: (definition, view, trial, step, trial, step, module, tensor) -> row of
            ``overlap_counts``.
        overlap_counts: columns of table ``overlaps``.
        update_size_of: another one: the run whose update sizes the null of that name uses.
        first_change: by trial, step of the first snapshot with a changed weight.
        views: that were measured.
        controls: result of ``selection.control_pairs``.
        tracks: by trial, the columns of ``responses.snapshots`` that were asked for.
    """

    study: StudyBase
    runs: pd.DataFrame
    by_id: dict[str, dict[str, Any]]
    settings: dict[str, Settings]
    readings: dict[tuple[str, str], dict[int | None, Reading]]
    frames: dict[str, pd.DataFrame]
    overlap_rows: dict[tuple[object, ...], int]
    overlap_counts: dict[str, Floats]
    update_size_of: list[str | None]
    first_change: dict[str, float]
    views: tuple[str, ...]
    controls: list[selection.Pair]
    tracks: dict[str, dict[str, npt.NDArray[Any]]] = field(default_factory=dict)

    def parse(self, claim: ClaimBase) -> Response:
        """The response of a claim."""
        return Response.parse(claim.response, self.study.default_view)

    def sides(self, claim: ClaimBase) -> dict[str, pd.DataFrame]:
        """Runs of any status, one selection per side of the claim."""
        return {
            side: selection.select(self.runs, selector, claim.varied)
            for side, selector in claim.sides.items()
        }

    def finished(self, trial: str) -> bool:
        """Whether a run finished."""
        return bool(self.by_id[trial]["status"] == "finished")

    def number(self, trial: str, column: str) -> float:
        """A number of table ``trials``; nan where null."""
        value = self.by_id[trial][column]
        return NAN if value is None else float(value)

    def track(self, trial: str) -> dict[str, npt.NDArray[Any]]:
        """Columns step, score and kl of ``responses.snapshots``, the same for all responses."""
        if trial not in self.tracks:
            found = responses.snapshots(self.frames.get(trial, self.frames[""]), trial, "")
            self.tracks[trial] = {str(name): found[name].to_numpy() for name in found}
        return self.tracks[trial]

    def read(
        self, trial: str, response: Response, at: At | None, scale: Scale
    ) -> tuple[float, str]:
        """What was measured of a run, or nan and why there is nothing.

        Args:
            trial: its id.
            response: any but overlap and identical_replicates.
            at: where; ``common`` must have been resolved.
            scale: of the result.
        """
        if response.kind != FAILED and not self.finished(trial):
            return NAN, UNFINISHED
        found = self.readings.get((trial, response.name), {})
        if at is not None and at.step is None:
            run = self.track(trial)
            levels = [found[step].log if step in found else NAN for step in run["step"]]
            level, why = responses.density_at({**run, "log_density": np.array(levels)}, at)
            return (NAN, why) if level is None else (_on_scale(level, scale), "")
        step = at.step if at else None
        if step not in found:
            there = ", ".join(str(one) for one in sorted(key for key in found if key is not None))
            where = f" at step {step}" if step else ""
            return NAN, f"no {response.name}{where}" + (f"; there are {there}" if there else "")
        value: float = getattr(found[step], scale)
        if not np.isnan(value):
            return value, ""
        why = "is not above 0" if scale == "log" else ": num_eval_problems is not known"
        return NAN, f"{response.name} {why}".replace(" :", ":")


def _on_scale(level: float, scale: Scale) -> float:
    """A log density as sparsity on a scale of contrasts."""
    if scale == "log":
        return level
    return odds_unchanged(level) if scale == "log_odds" else float(-np.expm1(level))


# --- indexing ----------------------------------------------------------------------------------


def observe(
    study: StudyBase, trials: pa.Table, steps: pa.Table, changes: pa.Table, overlaps: pa.Table
) -> Observations:
    """Index the tables of a study; the arguments are those of ``claims.judge``."""
    runs = selection.with_configs(trials)
    frame = responses.responses(trials, steps, changes, study.default_view)
    bitwise = frame[frame["response"].str.startswith("sparsity.bitwise@")]
    changed = bitwise["step"].where(bitwise["numerator"] > 0, np.inf)
    rows: list[Any] = runs.to_dict("records")
    by_id: dict[str, dict[str, Any]] = {row["trial_id"]: row for row in rows}
    pairs = _of_claims(study, overlaps)
    return Observations(
        study,
        runs,
        by_id,
        {trial: _settings(row) for trial, row in by_id.items()},
        _readings(frame),
        {"": frame.iloc[:0], **{str(name): rows for name, rows in frame.groupby("trial_id")}},
        _overlap_rows(pairs),
        {name: _floats(pairs, name) for name in _COUNTS},
        pairs["update_size_of"].to_pylist(),
        {str(name): float(step.min()) for name, step in changed.groupby(bitwise["trial_id"])},
        tuple(sorted(changes["view"].unique().to_pylist())),
        selection.control_pairs(study, runs),
    )


_COUNTS = ("num_elements", "num_a", "num_b", "num_both", *(f"expected_{null}" for null in NULLS))
_PAIR = ("definition", "view", "trial_a", "step_a", "trial_b", "step_b")


def _readings(frame: pd.DataFrame) -> dict[tuple[str, str], dict[int | None, Reading]]:
    scales, scaled = frame["response"].map(responses.scale_of), responses.scaled(frame)
    density = log_density(frame["numerator"], frame["n"])
    of_density = frame["response"].str.startswith("sparsity.")
    log = np.select([of_density, scales == "log"], [density, scaled], np.nan)
    odds = np.where(scales == "log_odds", scaled, np.nan)
    columns = [frame[name].tolist() for name in ("trial_id", "response", "step", "last")]
    numbers = zip(frame["value"].tolist(), odds.tolist(), log.tolist(), strict=True)
    found: dict[tuple[str, str], dict[int | None, Reading]] = {}
    for trial, name, step, last, of_scales in zip(*columns, numbers, strict=True):
        by_step = found.setdefault((trial, name), {})
        by_step[int(step)] = Reading(*of_scales)
        if last:
            by_step[None] = by_step[int(step)]
    return found


def _settings(row: dict[str, Any]) -> Settings:
    def known(path: str) -> Any:
        return next(iter(selection.value_at(row, path)), None)

    num_steps = row["num_steps"]
    return Settings(
        known("model.source"),
        known("train.learning_rate"),
        None if pd.isna(num_steps) else int(num_steps),
        known("train.batch_size"),
    )


def _of_claims(study: StudyBase, overlaps: pa.Table) -> pa.Table:
    """Rows of the parts of the model that the study's claims name."""
    claims = [claim for claim in study.claims if isinstance(claim, OverlapClaim)]
    named = {claim.module for claim in claims if claim.module}
    tensors = {claim.tensor for claim in claims if claim.tensor}
    everything = any(claim.module is None and claim.tensor is None for claim in claims)
    whole = pc.is_null(overlaps["tensor"])
    module, tensor = overlaps["module"], overlaps["tensor"]
    of_module = pc.or_(
        pc.is_in(module, pa.array(sorted(named), pa.string())),
        pc.and_(pc.is_null(module), pa.scalar(everything)),
    )
    of_tensor = pc.is_in(tensor, pa.array(sorted(tensors), pa.string()))
    return overlaps.filter(pc.or_(pc.and_(whole, of_module), of_tensor))


def _overlap_rows(pairs: pa.Table) -> dict[tuple[object, ...], int]:
    columns = [pairs[name].to_pylist() for name in (*_PAIR, "module", "tensor")]
    return {
        # A tensor's row may say its module, too.
        (*pair, None if tensor else module, tensor): row
        for row, (*pair, module, tensor) in enumerate(zip(*columns, strict=True))
    }


def _floats(table: pa.Table, name: str) -> Floats:
    column = table[name].cast(pa.float64()).fill_null(np.nan)
    result: Floats = column.to_numpy()
    return result
