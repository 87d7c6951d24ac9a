import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from onnxcomp.numerics.histogram import Histogram

Values = NDArray[np.float32]

# Any float32 at all, denormals, infinities and NaN included, or plain numbers that share bins.
anything = arrays(np.float32, st.integers(0, 20), elements=st.floats(width=32))
ordinary = arrays(np.float32, st.integers(0, 20), elements=st.floats(-10, 10, width=32))
samples = st.one_of(anything, ordinary)


def assert_same(left: Histogram, right: Histogram) -> None:
    for name in ("bins", "minimum", "maximum", "zeros", "nonfinite", "exponent", "first"):
        assert getattr(left, name) == getattr(right, name), name
    np.testing.assert_array_equal(left.counts, right.counts)
    # Sums of at most 60 float64 terms, in another order: 60 roundings of the sum of magnitudes.
    bound = 60 * np.finfo(np.float64).eps
    assert math.isclose(left.squares, right.squares, rel_tol=bound)
    assert abs(left.total - right.total) <= bound * math.sqrt(60 * left.squares)


@given(samples, samples, samples)
def test_merge_is_exact_associative_and_commutative(a: Values, b: Values, c: Values) -> None:
    x, y, z = (Histogram.of(part, bins=16) for part in (a, b, c))
    whole = Histogram.of(np.concatenate([a, b, c]), bins=16)
    assert_same(x.merge(y).merge(z), whole)
    assert_same(x.merge(y.merge(z)), whole)
    assert_same(z.merge(x).merge(y), whole)
    assert_same(x.update(b).update(c), whole)


@given(samples)
def test_empty_is_the_identity(a: Values) -> None:
    histogram = Histogram.of(a, bins=16)
    assert_same(histogram.merge(Histogram.empty(16)), histogram)
    assert_same(Histogram.empty(16).merge(histogram), histogram)
    assert_same(Histogram.of(np.zeros(0, np.float32), bins=16), Histogram.empty(16))


@given(samples)
def test_every_value_is_in_its_bin(a: Values) -> None:
    histogram = Histogram.of(a, bins=16)
    finite = a[np.isfinite(a)].astype(np.float64)
    edges = histogram.edges
    assert 0.0 in edges
    assert edges.size - 1 == histogram.counts.size <= 16
    expected = [np.count_nonzero((finite >= low) & (finite < high)) for low, high in pairwise(edges)]
    np.testing.assert_array_equal(histogram.counts, expected)
    assert histogram.zeros == np.count_nonzero(finite == 0)
    assert histogram.nonfinite == a.size - finite.size
    assert histogram.nonzero_counts.sum() == np.count_nonzero(finite)


@pytest.mark.parametrize("low", [0.0, -1e-3, -4.0, -9.0])
def test_bins_are_as_narrow_as_they_can_be(low: float) -> None:
    histogram = Histogram.of(np.array([low, 5.0]), bins=64)
    half = histogram.width / 2
    assert math.floor(5.0 / half) - math.floor(low / half) >= 64


def test_totals_are_exact_over_many_chunks() -> None:
    values = np.arange(-70_000, 100_000, dtype=np.int32).reshape(170, 1000)
    histogram = Histogram.of(values)
    assert (histogram.minimum, histogram.maximum, histogram.count) == (-70_000, 99_999, 170_000)
    assert histogram.total == values.sum(dtype=np.int64)
    assert histogram.squares == np.square(values, dtype=np.int64).sum()
    assert histogram.mean == values.mean()


@pytest.mark.parametrize(
    ("values", "width"),
    [
        ([0.0, -0.0], 2.0**-160),
        ([1.0] * 3, 2.0**-11),
        ([1e-45], 2.0**-160),
        ([np.finfo(np.float32).max] * 2, 2.0**116),
        ([-np.finfo(np.float32).max, np.finfo(np.float32).max], 2.0**117),
    ],
)
def test_extremes(values: list[float], width: float) -> None:
    histogram = Histogram.of(np.array(values, np.float32))
    assert histogram.width == width
    assert histogram.count == len(values)
    assert histogram.minimum == np.array(values, np.float32).min()


def test_nonfinite_values_are_counted_apart() -> None:
    histogram = Histogram.of(np.array([np.nan, np.inf, -np.inf, 1.0, 0.0], np.float32))
    assert (histogram.nonfinite, histogram.count, histogram.minimum, histogram.maximum) == (3, 2, 0.0, 1.0)
    alone = Histogram.of(np.array([np.nan], np.float32))
    assert (alone.nonfinite, alone.count, alone.mean) == (1, 0, 0.0)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int8, np.uint8, np.bool_])
def test_takes_any_number_type(dtype: Any) -> None:
    values = np.array([0, 1, 1, 0, 1]).astype(dtype)
    assert_same(Histogram.of(values[::2], 8).update(values[1::2]), Histogram.of(values.astype(np.float32), 8))


def test_merging_takes_the_fewer_bins() -> None:
    a, b = np.linspace(-1, 3, 50), np.linspace(0, 9, 70)
    assert_same(Histogram.of(a, 64).merge(Histogram.of(b, 16)), Histogram.of(np.concatenate([a, b]), 16))
