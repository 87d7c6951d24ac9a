import numpy as np
import pytest

from onnxcomp.numerics.moments import Moments

rng = np.random.default_rng(0)
BATCH = np.maximum(rng.normal(1e3, 1.0, size=(60, 4, 5)) - np.array([0, 1e3, 1e3, 2e3])[:, None], 0)


def assert_moments_of(moments: Moments, rows: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> None:
    assert moments.count == rows.shape[1]
    # Means of 300 float64 values near 1,000: a few hundred roundings of 1e3 * 2e-16.
    np.testing.assert_allclose(moments.mean, rows.mean(axis=1), rtol=1e-13)
    np.testing.assert_allclose(moments.variance, rows.var(axis=1), rtol=1e-10)
    np.testing.assert_array_equal(moments.minimum, rows.min(axis=1))
    np.testing.assert_array_equal(moments.maximum, rows.max(axis=1))
    np.testing.assert_array_equal(moments.zeros, np.count_nonzero(rows == 0, axis=1))


@pytest.mark.parametrize("cuts", [[], [1], [7, 8, 30], [0, 60]])
def test_parts_merge_to_the_whole(cuts: list[int]) -> None:
    rows = BATCH.swapaxes(0, 1).reshape(4, -1)
    moments = Moments.empty(4)
    for part in np.split(BATCH, cuts):
        moments = moments.update(part, axis=1)
    assert_moments_of(moments, rows)


def test_merge_commutes_and_associates() -> None:
    a, b, c = (Moments.of(part, axis=1) for part in np.split(BATCH, [5, 40]))
    rows = BATCH.swapaxes(0, 1).reshape(4, -1)
    assert_moments_of(c.merge(a).merge(b), rows)
    assert_moments_of(a.merge(b.merge(c)), rows)


def test_nothing_has_no_magnitude_and_no_variance() -> None:
    empty = Moments.empty(2).merge(Moments.of(np.zeros((0, 2)), axis=1))
    np.testing.assert_array_equal(empty.absolute_maximum, [0, 0])
    np.testing.assert_array_equal(empty.variance, [0, 0])


def test_absolute_maximum_is_over_both_signs() -> None:
    moments = Moments.of(np.array([[-3.0, 1.0], [2.0, -0.5]]), axis=-1)
    np.testing.assert_array_equal(moments.absolute_maximum, [3, 1])
