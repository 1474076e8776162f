"""What chance alone would give: expected overlaps of masks, from counts.

The nested nulls (``definitions.NESTED_NULLS``) divide the weights into strata, each null into finer
ones than that before, and let masks be independent within a stratum: of n_s weights of which a_s
and b_s changed, a_s b_s / n_s changed in both, the hypergeometric mean. ``margins`` stands apart.

``update_size`` divides by how far an independent run (another seed than either run of the pair)
moved each weight. With a surrogate run, whose reward carries no information, it takes away what
the base and the optimizer do whatever is learned; with a real run also what recurs for the task's
sake, and an excess that is left is all the more remarkable.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from rlsparse.definitions import NESTED_NULLS
from rlsparse.errors import TableError

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

CONTINUITY = 0.5
_LARGEST_DRAW = 10**9  # beyond it numpy draws no hypergeometric numbers


def pair_products(
    left: npt.NDArray[np.number], right: npt.NDArray[np.number], sets: Sequence[Sequence[int]]
) -> Floats:
    """left[i] . right[j] for all pairs i < j of each set of rows, one set after the other.

    Exact for integers while the products stay below 2^53.

    Args:
        left: shape [R, S].
        right: shape [R, S].
        sets: rows that are paired with each other.
    """
    parts = [np.zeros(0)]
    for rows in sets:
        one = left[list(rows)].astype(np.float64)
        other = right[list(rows)].astype(np.float64)
        parts.append((one @ other.T)[np.triu_indices(len(rows), 1)])
    return np.concatenate(parts)


def expected_in_both(changed: Counts, sizes: Counts, sets: Sequence[Sequence[int]]) -> Floats:
    """Sum over strata of a_s b_s / n_s, for all pairs i < j of each set of runs.

    Args:
        changed: weights changed by each run in each stratum, shape [R, S].
        sizes: weights in each stratum, shape [S].
        sets: runs that are paired with each other.

    Raises:
        TableError: more weights changed in a stratum than it has.
    """
    if (changed > sizes).any():
        raise TableError(
            "more weights changed in a stratum than the base has there; the masks are of another "
            "base, diff again"
        )
    shares = np.divide(changed, sizes, out=np.zeros(changed.shape), where=sizes > 0)
    return pair_products(shares, changed, sets)


def expected_of_margins(
    rows: npt.ArrayLike, columns: npt.ArrayLike, num_a: npt.ArrayLike, num_b: npt.ArrayLike
) -> Floats:
    """Weights of one matrix changed in both, if each mask keeps its row and column counts.

    (sum_i ra_i rb_i) (sum_j ca_j cb_j) / (Na Nb): the rank-one form of Chung and Lu, in which cell
    (i, j) of a is changed with probability ra_i ca_j / Na, independently of b. Exact where the cell
    probabilities factorise; where rows and columns are so full that this exceeds 1, too high.

    Args:
        rows: sum over rows of the product of the two counts.
        columns: likewise over columns.
        num_a: weights changed in a.
        num_b: weights changed in b.
    """
    both = np.asarray(num_a, np.float64) * np.asarray(num_b, np.float64)
    product = np.asarray(rows, np.float64) * np.asarray(columns, np.float64)
    return np.divide(product, both, out=np.zeros(np.shape(both)), where=both > 0)


def expected_agreement(changed: Counts, sizes: Counts) -> Floats:
    """Weights changed in exactly k of R runs, if their masks are independent within strata.

    The Poisson binomial distribution of each stratum, by convolution, times its size.

    Args:
        changed: shape [R, S].
        sizes: shape [S].

    Returns:
        Shape [R + 1], by k.
    """
    shares = np.divide(changed, sizes, out=np.zeros(changed.shape), where=sizes > 0)
    chances = np.zeros((len(changed) + 1, len(sizes)))
    chances[0] = 1
    for share in shares:
        risen = chances[:-1] * share
        chances *= 1 - share
        chances[1:] += risen
    return chances @ sizes.astype(np.float64)


def random_in_both(key: Sequence[object], num_a: Counts, num_b: Counts, sizes: Counts) -> Counts:
    """Overlap of a with one random mask that has b's count in each tensor.

    Drawn from the hypergeometric distribution (of tensors of 10^9 weights or more, from the normal
    one of its mean and variance).

    Args:
        key: what identifies the pair; the same key gives the same draw.
        num_a: weights of a per tensor, shape [T].
        num_b: likewise of b.
        sizes: weights per tensor.

    Returns:
        Shape [T].
    """
    digest = hashlib.sha256(repr(tuple(key)).encode()).digest()
    draw = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    is_large = sizes >= _LARGEST_DRAW
    if not is_large.any():
        return draw.hypergeometric(num_a, sizes - num_a, num_b)
    found = np.zeros(len(sizes), np.int64)
    small = ~is_large
    found[small] = draw.hypergeometric(num_a[small], (sizes - num_a)[small], num_b[small])
    a, b, n = (counts[is_large].astype(np.float64) for counts in (num_a, num_b, sizes))
    mean, spread = a * b / n, np.sqrt(a * b / n * (1 - a / n) * (n - b) / (n - 1))
    drawn = np.rint(draw.normal(mean, spread))
    found[is_large] = np.clip(drawn, np.maximum(a + b - n, 0), np.minimum(a, b))
    return found


def explained(row: Mapping[str, object]) -> dict[str, float]:
    """How much of a pair's log excess over ``uniform`` each further null explains, and the rest.

    log(E_tensor / E_uniform), log(E_magnitude / E_tensor), log(E_update_size / E_magnitude), and as
    ``rest`` log(num_both / E) of the last null; they add up to log(num_both / E_uniform). Every
    count gets a continuity of .5, so that masks without common weights stay finite. A null that the
    row has no number of is left out.

    Args:
        row: ``num_both`` and ``expected_*`` of table ``overlaps``.
    """
    counts = {null: _number(row.get(f"expected_{null}")) for null in NESTED_NULLS}
    counts["rest"] = _number(row["num_both"])
    given = {name: count for name, count in counts.items() if not math.isnan(count)}
    logs = [math.log(count + CONTINUITY) for count in given.values()]
    steps = zip(list(given)[1:], logs[:-1], logs[1:], strict=True)
    return {name: after - before for name, before, after in steps}


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float, np.number)) else math.nan
