"""Strata of weights against one weight at a time, in exact fractions."""

import bisect
import itertools
import math
from collections import defaultdict
from fractions import Fraction
from functools import cache

import ml_dtypes
import numpy as np
import pytest
from planted import FLOATS, unsigned

from rlsparse import kernels
from rlsparse.definitions import NUM_MAGNITUDE_BINS
from rlsparse.overlap import strata
from rlsparse.overlap.strata import NUM_TIE_BINS

NONFINITE = NUM_MAGNITUDE_BINS * NUM_TIE_BINS


def weights(dtype: str, size: int = 300, scale: float = 0.02) -> np.ndarray:
    rng = np.random.default_rng(3)
    values = rng.standard_normal(size) * scale
    values[:8] = [0, -0.0, 1, -0.5, 0.25, 2.0**-9, np.inf, np.nan]
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(np.float32).astype(FLOATS[dtype]).view(unsigned(dtype))


@cache
def middles_of(view: str) -> tuple[Fraction, list[float]]:
    """Smallest value of a format, and all places at which rounding to it changes (exact floats)."""
    codes = np.arange(2 ** (8 * unsigned(view).itemsize - 1)).astype(unsigned(view))
    with np.errstate(invalid="ignore"):
        grid = codes.view(FLOATS[view]).astype(float)
    grid = grid[np.isfinite(grid)].tolist()
    middles = [(a + b) / 2 for a, b in itertools.pairwise(grid)]
    return Fraction(grid[1]), [-grid[1] / 2, *middles, (3 * grid[-1] - grid[-2]) / 2]


def naive_tie_bin(weight: float, view: str) -> int:
    """Search all values of the view for the cell that holds |weight|."""
    smallest, middles = middles_of(view)
    place = min(max(bisect.bisect(middles, abs(weight)), 1), len(middles) - 1)
    x = Fraction(abs(weight))
    distance = min(abs(x - Fraction(middle)) for middle in middles[place - 1 : place + 1])
    eps = Fraction(float(ml_dtypes.finfo(FLOATS[view]).eps))
    binade = Fraction(2) ** (math.frexp(abs(weight))[1] - 1)
    share = min(distance / max(binade * eps, smallest), Fraction(1, 2))
    if share == 0:
        return NUM_TIE_BINS - 1
    # half octaves: 2^(-(b + 2) / 2) <= share < 2^(-(b + 1) / 2), compared as squares
    found = 0
    while found < NUM_TIE_BINS - 1 and share**2 < Fraction(1, 2 ** (found + 2)):
        found += 1
    return found


@pytest.mark.parametrize(
    ("dtype", "view"),
    [
        ("fp32", "bf16"), ("fp64", "bf16"), ("bf16", "fp8_e4m3"), ("fp16", "bf16"),
        ("fp32", "fp8_e4m3"), ("bf16", "fp16"), ("fp32", "fp16"),
    ],
)  # fmt: skip
def test_distance_to_the_tie(dtype: str, view: str) -> None:
    bits = weights(dtype)
    found = strata.magnitude_labels(bits, dtype, view)
    stored = strata.magnitude_labels(bits, dtype, "stored")
    assert set(stored % NUM_TIE_BINS) == {0}
    assert (found // NUM_TIE_BINS == stored // NUM_TIE_BINS).all()
    values = bits.view(FLOATS[dtype]).astype(float).tolist()
    for value, label in zip(values, found.tolist(), strict=True):
        wanted = naive_tie_bin(value, view) if math.isfinite(value) else 0
        assert label % NUM_TIE_BINS == wanted, value
    assert len(set((found % NUM_TIE_BINS).tolist())) > (
        1 if view == "fp16" and dtype == "bf16" else 4
    )


def test_weights_on_the_grid_of_the_view_are_not_divided() -> None:
    on_grid = kernels.cast_bits(weights("bf16"), "bf16", "fp32")
    mine, stored = (strata.magnitude_labels(on_grid, "fp32", v) for v in ("bf16", "stored"))
    assert len(set(zip(mine.tolist(), stored.tolist(), strict=True))) == len(set(stored.tolist()))
    bits = weights("bf16")
    for view in ("fp32", "bf16", "stored"):
        assert np.array_equal(
            strata.magnitude_labels(bits, "bf16", view),
            strata.magnitude_labels(bits, "bf16", "stored"),
        )


@pytest.mark.parametrize("dtype", list(FLOATS))
def test_strata_are_the_bins_of_the_magnitude_histogram(dtype: str) -> None:
    bits = weights(dtype)
    labels = strata.magnitude_labels(bits, dtype, "stored")
    finite = labels[labels != NONFINITE]
    found = np.bincount(finite // NUM_TIE_BINS, minlength=NUM_MAGNITUDE_BINS)
    histogram, _ = kernels.magnitude_histogram(bits, dtype)
    assert found.tolist() == histogram.tolist()
    assert labels.size - finite.size == (~np.isfinite(bits.view(FLOATS[dtype]).astype(float))).sum()


def test_long_runs_are_labelled_as_short_ones() -> None:
    bits = weights("fp32", 2**18 + 77)
    every = strata.magnitude_labels(bits, "fp32", "bf16")
    assert np.array_equal(
        every[2**18 - 50 :], strata.magnitude_labels(bits[2**18 - 50 :], "fp32", "bf16")
    )


def test_integers_are_one_stratum() -> None:
    assert set(strata.magnitude_labels(np.arange(9, dtype=np.uint8), "u8", "bf16")) == {NONFINITE}
    one, other = np.arange(4, dtype=np.uint8), np.array([0, 1, 9, 3], np.uint8)
    assert strata.update_sizes(one, "u8", other, "u8").tolist() == [0, 0, 1, 0]


def test_update_sizes_are_against_the_base_as_training_casts_it() -> None:
    before = np.float32([1.001, 0.5, np.nan, 1e-3])
    after = np.array([1.0, 0.75, 1.0, 1e-3]).astype(FLOATS["bf16"])
    found = strata.update_sizes(before.view(np.uint32), "fp32", after.view(np.uint16), "bf16")
    np.testing.assert_array_equal(found, [0, 0.25, np.nan, 0])
    back = strata.update_sizes(after.view(np.uint16), "bf16", before.view(np.uint32), "fp32")
    np.testing.assert_allclose(back[0], np.float32(1.001) - 1, rtol=1e-12)


def test_deciles_of_update_sizes() -> None:
    rng = np.random.default_rng(8)
    labels = np.repeat(np.uint16([5, 700]), 4000)
    sizes = rng.exponential(1e-3, 8000)
    sizes[4000:] = np.exp2(rng.integers(0, 3, 4000))  # three sizes: ties
    sizes[rng.random(8000) < 0.3] = 0
    sizes[:2] = np.nan, np.inf
    found = strata.update_size_labels(labels, sizes)
    groups = defaultdict(list)
    for label, bin_, size in zip(labels.tolist(), found.tolist(), sizes.tolist(), strict=True):
        groups[label, bin_].append(size)
    assert len({bin_ for _, bin_ in groups}) == len(groups)  # they refine the strata
    of_first = {b: s for (label, b), s in groups.items() if label == 5}
    of_second = {b: s for (label, b), s in groups.items() if label == 700}
    assert [len(s) for s in of_first.values() if not np.isfinite(s).all()] == [2]
    assert [set(s) for s in of_first.values() if 0 in s] == [{0}]
    moved = sorted((s for s in of_first.values() if min(s) > 0 and np.isfinite(s).all()), key=min)
    assert len(moved) == 10
    assert all(max(a) < min(b) for a, b in itertools.pairwise(moved))
    # Buckets are an eighth of an octave at most, so deciles are near a tenth each.
    total = sum(map(len, moved))
    assert all(0.05 * total < len(s) < 0.15 * total for s in moved)
    assert sorted(map(sorted, map(set, of_second.values()))) == [[0], [1], [2], [4]]


def test_updates_of_any_size_are_updates() -> None:
    sizes = np.array([0, 1e-300, 1e-45, 1e-30, 1e300])
    found = strata.update_size_labels(np.zeros(5, np.uint16), sizes)
    assert found[0] != found[1] == found[2] != found[3]
    assert found[4] not in found[:4]


def test_strata_of_several_chunks_are_added_by_label() -> None:
    rng = np.random.default_rng(1)
    labels = rng.choice(np.uint16([3, 900, 40]), 640)
    labels[:320][labels[:320] == 40] = 3
    bits = rng.random((3, 640)) < 0.3
    packed = np.packbits(bits, axis=1, bitorder="little").view(np.uint64)
    parts = [
        strata.count_strata(packed[:, :5], labels[:320]),
        strata.count_strata(packed[:, 5:], labels[320:]),
    ]
    whole = strata.add_strata(parts)
    assert whole.labels.tolist() == [3, 40, 900]
    assert whole.sizes.tolist() == [(labels == one).sum() for one in (3, 40, 900)]
    for row in range(3):
        wanted = [bits[row, labels == one].sum() for one in (3, 40, 900)]
        assert whole.changed[row].tolist() == wanted
    assert strata.add_strata(parts[:1]) is parts[0]
