"""The shape of an update: rank, spectral drift, and where in a matrix it lies, beside its null.

A matrix pair W0, W+ (float64 arithmetic; D = W+ - W0 is exact for formats of at most 32 bits unless
two exponents are further apart than 53 bits hold). Read the numbers of kind ``update`` against
those of kind ``null``: a random sparse matrix of single representable steps also has full rank, so
full rank alone is no finding.

Sources: ranks, arXiv 2505.11711 section 3 and table 2; NSS, principal angles and masks, arXiv
2511.08567; effective rank, Roy and Vetterli 2007; its tolerances, ``torch.linalg.matrix_rank``.
"""

import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlsparse.decomposition import (
    METHODS,
    Factors,
    Matrix,
    choose_method,
    decompose,
    norm,
    principal_cosines,
    spectral_drift,
)
from rlsparse.definitions import RANK_TOLERANCES
from rlsparse.errors import CheckpointError
from rlsparse.kernels import FLOATS, cast_bits, values
from rlsparse.names import layer_and_module
from rlsparse.placement import Lifts, Stripes, measure_lifts, measure_stripes, top_share
from rlsparse.tensor_file import Bits, TensorInfo

PRINCIPAL_RANK = 32
"""k: singular directions of W0 that count as principal."""
MASK_SHARE = 0.5
"""alpha: share of the weights in the principal and in the low-magnitude mask (2511.08567 trains
masks of 50 %)."""
ENERGY = 0.99

ADAPTER_DENSITY = 0.5
ADAPTER_RANK_SHARE = 1 / 8
"""A denser update with 99 % of its energy in fewer directions looks like a merged adapter. Energy,
not numerical rank: rounding the merged weights adds noise of full rank."""

Row = dict[str, Any]
Pair = tuple[str, TensorInfo, TensorInfo, tuple[int, ...]]


@dataclass(frozen=True)
class Spectrum:
    """Shape of one update D = W+ - W0 of an m x n matrix; never NaN, None where undefined.

    An unchanged matrix is not decomposed: ranks, norms and ``nss`` are 0, the rest but
    ``stripes`` is None.

    Attributes:
        method: exact or gram.
        num_elements: m * n.
        num_changed: weights that differ bitwise.
        full_rank: min(m, n).
        ranks: name of ``RANK_TOLERANCES`` -> singular values of D above that share of the largest;
            ``default`` is max(m, n) * eps of fp32. None below the resolution of the method.
        energy_rank: fewest singular directions with 99 % of ||D||^2.
        entropy_rank: exp of the entropy of sigma / sum sigma. None if D = 0.
        stable_rank: ||D||^2 / sigma_max^2. None if D = 0.
        frobenius_norm: ||D||.
        sigma_max: largest singular value of D.
        nss: ||sigma(W+) - sigma(W0)|| / ||sigma(W0)||. None if W0 = 0.
        nss_random: the same of W0 plus Gaussian noise as large as D (||.||), the control of
            ``nss``. None for a null.
        principal_rank: directions used as principal: k, or fewer if W0 has a lower rank.
        cosines_left: cosines of the principal angles between the left principal directions of W0
            and W+, descending; fewer than ``principal_rank`` if W+ has a lower rank.
        cosines_right: likewise.
        top_1pct_share: share of ||D||^2 in the largest 1 % of all m * n entries (rounded up).
        top_10pct_share: likewise.
        lifts: preference for principal and for small weights.
        stripes: changes per row and column.
        null: the same statistics of the null; None in a null itself.
    """

    method: str
    num_elements: int
    num_changed: int
    full_rank: int
    ranks: dict[str, int | None]
    energy_rank: int
    entropy_rank: float | None
    stable_rank: float | None
    frobenius_norm: float
    sigma_max: float
    nss: float | None
    stripes: Stripes
    lifts: Lifts
    nss_random: float | None = None
    principal_rank: int | None = None
    cosines_left: list[float] | None = None
    cosines_right: list[float] | None = None
    top_1pct_share: float | None = None
    top_10pct_share: float | None = None
    null: "Spectrum | None" = None

    @property
    def looks_like_adapter(self) -> bool:
        """Dense, with nearly all energy in few directions: as a merged LoRA adapter leaves it."""
        is_dense = self.num_changed > ADAPTER_DENSITY * self.num_elements
        return is_dense and 0 < self.energy_rank <= ADAPTER_RANK_SHARE * self.full_rank

    def columns(self) -> Row:
        """The numbers under the column names of table ``spectra``."""
        nested = {"ranks", "stripes", "lifts", "null", "full_rank"}
        shares = {
            f"rank_share_{name}": None if rank is None else rank / self.full_rank
            for name, rank in self.ranks.items()
        }
        return {
            **{f"rank_{name}": rank for name, rank in self.ranks.items()},
            **shares,
            **{f.name: getattr(self, f.name) for f in fields(self) if f.name not in nested},
            **asdict(self.lifts),
            **asdict(self.stripes),
            "looks_like_adapter": self.looks_like_adapter,
        }


def measure_spectrum(
    before_bits: Bits,
    after_bits: Bits,
    dtype: str,
    shape: Sequence[int],
    *,
    method: str = "auto",
    seed: int = 0,
    principal_rank: int = PRINCIPAL_RANK,
    mask_share: float = MASK_SHARE,
) -> Spectrum:
    """Shape of the update from ``before_bits`` to ``after_bits``, and of its null.

    The null has as many changed weights at uniformly random places, each moved to the next
    representable value up or down with equal chance. Costs 6 decompositions, 3 of them with
    directions; see ``decomposition.decompose``.

    Args:
        before_bits: W0, flat bits of m * n weights.
        after_bits: W+, likewise.
        dtype: format of both, a key of ``kernels.FLOATS``.
        shape: of the tensor, at least two dimensions; the matrix is [shape[0], rest].
        method: exact, gram, or auto: gram where min(m, n) > ``decomposition.GRAM_ABOVE``.
        seed: of the null and of the Gaussian control.
        principal_rank: k.
        mask_share: alpha, in (0, 1).

    Raises:
        CheckpointError: no matrix, no weights, unknown format or method, or a NaN or infinity.
    """
    _check(before_bits, after_bits, dtype, shape)
    if method not in METHODS or not 0 < mask_share < 1 or principal_rank < 1:
        raise CheckpointError(
            f"method {method!r}, principal_rank {principal_rank}, mask_share {mask_share}: choose "
            f"of {', '.join(METHODS)}; at least 1; between 0 and 1"
        )
    rows = shape[0]
    before, after = (values(bits, dtype).reshape(rows, -1) for bits in (before_bits, after_bits))
    if num_nonfinite := _num_nonfinite(before, after):
        raise CheckpointError(f"{num_nonfinite} of {before.size} pairs have a NaN or an infinity")
    method = choose_method(method, before.shape)
    changed = (before_bits != after_bits).reshape(before.shape)
    if not changed.any():
        unchanged = _unchanged(changed, method)
        return replace(unchanged, null=unchanged)
    rng = np.random.default_rng(seed)
    null_bits = _random_steps(before_bits, int(changed.sum()), dtype, rng)
    null_changed = (before_bits != null_bits).reshape(before.shape)
    base = _Base(before, method, principal_rank, decompose(before, method, principal_rank))
    directions = base.factors.left[:, : base.factors.rank]
    lifts, null_lifts = measure_lifts(before, directions, mask_share, [changed, null_changed])
    update = base.with_delta(after, changed, lifts)
    null = base.with_delta(values(null_bits, dtype).reshape(rows, -1), null_changed, null_lifts)
    drift = base.random_drift(update.frobenius_norm, rng)
    return replace(update, nss_random=drift, null=null)


def _check(before: Bits, after: Bits, dtype: str, shape: Sequence[int]) -> None:
    is_matrix = len(shape) > 1 and before.size == after.size == math.prod(shape) > 0
    if not is_matrix or dtype not in FLOATS:
        raise CheckpointError(
            f"{before.size} and {after.size} weights of shape {list(shape)} in {dtype} make no "
            f"pair of matrices: at least 2 dimensions, one format of {', '.join(FLOATS)}"
        )


def _num_nonfinite(before: Matrix, after: Matrix) -> int:
    return int(before.size - np.count_nonzero(np.isfinite(before) & np.isfinite(after)))


def _unchanged(changed: NDArray[np.bool_], method: str) -> Spectrum:
    ranks: dict[str, int | None] = dict.fromkeys(RANK_TOLERANCES, 0)
    stripes = measure_stripes(changed.sum(1), changed.sum(0))
    return Spectrum(
        method, changed.size, 0, min(changed.shape), ranks, 0, None, None, 0.0, 0.0, 0.0,
        stripes, Lifts(),
    )  # fmt: skip


def _random_steps(bits: Bits, num_changed: int, dtype: str, rng: np.random.Generator) -> Bits:
    """``bits`` with ``num_changed`` weights moved by one representable value, up or down."""
    import ml_dtypes

    places = rng.choice(bits.size, num_changed, replace=False)
    weights = bits[places].view(FLOATS[dtype])
    largest = np.array(ml_dtypes.finfo(FLOATS[dtype]).max, FLOATS[dtype])
    towards = np.where(rng.integers(0, 2, num_changed, bool), largest, -largest)
    towards = np.where(weights == towards, -towards, towards)  # else it would not move
    moved = bits.copy()
    with np.errstate(under="ignore"):
        moved[places] = np.nextafter(weights, towards).view(bits.dtype)
    return moved


@dataclass(frozen=True)
class _Base:
    """W0 and its decomposition, made once for the update, its null and its control."""

    weights: Matrix
    method: str
    num_directions: int
    factors: Factors

    def with_delta(self, after: Matrix, changed: NDArray[np.bool_], lifts: Lifts) -> Spectrum:
        """Statistics of the update to ``after``."""
        delta = after.astype(np.float64)
        delta -= self.weights
        found = decompose(delta, self.method)
        new = decompose(after, self.method, self.num_directions)
        cosines_left, cosines_right = principal_cosines(self.factors, new)
        entries = delta[delta != 0]
        squares = (entries / np.abs(entries).max(initial=0.0)) ** 2
        return Spectrum(
            method=self.method,
            num_elements=delta.size,
            num_changed=int(np.count_nonzero(changed)),
            full_rank=min(delta.shape),
            **_ranks(found, max(delta.shape)),
            frobenius_norm=norm(entries),
            sigma_max=float(found.sigma[0]),
            nss=spectral_drift(self.factors.sigma, new.sigma),
            stripes=measure_stripes(changed.sum(1), changed.sum(0)),
            principal_rank=min(self.num_directions, self.factors.rank),
            cosines_left=cosines_left,
            cosines_right=cosines_right,
            top_1pct_share=top_share(squares, 0.01, delta.size),
            top_10pct_share=top_share(squares, 0.1, delta.size),
            lifts=lifts,
        )

    def random_drift(self, size: float, rng: np.random.Generator) -> float | None:
        """NSS of Gaussian noise of Frobenius norm ``size``."""
        noise = rng.standard_normal(self.weights.shape)
        noise *= size / np.linalg.norm(noise)
        noise += self.weights
        return spectral_drift(self.factors.sigma, decompose(noise, self.method).sigma)


def _ranks(delta: Factors, longest: int) -> dict[str, Any]:
    sigma = delta.sigma
    ranks = {}
    for name in RANK_TOLERANCES:
        share = longest * float(np.finfo(np.float32).eps) if name == "default" else float(name)
        is_resolved = share >= delta.resolution
        ranks[name] = int(np.count_nonzero(sigma > share * sigma[0])) if is_resolved else None
    relative = sigma[: delta.rank] / (sigma[0] or 1.0)
    if not relative.size:  # D = 0: only signs of zeros changed
        return {"ranks": ranks, "energy_rank": 0, "entropy_rank": None, "stable_rank": None}
    energy = np.cumsum(relative**2)
    spread = relative / relative.sum()
    return {
        "ranks": ranks,
        "energy_rank": int(np.searchsorted(energy, ENERGY * energy[-1])) + 1,
        "entropy_rank": float(np.exp(-(spread * np.log(spread)).sum())),
        "stable_rank": float(energy[-1]),
    }


# --- rows ------------------------------------------------------------------------------------


def spectrum_rows(
    pairs: Iterable[Pair],
    *,
    view: str = "stored",
    method: str = "auto",
    seed: int = 0,
    principal_rank: int = PRINCIPAL_RANK,
    mask_share: float = MASK_SHARE,
    on_progress: Callable[[int], object] | None = None,
) -> list[Row]:
    """Rows of table ``spectra``: kinds ``update`` and ``null`` of every matrix.

    A tensor of more dimensions is seen as [shape[0], rest]; vectors, empty tensors and formats
    without values have no row. A matrix with NaNs or infinities has one row of kind ``update``
    with their number (of pairs) and no statistics.

    One pair is in memory at a time: at peak about 45 bytes per weight, and 40 per entry of the
    Gram matrix. One thread took 3 s for 1024 x 4096 (exact: 6 s) and 8 s for 2048 x 2048; the
    time grows with m n min(m, n).

    Args:
        pairs: name, tensor before, tensor after, and their common shape (whole first rows).
        view: number format to which both sides are rounded first, or stored.
        method: as for ``measure_spectrum``, like ``principal_rank`` and ``mask_share``.
        seed: the seed of a matrix, in its row, is made of this and its name.
        principal_rank: k.
        mask_share: alpha.
        on_progress: called after each pair with its number of weights.

    Raises:
        CheckpointError: formats differ in the view ``stored``, or a tensor cannot be read.
    """
    rows: list[Row] = []
    for name, before, after, shape in pairs:
        is_matrix = len(shape) > 1 and math.prod(shape) > 0
        if is_matrix and {before.dtype, after.dtype} <= FLOATS.keys():
            dtype, bits = _read(name, before, after, math.prod(shape), view)
            settings: Row = {"seed": zlib.crc32(name.encode(), seed), "mask_share": mask_share}
            place = _place(name, shape) | {"view": view, "dtype": after.dtype} | settings
            num_nonfinite = _num_nonfinite(*(values(side, dtype) for side in bits))
            place |= {"num_elements": math.prod(shape), "num_nonfinite": num_nonfinite}
            if num_nonfinite:
                rows.append(place | {"kind": "update"})
            else:
                settings |= {"method": method, "principal_rank": principal_rank}
                update = measure_spectrum(*bits, dtype, shape, **settings)
                rows.append(place | {"kind": "update"} | update.columns())
                assert update.null is not None
                rows.append(place | {"kind": "null"} | update.null.columns())
        if on_progress:
            on_progress(math.prod(shape))
    return rows


def _read(
    name: str, before: TensorInfo, after: TensorInfo, num_elements: int, view: str
) -> tuple[str, tuple[Bits, Bits]]:
    """The number format of the view, and the bits of both sides in it."""
    if view == "stored" and before.dtype != after.dtype:
        raise CheckpointError(
            f"{name} is {before.dtype} before and {after.dtype} after; choose the format to "
            f"compare them in: --cast {before.dtype} or --cast {after.dtype}"
        )
    dtype = before.dtype if view == "stored" else view
    left = cast_bits(before.read(0, num_elements), before.dtype, dtype)
    return dtype, (left, cast_bits(after.read(0, num_elements), after.dtype, dtype))


def _place(name: str, shape: Sequence[int]) -> Row:
    layer, module = layer_and_module(name, shape)
    nobody: Row = {"trial_id": None, "step_before": None, "step_after": None}
    return nobody | {"tensor": name, "layer": layer, "module": module, "shape": list(shape)}


def adapter_hint(rows: Iterable[Row]) -> str | None:
    """One line for a reader if matrices of ``spectra`` look like a merged adapter, else None."""
    updates = [row for row in rows if row["kind"] == "update"]
    found = sum(bool(row.get("looks_like_adapter")) for row in updates)
    if not found:
        return None
    return (
        f"{found} of {len(updates)} matrices look like a merged adapter (LoRA): more than "
        f"{ADAPTER_DENSITY:.0%} of their weights changed, along at most {ADAPTER_RANK_SHARE:.1%} "
        "of their directions; their sparsity says nothing about full fine-tuning"
    )
