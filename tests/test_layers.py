"""The matrix view of a layer computes what the operator computes, by ONNX Runtime."""

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from onnxcomp.layers import Layer, layer_of, layers
from onnxcomp.model import load
from onnxcomp.runtime import Session

Array = NDArray[Any]
RANDOM = np.random.default_rng(0)


def one_layer(operator: str, weight: Array, x: Array, index: int = 1, **attributes: Any) -> tuple[Layer, Array]:
    """A model of one node, as a layer, and its output for x."""
    inputs = ["x", "w"] if index == 1 else ["w", "x"]
    graph = helper.make_graph(
        [helper.make_node(operator, inputs, ["y"], **attributes)],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "w")],
    )
    model = load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    (layer,) = layers(model)
    return layer, np.asarray(Session(model).run({"x": x})["y"])


def is_undone(layer: Layer, x: Array, rows: Array, product: Array, expected: Array) -> None:
    """The way back from rows: exact for what the layer gives, the adjoint for what it reads."""
    assert layer.output_shape(x.shape) == expected.shape
    np.testing.assert_allclose(layer.from_output_rows(product, x.shape), expected, rtol=1e-4, atol=1e-5)
    weights = RANDOM.normal(size=rows.shape).astype(np.float32)
    assert np.vdot(rows, weights) == pytest.approx(np.vdot(x, layer.from_rows(weights, x.shape)), rel=1e-3, abs=1e-3)


def normal(*shape: int) -> Array:
    return RANDOM.normal(size=shape).astype(np.float32)


CONVOLUTIONS: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ((4, 3, 5), (2, 3, 11), {}),
    ((4, 3, 3), (2, 3, 11), {"strides": [2], "pads": [2, 1]}),
    ((4, 3, 3), (2, 3, 12), {"dilations": [3], "pads": [0, 4]}),
    ((6, 2, 3, 2), (2, 4, 7, 9), {"group": 2, "pads": [1, 0, 2, 1]}),
    ((6, 1, 3, 3), (1, 6, 8, 8), {"group": 6, "strides": [2, 1], "pads": [1, 1, 1, 1]}),
    ((4, 3, 3, 3), (2, 3, 9, 8), {"strides": [2, 3], "dilations": [2, 1], "pads": [2, 0, 1, 1]}),
    ((4, 3, 3, 4), (2, 3, 9, 8), {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    ((4, 3, 3, 4), (2, 3, 9, 8), {"strides": [2, 3], "auto_pad": "SAME_LOWER"}),
    ((4, 3, 3, 3), (2, 3, 9, 8), {"auto_pad": "VALID"}),
    ((4, 2, 2, 3, 2), (1, 2, 5, 6, 4), {"strides": [1, 2, 1], "pads": [1, 0, 0, 0, 1, 1]}),
]


@pytest.mark.parametrize(("weight", "data", "attributes"), CONVOLUTIONS)
def test_rows_times_matrix_is_the_convolution(
    weight: tuple[int, ...], data: tuple[int, ...], attributes: dict[str, Any]
) -> None:
    x = normal(*data)
    layer, expected = one_layer("Conv", normal(*weight), x, **attributes)
    rows = layer.rows(x, 10**9, np.random.default_rng(0))
    matrix = layer.matrix().reshape(layer.groups, -1, rows.shape[-1])
    product = np.einsum("gni,goi->ngo", rows, matrix).reshape(rows.shape[1], -1)
    # Positions run over the batch, then space; the operator has channels before space.
    np.testing.assert_allclose(product, np.moveaxis(expected, 1, -1).reshape(product.shape), rtol=1e-4, atol=1e-5)
    assert layer.input_width == rows.shape[-1]
    is_undone(layer, x, rows, product, expected)


@pytest.mark.parametrize(
    ("operator", "weight", "data", "index", "attributes"),
    [
        ("Gemm", (5, 3), (7, 5), 1, {}),
        ("Gemm", (3, 5), (7, 5), 1, {"transB": 1}),
        ("Gemm", (3, 5), (5, 7), 1, {"transA": 1, "transB": 1}),
        ("MatMul", (5, 3), (2, 4, 5), 1, {}),
        ("MatMul", (3, 5), (2, 5, 4), 0, {}),
    ],
)
def test_rows_times_matrix_is_the_product(
    operator: str, weight: tuple[int, ...], data: tuple[int, ...], index: int, attributes: dict[str, Any]
) -> None:
    x = normal(*data)
    layer, expected = one_layer(operator, normal(*weight), x, index, **attributes)
    rows = layer.rows(x, 10**9, np.random.default_rng(0))
    product = rows[0] @ layer.matrix().T
    in_rows = np.moveaxis(expected, -2, -1) if index == 0 else expected
    np.testing.assert_allclose(product, in_rows.reshape(product.shape), rtol=1e-5, atol=1e-5)
    is_undone(layer, x, rows, product, expected)


@pytest.mark.parametrize("group", [1, 2])
def test_transposed_convolution_is_one_product_per_tap(group: int) -> None:
    x = normal(2, 4, 3, 3)
    # A stride as large as the kernel keeps taps apart: each output element is one element of the product.
    layer, expected = one_layer("ConvTranspose", normal(4, 3, 2, 2), x, strides=[2, 2], group=group)
    rows = layer.rows(x, 10**9, np.random.default_rng(0))
    matrix = layer.matrix().reshape(group, -1, rows.shape[-1])
    product = np.einsum("gni,goi->ngo", rows, matrix).reshape(2, 3, 3, group * 3, 2, 2)
    np.testing.assert_allclose(product.transpose(0, 3, 1, 4, 2, 5).reshape(expected.shape), expected, atol=1e-5)


SHAPES: list[tuple[str, tuple[int, ...], int, dict[str, Any]]] = [
    ("Conv", (6, 2, 3, 2), 1, {"group": 2}),
    ("Conv", (6, 1, 3), 1, {"group": 6}),
    ("ConvTranspose", (4, 3, 2, 2), 1, {"group": 2}),
    ("Gemm", (5, 3), 1, {}),
    ("Gemm", (3, 5), 1, {"transB": 1}),
    ("MatMul", (5, 3), 1, {}),
    ("MatMul", (3, 5), 0, {}),
]


def bare(operator: str, weight: Array, index: int, attributes: dict[str, Any]) -> Layer:
    values = [ir.val("x"), ir.val("w", const_value=ir.tensor(weight))]
    layer = layer_of(ir.node(operator, values if index else values[::-1], attributes))
    assert layer is not None
    return layer


@pytest.mark.parametrize(("operator", "shape", "index", "attributes"), SHAPES)
def test_from_matrix_inverts_to_matrix(
    operator: str, shape: tuple[int, ...], index: int, attributes: dict[str, Any]
) -> None:
    weight = normal(*shape)
    layer = bare(operator, weight, index, attributes)
    np.testing.assert_array_equal(layer.from_matrix(layer.to_matrix(weight)), weight)
    assert layer.matrix().shape[1] == layer.input_width


@pytest.mark.parametrize(("operator", "shape", "index", "attributes"), SHAPES)
def test_scaling_channels_scales_outputs_and_inputs(
    operator: str, shape: tuple[int, ...], index: int, attributes: dict[str, Any]
) -> None:
    weight = normal(*shape)
    layer = bare(operator, weight, index, attributes)
    outputs, inputs = len(layer.by_output()), len(layer.by_input())
    data_shape = {"Gemm": (4, inputs), "MatMul": (4, inputs) if index else (inputs, 4)}.get(
        operator, (2, inputs, *[5] * (len(shape) - 2))
    )
    x = normal(*data_shape)
    r, c = RANDOM.uniform(0.5, 2, outputs), RANDOM.uniform(0.5, 2, inputs)

    def along(vector: Array, axis: int) -> Array:
        return vector.reshape([-1 if i == axis else 1 for i in range(x.ndim)])

    channel_axis = 0 if operator == "MatMul" and index == 0 else 1
    _, plain = one_layer(operator, weight, (x * along(c, channel_axis)).astype(np.float32), index, **attributes)
    _, scaled = one_layer(operator, layer.scaled(r, c).astype(np.float32), x, index, **attributes)
    np.testing.assert_allclose(scaled, plain * along(r, channel_axis), rtol=1e-4, atol=1e-5)


def test_channels_hold_their_own_weights() -> None:
    weight = np.arange(24, dtype=np.float32).reshape(4, 2, 3)
    layer = bare("Conv", weight, 1, {"group": 2})  # inputs 0, 1 go to outputs 0, 1
    np.testing.assert_array_equal(layer.by_output(), weight.reshape(4, 6))
    np.testing.assert_array_equal(layer.by_input()[1], np.concatenate([weight[0, 1], weight[1, 1]]))
    np.testing.assert_array_equal(layer.by_input()[2], np.concatenate([weight[2, 0], weight[3, 0]]))


def test_drawn_rows_are_some_of_all_and_the_same_for_a_seed() -> None:
    layer, _ = one_layer("Conv", normal(4, 3, 3, 3), normal(1, 3, 8, 8))
    x = normal(1, 3, 8, 8)
    whole = {row.tobytes() for row in layer.rows(x, 10**9, np.random.default_rng(0))[0]}
    first, again = (layer.rows(x, 10, np.random.default_rng(7)) for _ in range(2))
    assert first.shape == (1, 10, 27)
    assert {row.tobytes() for row in first[0]} < whole
    np.testing.assert_array_equal(first, again)


def test_what_is_no_layer() -> None:
    x, w = ir.val("x"), ir.val("w", const_value=ir.tensor(normal(3, 3)))
    assert layer_of(ir.node("MatMul", [x, ir.val("y")])) is None
    assert layer_of(ir.node("MatMul", [x, w], domain="com.example")) is None
    assert layer_of(ir.node("MatMul", [x, ir.val("i", const_value=ir.tensor(np.ones((3, 3), np.int32)))])) is None
    assert layer_of(ir.node("MatMul", [x, ir.val("t", const_value=ir.tensor(normal(2, 3, 3)))])) is None
    assert layer_of(ir.node("Add", [x, w])) is None


@pytest.mark.parametrize(
    ("gemm", "adds", "vector"),
    [
        ("Gemm(x, w)", True, [0, 0]),
        ("Gemm(x, w, one)", True, [3, 3]),
        ("Gemm(x, w, row)", True, [1, 2]),
        ("Gemm(x, w, rows)", False, [0, 0]),
        ("Gemm(x, w, y)", False, [0, 0]),
        ("Gemm <alpha = 0.5> (x, w, row)", False, [1, 2]),
    ],
)
def test_a_bias_is_a_constant_vector(gemm: str, adds: bool, vector: list[int]) -> None:
    model = ir.from_onnx_text(f"""<ir_version: 8, opset_import: ["" : 17]>
        agraph (float[3,2] x, float[3,2] y) => (float[3,2] z)
        <float[2,2] w = {{1,2,3,4}}, float one = {{3}}, float[1,2] row = {{1,2}}, float[3,1] rows = {{1,2,3}}>
        {{ z = {gemm} }}""")
    (layer,) = layers(model)
    assert layer.adds_bias == adds
    assert layer.bias_vector().tolist() == vector
