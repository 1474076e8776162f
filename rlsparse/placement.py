"""Where in a matrix the changed weights lie: in rows and columns, by magnitude, by direction."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlsparse.errors import CheckpointError

NUM_STRATA = 10
"""Strata of |W0| within which a choice counts as uniform: deciles."""

_Matrix = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Stripes:
    """Whether changes crowd in some rows or columns.

    Attributes:
        row_dispersion: variance of the changes per row over that of a binomial of the same
            density: 1 without stripes, more with them (standard deviation about sqrt(2 / rows)).
            None for one row, and where nothing or everything changed.
        column_dispersion: likewise.
        untouched_row_share: share of the rows without a change.
        untouched_column_share: likewise.
        top_row_share: share of all changes that lies in the 10 % of the rows with most of them
            (rounded up); a little over 0.1 without stripes. None if nothing changed.
        top_column_share: likewise.
    """

    row_dispersion: float | None
    column_dispersion: float | None
    untouched_row_share: float
    untouched_column_share: float
    top_row_share: float | None
    top_column_share: float | None


@dataclass(frozen=True)
class Lifts:
    """How far changed weights prefer principal and small weights; 1 is no preference.

    The principal mask is the largest ``share`` of |rank-k reconstruction of W0|, the low mask the
    smallest ``share`` of |W0|. A lift is the part of the changed weights inside the mask, over
    ``share``, its expectation for a uniform choice (arXiv 2511.08567: Overlap / alpha). Masks
    ``*_in_decile`` take that share of *each decile* of |W0|: they say what is left among weights of
    like size, where the format rounds alike. Ties count in part: with the chance that a random
    order puts them inside. None if W0 = 0, or nothing changed.
    """

    principal_lift: float | None = None
    principal_lift_in_decile: float | None = None
    low_lift: float | None = None
    low_lift_in_decile: float | None = None


def measure_stripes(
    row_counts: Sequence[int] | NDArray[Any], column_counts: Sequence[int] | NDArray[Any]
) -> Stripes:
    """Stripes, from the number of changed weights in each row and in each column.

    Args:
        row_counts: shape [m], whole numbers.
        column_counts: shape [n], of the same m x n matrix.

    Raises:
        CheckpointError: the counts cannot be those of one matrix.
    """
    rows, columns = np.asarray(row_counts, np.int64), np.asarray(column_counts, np.int64)
    for counts, length in ((rows, columns.size), (columns, rows.size)):
        if not counts.size or counts.min() < 0 or counts.max() > length:
            raise CheckpointError(
                f"changes per row [{rows.size}] and per column [{columns.size}] must lie between 0 "
                "and the length of the row or column, and neither list may be empty"
            )
    num_changed = int(rows.sum())
    if num_changed != columns.sum():
        raise CheckpointError(
            f"{num_changed} changes by row but {columns.sum()} by column: not of one matrix"
        )
    density = num_changed / (rows.size * columns.size)
    return Stripes(
        _dispersion(rows, columns.size, density), _dispersion(columns, rows.size, density),
        float((rows == 0).mean()), float((columns == 0).mean()),
        top_share(rows, 0.1, rows.size), top_share(columns, 0.1, columns.size),
    )  # fmt: skip


def _dispersion(counts: NDArray[np.int64], length: int, density: float) -> float | None:
    if counts.size == 1 or density in (0, 1):
        return None
    return float(counts.var(ddof=1) / (length * density * (1 - density)))


def top_share(amounts: NDArray[Any], share: float, size: int) -> float | None:
    """Part of the sum of ``amounts`` that the largest ``share`` of ``size`` entries hold.

    Args:
        amounts: not negative; entries that are 0 may be left out.
        share: in (0, 1); the number of entries is rounded up.
        size: number of entries, those left out included.

    Returns:
        In [0, 1]; None if all is 0.
    """
    num_top = int(np.ceil(share * size))
    if not amounts.any():
        return None
    if num_top >= amounts.size:
        return 1.0
    ordered = np.partition(amounts, -num_top)
    return float(ordered[-num_top:].sum() / ordered.sum())


def measure_lifts(
    weights: _Matrix,
    directions: _Matrix,
    share: float,
    changes: Sequence[NDArray[np.bool_]],
) -> list[Lifts]:
    """``Lifts`` of several sets of changed weights of one matrix.

    Args:
        weights: W0, shape [m, n].
        directions: its k left principal directions, shape [m, k]; none if W0 = 0.
        share: alpha, in (0, 1).
        changes: sets of changed weights, each [m, n] and not empty.
    """
    if not directions.size:
        return [Lifts() for _ in changes]
    size = np.abs(weights)
    edges = np.quantile(size, np.arange(1, NUM_STRATA) / NUM_STRATA)
    decile = np.searchsorted(edges, size, side="right").astype(np.uint8)
    lifts: list[dict[str, float]] = [{} for _ in changes]
    for name, scores in _scores(weights, directions, size):
        # One mask is in memory at a time: these matrices are large.
        for column, strata in ((name, np.zeros_like(decile)), (f"{name}_in_decile", decile)):
            mask = _top_mask(scores, share, strata)
            for found, changed in zip(lifts, changes, strict=True):
                found[column] = float(mask[changed].mean(dtype=np.float64) / share)
    return [Lifts(**found) for found in lifts]


def principal_scores(weights: _Matrix, directions: _Matrix) -> _Matrix:
    """|rank-k reconstruction of W0|, of which the largest are the principal weights (2511.08567).

    Args:
        weights: W0, shape [m, n].
        directions: its k left principal directions, shape [m, k].

    Returns:
        Shape [m, n].
    """
    dtype = weights.dtype
    reconstruction = directions.astype(dtype) @ (directions.T @ weights).astype(dtype)
    return np.abs(reconstruction, out=reconstruction)


def _scores(weights: _Matrix, directions: _Matrix, size: _Matrix) -> Iterator[tuple[str, _Matrix]]:
    yield "principal_lift", principal_scores(weights, directions)
    yield "low_lift", -size


def _top_mask(scores: _Matrix, share: float, strata: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Chance to be among the largest ``share`` of the stratum, ties being ordered at random."""
    mask = np.zeros(scores.shape, np.float32)
    for index in np.unique(strata):
        inside = strata == index
        own = scores[inside]
        num_top = share * own.size
        place = own.size - int(np.ceil(num_top))
        threshold = np.partition(own, place)[place]
        above, tied = own > threshold, own == threshold
        chance = (num_top - np.count_nonzero(above)) / np.count_nonzero(tied)
        mask[inside] = above + tied * np.float32(chance)
    return mask
