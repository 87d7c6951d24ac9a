from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from onnxcomp.numerics.affine import IntGrid, dequantize, quantize, spread_blocks
from onnxcomp.numerics.arrays import Floats, Ints
from onnxcomp.numerics.feedback import layer_error
from onnxcomp.numerics.gptq import polish, round_gptq
from onnxcomp.numerics.ranges import blockwise, weight_scales

Array = NDArray[np.float64]

GRIDS = {
    "int8": IntGrid(8, signed=True, symmetric=True),
    "int4": IntGrid(4, signed=True, symmetric=True),
    "uint4": IntGrid(4, signed=False, symmetric=False),
}
TINY = IntGrid(2, signed=True, symmetric=True)
ROUNDING = 1 + 1e-9  # float64 sums of up to 10^4 terms


def correlated(seed: int, out: int, width: int, samples: int) -> tuple[Array, Array]:
    """Weights and the Gram matrix of inputs that share a few strong directions, as real activations do."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(width, width)) * np.geomspace(1, 0.05, width)[:, None]
    X = rng.normal(size=(samples, width)) @ mixing
    return rng.normal(size=(out, width)), X.T @ X / samples


def error(W: Array, H: Array, Q: Ints, scale: Floats, zero_point: Ints | int) -> float:
    return layer_error(dequantize(Q, scale, zero_point) - W, H)


def parameters(W: Array, H: Array, grid: IntGrid, block: int | None) -> tuple[Floats, Ints | int]:
    if block is None and grid.symmetric:
        return weight_scales(W, grid, H)[:, None], 0
    width = W.shape[1]
    scales, zero_points = blockwise(W, block or width, grid, H)
    spread = spread_blocks(scales, block or width, width)
    return spread, 0 if zero_points is None else spread_blocks(zero_points, block or width, width)


def test_layer_error_is_the_output_error() -> None:
    rng = np.random.default_rng(0)
    dW, X = rng.normal(size=(3, 5)), rng.normal(size=(40, 5))
    assert layer_error(dW, X.T @ X) == pytest.approx(np.sum((X @ dW.T) ** 2), rel=1e-12)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("block", [None, 16])
@pytest.mark.parametrize("order", [True, False])
def test_gptq_beats_nearest_and_polish_beats_gptq(grid: IntGrid, block: int | None, order: bool) -> None:
    W, H = correlated(1, out=12, width=40, samples=300)
    scale, zero_point = parameters(W, H, grid, block)
    nearest = quantize(W, scale, zero_point, grid)
    rounded = round_gptq(W, H, scale, zero_point, grid, order=order)
    polished = polish(W, H, rounded, scale, zero_point, grid)
    for integers in (rounded, polished):
        assert integers.dtype == grid.dtype
        assert integers.shape == W.shape
        assert grid.qmin <= integers.min() <= integers.max() <= grid.qmax
    errors = [error(W, H, Q, scale, zero_point) for Q in (nearest, rounded, polished)]
    assert errors[1] < 0.8 * errors[0]  # inputs this correlated leave a lot to win
    assert errors[2] < errors[1]


@pytest.mark.parametrize("block", [1, 7, 40, 128])
def test_blocks_only_order_the_work(block: int) -> None:
    W, H = correlated(2, out=6, width=40, samples=300)
    scale, zero_point = parameters(W, H, GRIDS["int4"], None)
    expected = round_gptq(W, H, scale, zero_point, GRIDS["int4"], block=13)
    np.testing.assert_array_equal(round_gptq(W, H, scale, zero_point, GRIDS["int4"], block=block), expected)
    nearest = quantize(W, scale, zero_point, GRIDS["int4"])
    polished = polish(W, H, nearest, scale, zero_point, GRIDS["int4"], block=13)
    np.testing.assert_array_equal(polish(W, H, nearest, scale, zero_point, GRIDS["int4"], block=block), polished)


def reference_gptq(w: Array, scale: float, H: Array, grid: IntGrid, damping: float) -> Array:
    """Optimal brain quantization of one row in the given order, each step by inverting what is left of H."""
    w, H = w.copy(), H + damping * np.diagonal(H).mean() * np.eye(len(H))
    for q in range(len(w)):
        inverse = np.linalg.inv(H[q:, q:])
        rounded = np.clip(np.rint(w[q] / scale), grid.qmin, grid.qmax) * scale
        w[q:] -= (w[q] - rounded) / inverse[0, 0] * inverse[:, 0]
        w[q] = rounded
    return w


def test_gptq_is_optimal_brain_quantization_in_a_fixed_order() -> None:
    W, H = correlated(3, out=8, width=20, samples=100)
    scale = weight_scales(W, GRIDS["int4"], H)[:, None].astype(float)
    expected = np.array([reference_gptq(*row, H, GRIDS["int4"], 1e-2) for row in zip(W, scale[:, 0], strict=True)])
    nearest = dequantize(quantize(W, scale, 0, GRIDS["int4"]), scale, 0)
    greedy_loses = np.array([layer_error(e[None], H) for e in expected - W]) > [
        layer_error(e[None], H) for e in nearest - W
    ]
    expected[greedy_loses] = nearest[greedy_loses]
    assert 0 < greedy_loses.sum() < 8  # both ways are seen
    rounded = round_gptq(W, H, scale, 0, GRIDS["int4"], order=False)
    np.testing.assert_array_equal(rounded, np.rint(expected / scale))


def best_of_all(w: Array, H: Array, scale: float, grid: IntGrid) -> float:
    levels = range(grid.qmin, grid.qmax + 1)
    return min(layer_error(scale * np.array([choice]) - w, H) for choice in product(levels, repeat=len(w)))


def test_tiny_rows_come_near_the_best_of_all_roundings() -> None:
    nearest, found, best = np.zeros((3, 10))
    for seed in range(10):
        W, H = correlated(seed, out=4, width=4, samples=50)
        scale = np.abs(W).max(axis=1, keepdims=True) / 1.5
        plain = quantize(W, scale, 0, TINY)
        polished = polish(W, H, round_gptq(W, H, scale, 0, TINY), scale, 0, TINY)
        nearest[seed], found[seed] = error(W, H, plain, scale, 0), error(W, H, polished, scale, 0)
        best[seed] = sum(best_of_all(row, H, float(step), TINY) for row, step in zip(W, scale[:, 0], strict=True))
    assert np.all(found >= best / ROUNDING)
    # Greedy with repair is no exhaustive search, but it closes nine tenths of the gap.
    assert np.sum(nearest - found) >= 0.9 * np.sum(nearest - best)


def test_polish_stays_at_the_best_of_all_roundings() -> None:
    W, H = correlated(7, out=1, width=4, samples=50)
    scale = np.abs(W).max(axis=1, keepdims=True) / 1.5
    choices = [np.array([choice], np.int8) for choice in product(range(-2, 2), repeat=4)]
    best = min(choices, key=lambda Q: error(W, H, Q, scale, 0))
    np.testing.assert_array_equal(polish(W, H, best, scale, 0, TINY), best)


@given(st.integers(0, 10_000), st.sampled_from(sorted(GRIDS)), st.integers(2, 30), st.booleans())
@settings(max_examples=40, deadline=None)
def test_every_sweep_is_at_most_as_bad_as_the_last(seed: int, name: str, samples: int, blocks: bool) -> None:
    grid = GRIDS[name]
    W, H = correlated(seed, out=3, width=12, samples=samples)  # fewer samples than inputs: H is singular
    scale, zero_point = parameters(W, H, grid, 4 if blocks else None)
    integers = np.random.default_rng(seed).integers(grid.qmin, grid.qmax + 1, W.shape).astype(grid.dtype)
    level = error(W, H, integers, scale, zero_point)
    for _ in range(4):
        integers = polish(W, H, integers, scale, zero_point, grid, sweeps=1)
        lower = error(W, H, integers, scale, zero_point)
        assert lower <= level * ROUNDING
        level = lower


@given(st.integers(0, 10_000), st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_no_row_is_worse_than_nearest(seed: int, samples: int) -> None:
    W, H = correlated(seed, out=3, width=12, samples=samples)
    scale, _ = parameters(W, H, GRIDS["int4"], None)
    nearest, rounded = quantize(W, scale, 0, GRIDS["int4"]), round_gptq(W, H, scale, 0, GRIDS["int4"])
    for row in range(3):
        part = slice(row, row + 1)
        plain = error(W[part], H, nearest[part], scale[part], 0)
        assert error(W[part], H, rounded[part], scale[part], 0) <= plain * ROUNDING


def test_dead_and_constant_inputs() -> None:
    rng = np.random.default_rng(5)
    X = rng.normal(size=(200, 12))
    X[:, [0, 5]], X[:, 7] = 0.0, 3.0
    H, W = X.T @ X / 200, rng.normal(size=(4, 12))
    scale, _ = parameters(W, H, GRIDS["int4"], None)
    nearest, rounded = quantize(W, scale, 0, GRIDS["int4"]), round_gptq(W, H, scale, 0, GRIDS["int4"])
    polished = polish(W, H, rounded, scale, 0, GRIDS["int4"])
    np.testing.assert_array_equal(rounded[:, [0, 5]], nearest[:, [0, 5]])
    np.testing.assert_array_equal(polished[:, [0, 5]], nearest[:, [0, 5]])
    assert error(W, H, polished, scale, 0) < error(W, H, nearest, scale, 0)


def test_without_inputs_rounding_is_to_the_nearest() -> None:
    W, H = np.random.default_rng(6).normal(size=(3, 5)), np.zeros((5, 5))
    scale = weight_scales(W, GRIDS["int8"])[:, None]
    nearest = quantize(W, scale, 0, GRIDS["int8"])
    np.testing.assert_array_equal(round_gptq(W, H, scale, 0, GRIDS["int8"]), nearest)
    np.testing.assert_array_equal(polish(W, H, nearest, scale, 0, GRIDS["int8"]), nearest)


def test_one_input_drives_all_the_others() -> None:
    """All inputs equal: only the sum of a row's weights matters, and GPTQ must keep it to within a step."""
    W = np.random.default_rng(8).uniform(-1, 1, size=(5, 16))
    H, scale = np.ones((16, 16)), np.full((5, 1), 0.2)
    rounded = round_gptq(W, H, scale, 0, GRIDS["int4"], damping=1e-6)
    sums = dequantize(rounded, scale, 0).sum(axis=1)
    assert np.all(np.abs(sums - W.sum(axis=1)) <= 0.1 * (1 + 1e-3))  # half a step, and a little for the damping


def test_singular_gram_without_damping_is_an_error() -> None:
    W, H = np.ones((1, 2)), np.zeros((2, 2))
    with pytest.raises(np.linalg.LinAlgError):
        round_gptq(W, H, np.ones((1, 1)), 0, TINY, damping=0.0)
