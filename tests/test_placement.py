"""Stripes and lifts against plain loops; both are 1 where nothing is preferred."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsparse.errors import CheckpointError
from rlsparse.placement import Lifts, measure_lifts, measure_stripes, top_share


def stripes_of(changed: np.ndarray):
    return measure_stripes(changed.sum(1), changed.sum(0))


# --- stripes ---------------------------------------------------------------------------------


def test_stripes_by_hand():
    changed = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    found = stripes_of(changed)
    # Rows 3, 1, 0 of 4 at density 1/3: variance 7/3 over 4 * 1/3 * 2/3.
    assert found.row_dispersion == pytest.approx(7 / 3 / (8 / 9))
    # Columns 2, 1, 1, 0 of 3: variance 2/3 over 3 * 1/3 * 2/3.
    assert found.column_dispersion == pytest.approx(1)
    assert found.untouched_row_share == pytest.approx(1 / 3)
    assert found.untouched_column_share == 0.25
    assert found.top_row_share == 0.75
    assert found.top_column_share == 0.5


def test_uniform_changes_have_no_stripes():
    rng = np.random.default_rng(0)
    found = [stripes_of(rng.random((60, 90)) < density) for density in (0.01, 0.2, 0.9) * 40]
    assert np.mean([stripes.row_dispersion for stripes in found]) == pytest.approx(1, abs=0.05)
    assert np.mean([stripes.column_dispersion for stripes in found]) == pytest.approx(1, abs=0.05)


def test_planted_stripes_are_seen_on_their_side():
    rng = np.random.default_rng(1)
    probability = np.full((100, 80), 0.1)
    probability[:10] = 0.5
    changed = rng.random((100, 80)) < probability
    found = stripes_of(changed)
    assert found.row_dispersion > 5
    assert 0.6 < found.column_dispersion < 1.5
    assert found.top_row_share == pytest.approx(changed[:10].sum() / changed.sum(), abs=0.02)
    flipped = stripes_of(changed.T)
    assert flipped.column_dispersion == found.row_dispersion
    assert flipped.top_column_share == found.top_row_share


@pytest.mark.parametrize("value", [0, 1])
def test_nothing_or_everything_changed(value):
    found = stripes_of(np.full((3, 5), value, bool))
    assert found.row_dispersion is None
    assert found.column_dispersion is None
    assert found.untouched_row_share == found.untouched_column_share == 1 - value
    assert found.top_row_share == (pytest.approx(1 / 3) if value else None)


def test_one_row_has_no_dispersion():
    found = stripes_of(np.array([[1, 0, 1, 1]], bool))
    assert found.row_dispersion is None
    assert found.column_dispersion == pytest.approx(0.25 / (0.75 * 0.25))


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([1, 2], [1, 1], "3 changes by row but 2 by column"),
        ([3, 0], [1, 2], "must lie between 0"),
        ([-1, 1], [0, 0], "must lie between 0"),
        ([], [], "empty"),
    ],
)
def test_counts_of_no_matrix_are_refused(rows, columns, message):
    with pytest.raises(CheckpointError, match=message):
        measure_stripes(rows, columns)


def test_top_share_counts_entries_that_are_left_out():
    amounts = np.array([5.0, 1.0, 3.0, 1.0])
    assert top_share(amounts, 0.25, 4) == 0.5
    assert top_share(amounts, 0.26, 4) == 0.8
    assert top_share(amounts, 0.01, 200) == 0.8
    assert top_share(amounts, 0.01, 10_000) == 1
    assert top_share(np.zeros(3), 0.5, 3) is None


# --- lifts -----------------------------------------------------------------------------------


def chances(scores: list[float], share: float) -> list[float]:
    """Chance of each score to be among the largest, by counting the larger and the equal ones."""
    return [
        min(max((share * len(scores) - sum(s > own for s in scores)) / scores.count(own), 0), 1)
        for own in scores
    ]


def oracle(weights: np.ndarray, rank: int, share: float, changed: np.ndarray) -> Lifts:
    left, sigma, right = np.linalg.svd(weights.astype(np.float64), full_matrices=False)
    principal = np.abs((left[:, :rank] * sigma[:rank]) @ right[:rank]).astype(np.float32).ravel()
    size = np.abs(weights).ravel()
    edges = [np.quantile(size, i / 10) for i in range(1, 10)]
    stratum = [sum(w >= edge for edge in edges) for w in size]
    found = []
    for scores in (principal, -size):
        for strata in ([0] * size.size, stratum):
            inside = 0.0
            for index in set(strata):
                places = [i for i, own in enumerate(strata) if own == index]
                chance = chances([float(scores[i]) for i in places], share)
                inside += sum(c for c, i in zip(chance, places, strict=True) if changed.flat[i])
            found.append(inside / share / changed.sum())
    return Lifts(*found)


@pytest.mark.parametrize("share", [0.5, 0.1, 0.37])
@pytest.mark.parametrize("shape", [(13, 22), (22, 13), (1, 40)])
def test_lifts_are_those_of_a_plain_loop(shape, share):
    rng = np.random.default_rng(2)
    weights = rng.standard_normal(shape).astype(np.float32)
    weights[:, ::4] = np.round(weights[:, ::4], 1)  # ties, and zeros among them
    changes = [rng.random(shape) < density for density in (0.1, 0.6)]
    left = np.linalg.svd(weights.astype(np.float64))[0][:, :3]
    found = measure_lifts(weights, left, share, changes)
    for lifts, changed in zip(found, changes, strict=True):
        expected = oracle(weights, 3, share, changed)
        assert dataclasses.astuple(lifts) == pytest.approx(dataclasses.astuple(expected), rel=1e-5)


def test_a_gate_on_magnitude_is_no_preference_within_deciles():
    rng = np.random.default_rng(3)
    weights = (rng.standard_normal((300, 200)) * 0.02).astype(np.float32)
    weights += np.outer(rng.standard_normal(300), rng.standard_normal(200)).astype(np.float32) * 0.1
    size = np.abs(weights)
    gate = rng.random(size.shape) < np.where(size < np.quantile(size, 0.3), 0.3, 0.03)
    left = np.linalg.svd(weights.astype(np.float64))[0][:, :1]
    lifts = measure_lifts(weights, left, 0.5, [gate])[0]
    assert lifts.low_lift > 1.5
    assert lifts.principal_lift < 0.6
    assert lifts.low_lift_in_decile == pytest.approx(1, abs=0.05)
    assert lifts.principal_lift_in_decile == pytest.approx(1, abs=0.05)


@given(st.integers(1, 60), st.integers(1, 5), st.floats(0.01, 0.99), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_when_everything_changes_nothing_is_preferred(num_columns, num_levels, share, seed):
    rng = np.random.default_rng(seed)
    weights = rng.integers(0, num_levels, (3, num_columns)).astype(np.float32)
    weights[0, 0] = 1  # not all zero
    left = np.linalg.svd(weights.astype(np.float64))[0][:, :1]
    lifts = measure_lifts(weights, left, share, [np.ones(weights.shape, bool)])[0]
    assert dataclasses.astuple(lifts) == pytest.approx((1, 1, 1, 1), rel=1e-5)


def test_no_directions_no_lifts():
    weights = np.zeros((3, 4), np.float32)
    changes = [np.ones((3, 4), bool)] * 2
    assert measure_lifts(weights, np.zeros((3, 0)), 0.5, changes) == [Lifts(), Lifts()]
