from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from onnxcomp.core import Context
from onnxcomp.passes.quantize_weights import QuantizeWeights
from onnxcomp.runtime import Target
from onnxcomp.sensitivity import output_errors, ranking
from onnxcomp.weights import NEAREST
from tests.lab import LAYERS, WIDTH, network

FEEDS = {"x": np.random.default_rng(0).standard_normal((8, 16)).astype("f4")}
TARGET = Target(threads=1)


def model(scales: dict[str, float], activation: str = "Relu", names: dict[str, str] | None = None) -> ir.Model:
    """Three layers; a scale other than 1 multiplies a layer's weights, as a bad quantization might."""
    random = np.random.default_rng(1)
    value = x = ir.val("x", dtype=ir.DataType.FLOAT, shape=ir.Shape(["n", 16]))
    nodes: list[ir.Node] = []
    constants = []
    for layer in ("a", "b", "c"):
        array: NDArray[Any] = (random.standard_normal((16, 16)) * scales.get(layer, 1.0)).astype("f4")
        weight = ir.val(f"w{layer}", const_value=ir.tensor(array, name=f"w{layer}"))
        for operator, inputs, name in (("MatMul", [value, weight], layer), (activation, [], f"{layer}_act")):
            node = ir.node(operator, inputs or [nodes[-1].outputs[0]], name=name)
            output = node.outputs[0]
            output.name = (names or {}).get(f"{name}_out", f"{name}_out")
            output.dtype = ir.DataType.FLOAT
            nodes.append(node)
        value = nodes[-1].outputs[0]
        constants.append(weight)
    return ir.Model(ir.Graph([x], [value], nodes=nodes, initializers=constants, opset_imports={"": 17}), ir_version=8)


def rank(scales: dict[str, float], **options: Any) -> list[str]:
    return ranking(model({}), model(scales, **options), ["a", "b", "c"], TARGET, FEEDS)


@pytest.mark.parametrize("culprit", ["a", "b", "c"])
def test_the_layer_that_adds_most_error_comes_first(culprit: str) -> None:
    small = {"a": 1.02, "b": 1.02, "c": 1.02}
    assert rank(small | {culprit: 1.4})[0] == culprit


def test_order_follows_the_error_added_and_not_the_error_carried() -> None:
    # a is 30% off, b and c carry that on and add 1% and 5% of their own.
    assert rank({"a": 1.3, "b": 1.01, "c": 1.05}) == ["a", "c", "b"]


def test_outputs_are_looked_up_behind_their_dequantization() -> None:
    renamed = {"b_act_out": "b_act_out_dq"}
    assert rank({"b": 1.5}, names=renamed)[0] == "b"


def test_a_tensor_that_is_gone_says_nothing() -> None:
    gone = {f"{layer}_act_out": f"{layer}_elsewhere" for layer in "abc"}
    original, candidate = model({}), model({"c": 2.0}, names=gone)
    candidate.graph.outputs[0].name = "c_elsewhere"
    assert sorted(ranking(original, candidate, ["a", "b", "c"], TARGET, FEEDS)) == ["a", "b", "c"]


def test_infinite_error_comes_first_and_hides_nothing() -> None:
    assert rank({"b": np.inf, "a": 1.001})[0] == "b"


def test_zero_outputs() -> None:
    zero = {"a": 0.0, "b": 0.0, "c": 0.0}
    assert len(ranking(model(zero), model(zero), ["a", "b", "c"], TARGET, FEEDS)) == 3


def test_tensors_of_another_shape_or_as_integers_are_not_compared() -> None:
    original, candidate = model({}), model({"a": 1.1})
    tensors = {value.name or "": value for node in original.graph for value in node.outputs}
    assert set(output_errors(original, candidate, tensors, TARGET, FEEDS)) == set(tensors)
    last = list(candidate.graph)[-1]
    for operator, name in (("Shape", "b_act_out"), ("Flatten", "c_act_out_dq")):
        (old,) = (value for node in candidate.graph for value in node.outputs if value.name == name.removesuffix("_dq"))
        old.name = f"{name}_elsewhere"
        inputs = [old] if operator == "Shape" else [ir.val("flat", const_value=ir.tensor(np.zeros((2, 3), "f4")))]
        node = ir.node(operator, inputs, name=name)
        node.outputs[0].name = name
        if operator == "Flatten":
            candidate.graph.register_initializer(inputs[0])
            node.outputs[0].dtype = ir.DataType.FLOAT
        else:
            node.outputs[0].dtype = ir.DataType.INT64
        candidate.graph.insert_after(last, node)
    errors = output_errors(original, candidate, tensors, TARGET, FEEDS)
    assert set(errors) == set(tensors) - {"b_act_out", "c_act_out"}
    assert errors["a_out"] == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("culprit", ["g0", "g3", "g5"])
def test_layers_that_multiply_packed_weights_are_ranked_too(culprit: str) -> None:
    original = network()
    weight = original.graph.initializers[f"{culprit}_w"]
    assert weight.const_value is not None
    array = weight.const_value.numpy().copy()
    array[0] *= 30  # four bits hardly reach the others then
    weight.const_value = ir.tensor(array, name=weight.name)
    packed = QuantizeWeights(bits=4, rounding=NEAREST)(original, Context()).model
    feeds = {"x": np.random.default_rng(0).standard_normal((8, WIDTH)).astype("f4")}
    assert ranking(original, packed, LAYERS, TARGET, feeds)[0] == culprit
