"""Moments of parts merge to those of all values at once."""

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxcomp.numerics.moments import Moments

Values = NDArray[np.float64]

rng = np.random.default_rng(0)
DATA = np.maximum(rng.normal(1e3, 1.0, size=(60, 4, 5)) - np.array([0, 1e3, 1e3, 2e3])[:, None], 0)
DATA[:, 2] *= rng.choice([-1, 1], size=(60, 5))
"""(samples, channels, values): far from zero, rectified, of both signs, and all zero."""


def moments_of(values: Values) -> Moments:
    sums = {"sums": values, "squares": values**2, "magnitudes": np.abs(values), "nonzeros": (values != 0).astype(float)}
    return Moments.of(values.shape[2], **{name: array.sum(axis=2) for name, array in sums.items()})


def assert_moments_of(moments: Moments, values: Values) -> None:
    rows = values.swapaxes(0, 1).reshape(4, -1)
    levels = np.abs(values).mean(axis=2)
    assert (moments.values.count, moments.levels.count) == (rows.shape[1], len(values))
    # Means of 300 float64 values near 1,000: a few hundred roundings of 1e3 * 2e-16.
    np.testing.assert_allclose(moments.values.mean, rows.mean(axis=1), rtol=1e-13, atol=1e-15)
    # Sums of squares near 5e6 are exact to 1e-9, the variance is 1.
    np.testing.assert_allclose(moments.values.variance, rows.var(axis=1), rtol=1e-8)
    np.testing.assert_allclose(moments.levels.mean, levels.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(moments.levels.variance, levels.var(axis=0), rtol=1e-10)
    np.testing.assert_allclose(moments.magnitudes, np.abs(rows).sum(axis=1), rtol=1e-13)
    np.testing.assert_array_equal(moments.nonzeros, np.count_nonzero(rows, axis=1))


@pytest.mark.parametrize("cuts", [[], [1], [7, 8, 30], [0, 60]])
def test_parts_merge_to_the_whole(cuts: list[int]) -> None:
    moments = Moments.empty(4)
    for part in np.split(DATA, cuts):
        moments = moments.merge(moments_of(part))
    assert_moments_of(moments, DATA)


def test_merge_commutes_and_associates() -> None:
    a, b, c = (moments_of(part) for part in np.split(DATA, [5, 40]))
    assert_moments_of(c.merge(a).merge(b), DATA)
    assert_moments_of(a.merge(b.merge(c)), DATA)


def test_samples_of_other_lengths_merge_too() -> None:
    short, long = DATA[:20, :, :2], DATA[20:]
    merged = moments_of(short).merge(moments_of(long))
    rows = np.concatenate([part.swapaxes(0, 1).reshape(4, -1) for part in (short, long)], axis=1)
    levels = np.concatenate([np.abs(part).mean(axis=2) for part in (short, long)])
    np.testing.assert_allclose(merged.values.mean, rows.mean(axis=1), rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(merged.values.variance, rows.var(axis=1), rtol=1e-8)
    np.testing.assert_allclose(merged.levels.variance, levels.var(axis=0), rtol=1e-10)


@pytest.mark.parametrize("shape", [(0, 4, 5), (3, 4, 0)])
def test_nothing_has_no_spread(shape: tuple[int, ...]) -> None:
    nothing = Moments.empty(4).merge(moments_of(np.zeros(shape)))
    np.testing.assert_array_equal(nothing.values.variance, np.zeros(4))
    assert_moments_of(nothing.merge(moments_of(DATA)), DATA)


def test_what_is_not_finite_shows() -> None:
    values = DATA.copy()
    values[3, 1, 2] = np.inf
    values[3, 2, 2] = np.nan
    np.testing.assert_array_equal(np.isfinite(moments_of(values).magnitudes), [True, False, False, True])
