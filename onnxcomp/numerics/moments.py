"""Per-channel moments that merge (Chan, Golub and LeVeque, The American Statistician 37, 1983, eq. 2.1)."""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, eq=False)
class Moments:
    """What is known of each channel's values; a monoid under `merge`, with `empty` as identity.

    NaN and infinities are not filtered: they show in the mean, the minimum or the maximum.

    Attributes:
        count: values per channel.
        mean: (channels,) their mean.
        deviations: (channels,) sum of squared deviations from the mean.
        minimum: (channels,) smallest value, inf if there is none.
        maximum: (channels,) largest value, -inf if there is none.
        zeros: (channels,) values equal to zero.
    """

    count: int
    mean: NDArray[np.float64]
    deviations: NDArray[np.float64]
    minimum: NDArray[np.float64]
    maximum: NDArray[np.float64]
    zeros: NDArray[np.int64]

    @classmethod
    def empty(cls, channels: int) -> Self:
        """The moments of nothing."""
        zero, infinite = np.zeros(channels), np.full(channels, np.inf)
        return cls(0, zero, zero, infinite, -infinite, np.zeros(channels, np.int64))

    @classmethod
    def of(cls, values: ArrayLike, axis: int) -> Self:
        """The moments of an array whose `axis` counts channels."""
        array: NDArray[Any] = np.asarray(values)
        rows = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1).astype(np.float64)
        if not rows.shape[1]:
            return cls.empty(rows.shape[0])
        mean = rows.mean(axis=1)
        deviations = np.square(rows - mean[:, None]).sum(axis=1)
        return cls(rows.shape[1], mean, deviations, rows.min(axis=1), rows.max(axis=1), (rows == 0).sum(axis=1))

    def update(self, values: ArrayLike, axis: int) -> Self:
        """These moments with an array added whose `axis` counts channels."""
        return self.merge(self.of(values, axis))

    def merge(self, other: "Moments") -> Self:
        """The moments of both sets of values together."""
        count = self.count + other.count
        share = other.count / max(count, 1)
        shift = other.mean - self.mean
        return type(self)(
            count,
            self.mean + shift * share,
            self.deviations + other.deviations + shift**2 * (self.count * share),
            np.minimum(self.minimum, other.minimum),
            np.maximum(self.maximum, other.maximum),
            self.zeros + other.zeros,
        )

    @property
    def variance(self) -> NDArray[np.float64]:
        """(channels,) population variance, 0 where there are no values."""
        return self.deviations / max(self.count, 1)

    @property
    def absolute_maximum(self) -> NDArray[np.float64]:
        """(channels,) largest magnitude, 0 where there are no values."""
        return np.maximum(0.0, np.maximum(-self.minimum, self.maximum))
