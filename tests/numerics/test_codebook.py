"""Codebooks: against brute force and dense solvers, and never worse than k-means on the weights alone."""

from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxcomp.numerics.codebook import fitted, kmeans, share
from onnxcomp.numerics.feedback import grouped_error


def problem(
    rows: int = 12, width: int = 20, groups: int = 1, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weights, and the Gram matrix of correlated inputs for each group of rows."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(groups, 200, width)) @ random.normal(size=(groups, width, width))
    return random.normal(size=(rows, width)), np.matmul(x.swapaxes(1, 2), x) / 200


def plain(W: NDArray[np.float64], values: NDArray[np.float64]) -> float:
    return float(np.square(W[..., None] - values).min(axis=-1).sum())


def test_kmeans_finds_the_best_two_values() -> None:
    W, _ = problem(3, 6)
    x = np.sort(W.ravel())
    splits = [plain(W, np.array([x[:cut].mean(), x[cut:].mean()])) for cut in range(1, len(x))]
    book = kmeans(W, np.ones((1, 6)), 2)
    assert np.square(W - book.decoded()).sum() == pytest.approx(min(splits), rel=1e-9)


def test_kmeans_weighs_errors() -> None:
    book = kmeans(np.array([[0.0, 1.0, 10.0, 11.0]]), np.array([[3, 1, 1, 4]]), 2)
    np.testing.assert_allclose(book.values, [[0.25, 10.8]])


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("signed", [False, True])
def test_fitted_values_solve_the_normal_equations(groups: int, signed: bool) -> None:
    W, H = problem(groups=groups)
    random = np.random.default_rng(1)
    indices = random.integers(5, size=W.shape)
    signs = random.choice([-1.0, 1.0], size=W.shape) if signed else None
    found = fitted(W, H, indices, np.zeros(5), signs)
    rows = len(W) // groups
    A = np.stack([np.where(indices == value, 1.0 if signs is None else signs, 0.0) for value in range(5)])
    weighed = np.stack([A[:, row] @ H[row // rows] for row in range(len(W))], axis=1)
    expected = np.linalg.solve(np.einsum("kri,lri->kl", weighed, A), np.einsum("kri,ri->k", weighed, W))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)  # the ridge is 1e-6


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("books", [1, 2, 12])
def test_sharing_by_inputs_beats_sharing_by_weights(groups: int, books: int) -> None:
    W, H = problem(groups=groups)
    book = share(W, H, 4, books)
    assert book.values.shape == (books, 4)
    assert np.all(np.diff(book.values) >= 0)
    alone = kmeans(W, np.ones((1, W.shape[1])), 4, books)
    assert grouped_error(W - book.decoded(), H) < 0.7 * grouped_error(W - alone.decoded(), H)


def test_two_weights_of_a_row_reach_the_best_of_all_codebooks() -> None:
    """Every way to share two values among four weights, each with its best values."""
    W, H = problem(1, 4, seed=3)
    errors = []
    for size in range(5):
        for chosen in combinations(range(4), size):
            indices = np.isin(np.arange(4), chosen).astype(np.int64)[None]
            values = fitted(W, H, indices, np.zeros(2))
            errors.append(grouped_error(W - values[indices], H))
    found = grouped_error(W - share(W, H, 2).decoded(), H)
    assert min(errors) * (1 - 1e-6) <= found <= 1.5 * min(errors)


def test_as_many_values_as_weights_lose_nothing() -> None:
    W, H = problem(2, 4)
    np.testing.assert_allclose(share(W, H, 16).decoded(), W, atol=1e-9)


def test_zeros_stay_zero() -> None:
    W, H = problem()
    W[np.abs(W) < 0.6] = 0
    book = share(W, H, 8, zero=True)
    assert np.all(book.decoded()[W == 0] == 0)
    assert np.count_nonzero(book.values == 0) == 1


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    W, H = problem()
    H[:, 3], H[:, :, 3] = 0, 0
    assert np.isfinite(share(W, H, 4).decoded()).all()
    assert np.isfinite(share(W, np.zeros_like(H), 4).decoded()).all()
