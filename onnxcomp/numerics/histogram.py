"""A streaming histogram whose merge is exact.

Bins are [i w, (i + 1) w) with w = 2**k, so zero is always an edge, and doubling w joins neighbours (2i, 2i + 1) into i
without moving a single value across an edge. k is not state: it is the smallest exponent at which the range, widened
to hold zero, fits into the bins. The histogram of a union therefore depends on neither order nor partition.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Narrow enough for float32's smallest denormal, 2**-149, spread over 2,048 bins; it also ends the search for all zeros.
_SMALLEST_EXPONENT = -160
_CHUNK = 1 << 15  # elements held as float64 at a time: stays in the cache


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts and exact totals of the finite values seen so far; a monoid under `merge`, with `empty` as identity.

    Exact for float16, bfloat16, float32 and integers below 2**53. Float64 values of more than 300 decimal orders
    of magnitude between largest and smallest may fall one bin off.

    Attributes:
        bins: most bins to use.
        minimum: smallest finite value, inf if there is none.
        maximum: largest finite value, -inf if there is none.
        counts: (at most bins,) values per bin, from index `first` upwards.
        zeros: values equal to zero, which `counts` holds too.
        nonfinite: NaN and infinite values, counted here and nowhere else.
        total: sum of the finite values.
        squares: sum of their squares.
    """

    bins: int
    minimum: float
    maximum: float
    counts: NDArray[np.int64]
    zeros: int
    nonfinite: int
    total: float
    squares: float

    @classmethod
    def empty(cls, bins: int = 4096) -> Self:
        """The histogram of nothing."""
        return cls(bins, math.inf, -math.inf, np.zeros(1, np.int64), 0, 0, 0.0, 0.0)

    @classmethod
    def of(cls, values: ArrayLike, bins: int = 4096) -> Self:
        """The histogram of an array of any shape."""
        flat = np.asarray(values).reshape(-1)
        if not flat.size:
            return cls.empty(bins)
        with np.errstate(invalid="ignore"):
            minimum, maximum = float(flat.min()), float(flat.max())
        if not (math.isfinite(minimum) and math.isfinite(maximum)):
            finite = flat[np.isfinite(flat)]
            return replace(cls.of(finite, bins), nonfinite=flat.size - finite.size)

        exponent, first, length = _layout(minimum, maximum, bins)
        inverse_width = math.ldexp(1.0, -exponent)
        counts = np.zeros(length, np.int64)
        zeros, total, squares = 0, 0.0, 0.0
        for chunk in _chunks(flat):
            zeros += int(np.count_nonzero(chunk == 0))
            total += float(chunk.sum())
            # Not `chunk @ chunk`: BLAS would wake its threads for each chunk, and wait for them on a busy machine.
            squares += float(np.einsum("i,i", chunk, chunk))
            chunk *= inverse_width
            # Floor before the shift to the first bin: -1e-30 + 2048 would round up, out of the bin below zero.
            np.floor(chunk, out=chunk)
            chunk -= first
            counts += np.bincount(chunk.astype(np.int32), minlength=length)
        return cls(bins, minimum, maximum, counts, zeros, 0, total, squares)

    def update(self, values: ArrayLike) -> Self:
        """This histogram with an array of any shape added."""
        return self.merge(self.of(values, self.bins))

    def merge(self, other: "Histogram") -> Self:
        """The histogram of both sets of values together, with the fewer bins of the two."""
        bins = min(self.bins, other.bins)
        minimum, maximum = min(self.minimum, other.minimum), max(self.maximum, other.maximum)
        exponent, first, length = _layout(minimum, maximum, bins)
        counts = np.zeros(length, np.int64)
        for part in (self, other):
            # Beyond 62 doublings every index is already 0 or -1, and a longer shift is undefined.
            doublings = min(exponent - part.exponent, 62)
            index = (np.arange(part.counts.size) + part.first) >> doublings
            counts += np.bincount(index - first, part.counts, length).astype(np.int64)  # exact below 2**53
        return replace(
            self,
            bins=bins,
            minimum=minimum,
            maximum=maximum,
            counts=counts,
            zeros=self.zeros + other.zeros,
            nonfinite=self.nonfinite + other.nonfinite,
            total=self.total + other.total,
            squares=self.squares + other.squares,
        )

    @property
    def count(self) -> int:
        """Number of finite values."""
        return int(self.counts.sum())

    @property
    def exponent(self) -> int:
        """Base-2 logarithm of the bin width."""
        return _layout(self.minimum, self.maximum, self.bins)[0]

    @property
    def width(self) -> float:
        """Width of a bin, in the unit of the values."""
        return math.ldexp(1.0, self.exponent)

    @property
    def first(self) -> int:
        """Index of the first bin: its lower edge is `first * width`, at or below zero."""
        return _layout(self.minimum, self.maximum, self.bins)[1]

    @property
    def edges(self) -> NDArray[np.float64]:
        """Edges of the bins, one more than there are bins."""
        first = self.first
        return self.width * np.arange(first, first + self.counts.size + 1, dtype=np.float64)

    @property
    def nonzero_counts(self) -> NDArray[np.int64]:
        """The counts without the values equal to zero, which no quantization harms."""
        counts = self.counts.copy()
        counts[-self.first] -= self.zeros
        return counts

    @property
    def mean(self) -> float:
        """Mean of the finite values, 0 if there are none."""
        return self.total / max(self.count, 1)


def _layout(minimum: float, maximum: float, bins: int) -> tuple[int, int, int]:
    """Exponent of the width, index of the first bin and number of bins that a range needs."""
    low, high = min(minimum, 0.0), max(maximum, 0.0)
    # With an exponent one smaller the larger side alone would overflow the bins, so few steps remain.
    exponent = max(math.frexp(max(high, -low))[1] - bins.bit_length(), _SMALLEST_EXPONENT)
    if low == high:
        exponent = _SMALLEST_EXPONENT
    while True:
        first, last = math.floor(math.ldexp(low, -exponent)), math.floor(math.ldexp(high, -exponent))
        if last - first < bins:
            return exponent, first, last - first + 1
        exponent += 1


def _chunks(flat: NDArray[Any]) -> Iterator[NDArray[np.float64]]:
    for start in range(0, flat.size, _CHUNK):
        yield np.array(flat[start : start + _CHUNK], np.float64)
