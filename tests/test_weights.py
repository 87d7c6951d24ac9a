"""Each step of weight rounding lowers the layer's error on its inputs."""

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from onnxcomp.layers import Layer, layer_of
from onnxcomp.numerics.affine import IntGrid, dequantize, spread_blocks
from onnxcomp.observations import Gram
from onnxcomp.weights import RoundedWeights, Rounding, mean_error, round_weights

INT8 = IntGrid(8, signed=True, symmetric=True)
INT4 = IntGrid(4, signed=True, symmetric=True)
NEAREST = Rounding(gptq=False, sweeps=0, bias_correction=False)


def layer_and_rows(groups: int = 1, seed: int = 0) -> tuple[Layer, NDArray[np.float32]]:
    """A convolution of 16 x 48 per group and correlated inputs with a mean, as behind a Relu."""
    random = np.random.default_rng(seed)
    weight = random.normal(size=(16 * groups, 48, 1)).astype(np.float32)
    rows = np.maximum(random.normal(size=(groups, 400, 12)) @ random.normal(size=(groups, 12, 48)), 0) + 0.2
    node = ir.node("Conv", [ir.val("x"), ir.val("w", const_value=ir.tensor(weight))], {"group": groups}, name="conv")
    layer = layer_of(node)
    assert layer is not None
    return layer, rows.astype(np.float32)


def error(layer: Layer, rows: NDArray[Any], grid: IntGrid, rounded: RoundedWeights, block: int | None = None) -> float:
    """Mean squared error of the layer's outputs on the rows, its bias corrected."""
    W = layer.matrix()
    width = block or W.shape[1]
    zero = grid.middle if rounded.zero_point is None else spread_blocks(rounded.zero_point, width, W.shape[1])
    values = dequantize(rounded.integers, spread_blocks(rounded.scale, width, W.shape[1]), zero)
    lost = (W - values).reshape(layer.groups, -1, W.shape[1])
    outputs = np.einsum("gni,goi->ngo", rows.astype(np.float64), lost).reshape(rows.shape[1], -1)
    return float(np.square(outputs - rounded.bias_shift).mean())


@pytest.mark.parametrize("grid", [INT8, INT4, IntGrid(4, signed=False, symmetric=False)])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("block", [None, 20])
def test_each_step_lowers_the_error(grid: IntGrid, groups: int, block: int | None) -> None:
    layer, rows = layer_and_rows(groups)
    gram = Gram.of(rows)

    def after(rounding: Rounding) -> float:
        return error(layer, rows, grid, round_weights(layer, grid, rounding, gram, block=block), block)

    nearest = after(NEAREST)
    corrected = after(replace(NEAREST, bias_correction=True))
    feedback = after(replace(NEAREST, gptq=True))
    polished = after(replace(NEAREST, gptq=True, sweeps=3))
    everything = after(Rounding())
    assert nearest < after(replace(NEAREST, search=False))
    assert corrected < nearest
    assert feedback < 0.8 * nearest
    assert polished < feedback
    assert everything <= polished


def test_the_bias_takes_the_mean_of_the_error() -> None:
    layer, rows = layer_and_rows(groups=2)
    rounded = round_weights(layer, INT4, replace(NEAREST, bias_correction=True), Gram.of(rows))
    lost = (layer.matrix() - dequantize(rounded.integers, rounded.scale, 0)).reshape(2, 16, 48)
    expected = np.einsum("gni,goi->go", rows.astype(np.float64), lost).reshape(-1) / rows.shape[1]
    np.testing.assert_allclose(rounded.bias_shift, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(mean_error(layer.matrix(), rounded, Gram.of(rows), INT4), rounded.bias_shift)


def test_without_a_gram_weights_go_to_the_nearest() -> None:
    layer, _ = layer_and_rows()
    rounded = round_weights(layer, INT8, Rounding(), None)
    expected = np.clip(np.rint(layer.matrix() / rounded.scale), -127, 127)
    np.testing.assert_array_equal(rounded.integers, expected)
    assert rounded.integers.dtype == np.int8
    assert not rounded.bias_shift.any()


def test_without_a_search_the_largest_weight_sets_the_scale() -> None:
    layer, _ = layer_and_rows()
    rounded = round_weights(layer, INT8, replace(NEAREST, search=False), None)
    largest = np.abs(layer.matrix()).max(axis=1)
    np.testing.assert_allclose(rounded.scale[:, 0], largest / 127, rtol=1e-6)
    assert (np.abs(rounded.integers.astype(int)).max(axis=1) == 127).all()


def test_scales_keep_their_lower_bound() -> None:
    layer, rows = layer_and_rows()
    least = np.linspace(0.001, 0.2, 16)
    rounded = round_weights(layer, INT8, Rounding(), Gram.of(rows), least_scale=least)
    assert (rounded.scale[:, 0] >= least.astype(np.float32)).all()
    assert rounded.scale[-1, 0] == np.float32(0.2)


def test_another_matrix_can_be_rounded_in_the_layers_place() -> None:
    layer, rows = layer_and_rows()
    other = 2 * layer.matrix()
    rounded = round_weights(layer, INT8, NEAREST, Gram.of(rows), matrix=other)
    np.testing.assert_allclose(dequantize(rounded.integers, rounded.scale, 0), other, atol=2 * rounded.scale.max())


def test_dead_inputs_do_no_harm() -> None:
    layer, rows = layer_and_rows()
    rows[..., 3] = 0
    rounded = round_weights(layer, INT8, Rounding(), Gram.of(rows))
    assert np.isfinite(rounded.scale).all()
    nearest = round_weights(layer, INT8, NEAREST, Gram.of(rows))
    assert error(layer, rows, INT8, rounded) < 0.5 * error(layer, rows, INT8, nearest)


def test_needs_gram_says_which_steps_use_data() -> None:
    assert not NEAREST.needs_gram
    for step in ({"gptq": True}, {"sweeps": 1}, {"bias_correction": True}):
        assert replace(NEAREST, **step).needs_gram


def test_cache_saves_the_work_and_tells_settings_apart() -> None:
    layer, rows = layer_and_rows()
    cache: dict[Any, Any] = {}
    gram = Gram.of(rows)
    first = round_weights(layer, INT8, Rounding(), gram, cache=cache)
    assert round_weights(layer, INT8, Rounding(), gram, cache=cache) is first
    other = round_weights(layer, INT4, Rounding(), gram, cache=cache)
    assert other is not first
    assert len(cache) == 2
