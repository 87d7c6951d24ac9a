"""How far a figure measured on few samples can be trusted: percentile bootstrap (Efron 1979)."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
Interval = tuple[float, float]

_RESAMPLES = 1000
_LARGEST_RESAMPLE = 1000


def bootstrap_interval(rows: FloatArray, statistic: Callable[[FloatArray], FloatArray]) -> Interval | None:
    """95% percentile interval of a function of the mean row.

    Above 1,000 samples, random groups of equal size are resampled in place of samples: their mean has the same mean
    and variance, so the interval is the same at a fixed cost. Resamples are drawn as counts, so that each mean is one
    row of a matrix product; scipy.stats.bootstrap would call the statistic on whole resamples.

    Args:
        rows: (samples, ...), drawn along the first axis.
        statistic: from mean rows (resamples, ...) to values (resamples,). Values that are not finite do not count.

    Returns:
        Both ends, the same for the same rows; None for fewer than two samples, rows that are not finite, or a
        statistic that never is.
    """
    if len(rows) < 2 or not np.isfinite(rows).all():
        return None
    random = np.random.default_rng(0)
    size = -(-len(rows) // _LARGEST_RESAMPLE)
    groups = len(rows) // size
    order = random.permutation(len(rows))[: groups * size]
    grouped = rows[order].reshape(groups, size, *rows.shape[1:]).mean(1)
    counts = random.multinomial(groups, np.full(groups, 1 / groups), _RESAMPLES)
    with np.errstate(all="ignore"):
        values = statistic(np.tensordot(counts, grouped, 1) / groups)
    finite = values[np.isfinite(values)]
    return (float(np.quantile(finite, 0.025)), float(np.quantile(finite, 0.975))) if finite.size else None
