"""Inference over a handful of independent units: intervals, exact tests, corrections.

The unit is the training run, or the seed where several runs share one: never a weight or a tensor.
"""

import numpy as np
import numpy.typing as npt
from scipy import special

Floats = npt.NDArray[np.float64]

CI_LEVEL = 0.95
MAX_EXACT_FLIPS = 16
"""Up to this many units the sign-flip test enumerates all flips; beyond, it samples 2^16."""


def log_odds(num_hits: npt.ArrayLike, num_total: npt.ArrayLike) -> Floats:
    """log(p / (1 - p)) with p = (k + .5) / (n + 1)."""
    hits = np.asarray(num_hits, np.float64)
    result: Floats = np.log(hits + 0.5) - np.log(np.asarray(num_total) - hits + 0.5)
    return result


def log_density(num_changed: npt.ArrayLike, num_total: npt.ArrayLike) -> Floats:
    """log((k + .5) / (n + 1))."""
    changed = np.asarray(num_changed, np.float64)
    result: Floats = np.log(changed + 0.5) - np.log(np.asarray(num_total, np.float64) + 1)
    return result


def odds_unchanged(log_density: float) -> float:
    """Log odds of being unchanged, at a log density below 0."""
    return float(np.log(-np.expm1(log_density)) - log_density)


def t_interval(values: npt.ArrayLike, level: float = CI_LEVEL) -> tuple[Floats, Floats, Floats]:
    """Mean over the last axis and its Student t interval; nan bounds below two values.

    Args:
        values: [..., n], one per independent unit.
        level: coverage, in (0, 1).

    Returns:
        mean, lower and upper bound, each of shape [...].
    """
    array = np.asarray(values, np.float64)
    n = array.shape[-1]
    if n < 2:
        nan = np.full(array.shape[:-1], np.nan)
        return (array[..., 0] if n else nan), nan, nan
    mean = array.mean(axis=-1)
    half = special.stdtrit(n - 1, (1 + level) / 2) * array.std(axis=-1, ddof=1) / np.sqrt(n)
    return mean, mean - half, mean + half


def t_p_value(values: npt.ArrayLike, null: float) -> float:
    """Two-sided p of Student's t test that the mean of ``values`` [n] is ``null``.

    Without spread it is 0, or 1 where the mean is ``null``; nan below two values.
    """
    array = np.asarray(values, np.float64)
    if array.size < 2:
        return float("nan")
    error = array.std(ddof=1) / np.sqrt(array.size)
    distance = abs(array.mean() - null)
    if error == 0 or np.isinf(distance):
        return float(distance == 0)
    return float(2 * special.stdtr(array.size - 1, -distance / error))


def sign_flip(values: npt.ArrayLike) -> float:
    """Two-sided p that ``values`` [n] are symmetric about 0, by flipping their signs.

    Exact for n <= 16, else from 2^16 flips drawn under a fixed seed. nan without values.
    """
    array = np.asarray(values, np.float64)
    n = array.size
    if n == 0:
        return float("nan")
    threshold = abs(array.sum()) - 1e-12 * np.abs(array).sum()
    if n <= MAX_EXACT_FLIPS:  # flipping all signs changes nothing: fix the first one
        bits = np.arange(2 ** (n - 1))[:, None] >> np.arange(n - 1) & 1
        sums = array[0] + (1 - 2 * bits) @ array[1:]
        return float((np.abs(sums) >= threshold).mean())
    draws = np.random.default_rng(0).integers(0, 2, (2**MAX_EXACT_FLIPS - 1, n), np.int8)
    hits = (np.abs((1 - 2 * draws) @ array) >= threshold).sum()
    return float((hits + 1) / 2**MAX_EXACT_FLIPS)


def sign_flip_floor(num_units: int) -> float:
    """Smallest two-sided p that ``sign_flip`` can give with that many units; 1 with none."""
    return 2.0 ** -max(0, min(num_units - 1, MAX_EXACT_FLIPS))


def holm(p_values: npt.ArrayLike) -> Floats:
    """Holm's step-down adjusted p values; nan stays nan but counts as a test with p = 1."""
    given = np.asarray(p_values, np.float64)
    filled = np.where(np.isnan(given), 1.0, given)
    order = np.argsort(filled, kind="stable")
    stepped = np.maximum.accumulate(filled[order] * np.arange(given.size, 0, -1))
    adjusted = np.empty(given.size)
    adjusted[order] = np.minimum(stepped, 1.0)
    return np.where(np.isnan(given), np.nan, adjusted)


def holm_levels(p_values: npt.ArrayLike, alpha: float) -> Floats:
    """Level at which Holm's step-down procedure tests each hypothesis.

    The k-th smallest p value is tested at alpha / (m - k + 1) while all smaller ones were
    rejected; those after the first that is not share its level. An interval of coverage
    1 - level excludes the null exactly if ``holm(p) < alpha``.
    """
    p = np.nan_to_num(np.asarray(p_values, np.float64), nan=1.0)
    levels = np.empty(p.size)
    tests = p.size
    for i in np.argsort(p, kind="stable"):
        levels[i] = alpha / tests
        if p[i] < levels[i] and tests > 1:
            tests -= 1
    return levels


def jackknife(values: npt.ArrayLike, units: list[set[int]]) -> Floats:
    """Pseudo-values of the mean of ``values`` under leaving out one unit at a time.

    For values that belong to several units each, such as pairs of runs: they are dependent, and an
    interval over pairs, or over the runs' own means, is too narrow (the latter by up to half). A t
    interval over these pseudo-values, with (number of units - 1) df, has the jackknife's standard
    error, which is conservative in expectation (Efron & Stein 1981).

    Args:
        values: [P].
        units: the units of each value; leaving out a unit leaves out all its values.

    Returns:
        One pseudo-value per unit, in order of the units; empty where leaving out one unit leaves
        nothing.
    """
    array = np.asarray(values, np.float64)
    names = sorted(set().union(*units))
    left = [np.array([name not in unit for unit in units], bool) for name in names]
    if not all(keep.any() for keep in left):
        return np.empty(0)
    n, mean = len(names), array.mean()
    return np.array([n * mean - (n - 1) * array[keep].mean() for keep in left])
