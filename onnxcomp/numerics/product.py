"""Product quantization (Jegou et al. 2011): neighbouring weights of a row are one vector of a codebook.

Vectors are chosen as single values are in `feedback`, whole blocks of inputs at a time. With the factor U of the
inverse Gram matrix, a block S of weights w replaced by c costs ||(w - c) U_SS^-1||^2, and E = (w - c) U_SS^-1 takes
E U_S,: from the weights that follow.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2

from onnxcomp.numerics.arrays import Floats
from onnxcomp.numerics.codebook import Indices, fitted
from onnxcomp.numerics.feedback import grouped_error, inverse_factor

_ROUNDS = 3
_SWEEPS = 2
_DAMPING = 1e-2
_GAIN = 1e-3


def share_vectors(W: Floats, H: Floats, count: int, length: int, seed: int = 0) -> tuple[NDArray[np.float64], Indices]:
    """A codebook of vectors, and which each part of a row takes.

    Args:
        W: (out, in) weights; in is a multiple of the length.
        H: (groups, in, in) Gram matrices of the inputs of equal runs of rows.
        count: vectors.
        length: of each.
        seed: of the first guess.

    Returns:
        (count, length) vectors and (out, in / length) indices.
    """
    target = np.array(W, np.float64)
    vectors, _ = plain_vectors(target, count, length, seed)
    best: tuple[NDArray[np.float64], Indices] | None = None
    least = np.inf
    for _ in range(_ROUNDS):
        indices = _assigned(target, H, vectors)
        each = indices[:, :, None] * length + np.arange(length)
        vectors = fitted(target, H, each.reshape(target.shape), vectors.ravel()).reshape(count, length)
        error = grouped_error(target - vectors[indices].reshape(target.shape), H)
        enough = error > least * (1 - _GAIN)
        if error < least:
            best, least = (vectors, indices), error
        if enough:
            break
    assert best is not None
    return best


def plain_vectors(W: Floats, count: int, length: int, seed: int = 0) -> tuple[NDArray[np.float64], Indices]:
    """The same by the weights alone: k-means on the vectors."""
    parts = np.asarray(W, np.float64).reshape(-1, length)
    vectors, indices = np.zeros((count, length)), np.arange(len(parts))
    if len(parts) <= count:
        vectors[: len(parts)] = parts
    else:
        vectors[:], labels = kmeans2(parts, count, minit="points", seed=seed)
        indices = labels.astype(np.int64)
    return vectors, indices.reshape(len(W), -1)


def _assigned(W: NDArray[np.float64], H: Floats, vectors: NDArray[np.float64]) -> Indices:
    """By error feedback, then block by block with the others fixed."""
    runs = [
        _descended(rows, moment, vectors, _fed_back(rows, moment, vectors))
        for rows, moment in zip(np.split(W, len(H)), H, strict=True)
    ]
    return np.concatenate(runs)


def _fed_back(W: NDArray[np.float64], H: Floats, vectors: NDArray[np.float64]) -> Indices:
    length = vectors.shape[1]
    weight = np.diagonal(H).reshape(-1, length).sum(axis=1)
    blocks = np.argsort(-weight, kind="stable")
    sequence = (blocks[:, None] * length + np.arange(length)).ravel()
    U = inverse_factor(H[np.ix_(sequence, sequence)], _DAMPING)
    remaining = W[:, sequence]
    result = np.empty((len(W), len(blocks)), np.int64)
    for number, block in enumerate(blocks):
        S = slice(number * length, (number + 1) * length)
        metric = np.linalg.inv(U[S, S])
        result[:, block] = _closest(remaining[:, S] @ metric, vectors @ metric)
        errors = (remaining[:, S] - vectors[result[:, block]]) @ metric
        remaining[:, S.stop :] -= errors @ U[S, S.stop :]
    return result


def _descended(W: NDArray[np.float64], H: Floats, vectors: NDArray[np.float64], indices: Indices) -> Indices:
    length = vectors.shape[1]
    result = indices.copy()
    pull = (W - vectors[result].reshape(W.shape)) @ H
    ridge = 1e-6 * (float(np.diagonal(H).mean()) or 1.0) * np.eye(length)
    for _ in range(_SWEEPS):
        for block in range(result.shape[1]):
            S = slice(block * length, (block + 1) * length)
            inner = H[S, S] + ridge
            metric = np.linalg.cholesky(inner)
            old = vectors[result[:, block]]
            result[:, block] = _closest((old + np.linalg.solve(inner, pull[:, S].T).T) @ metric, vectors @ metric)
            pull -= (vectors[result[:, block]] - old) @ H[S]
    return result


def _closest(points: NDArray[np.float64], vectors: NDArray[np.float64]) -> Indices:
    """The nearest vector of each point."""
    distances = np.square(vectors).sum(axis=1) - 2 * points @ vectors.T
    return np.asarray(np.argmin(distances, axis=1))
