"""How far a metric measured on few samples can be trusted: percentile bootstrap (Efron and Tibshirani 1993, ch. 13)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxcomp.errors import DataError


@dataclass(frozen=True)
class Interval:
    """A statistic with its confidence interval.

    Attributes:
        value: the statistic of all samples.
        low: lower end of the interval.
        high: upper end of the interval.
    """

    value: float
    low: float
    high: float


def bootstrap_interval(
    values: NDArray[Any],
    statistic: Callable[[NDArray[Any]], float],
    seed: int,
    level: float = 0.95,
    resamples: int = 1000,
) -> Interval:
    """The percentile bootstrap interval of a statistic.

    Not scipy.stats.bootstrap: that resamples along one axis of numbers, while the samples here may be rows, such as
    pairs to correlate, and may repeat one value.

    Args:
        values: (samples, ...) drawn from with replacement along the first axis.
        statistic: from (samples, ...) to a number; it may be NaN for a resample, which then does not count.
        seed: the same seed gives the same interval.
        level: coverage, 0.95 for 95%.
        resamples: how often to draw.

    Raises:
        DataError: there are no samples.
    """
    samples = len(values)
    if not samples:
        raise DataError("a metric has no samples", remedy="give evaluation data that hold at least one sample")
    generator = np.random.default_rng(seed)
    drawn = [statistic(values[generator.integers(samples, size=samples)]) for _ in range(resamples)]
    value = float(statistic(values))
    known = np.asarray(drawn, np.float64)[~np.isnan(drawn)]
    if not known.size:
        return Interval(value, value, value)
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def paired_difference(
    first: NDArray[Any],
    second: NDArray[Any],
    statistic: Callable[[NDArray[Any]], float],
    seed: int,
    level: float = 0.95,
    resamples: int = 1000,
) -> Interval:
    """The interval of statistic(first) - statistic(second) when both saw the same samples.

    Each resample draws the same samples for both, so that what they share cancels: for two variants of one model the
    interval is far narrower than that of either.

    Args:
        first: (samples, ...) values of the one.
        second: (samples, ...) values of the other, in the same order.
        statistic: from (samples, ...) to a number.
        seed: the same seed gives the same interval.
        level: coverage, 0.95 for 95%.
        resamples: how often to draw.

    Raises:
        DataError: there are no samples, or not as many of both.
    """
    if len(first) != len(second):
        raise DataError(
            f"{len(first)} samples cannot be paired with {len(second)}",
            remedy="evaluate both models on the same data",
        )

    def difference(chosen: NDArray[Any]) -> float:
        return statistic(first[chosen]) - statistic(second[chosen])

    return bootstrap_interval(np.arange(len(first)), difference, seed, level, resamples)
