"""Symmetric positive definite matrices, solved and inverted by their Cholesky factor: half the work of general ones.

What rounding made indefinite is treated as a general matrix.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import lapack

from onnxcomp.numerics.arrays import Floats


def solved(matrix: Floats, right: Floats) -> NDArray[np.float64]:
    """matrix^-1 right.

    Args:
        matrix: (n, n) symmetric positive definite.
        right: (n, k).
    """
    if not len(matrix):
        return np.zeros(right.shape)
    _, result, failed = lapack.dposv(matrix, right, lower=1)
    return np.asarray(np.linalg.solve(matrix, right) if failed else result, np.float64)


def inverted(matrix: Floats) -> NDArray[np.float64]:
    """The inverse of an (n, n) symmetric positive definite matrix."""
    if not len(matrix):
        return np.zeros(matrix.shape)
    factor, failed = lapack.dpotrf(matrix, lower=1)
    half = None
    if not failed:
        half, failed = lapack.dpotri(factor, lower=1, overwrite_c=1)
    if half is None or failed:
        return np.asarray(np.linalg.inv(matrix), np.float64)
    lower = np.tril(half)
    return np.ascontiguousarray(lower + np.tril(lower, -1).T)
