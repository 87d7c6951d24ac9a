import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from onnxcomp.errors import DataError, OptionError
from onnxcomp.numerics.affine import (
    IntGrid,
    dequantize,
    fake_quantize,
    parameters_from_range,
    quantize,
    spread_blocks,
)
from onnxcomp.numerics.arrays import Floats, Ints

INT8, UINT8 = IntGrid(8, signed=True, symmetric=True), IntGrid(8, signed=False, symmetric=False)
INT4, UINT4 = IntGrid(4, signed=True, symmetric=True), IntGrid(4, signed=False, symmetric=False)
grids = st.builds(IntGrid, st.integers(2, 16), st.booleans(), st.booleans())
bounds = st.floats(width=32, allow_nan=False, allow_infinity=False)


@pytest.mark.parametrize(
    ("grid", "limits", "dtype"),
    [
        (INT8, (-127, 127, 0), np.int8),
        (UINT8, (0, 255, 128), np.uint8),
        (IntGrid(8, signed=True, symmetric=False), (-128, 127, 0), np.int8),
        (IntGrid(7, signed=True, symmetric=True), (-64, 63, 0), np.int8),
        (INT4, (-8, 7, 0), np.int8),
        (UINT4, (0, 15, 8), np.uint8),
        (IntGrid(16, signed=False, symmetric=False), (0, 65535, 32768), np.uint16),
    ],
)
def test_grid_limits(grid: IntGrid, limits: tuple[int, int, int], dtype: type[np.generic]) -> None:
    assert (grid.qmin, grid.qmax, grid.middle) == limits
    assert grid.dtype == dtype


@pytest.mark.parametrize("bits", [1, 17])
def test_grid_refuses_other_widths(bits: int) -> None:
    with pytest.raises(OptionError, match=f"{bits} bits"):
        IntGrid(bits, signed=True, symmetric=True)


@given(bounds, bounds, grids)
def test_parameters_hold_zero_and_the_range(a: float, b: float, grid: IntGrid) -> None:
    low, high = min(a, b), max(a, b)
    scale, zero_point = parameters_from_range(low, high, grid)
    assert scale.dtype == np.float32
    assert np.finfo(np.float32).tiny <= scale <= np.finfo(np.float32).max
    assert grid.qmin <= zero_point <= grid.qmax
    assert zero_point == grid.middle or not grid.symmetric
    zero = np.zeros((), np.float32)
    assert dequantize(quantize(zero, scale, zero_point, grid), scale, zero_point) == 0
    # The zero point's rounding shifts the grid by half a step at most; scale's float32 rounding adds a little.
    ends = np.array([low, high])
    assert np.all(np.abs(fake_quantize(ends, scale.astype(np.float64), zero_point, grid) - ends) <= 1.01 * float(scale))


def test_parameters_are_per_element() -> None:
    scale, zero_point = parameters_from_range(np.array([-1.0, 0.0, 2.0]), np.array([1.0, 51.0, 5.1]), UINT8)
    np.testing.assert_allclose(scale, [2 / 255, 0.2, 0.02], rtol=1e-7)
    np.testing.assert_array_equal(zero_point, [128, 0, 0])


@pytest.mark.parametrize(("low", "high"), [(np.nan, 1.0), (0.0, np.inf)])
def test_parameters_refuse_what_is_not_finite(low: float, high: float) -> None:
    with pytest.raises(DataError, match="not finite"):
        parameters_from_range(low, high, UINT8)


def onnx_quantize(values: Floats, scale: Floats, zero_point: Ints) -> tuple[Ints, Floats]:
    """QuantizeLinear and DequantizeLinear per row by ONNX's reference implementation."""
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], axis=0),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], axis=0),
        ],
        "oracle",
        [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in "xsz"],
        [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in "qy"],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    integers, result = ReferenceEvaluator(model).run(None, {"x": values, "s": scale, "z": zero_point})
    return np.asarray(integers), np.asarray(result)


@pytest.mark.parametrize("grid", [UINT8, IntGrid(8, signed=True, symmetric=False), UINT4, INT4])
def test_quantize_is_onnx_quantize_linear(grid: IntGrid) -> None:
    rng = np.random.default_rng(1)
    # Multiples of a half meet every tie, and reach far outside the range.
    values = (rng.integers(-600, 600, (3, 400)) / 2).astype(np.float32)
    scale, zero_point = np.array([1.0, 0.5, 3.0], np.float32), rng.integers(grid.qmin, grid.qmax, 3).astype(grid.dtype)
    narrow = {"int4": ml_dtypes.int4, "uint4": ml_dtypes.uint4}.get(f"{grid.dtype.name[:-1]}{grid.bits}", grid.dtype)
    integers, result = onnx_quantize(values, scale, zero_point.astype(narrow))

    ours = quantize(values, scale[:, None], zero_point[:, None], grid)
    assert ours.dtype == grid.dtype
    np.testing.assert_array_equal(ours, integers.astype(grid.dtype))
    np.testing.assert_array_equal(dequantize(ours, scale[:, None], zero_point[:, None]), result)
    np.testing.assert_array_equal(fake_quantize(values, scale[:, None], zero_point[:, None], grid), result)


def test_quantize_saturates_what_overflows_float32() -> None:
    values = np.array([-3e38, 3e38], np.float32)
    np.testing.assert_array_equal(quantize(values, np.array(1e-38, np.float32), 0, INT8), [-127, 127])


def test_spread_blocks_cuts_the_last_block() -> None:
    spread = spread_blocks(np.array([[1, 2], [3, 4]]), block=3, width=5)
    np.testing.assert_array_equal(spread, [[1, 1, 1, 2, 2], [3, 3, 3, 4, 4]])
