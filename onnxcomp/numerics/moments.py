"""Per-channel statistics that merge: parts of the data give what the whole gives, however samples are batched."""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from onnxcomp.numerics.arrays import Floats


@dataclass(frozen=True, eq=False)
class Spread:
    """Mean and spread of each channel; a monoid under `merge` (Chan, Golub and LeVeque 1983, equation 2.1).

    Attributes:
        count: values per channel.
        mean: (channels,) their mean.
        deviations: (channels,) sum of their squared deviations from it.
    """

    count: int
    mean: NDArray[np.float64]
    deviations: NDArray[np.float64]

    @classmethod
    def of(cls, rows: Floats) -> Self:
        """Of (count, channels) values."""
        if not len(rows):
            return cls(0, np.zeros(rows.shape[1]), np.zeros(rows.shape[1]))
        mean = rows.mean(axis=0, dtype=np.float64)
        return cls(len(rows), mean, np.square(rows - mean).sum(axis=0))

    def merge(self, other: "Spread") -> Self:
        """Of both sets of values together."""
        count = self.count + other.count
        share = other.count / max(count, 1)
        shift = other.mean - self.mean
        deviations = self.deviations + other.deviations + shift**2 * (self.count * share)
        return type(self)(count, self.mean + shift * share, deviations)

    @property
    def variance(self) -> NDArray[np.float64]:
        """(channels,) population variance, 0 where there are no values."""
        return self.deviations / max(self.count, 1)


@dataclass(frozen=True, eq=False)
class Moments:
    """What is known of each channel of an activation; a monoid under `merge`, with `empty` as identity.

    NaN and infinities are not filtered: they show in the magnitudes. Extremes are no part of it: calibration has them
    beside the histograms.

    Attributes:
        values: over all values of a channel.
        levels: over samples, of the mean |x| of each sample.
        magnitudes: (channels,) sum of |x|.
        nonzeros: (channels,) how many values are not zero.
    """

    values: Spread
    levels: Spread
    magnitudes: NDArray[np.float64]
    nonzeros: NDArray[np.float64]

    @classmethod
    def empty(cls, channels: int) -> Self:
        """The moments of nothing."""
        nothing = Spread.of(np.zeros((0, channels)))
        return cls(nothing, nothing, np.zeros(channels), np.zeros(channels))

    @classmethod
    def of(cls, count: int, *, sums: Floats, squares: Floats, magnitudes: Floats, nonzeros: Floats) -> Self:
        """From sums over each sample, all (samples, channels).

        The deviations within a sample come from its sum of squares, so they are as exact as that sum: for float32 a
        relative 1e-7 of the mean square, not of the variance.

        Args:
            count: values per sample and channel.
            sums: of x.
            squares: of x^2.
            magnitudes: of |x|.
            nonzeros: how many x are not zero.
        """
        if not (count and len(sums)):
            return cls.empty(sums.shape[1])
        with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is for the caller to refuse, by name
            totals = np.asarray(sums, np.float64)
            means = Spread.of(totals / count)
            within = np.maximum(squares - totals**2 / count, 0).sum(axis=0)
            values = Spread(count * len(sums), means.mean, count * means.deviations + within)
            levels = Spread.of(np.asarray(magnitudes, np.float64) / count)
        return cls(values, levels, magnitudes.sum(axis=0, dtype=np.float64), nonzeros.sum(axis=0, dtype=np.float64))

    def merge(self, other: "Moments") -> Self:
        """The moments of both sets of samples together."""
        return type(self)(
            self.values.merge(other.values),
            self.levels.merge(other.levels),
            self.magnitudes + other.magnitudes,
            self.nonzeros + other.nonzeros,
        )
