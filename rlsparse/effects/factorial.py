"""One factorial model per response: which factors matter, adjusted for each other and for the seed.

Ordinary least squares on the scale of the response, with seeds as fixed blocks, all factors and the
interactions that the study declares. Sums of squares are of type II (Langsrud 2003, Statistics and
Computing 13): each term is adjusted for all terms that do not contain it. Terms are spans of
columns and their degrees of freedom differences of ranks, so that a design with empty cells or
aliased factors loses what cannot be told, and says so, instead of giving other numbers.

A factor that some cells do not have, or that means another thing in each algorithm or task, is
nested: it has columns only where it is, one per algorithm (task) and level. The factor that it is
nested in is tested without it, as it is without interactions.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
from scipy import special

from rlsparse import tables
from rlsparse.claim_config import InteractionClaim
from rlsparse.effects.responses import scale_of, scaled
from rlsparse.effects.selection import value_at, with_configs
from rlsparse.identity import canonical_json
from rlsparse.levels import canonical_path, level_label, order_of, tags_of
from rlsparse.statistics import CI_LEVEL, Floats, holm, without_nan
from rlsparse.study import StudyBase, left_out

OTHER_RESPONSES = ("score_after", "score_gain", "kl_final")
"""Responses that are modelled beside bitwise sparsity in the default view."""

_Point = tuple[str, str]
"""What a run has of a factor: where it is nested (JSON of algorithm or task, or ``{}``), level."""
_Term = tuple[str, ...]
_SEED: _Term = ("seed",)
_ROUNDING = 1e-9
_LOST = "not estimable: cells have no measured run, or factors are aliased"


def factorial(study: StudyBase, trials: pa.Table, frame: pd.DataFrame) -> tuple[pa.Table, pa.Table]:
    """Fit the model to the last snapshots of finished runs, without controls and surrogates.

    Args:
        study: gives factors and interactions, its own and those of claims of that kind.
        trials: table of that name, with the column ``config``. Planned cells without finished runs
            count in what marginal means average over.
        frame: result of ``responses``.

    Returns:
        Tables ``terms`` and ``means``. ``omega_sq`` is partial omega squared, without the bias of
        eta squared (may be below 0); Holm is over a response's terms but ``seed``; ``note`` says
        what is nested, aliased or lost. Means are predictions, averaged with equal weights over the
        levels of the other factors (in planned cells, nested ones within their own) and over the
        seeds of the study: their intervals are about these seeds. They have the further columns
        ``within`` (as in table ``effects``) and ``note``; what is not estimable is null.
    """
    runs = with_configs(trials)
    design = _design(study, runs[~runs["role"].isin(left_out(()))])
    last = frame[frame["last"]]
    terms: list[dict[str, object]] = []
    means: list[dict[str, object]] = []
    for response in (f"sparsity.bitwise@{study.default_view}", *OTHER_RESPONSES):
        rows = last[last["response"] == response]
        values = dict(zip(rows["trial_id"], scaled(rows), strict=True))
        y = np.array([values.get(trial, np.nan) for trial in design.trials])
        if not np.isnan(y).all():
            shared = {"response": response}
            fitted = _fit(design, y)
            terms += [shared | without_nan(row) for row in _terms(design, fitted)]
            shared["scale"] = scale_of(response)
            means += [shared | without_nan(row) for row in _means(design, fitted)]
    return tables.from_rows(terms, "terms"), tables.from_rows(means, "means")


# --- the design --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Design:
    """Planned runs, whatever became of them, and the columns of each term.

    Attributes:
        trials: their ids.
        cells: what each has of the factors.
        points: by factor, what occurs, in order of the study.
        contained: by term, the factors that it contains, itself and those it is nested in.
        columns: by term, [runs, k], indicators of what occurs.
        margins: by term, the same with the levels of one factor put together where it is nested.
    """

    trials: list[str]
    cells: list[dict[str, _Point]]
    points: dict[str, list[_Point]]
    contained: dict[_Term, set[str]]
    columns: dict[_Term, Floats]
    margins: dict[_Term, Floats]

    def others(self, term: _Term, but: Collection[_Term] = ()) -> list[Floats]:
        """What ``term`` is adjusted for, without the terms ``but``."""
        kept = [
            columns
            for other, columns in self.columns.items()
            if other != term and other not in but and not set(term) <= self.contained[other]
        ]
        return [*kept, self.margins[term]]


def _design(study: StudyBase, runs: pd.DataFrame) -> _Design:
    rows = runs.to_dict("records")
    cells: list[dict[str, _Point]] = [{} for _ in rows]
    points: dict[str, list[_Point]] = {}
    contained: dict[_Term, set[str]] = {_SEED: {"seed"}}
    for factor, levels in study.factors.items():
        tags = tags_of(factor)
        having = [i for i, row in enumerate(rows) if factor in row["cell"]]
        strata = {
            i: canonical_json({tag: value for tag in tags for value in value_at(rows[i], tag)})
            for i in having
        }
        is_apart = len(set(strata.values())) > 1
        for i in having:
            cells[i][factor] = (strata[i] if is_apart else "{}", rows[i]["cell"][factor])
        labels = [level_label(level) for level in levels]
        found = sorted({cells[i][factor] for i in having})
        points[factor] = [point for label in labels for point in found if point[1] == label]
        is_nested = is_apart or len(having) < len(rows)
        parents = {other for other in study.factors if canonical_path(other) in tags}
        contained[factor,] = {factor} | (parents if is_nested else set())
    for a, b in _interactions(study):
        contained[a, b] = contained[a,] | contained[b,]
    blocked = [
        {**cell, "seed": ("{}", str(row["seed"]))} for cell, row in zip(cells, rows, strict=True)
    ]
    return _Design(
        [row["trial_id"] for row in rows],
        cells,
        points,
        contained,
        {term: _indicators(blocked, term) for term in contained},
        {
            term: np.hstack([_indicators(blocked, term, coarse) for coarse in term])
            for term in contained
        },
    )


def _interactions(study: StudyBase) -> list[_Term]:
    """Declared pairs of the study's factors, in its order, each once."""
    known = {canonical_path(factor): factor for factor in study.factors}
    of_claims = [(c.factor, c.by) for c in study.claims if isinstance(c, InteractionClaim)]
    found = [
        tuple(factor for path, factor in known.items() if path in map(canonical_path, pair))
        for pair in (*study.interactions, *of_claims)
    ]
    return [pair for pair in dict.fromkeys(found) if len(pair) == 2]


def _indicators(
    rows: Sequence[dict[str, _Point]], term: _Term, coarse: str | None = None
) -> Floats:
    """One column per combination of the term's factors; ``coarse`` counts without its levels."""
    keys = [
        tuple(row[f][:1] if f == coarse else row[f] for f in term)
        if all(f in row for f in term)
        else ()
        for row in rows
    ]
    distinct = sorted(set(keys) - {()})
    columns = [[float(key == one) for key in keys] for one in distinct]
    return np.array(columns, np.float64).reshape(len(distinct), len(rows)).T


# --- the fit -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Fit:
    """The whole model, fitted to the runs that have the response.

    Attributes:
        seen: [planned runs], which have it.
        y: [n], the response of these.
        df_residual: of the whole model.
        mean_sq: residual mean square; nan without degrees of freedom or spread.
    """

    seen: npt.NDArray[np.bool_]
    y: Floats
    df_residual: int
    mean_sq: float

    def rank(self, *parts: Floats) -> int:
        """Dimensions that a constant and ``parts`` span in these runs."""
        return int(_basis(parts, self.seen).shape[1])

    def rest(self, *parts: Floats) -> float:
        """Sum of squares that a constant and ``parts`` leave."""
        basis = _basis(parts, self.seen)
        left = self.y - basis @ (basis.T @ self.y)
        return float(left @ left)


def _fit(design: _Design, y: Floats) -> _Fit:
    seen = ~np.isnan(y)
    bare = _Fit(seen, y[seen], 0, np.nan)
    whole = tuple(design.columns.values())
    df, rest = int(seen.sum()) - bare.rank(*whole), bare.rest(*whole)
    has_spread = df > 0 and rest > _ROUNDING**2 * float(bare.y @ bare.y)
    return replace(bare, df_residual=df, mean_sq=rest / df if has_spread else np.nan)


def _basis(parts: Sequence[Floats], rows: npt.NDArray[np.bool_]) -> Floats:
    """Orthonormal basis of the span of a constant and ``parts`` in some rows."""
    columns = np.hstack([np.ones((rows.size, 1)), *parts])[rows]
    u, size, _ = np.linalg.svd(columns, full_matrices=False)
    basis: Floats = u[:, size > _ROUNDING * size[0]]
    return basis


# --- terms -------------------------------------------------------------------------------------


def _terms(design: _Design, fit: _Fit) -> list[dict[str, object]]:
    rows = [_term(design, fit, term) for term in design.columns]
    tested = [row for row in rows if row["term"] != _SEED[0] and "p_value" in row]
    adjusted = holm([row["p_value"] for row in tested])  # type: ignore[arg-type]
    for row, p in zip(tested, adjusted, strict=True):
        row["p_adjusted"] = p
    return rows


def _term(design: _Design, fit: _Fit, term: _Term) -> dict[str, object]:
    own, others = design.columns[term], design.others(term)
    df = fit.rank(*others, own) - fit.rank(*others)
    # Rounding may leave less than nothing.
    sum_sq = max(fit.rest(*others) - fit.rest(*others, own), 0.0)
    row: dict[str, object] = {
        "term": " : ".join(term),
        "df": df,
        "df_residual": fit.df_residual,
        "sum_sq": sum_sq if df else None,
        "num_runs": fit.y.size,
        "note": _note(design, fit, term, df),
    }
    if df and not np.isnan(fit.mean_sq):
        f_value = sum_sq / df / fit.mean_sq
        row["f_value"] = f_value
        row["p_value"] = float(special.fdtrc(df, fit.df_residual, f_value))
        unexplained = sum_sq + (fit.y.size - df) * fit.mean_sq
        row["omega_sq"] = (sum_sq - df * fit.mean_sq) / unexplained
    return row


def _note(design: _Design, fit: _Fit, term: _Term, df: int) -> str:
    """What a reader of a term must know: what it is nested in, and what cannot be told."""
    parents = sorted(design.contained[term] - set(term))
    notes = [f"nested in {', '.join(parents)}"] if parents else []
    own, margin = design.columns[term], design.margins[term]
    planned = replace(fit, seen=np.ones(fit.seen.size, bool))
    df_planned = planned.rank(margin, own) - planned.rank(margin)
    if df_planned == 0:
        notes.append("a single level")
    elif df < df_planned:
        told = f"{df} of {df_planned} degrees of freedom can be told"
        aliases = ", ".join(" : ".join(other) for other in _aliases(design, fit, term, df))
        why = f"the rest is aliased with {aliases}" if aliases else "cells have no measured run"
        notes.append(f"{told}, {why}")
    if fit.df_residual == 0:
        notes.append("no residual degrees of freedom")
    elif np.isnan(fit.mean_sq):
        notes.append("no residual spread")
    return "; ".join(notes)


def _aliases(design: _Design, fit: _Fit, term: _Term, df: int) -> list[_Term]:
    """Terms without which, and what contains them, more degrees of freedom could be told."""
    found = []
    for other in design.columns:
        if other != term and not set(term) <= design.contained[other]:
            above = [one for one, held in design.contained.items() if set(other) <= held]
            kept = design.others(term, above)
            if fit.rank(*kept, design.columns[term]) - fit.rank(*kept) > df:
                found.append(other)
    return found


# --- marginal means ----------------------------------------------------------------------------


def _means(design: _Design, fit: _Fit) -> list[dict[str, object]]:
    """Estimated marginal means: estimable linear functions of the least squares solution."""
    whole = np.hstack([np.ones((fit.seen.size, 1)), *design.columns.values()])
    u, size, vt = np.linalg.svd(whole[fit.seen], full_matrices=False)
    rank = int((size > _ROUNDING * size[0]).sum())
    u, size, vt = u[:, :rank], size[:rank], vt[:rank]
    quantile = special.stdtrit(max(fit.df_residual, 1), (1 + CI_LEVEL) / 2)
    rows: list[dict[str, object]] = []
    for factor, point in [(f, point) for f, points in design.points.items() for point in points]:
        at = np.array([cell.get(factor) == point for cell in design.cells])
        row: dict[str, object] = {"factor": factor, "within": point[0], "level": point[1]}
        row |= {"ci_level": CI_LEVEL, "num_runs": int((at & fit.seen).sum()), "note": _LOST}
        wanted = _reference(design, fit.seen, factor, point, whole)
        if np.abs(wanted - vt.T @ (vt @ wanted)).max() <= _ROUNDING:
            loading = (vt @ wanted) / size
            estimate = float(loading @ (u.T @ fit.y))
            half = float(quantile * np.sqrt(fit.mean_sq * (loading @ loading)))
            row |= {"estimate": estimate, "note": ""}
            row |= {"ci_low": estimate - half, "ci_high": estimate + half}
        rows.append(row)
    return rows


def _reference(
    design: _Design, seen: npt.NDArray[np.bool_], factor: str, point: _Point, whole: Floats
) -> Floats:
    """What the mean at a level is made of: a combination of the rows of the whole model."""
    first = {
        canonical_json(cell): i for i, cell in enumerate(design.cells) if cell.get(factor) == point
    }
    cells = [design.cells[i] for i in first.values()]
    weights = _weights(cells, sorted(design.points, key=order_of))
    wanted = weights @ whole[list(first.values())]
    start = 1
    for term, columns in design.columns.items():
        if term == _SEED:
            there = columns[seen].any(axis=0)
            wanted[start : start + columns.shape[1]] = there / there.sum()
        start += columns.shape[1]
    return wanted


def _weights(cells: Sequence[Mapping[str, _Point]], factors: Sequence[str]) -> Floats:
    """Weights of distinct cells: equal for the levels of the first factor, and so on within."""
    if not factors:
        return np.full(len(cells), 1 / len(cells))
    head, *rest = factors
    weights = np.zeros(len(cells))
    levels = {cell.get(head) for cell in cells}
    for level in levels:
        members = [i for i, cell in enumerate(cells) if cell.get(head) == level]
        weights[members] = _weights([cells[i] for i in members], rest) / len(levels)
    return weights
