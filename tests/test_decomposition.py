"""Singular values by either method are those of plain numpy, at every scale and shape."""

import numpy as np
import pytest

from rlsparse.decomposition import (
    GRAM_ABOVE,
    choose_method,
    decompose,
    principal_cosines,
    spectral_drift,
)

SHAPES = [(40, 40), (24, 90), (90, 24), (1, 30), (30, 1), (1, 1)]


@pytest.mark.parametrize("method", ["exact", "gram"])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_directions(method, shape):
    matrix = np.random.default_rng(0).standard_normal(shape)
    left, sigma, right = np.linalg.svd(matrix, full_matrices=False)
    found = decompose(matrix, method, 5)
    k = min(5, *shape)
    assert np.allclose(found.sigma, sigma, rtol=1e-9, atol=0)
    assert decompose(matrix, method).sigma == pytest.approx(sigma, rel=1e-9)
    assert found.left.shape == (shape[0], k)
    assert found.right.shape == (shape[1], k)
    # Directions are known up to their sign.
    assert np.abs((found.left * left[:, :k]).sum(0)) == pytest.approx(1)
    assert np.abs((found.right * right[:k].T).sum(0)) == pytest.approx(1)
    assert found.rank == min(shape)


@pytest.mark.parametrize("method", ["exact", "gram"])
@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300])
def test_no_scale_overflows(method, scale):
    matrix = np.random.default_rng(1).standard_normal((12, 20))
    sigma = np.linalg.svd(matrix, compute_uv=False)
    assert decompose(matrix * scale, method).sigma / scale == pytest.approx(sigma, rel=1e-8)


@pytest.mark.parametrize(
    ("shape", "rank"), [((200, 200), 16), ((60, 3000), 5), ((3000, 60), 59), ((300, 300), 1)]
)
def test_rounding_is_below_the_resolution(shape, rank):
    rng = np.random.default_rng(2)
    matrix = rng.standard_normal((shape[0], rank)) @ rng.standard_normal((rank, shape[1]))
    for method in ("exact", "gram"):
        found = decompose(matrix, method)
        assert found.rank == rank
        assert found.sigma[rank:].max() < 0.5 * found.resolution * found.sigma[0]


def test_what_lies_above_the_resolution_is_told():
    sigma = np.array([1.0, 1e-3, 1e-6, 5e-10])
    rotation = np.linalg.qr(np.random.default_rng(3).standard_normal((4, 4)))[0]
    matrix = rotation @ np.diag(sigma) @ rotation
    assert decompose(matrix, "exact").rank == 4
    gram = decompose(matrix, "gram")
    assert 5e-10 < gram.resolution < 1e-6
    assert gram.rank == 3
    assert gram.sigma[:3] == pytest.approx(sigma[:3], rel=1e-3)


@pytest.mark.parametrize("method", ["exact", "gram"])
def test_zero(method):
    found = decompose(np.zeros((4, 6), np.float32), method, 3)
    assert found.sigma.tolist() == [0, 0, 0, 0]
    assert found.rank == 0
    assert principal_cosines(found, found) == ([], [])
    assert spectral_drift(found.sigma, found.sigma) is None


@pytest.mark.parametrize("method", ["exact", "gram"])
def test_angles_of_a_planted_rotation(method):
    rng = np.random.default_rng(4)
    left, right = (np.linalg.qr(rng.standard_normal((n, 6)))[0] for n in (30, 50))
    sigma = np.diag([9.0, 8.0, 3.0, 2.0, 1.0, 0.5])
    turned = right.copy()
    angle = 0.3  # the second direction turns out of the principal plane
    turned[:, 1] = np.cos(angle) * right[:, 1] + np.sin(angle) * right[:, 3]
    turned[:, 3] = np.cos(angle) * right[:, 3] - np.sin(angle) * right[:, 1]
    old, new = (decompose(left @ sigma @ basis.T, method, 2) for basis in (right, turned))
    on_left, on_right = principal_cosines(old, new)
    assert on_left == pytest.approx([1, 1])
    assert on_right == pytest.approx([1, np.cos(angle)])
    assert spectral_drift(old.sigma, new.sigma) < 1e-7


def test_drift_is_relative():
    old, new = np.array([4.0, 3.0]), np.array([4.0, 3.5])
    assert spectral_drift(old, new) == pytest.approx(0.1)
    assert spectral_drift(old * 1e-300, new * 1e-300) == pytest.approx(0.1)


def test_auto_takes_the_gram_matrix_of_large_matrices():
    assert choose_method("auto", (GRAM_ABOVE, 10**6)) == "exact"
    assert choose_method("auto", (GRAM_ABOVE + 1, GRAM_ABOVE + 1)) == "gram"
    assert choose_method("exact", (9999, 9999)) == "exact"
    assert choose_method("gram", (1, 1)) == "gram"
