import numpy as np
import pytest
import scipy.stats
from numpy.typing import NDArray

from onnxcomp.numerics.stats import bootstrap_interval

Array = NDArray[np.float64]
VALUES = np.random.default_rng(0).exponential(size=400)


def mean(means: Array) -> Array:
    return means


def ratio(means: Array) -> Array:
    return np.asarray(means[..., 0] / means[..., 1])


def interval(rows: Array) -> tuple[float, float]:
    found = bootstrap_interval(rows, mean)
    assert found is not None
    return found


@pytest.mark.parametrize("samples", [400, 5000])
def test_agrees_with_scipy(samples: int) -> None:
    values = np.random.default_rng(1).exponential(size=samples)
    theirs = scipy.stats.bootstrap((values,), np.mean, n_resamples=4000, method="percentile", batch=100, rng=2)
    expected = theirs.confidence_interval
    # The 2.5% quantile of 1,000 draws has a standard error of about 0.08 standard deviations of the mean.
    noise = 4 * 0.09 * values.std() / np.sqrt(samples)
    assert interval(values) == pytest.approx((expected.low, expected.high), abs=noise)


def test_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(3)
    covered = sum(low <= 0 <= high for low, high in (interval(generator.normal(size=100)) for _ in range(200)))
    assert 180 <= covered <= 198  # 190 expected, standard deviation 3; the percentile bootstrap is a little narrow


def test_is_reproducible() -> None:
    assert interval(VALUES) == interval(VALUES.copy())


def test_statistic_of_several_columns() -> None:
    rows = np.stack([2 * VALUES, VALUES], axis=1)
    assert bootstrap_interval(rows, ratio) == pytest.approx((2, 2))


def test_undefined_resamples_do_not_count() -> None:
    with np.errstate(all="ignore"):
        rows = np.array([[1.0, 0.0], [1.0, 1.0]])  # one in four draws has nothing to divide by
        assert bootstrap_interval(rows, ratio) == (1.0, 2.0)
        assert bootstrap_interval(np.zeros((3, 2)), ratio) is None


@pytest.mark.parametrize("rows", [np.zeros((0, 1)), np.ones(1), np.array([1.0, np.inf]), np.array([1.0, np.nan])])
def test_no_interval_of_too_few_or_infinite_rows(rows: Array) -> None:
    assert bootstrap_interval(rows, mean) is None
