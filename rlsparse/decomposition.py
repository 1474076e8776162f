"""Singular values and principal directions of a weight matrix, exactly or by its Gram matrix."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

GRAM_ABOVE = 512
"""``auto`` takes the Gram matrix where the smaller side exceeds this."""

METHODS = ("auto", "exact", "gram")

Matrix = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Factors:
    """What is known of the singular value decomposition of an m x n matrix.

    Attributes:
        sigma: all singular values, descending, shape [min(m, n)].
        left: the first left singular directions, orthonormal, shape [m, k].
        right: the first right singular directions, shape [n, k].
        resolution: share of the largest singular value below which others cannot be told from 0.
    """

    sigma: Matrix
    left: Matrix
    right: Matrix
    resolution: float

    @property
    def rank(self) -> int:
        """Singular values above the resolution."""
        return int(np.count_nonzero(self.sigma > self.resolution * self.sigma[0]))


def choose_method(method: str, shape: tuple[int, ...]) -> str:
    """``method``, or for ``auto`` what suits a matrix of this shape."""
    if method != "auto":
        return method
    return "gram" if min(shape) > GRAM_ABOVE else "exact"


def decompose(matrix: Matrix, method: str, num_directions: int = 0) -> Factors:
    """Singular values of ``matrix``, and its first directions.

    ``exact`` is the singular value decomposition in float64; it resolves max(m, n) eps. ``gram``
    takes eigenvalues of the float64 Gram matrix of the smaller side and agrees to about 1e-8 of
    the largest singular value; since it holds squares, it resolves no more than
    sqrt(8 sqrt(max(m, n)) eps), 3e-7 at 4096 (errors of a sum of n terms grow with sqrt(n): Higham
    and Mary 2019). Both take O(m n min(m, n)) time; ``gram`` takes 16 bytes per weight and 40 per
    entry of the Gram matrix, ``exact`` with directions some 40 per weight.

    Args:
        matrix: finite, shape [m, n], not empty.
        method: exact or gram.
        num_directions: k, at most min(m, n) are found; those beyond the rank are arbitrary.
    """
    longest, eps = max(matrix.shape), float(np.finfo(np.float64).eps)
    exponent = int(np.frexp(max(matrix.max(), -matrix.min()))[1])
    scaled = np.ldexp(matrix.astype(np.float64, copy=False), -exponent)  # its squares stay in range
    is_wide = scaled.shape[0] < scaled.shape[1]
    tall = scaled.T if is_wide else scaled
    if method == "gram":
        resolution = (8 * longest**0.5 * eps) ** 0.5
        squares, basis = _eigen(tall.T @ tall, num_directions)
        sigma = np.sqrt(np.maximum(squares, 0))
    else:
        resolution = longest * eps
        sigma, basis = _singular(tall, num_directions)
    other = np.linalg.qr(tall @ basis)[0]
    left, right = (basis, other) if is_wide else (other, basis)
    return Factors(np.ldexp(sigma, exponent), left, right, resolution)


def _eigen(gram: Matrix, num_directions: int) -> tuple[Matrix, Matrix]:
    if not num_directions:
        return np.linalg.eigvalsh(gram)[::-1], gram[:, :0]
    # All vectors: as fast as the values and then a few vectors (LAPACK's evr), which share nothing.
    squares, vectors = np.linalg.eigh(gram)
    return squares[::-1], vectors[:, ::-1][:, :num_directions].copy()


def _singular(tall: Matrix, num_directions: int) -> tuple[Matrix, Matrix]:
    if not num_directions:
        return np.linalg.svd(tall, compute_uv=False), np.zeros((tall.shape[1], 0))
    _, sigma, right = np.linalg.svd(tall, full_matrices=False)
    return sigma, right[:num_directions].T.copy()


def spectral_drift(old: Matrix, new: Matrix) -> float | None:
    """NSS of arXiv 2511.08567: ||sigma(W+) - sigma(W0)|| / ||sigma(W0)||; None if W0 = 0."""
    return norm(new - old) / norm(old) if old.any() else None


def norm(values: Matrix) -> float:
    """Euclidean norm of a flat array; squares neither over- nor underflow."""
    largest = float(np.abs(values).max(initial=0.0))
    return largest * float(np.linalg.norm(values / largest)) if largest else 0.0


def principal_cosines(old: Factors, new: Factors) -> tuple[list[float], list[float]]:
    """Cosines of the left and right principal angles, descending (arXiv 2511.08567).

    As many as directions were found, but no more than the lower of the two ranks.
    """
    k = min(old.left.shape[1], new.left.shape[1], old.rank, new.rank)
    left, right = (
        np.linalg.svd(one[:, :k].T @ other[:, :k], compute_uv=False).clip(0, 1).tolist()
        for one, other in ((old.left, new.left), (old.right, new.right))
    )
    return left, right
