"""Expectations against enumeration, simulation and scipy; lift 1 on masks that know nothing."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from planted import FLOATS, unsigned

from rlsparse import kernels
from rlsparse.errors import TableError
from rlsparse.overlap import nulls
from rlsparse.overlap.strata import count_strata, magnitude_labels, update_size_labels


def test_expected_in_both_is_the_mean_over_all_masks() -> None:
    """Enumerated: every mask of b with its count in each stratum is equally likely."""
    strata = [range(4), range(4, 9)]
    a = {0, 1, 5, 6, 7}
    means = 0.0
    for stratum, count in zip(strata, (3, 2), strict=True):
        masks = list(itertools.combinations(stratum, count))
        means += sum(len(a & set(mask)) for mask in masks) / len(masks)
    changed, sizes = np.array([[2, 3, 0], [3, 2, 0]]), np.array([4, 5, 0])
    (found,) = nulls.expected_in_both(changed, sizes, [(0, 1)])
    assert found == pytest.approx(means, rel=1e-12, abs=0)
    with pytest.raises(TableError, match="more weights changed in a stratum"):
        nulls.expected_in_both(changed, np.array([1, 5, 0]), [(0, 1)])


def test_pairs_come_set_after_set() -> None:
    values = np.array([[2], [3], [5], [7]])
    found = nulls.pair_products(values, values + 1, [(0, 1, 3), (2, 3), ()])
    assert found.tolist() == [2 * 4, 2 * 8, 3 * 8, 5 * 8]


def test_margins_are_exact_where_cell_probabilities_factorise() -> None:
    """Rank-one probabilities: the expectation, formed of expected counts, is the true mean."""
    rng = np.random.default_rng(0)
    p, q = (np.outer(rng.random(30), rng.random(40)) for _ in range(2))
    rows, columns = p.sum(axis=1) @ q.sum(axis=1), p.sum(axis=0) @ q.sum(axis=0)
    found = nulls.expected_of_margins(rows, columns, p.sum(), q.sum())
    assert found == pytest.approx((p * q).sum(), rel=1e-12, abs=0)
    masks = [rng.random((2000, 30, 40)) < chance for chance in (p, q)]
    lifts = []
    for a, b in zip(*masks, strict=True):
        dots = [a.sum(axis=i) @ b.sum(axis=i) for i in (1, 0)]
        lifts.append((a & b).sum() / nulls.expected_of_margins(*dots, a.sum(), b.sum()))
    assert np.mean(lifts) == pytest.approx(1, rel=0, abs=0.01)
    assert nulls.expected_of_margins([0, 6], [0, 4], [0, 3], [5, 2]).tolist() == [0, 4]


def test_expected_agreement_is_the_poisson_binomial() -> None:
    changed, sizes = np.array([[10, 0, 4], [5, 3, 4], [20, 1, 4]]), np.array([20, 7, 4])
    wanted = np.zeros(4)
    for stratum, size in enumerate(sizes.tolist()):
        chances = (changed[:, stratum] / size).tolist()
        for outcome in itertools.product((0, 1), repeat=3):
            picked = [p if hit else 1 - p for p, hit in zip(chances, outcome, strict=True)]
            wanted[sum(outcome)] += size * math.prod(picked)
    found = nulls.expected_agreement(changed, sizes)
    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-12)
    assert found.sum() == pytest.approx(31, rel=1e-12, abs=0)
    empty = nulls.expected_agreement(np.zeros((2, 1), np.int64), np.zeros(1, np.int64))
    assert empty.tolist() == [0, 0, 0]


def test_random_masks_are_hypergeometric() -> None:
    sizes, a, b = np.array([50, 400, 9]), np.array([20, 30, 9]), np.array([10, 200, 4])
    draws = np.array([nulls.random_in_both(("x", 1, i), a, b, sizes) for i in range(4000)])
    assert (draws[:, 2] == 4).all()
    for tensor in (0, 1):
        truth = scipy.stats.hypergeom(sizes[tensor], a[tensor], b[tensor])
        assert draws[:, tensor].mean() == pytest.approx(truth.mean(), rel=0.02, abs=0)
        assert draws[:, tensor].std() == pytest.approx(truth.std(), rel=0.05, abs=0)
    again = nulls.random_in_both(("x", 1, 7), a, b, sizes)
    assert again.tolist() == draws[7].tolist()
    assert np.unique(draws[:, 1]).size > 10


def test_random_masks_of_very_large_tensors() -> None:
    sizes, a, b = np.array([2 * 10**9, 100]), np.array([4 * 10**8, 50]), np.array([10**9, 50])
    draws = np.array([nulls.random_in_both((i,), a, b, sizes) for i in range(2000)])
    truth = scipy.stats.hypergeom(2 * 10**9, 4 * 10**8, 10**9)
    assert draws[:, 0].mean() == pytest.approx(truth.mean(), rel=1e-5, abs=0)
    assert draws[:, 0].std() == pytest.approx(truth.std(), rel=0.05, abs=0)
    assert draws[:, 1].mean() == pytest.approx(25, rel=0.01, abs=0)
    full = nulls.random_in_both((0,), sizes[:1], b[:1], sizes[:1])
    assert full.tolist() == [10**9]


def test_explained_adds_up_to_the_whole_excess() -> None:
    row = {
        "num_both": 99.5, "expected_uniform": 9.5, "expected_tensor": 19.5,
        "expected_magnitude": 39.5, "expected_update_size": 49.5, "expected_margins": 1.0,
    }  # fmt: skip
    found = nulls.explained(row)
    assert list(found) == ["tensor", "magnitude", "update_size", "rest"]
    assert np.exp(list(found.values())) == pytest.approx([2, 2, 1.25, 2], rel=1e-12, abs=0)
    for missing in (None, math.nan):
        without = nulls.explained(row | {"expected_update_size": missing})
        assert list(without) == ["tensor", "magnitude", "rest"]
        assert without["rest"] == pytest.approx(math.log(2.5), rel=1e-12, abs=0)
    none = nulls.explained(row | {"num_both": 0})
    assert none["rest"] == pytest.approx(math.log(0.5 / 50), rel=1e-12, abs=0)


# --- masks that share nothing but the base -----------------------------------------------------

NUM_WEIGHTS = 2**19


def base_bits(dtype: str) -> np.ndarray:
    rng = np.random.default_rng(11)
    values = (rng.standard_normal(NUM_WEIGHTS) * 0.02).astype(np.float32)
    return values.astype(FLOATS[dtype]).view(unsigned(dtype))


def lifts(labels: list[np.ndarray], masks: list[np.ndarray]) -> list[float]:
    """Lift of all pairs of masks together, over each of several ways to divide the weights."""
    packed = np.stack([np.packbits(mask, bitorder="little") for mask in masks]).view(np.uint64)
    runs = range(len(masks))
    both = kernels.popcount_and(packed)[np.triu_indices(len(masks), 1)].sum()
    found = []
    for one in labels:
        strata = count_strata(packed, one)
        found.append(both / nulls.expected_in_both(strata.changed, strata.sizes, [runs]).sum())
    return found


def rounded(bits: np.ndarray, dtype: str, view: str, noise: np.ndarray) -> np.ndarray:
    """Which weights change in the view when ``noise`` is added to them in full precision."""
    values = bits.view(FLOATS[dtype]).astype(np.float64)
    moved = (values + noise).view(np.uint64)
    before = kernels.cast_bits(values.view(np.uint64), "fp64", view)
    return before != kernels.cast_bits(moved, "fp64", view)


@pytest.mark.parametrize(
    ("dtype", "view", "kind"),
    [
        ("bf16", "bf16", "normal"), ("fp32", "bf16", "normal"), ("fp32", "bf16", "uniform"),
        ("fp32", "fp16", "normal"), ("bf16", "fp8_e4m3", "normal"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("spread", [3e-6, 3e-5, 3e-4])
def test_rounding_alone_gives_no_lift(dtype: str, view: str, spread: float, kind: str) -> None:
    """Independent noise on a shared base: 1.7 % covers bins of a finite width and sampling."""
    rng, bits = np.random.default_rng(2), base_bits(dtype)
    draw = {
        "normal": lambda: rng.normal(0, spread, NUM_WEIGHTS),
        "uniform": lambda: rng.uniform(-2 * spread, 2 * spread, NUM_WEIGHTS),
    }[kind]
    masks = [rounded(bits, dtype, view, draw()) for _ in range(6)]
    everywhere = np.zeros(NUM_WEIGHTS, np.uint16)
    stored, mine = (magnitude_labels(bits, dtype, v) for v in ("stored", view))
    uniform, magnitude, ties = lifts([everywhere, stored, mine], masks)
    assert ties == pytest.approx(1, rel=0, abs=0.017)
    if spread < 1e-5:  # far below the spacing of bf16 and fp8
        assert uniform > 1.3 or view == "fp16"
        assert magnitude > 1.3 or view == "fp16" or dtype == view


def test_a_step_scale_that_runs_share_is_seen_by_the_update_sizes_of_a_third() -> None:
    """Lift over the magnitude null from a per-weight scale alone; none over the update sizes."""
    rng, bits = np.random.default_rng(4), base_bits("bf16")
    scale = 3e-5 * np.exp(rng.normal(0, 0.7, NUM_WEIGHTS))
    runs = [rng.normal(0, 1, NUM_WEIGHTS) * scale for _ in range(5)]
    masks = [rounded(bits, "bf16", "bf16", noise) for noise in runs[:4]]
    labels = magnitude_labels(bits, "bf16", "stored")
    # |a normal draw| says little of its scale; the root mean square of many draws says it well.
    sharp = np.sqrt(np.mean(rng.normal(0, 1, (12, NUM_WEIGHTS)) ** 2, axis=0)) * scale
    divided = [update_size_labels(labels, sizes) for sizes in (np.abs(runs[4]), sharp)]
    magnitude, one_run, many = lifts([labels, *divided], masks)
    assert 1.1 < magnitude < 1.7
    assert 1.02 < one_run < magnitude
    assert many == pytest.approx(1, rel=0, abs=0.04)
