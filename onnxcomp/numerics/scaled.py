"""Weights of a few levels times scales of their row: binary, residual binary, ternary.

    W'[r, c] = sum_j scales[r, j] patterns[k, j],   k = index[r, c]

One pattern of +1 and -1 is XNOR-Net's (Rastegari et al. 2016, equation 5), several are residual binarization (Guo et
al. 2017, "Network Sketching", section 3); -1, 0 and 1 are ternary weights (Li and Liu 2016). There, scales suit the
weights alone. Here indices are assigned with the error passed on, and the scales of a row solve
(B H B^T) s = B H w, where B holds the patterns that its weights took.
"""

from itertools import product

import numpy as np
from numpy.typing import NDArray

from onnxcomp.numerics.arrays import Floats
from onnxcomp.numerics.codebook import Indices
from onnxcomp.numerics.feedback import Nearest, descend, feedback, row_errors

TERNARY = np.array([[-1.0], [0.0], [1.0]])

_ROUNDS = 4
_SWEEPS = 3


def signs(bases: int) -> NDArray[np.float64]:
    """(2^bases, bases) every combination of -1 and 1; bit j of a row's number is 1 where pattern j is positive."""
    return np.array([pattern[::-1] for pattern in product((-1.0, 1.0), repeat=bases)])


def fit_scaled(W: Floats, H: Floats, patterns: NDArray[np.float64]) -> tuple[Indices, NDArray[np.float64]]:
    """Indices and scales with a small layer error.

    Args:
        W: (out, in) weights.
        H: (groups, in, in) positive semidefinite Gram matrices of the inputs of equal runs of rows.
        patterns: (count, bases) `TERNARY` or `signs(bases)`.

    Returns:
        (out, in) indices into the patterns, and (out, bases) scales.
    """
    parts = [
        _fit(rows, moment, patterns) for rows, moment in zip(np.split(np.array(W, np.float64), len(H)), H, strict=True)
    ]
    return np.concatenate([indices for indices, _ in parts]), np.concatenate([scales for _, scales in parts])


def plain_scaled(W: Floats, patterns: NDArray[np.float64]) -> tuple[Indices, NDArray[np.float64]]:
    """The same by the weights alone: the least squared error of the weights for ternary and for one base of signs.

    More bases are fitted to what those before leave.
    """
    target = np.array(W, np.float64)
    if len(patterns) == len(TERNARY):
        scales = _threshold_scales(target)[:, None]
    else:
        columns, left = [], np.abs(target)
        for _ in range(patterns.shape[1]):
            columns.append(left.mean(axis=1))
            left = np.abs(left - columns[-1][:, None])
        scales = np.stack(columns, axis=1)
    return _closest(target, scales @ patterns.T), scales


def decoded(indices: Indices, scales: Floats, patterns: NDArray[np.float64]) -> NDArray[np.float64]:
    """(out, in) the weights."""
    return np.take_along_axis(np.asarray(scales @ patterns.T), indices, axis=1)


def _fit(W: NDArray[np.float64], H: Floats, patterns: NDArray[np.float64]) -> tuple[Indices, NDArray[np.float64]]:
    indices, scales = plain_scaled(W, patterns)
    best = indices, _rescaled(W, H, indices, scales, patterns)
    least = row_errors(W - decoded(*best, patterns), H)
    for turn in range(_ROUNDS):
        books = best[1] @ patterns.T
        nearest = _nearest(books)
        start = feedback(W, H, nearest) if turn == 0 else decoded(*best, patterns)
        indices = _closest(descend(W, H, start, nearest, _SWEEPS), books)
        scales = _rescaled(W, H, indices, best[1], patterns)
        errors = row_errors(W - decoded(indices, scales, patterns), H)
        better = errors < least
        best = np.where(better[:, None], indices, best[0]), np.where(better[:, None], scales, best[1])
        least = np.minimum(errors, least)
    return best


def _threshold_scales(W: NDArray[np.float64]) -> NDArray[np.float64]:
    """(out,) the scale at which -s, 0 and s are nearest to a row: the mean of its k largest magnitudes, k the best."""
    magnitudes = -np.sort(-np.abs(W), axis=1)
    sums, counts = np.cumsum(magnitudes, axis=1), np.arange(1, W.shape[1] + 1)
    best = np.argmax(sums**2 / counts, axis=1)  # the squared error is ||w||^2 - (sum of k)^2 / k
    return np.asarray(sums[np.arange(len(W)), best] / counts[best])


def _rescaled(
    W: NDArray[np.float64], H: Floats, indices: Indices, scales: NDArray[np.float64], patterns: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The best scales of each row; where they are not determined, those there were."""
    B = patterns[indices].swapaxes(1, 2)  # (out, bases, in)
    weighed = B @ H
    normal = weighed @ B.swapaxes(1, 2)
    ridge = 1e-9 * (np.trace(normal, axis1=1, axis2=2)[:, None, None] + np.finfo(float).tiny)
    missing = np.matmul(weighed, (W - np.einsum("rj,rji->ri", scales, B))[:, :, None])
    step: NDArray[np.float64] = np.linalg.solve(normal + ridge * np.eye(B.shape[1]), missing)[:, :, 0]
    return scales + step


def _nearest(books: NDArray[np.float64]) -> Nearest:
    rows = np.arange(len(books))
    return lambda q, wanted: books[rows, np.abs(wanted[:, None] - books).argmin(axis=1)]


def _closest(V: NDArray[np.float64], books: NDArray[np.float64]) -> Indices:
    """(out, in) of the nearest value of each row's book."""
    best, distance = np.zeros(V.shape, np.int64), np.abs(V - books[:, :1])
    for number in range(1, books.shape[1]):  # one by one, so that memory does not grow with them
        candidate = np.abs(V - books[:, number, None])
        best[candidate < distance] = number
        distance = np.minimum(candidate, distance)
    return best
