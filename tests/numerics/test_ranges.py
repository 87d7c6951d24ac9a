from collections.abc import Callable
from fractions import Fraction
from math import ceil

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxcomp.errors import OptionError
from onnxcomp.numerics.affine import IntGrid, fake_quantize, parameters_from_range, spread_blocks
from onnxcomp.numerics.histogram import Histogram
from onnxcomp.numerics.ranges import blockwise, entropy, expected_error, minmax, mse, percentile, weight_scales

Array = NDArray[np.float64]

INT8, UINT8 = IntGrid(8, signed=True, symmetric=True), IntGrid(8, signed=False, symmetric=False)
INT4, UINT4 = IntGrid(4, signed=True, symmetric=True), IntGrid(4, signed=False, symmetric=False)
rng = np.random.default_rng(3)
NORMAL = rng.normal(size=20_000)
SAMPLES = {
    "normal": NORMAL,
    "relu": np.maximum(NORMAL, 0),
    "gelu": NORMAL * (NORMAL > -0.5) + 0.01 * NORMAL,
    "heavy": rng.standard_t(3, size=20_000),
    "shifted": NORMAL + 6,
    "negative": -np.abs(NORMAL),
}


@pytest.fixture(params=SAMPLES)
def values(request: pytest.FixtureRequest) -> Array:
    return SAMPLES[request.param].astype(np.float32).astype(np.float64)


def error_of(values: Array, low: float, high: float, grid: IntGrid) -> float:
    scale, zero_point = parameters_from_range(low, high, grid)
    return float(np.mean((fake_quantize(values, scale.astype(np.float64), zero_point, grid) - values) ** 2))


def test_minmax_is_exact(values: Array) -> None:
    assert minmax(Histogram.of(values)) == (values.min(), values.max())


@pytest.mark.parametrize("percent", [50, 99, 99.9, 99.99, 100])
def test_percentile_is_within_a_bin(values: Array, percent: float) -> None:
    histogram = Histogram.of(values)
    tail = (1 - Fraction(str(percent)) / 100) / 2  # exact: 0.005% of 20,000 is one value, in floats a little more
    ranks = [max(ceil(share * values.size), 1) for share in (tail, 1 - tail)]
    oracle = np.sort(values)[np.array(ranks) - 1]
    np.testing.assert_allclose(percentile(histogram, percent), oracle, rtol=0, atol=histogram.width)


def test_percentile_steps_over_empty_bins() -> None:
    histogram = Histogram.of(np.array([1.0] * 9 + [100.0]))
    assert percentile(histogram, 100) == (1.0, 100.0)
    assert percentile(histogram, 80)[1] <= 1.0 + histogram.width


@pytest.mark.parametrize("percent", [0, -1, 100.1, float("nan")])
def test_percentile_refuses_what_is_no_share(percent: float) -> None:
    with pytest.raises(OptionError, match="percentile"):
        percentile(Histogram.empty(), percent)


def brute_force_threshold(values: Array, levels: int, width: float) -> float:
    """Migacz's algorithm word for word on raw values, one threshold and one level at a time."""
    magnitudes = np.abs(values[values != 0])
    bins = int(np.ceil(magnitudes.max() / width))
    counts = np.histogram(magnitudes, bins=np.arange(bins + 1) * width)[0]
    best, threshold = np.inf, 0.0
    for stop in range(levels, bins + 1):
        inside = counts[:stop].astype(np.float64)
        P = inside.copy()
        P[-1] += np.count_nonzero(magnitudes >= stop * width)
        Q = np.zeros(stop)
        for level in range(levels):
            members = [i for i in range(stop) if i * levels // stop == level and inside[i]]
            Q[members] = inside[members].sum() / max(len(members), 1)
        if P[-1] and not Q[-1]:
            continue
        P, Q = P / P.sum(), Q / Q.sum()
        divergence = float(np.sum(P[P > 0] * np.log(P[P > 0] / Q[P > 0])))
        if divergence <= best:
            best, threshold = divergence, stop * width
    return threshold


@pytest.mark.parametrize(("name", "grid", "levels"), [("relu", UINT4, 16), ("relu", INT4, 8), ("heavy", UINT4, 8)])
def test_entropy_is_migacz_on_the_raw_values(name: str, grid: IntGrid, levels: int) -> None:
    values = SAMPLES[name][:4000]
    histogram = Histogram.of(values, bins=160)  # few enough bins that every threshold is tried
    threshold = brute_force_threshold(values, levels, histogram.width)
    assert entropy(histogram, grid) == (max(-threshold, values.min()), min(threshold, values.max()))


def test_entropy_does_not_see_zeros() -> None:
    values = SAMPLES["heavy"]
    padded = np.concatenate([values, np.zeros(100_000)])
    assert entropy(Histogram.of(padded), UINT8) == entropy(Histogram.of(values), UINT8)


def test_entropy_keeps_the_range_of_few_bins() -> None:
    assert entropy(Histogram.of(np.array([-1.0, 3.0]), bins=64), UINT8) == (-1.0, 3.0)


@pytest.mark.parametrize("grid", [UINT8, INT8, UINT4, INT4])
def test_mse_is_near_the_best_of_all_ranges(values: Array, grid: IntGrid) -> None:
    found = error_of(values, *mse(Histogram.of(values), grid), grid)
    sample = values[:5000]
    shares = np.linspace(0, 1, 41)[1:]
    lows = [0.0] if values.min() >= 0 else values.min() * shares
    highs = [0.0] if values.max() <= 0 else values.max() * shares
    if grid.symmetric:
        extreme = np.abs(values).max()
        pairs = [(-extreme * share, extreme * share) for share in shares]
    else:
        pairs = [(low, high) for low in lows for high in highs]
    # Judge all pairs on a part of the values, the best 20 on all of them.
    pairs.sort(key=lambda pair: error_of(sample, pair[0], pair[1], grid))
    best = min(error_of(values, pair[0], pair[1], grid) for pair in pairs[:20])
    # Bins blur each value by half a width, and the search steps by a few percent of a flat minimum.
    assert found <= 1.02 * best


def test_expected_error_is_that_of_the_values(values: Array) -> None:
    histogram = Histogram.of(values)
    for share in (1.0, 0.3):
        low, high = values.min() * share, values.max() * share
        exact = error_of(values, low, high, UINT4)
        # A value is at most width / 2 from its centre, so the root of the error is off by at most as much.
        difference = np.sqrt(expected_error(histogram, low, high, UINT4)) - np.sqrt(exact)
        assert abs(difference) <= histogram.width / 2


def test_mse_clips_a_lone_outlier_where_minmax_does_not() -> None:
    values = np.append(SAMPLES["relu"], 40.0)
    assert mse(Histogram.of(values), UINT4)[1] < 10
    assert minmax(Histogram.of(values))[1] == 40


METHODS: list[Callable[[Histogram], tuple[float, float]]] = [
    minmax,
    percentile,
    lambda histogram: entropy(histogram, UINT8),
    lambda histogram: mse(histogram, UINT8),
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "data", [[], [0.0, 0.0], [5.0], [-5.0, -5.0], [1e-45], [3.4e38, -3.4e38], [np.nan], [np.nan, 2.0]]
)
def test_methods_survive_degenerate_data(method: Callable[[Histogram], tuple[float, float]], data: list[float]) -> None:
    low, high = method(Histogram.of(np.array(data, np.float32)))
    finite = np.array(data, np.float32)[np.isfinite(data)]
    assert min(finite.min(initial=0), 0) <= low <= high <= max(finite.max(initial=0), 0)
    scale, _ = parameters_from_range(low, high, UINT8)
    assert 0 < scale < np.inf


def correlated_gram(inputs: int) -> Array:
    X = rng.normal(size=(4 * inputs, inputs)) @ rng.normal(size=(inputs, inputs))
    return X.T @ X / len(X)


def nearest_error(W: Array, scale: Array, zero_point: Array, grid: IntGrid, H: Array) -> Array:
    delta = fake_quantize(W, scale, zero_point, grid) - W
    errors: Array = np.einsum("ri,ij,rj->r", delta, H, delta)
    return errors


@pytest.mark.parametrize("grid", [INT8, INT4, IntGrid(2, signed=True, symmetric=True)])
@pytest.mark.parametrize("weighted", [True, False])
def test_weight_scales_are_near_the_best_of_a_fine_search(grid: IntGrid, weighted: bool) -> None:
    W = rng.standard_t(4, size=(6, 24))
    gram = correlated_gram(24)
    # The search damps H by 1% of its mean diagonal; judge it by what it was asked to minimise.
    H = gram + 0.01 * np.diagonal(gram).mean() * np.eye(24) if weighted else np.eye(24)
    found = nearest_error(
        W, weight_scales(W, grid, gram if weighted else None)[:, None].astype(float), np.zeros(1), grid, H
    )
    full = np.abs(W).max(axis=1) / grid.qmax
    trials = [nearest_error(W, (full * share)[:, None], np.zeros(1), grid, H) for share in np.linspace(0.35, 1, 400)]
    assert np.all(found <= trials[-1] * (1 + 1e-5))  # never worse than min-max, in float32
    # The error is jagged: 34 trials, 18 of them around the best, cannot promise more than the best twentieth of 400.
    assert np.all(found <= np.quantile(trials, 0.05, axis=0))


@pytest.mark.parametrize("grid", [INT4, UINT4, INT8, UINT8])
@pytest.mark.parametrize("width", [32, 44])
@pytest.mark.parametrize("weighted", [True, False])
def test_blockwise_beats_minmax(grid: IntGrid, width: int, weighted: bool) -> None:
    W = rng.standard_t(4, size=(5, width)) + 0.3
    H = correlated_gram(width) if weighted else None
    scales, zero_points = blockwise(W, 16, grid, H)
    assert scales.shape == (5, -(-width // 16))
    assert (zero_points is None) == grid.symmetric
    zeros = np.zeros(scales.shape) if zero_points is None else zero_points.astype(float)
    for index, start in enumerate(range(0, width, 16)):
        part = W[:, start : start + 16]
        local = np.eye(part.shape[1]) if H is None else H[start : start + 16, start : start + 16]
        if H is not None:
            local = local + 0.01 * np.diagonal(H).mean() * np.eye(len(local))
        plain, plain_zero = parameters_from_range(part.min(axis=1), part.max(axis=1), grid)
        found = nearest_error(part, scales[:, [index]].astype(float), zeros[:, [index]], grid, local)
        reference = nearest_error(part, plain[:, None].astype(float), plain_zero[:, None].astype(float), grid, local)
        assert np.all(found <= reference * (1 + 1e-4))  # float32 in the search
        assert found.sum() < reference.sum() or grid.bits == 8


def test_blockwise_rows_and_blocks_do_not_influence_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    W = rng.normal(size=(7, 40))
    scales, zero_points = blockwise(W, 8, UINT4)
    for row in range(7):
        alone, alone_zero = blockwise(W[[row], 16:24], 8, UINT4)
        assert zero_points is not None
        assert alone_zero is not None
        assert (alone[0, 0], alone_zero[0, 0]) == (scales[row, 2], zero_points[row, 2])
    monkeypatch.setattr("onnxcomp.numerics.ranges._ELEMENTS", 80)
    np.testing.assert_array_equal(blockwise(W, 8, UINT4)[0], scales)


def test_dead_inputs_and_dead_rows_keep_their_whole_range() -> None:
    W = np.array([[1.0, -2.0, 4.0], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(weight_scales(W, INT8, np.zeros((3, 3))), weight_scales(W, INT8), rtol=1e-6)
    assert weight_scales(W, INT8)[1] == 1.0


def test_spread_blocks_fit_the_weights() -> None:
    W = rng.normal(size=(3, 20))
    scales, zero_points = blockwise(W, 8, UINT4)
    assert zero_points is not None
    wide = fake_quantize(W, spread_blocks(scales, 8, 20), spread_blocks(zero_points, 8, 20), UINT4)
    assert np.abs(wide - W).max() < scales.max()
