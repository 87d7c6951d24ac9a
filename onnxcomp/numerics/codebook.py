"""Weights that share values: W'[r, c] = codebook[index[r, c]], chosen so that tr((W - W') H (W - W')^T) is small.

Deep Compression (Han et al. 2016, section 3) finds the values by k-means on the weights alone. Here both halves of
k-means see the layer's inputs: indices are assigned with the error of each passed on to the weights that follow, and
the values that suit the indices best are the exact solution of (sum_r A_r^T H A_r) c = sum_r A_r^T H w_r, where A_r
(in, values) is 1 where row r uses a value.

Everywhere H is (groups, in, in): so many equal runs of rows see other inputs, as in a grouped convolution. Codebooks
belong to equal runs of rows, too, which need not be the same.
"""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, cg

from onnxcomp.numerics.arrays import Floats
from onnxcomp.numerics.feedback import Nearest, descend, feedback, grouped_error

_LLOYD = 30
_ROUNDS = 3
_SWEEPS = 3
_TOLERANCE = 1e-6
_STEPS = 60
_GAIN = 1e-3
"""Of a round, below which there is no next one."""

Indices: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Codebook:
    """Values and which weight has which.

    Attributes:
        values: (books, count) ascending; each serves a run of rows.
        indices: (out, in) into the values of the row's book.
    """

    values: NDArray[np.float64]
    indices: Indices

    def decoded(self) -> NDArray[np.float64]:
        """(out, in) the weights."""
        return np.take_along_axis(_by_row(self.values, len(self.indices)), self.indices, axis=1)


def share(W: Floats, H: Floats, count: int, books: int = 1, *, zero: bool = False) -> Codebook:
    """Weights that share values.

    Args:
        W: (out, in) weights.
        H: (groups, in, in) positive semidefinite Gram matrices of the inputs.
        count: values of each codebook.
        books: codebooks, each of as many rows.
        zero: weights that are zero stay zero, and one value is zero.
    """
    target = np.array(W, np.float64)
    kept = target != 0 if zero else None
    book = best = kmeans(target, np.diagonal(H, axis1=1, axis2=2), count, books, zero=zero)
    least = grouped_error(target - best.decoded(), H)
    for turn in range(_ROUNDS):
        indices = _assigned(target, H, book, kept, best if turn else None)
        values = fitted(target, H, indices + _offsets(indices, book.values), book.values.ravel(), fixed=zero)
        book = _ordered(Codebook(values.reshape(book.values.shape), indices))
        error = grouped_error(target - book.decoded(), H)
        enough = error > least * (1 - _GAIN)
        if error < least:
            best, least = book, error
        if enough:
            break
    return best


def kmeans(W: Floats, weight: Floats, count: int, books: int = 1, *, zero: bool = False) -> Codebook:
    """Lloyd's algorithm on single weights (Lloyd 1982).

    Args:
        W: (out, in) weights.
        weight: (groups, in) what an error counts at each input.
        count: values of each codebook.
        books: codebooks, each of as many rows.
        zero: one value is zero, for the weights that are.
    """
    W = np.asarray(W, np.float64)
    counts = _by_row(np.maximum(weight, 1e-9 * (np.max(weight) or 1.0)), len(W))
    parts = zip(np.split(W, books), np.split(counts, books), strict=True)
    values = np.stack([_lloyd(rows.ravel(), mass.ravel(), count, zero=zero) for rows, mass in parts])
    return Codebook(values, _indices(W, values))


def fitted(
    W: Floats,
    H: Floats,
    indices: Indices,
    start: Floats,
    signs: NDArray[np.float64] | None = None,
    *,
    fixed: bool = False,
) -> NDArray[np.float64]:
    """The values that suit given indices best, by conjugate gradients on the normal equations.

    Args:
        W: (out, in) weights to approach.
        H: (groups, in, in) Gram matrices of the inputs.
        indices: (out, in) of each weight's value.
        start: (values,) to begin from.
        signs: (out, in) factors of 1 and -1, where a weight is its value times that.
        fixed: values that are zero stay so.
    """
    free = (start != 0) if fixed else np.ones(len(start), bool)
    grouped = (len(H), -1, W.shape[1])

    def gathered(rows: NDArray[np.float64]) -> NDArray[np.float64]:
        summed = np.bincount(indices.ravel(), (rows if signs is None else rows * signs).ravel(), len(start))
        return np.where(free, summed, 0.0)

    def spread(values: Floats) -> NDArray[np.float64]:
        wide: NDArray[np.float64] = np.asarray(values, np.float64).ravel()[indices]
        return wide if signs is None else wide * signs

    def weighed(rows: Floats) -> NDArray[np.float64]:
        product: NDArray[np.float64] = np.matmul(rows.reshape(grouped), H)
        return product.reshape(rows.shape)

    levels = _by_row(np.diagonal(H, axis1=1, axis2=2), len(W))
    diagonal = gathered(levels if signs is None else levels * signs)
    ridge = _TOLERANCE * (float(diagonal.mean()) or 1.0)  # values that nothing uses stay where they are
    size = (len(start), len(start))
    operator = LinearOperator(size, lambda values: gathered(weighed(spread(values))) + ridge * values.ravel())
    scale = LinearOperator(size, lambda values: values.ravel() / (diagonal + ridge))
    step, _ = cg(operator, gathered(weighed(W - spread(start))), rtol=_TOLERANCE, maxiter=_STEPS, M=scale)
    return np.asarray(start + step)


def _assigned(
    W: NDArray[np.float64], H: Floats, book: Codebook, kept: NDArray[np.bool_] | None, start: Codebook | None
) -> Indices:
    """Indices by error feedback, or from those of another codebook, and coordinate descent."""
    nearest = _Nearest(_by_row(book.values, len(W)), len(book.values) == 1, kept)
    result = np.empty_like(W)
    for run, moment in zip(np.split(np.arange(len(W)), len(H)), H, strict=True):
        rows = nearest.of(run)
        V = feedback(W[run], moment, rows) if start is None else start.decoded()[run]
        result[run] = descend(W[run], moment, V, rows, _SWEEPS)
    return _indices(result, book.values)


@dataclass(frozen=True, eq=False)
class _Nearest:
    """The nearest value of each row's codebook; zero where nothing is kept.

    Attributes:
        books: (out, count) by row.
        alike: they are all the same.
        kept: (out, in), or None for all.
    """

    books: NDArray[np.float64]
    alike: bool
    kept: NDArray[np.bool_] | None

    def of(self, run: Indices) -> Nearest:
        """For some of the rows."""
        books, kept = self.books[run], None if self.kept is None else self.kept[run]
        middles = (books[0][1:] + books[0][:-1]) / 2

        def nearest(q: int, wanted: NDArray[np.float64]) -> NDArray[np.float64]:
            if self.alike:
                found: NDArray[np.float64] = books[0][np.searchsorted(middles, wanted)]
            else:
                places = np.argmin(np.abs(books - wanted[:, None]), axis=1)
                found = np.take_along_axis(books, places[:, None], axis=1)[:, 0]
            return found if kept is None else np.where(kept[:, q], found, 0.0)

        return nearest


def _lloyd(flat: Floats, counts: Floats, count: int, *, zero: bool) -> NDArray[np.float64]:
    order = np.argsort(flat, kind="stable")
    x, mass = flat[order], counts[order]
    if zero:
        x, mass, count = x[x != 0], mass[x != 0], count - 1
    known = np.unique(x)
    if len(known) <= count:
        values = np.concatenate([known, np.full(count - len(known), known[-1] if len(known) else 0.0)])
    else:
        values = _moved(x, mass, count)
    return np.sort(np.append(values, 0.0)) if zero else values


def _moved(x: Floats, mass: Floats, count: int) -> NDArray[np.float64]:
    """Values for sorted weights; started between equal numbers of weights and equal distances."""
    quantiles = np.interp(np.linspace(0, 1, count + 2)[1:-1], np.linspace(0, 1, len(x)), x)
    values = (quantiles + np.linspace(x[0], x[-1], count)) / 2
    totals, sums = np.append(0, np.cumsum(mass)), np.append(0, np.cumsum(mass * x))
    for _ in range(_LLOYD):
        edges = np.concatenate([[0], np.searchsorted(x, (values[1:] + values[:-1]) / 2), [len(x)]])
        held = np.diff(totals[edges])
        centres = np.divide(np.diff(sums[edges]), held, out=values.copy(), where=held > 0)
        if np.allclose(centres, values, rtol=0, atol=1e-9 * (x[-1] - x[0])):
            break
        values = centres
    return np.sort(values)


def _indices(V: Floats, values: NDArray[np.float64]) -> Indices:
    """Of the nearest values."""
    runs = zip(values, np.split(np.asarray(V), len(values)), strict=True)
    return np.concatenate([np.searchsorted((book[1:] + book[:-1]) / 2, rows) for book, rows in runs])


def _by_row(runs: Floats, rows: int) -> NDArray[np.float64]:
    """What holds for each of several equal runs of rows, for each row."""
    return np.repeat(np.asarray(runs, np.float64), rows // len(runs), axis=0)


def _offsets(indices: Indices, values: NDArray[np.float64]) -> Indices:
    """(out, 1) where each row's codebook begins when all stand in a row."""
    books, count = values.shape
    return np.repeat(np.arange(books) * count, len(indices) // books)[:, None]


def _ordered(book: Codebook) -> Codebook:
    """Values ascending again."""
    order = np.argsort(book.values, axis=1, kind="stable")
    places = np.repeat(np.argsort(order, axis=1), len(book.indices) // len(book.values), axis=0)
    return Codebook(np.take_along_axis(book.values, order, axis=1), np.take_along_axis(places, book.indices, axis=1))
