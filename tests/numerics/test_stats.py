import numpy as np
import pytest
import scipy.stats
from numpy.typing import NDArray

from onnxcomp.errors import DataError
from onnxcomp.numerics.stats import Interval, bootstrap_interval, paired_difference

Array = NDArray[np.float64]
rng = np.random.default_rng(0)
VALUES = rng.exponential(size=400)


def mean(values: Array) -> float:
    return float(values.mean())


def correlation(pairs: Array) -> float:
    return float(np.asarray(np.corrcoef(pairs.T))[0, 1])


def test_agrees_with_scipy() -> None:
    ours = bootstrap_interval(VALUES, mean, seed=1, resamples=4000)
    theirs = scipy.stats.bootstrap((VALUES,), np.mean, n_resamples=4000, method="percentile", rng=2)
    low, high = theirs.confidence_interval.low, theirs.confidence_interval.high
    # The 2.5% quantile of 4,000 draws has a standard error of about 0.04 standard deviations of the mean.
    noise = 4 * np.sqrt(2) * 0.04 * VALUES.std() / 20
    assert abs(ours.low - low) < noise
    assert abs(ours.high - high) < noise


def test_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(3)
    intervals = [
        bootstrap_interval(generator.normal(size=100), mean, seed=i, level=0.8, resamples=200) for i in range(200)
    ]
    covered = sum(interval.low <= 0 <= interval.high for interval in intervals)
    assert 135 <= covered <= 180  # 160 expected, standard deviation 6


def test_rows_stay_together() -> None:
    x = rng.normal(size=300)
    pairs = np.stack([x, x + 0.3 * rng.normal(size=300)], axis=1)
    interval = bootstrap_interval(pairs, correlation, seed=0, resamples=200)
    assert 0.9 < interval.low < interval.value < interval.high < 1.0


def test_the_seed_fixes_the_interval_and_a_higher_level_widens_it() -> None:
    first = bootstrap_interval(VALUES, mean, seed=5, resamples=200)
    assert first == bootstrap_interval(VALUES, mean, seed=5, resamples=200)
    assert first != bootstrap_interval(VALUES, mean, seed=6, resamples=200)
    wide = bootstrap_interval(VALUES, mean, seed=5, level=0.999, resamples=200)
    assert wide.low < first.low < first.high < wide.high


@pytest.mark.parametrize("values", [np.ones(50), np.array([3.0])])
def test_one_value_gives_a_point(values: Array) -> None:
    assert bootstrap_interval(values, mean, seed=0, resamples=50) == Interval(values[0], values[0], values[0])


def test_undefined_resamples_do_not_count() -> None:
    def ratio(values: Array) -> float:
        return float(values.sum()) if values.any() else float("nan")

    interval = bootstrap_interval(np.array([0.0, 1.0]), ratio, seed=0, resamples=100)
    assert (interval.low, interval.high) == (1.0, 2.0)
    undefined = bootstrap_interval(np.zeros(3), ratio, seed=0, resamples=10)
    assert np.isnan([undefined.value, undefined.low, undefined.high]).all()


def test_pairing_cancels_what_both_share() -> None:
    better = VALUES + 0.01 + 0.001 * rng.normal(size=400)
    paired = paired_difference(better, VALUES, mean, seed=0)
    assert paired.value == pytest.approx(0.01, abs=0.001)
    assert 0 < paired.low < paired.value < paired.high
    alone = bootstrap_interval(VALUES, mean, seed=0)
    assert paired.high - paired.low < 0.01 * (alone.high - alone.low)
    assert paired_difference(VALUES, VALUES, mean, seed=0) == Interval(0.0, 0.0, 0.0)


def test_samples_must_be_there_and_match() -> None:
    with pytest.raises(DataError, match="no samples"):
        bootstrap_interval(np.zeros(0), mean, seed=0)
    with pytest.raises(DataError, match="3 samples cannot be paired with 2"):
        paired_difference(np.zeros(3), np.zeros(2), mean, seed=0)
