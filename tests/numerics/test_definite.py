"""Solving and inverting by Cholesky factors gives what general methods give, and survives what is not definite."""

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxcomp.numerics.definite import inverted, solved


def moment(size: int, rows: int, seed: int = 0) -> NDArray[np.float64]:
    x = np.random.default_rng(seed).normal(size=(rows, size))
    return x.T @ x / rows


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_definite_matrices(size: int) -> None:
    matrix, right = moment(size, 4 * size), np.random.default_rng(1).normal(size=(size, 5))
    np.testing.assert_allclose(solved(matrix, right), np.linalg.solve(matrix, right), rtol=1e-8)
    inverse = inverted(matrix)
    np.testing.assert_allclose(inverse, np.linalg.inv(matrix), rtol=1e-8)
    np.testing.assert_array_equal(inverse, inverse.T)
    assert inverse.flags.c_contiguous


def test_a_matrix_that_is_not_definite_is_treated_as_any_other() -> None:
    matrix = np.diag([2.0, -1e-9, 3.0])
    np.testing.assert_allclose(inverted(matrix), np.linalg.inv(matrix))
    np.testing.assert_allclose(solved(matrix, np.ones((3, 1))), np.linalg.solve(matrix, np.ones((3, 1))))


def test_what_is_given_stays_as_it_is() -> None:
    matrix, right = moment(9, 30), np.ones((9, 2))
    copies = matrix.copy(), right.copy()
    inverted(matrix)
    solved(matrix, right)
    np.testing.assert_array_equal(matrix, copies[0])
    np.testing.assert_array_equal(right, copies[1])


def test_nothing() -> None:
    assert solved(np.zeros((0, 0)), np.zeros((0, 3))).shape == (0, 3)
    assert inverted(np.zeros((0, 0))).shape == (0, 0)


def test_singular_ones_are_refused() -> None:
    with pytest.raises(np.linalg.LinAlgError):
        inverted(np.zeros((2, 2)))
