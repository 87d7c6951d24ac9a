"""Which layers stand in a row."""

import numpy as np
import onnx_ir as ir
import pytest

from models import zoo
from onnxcomp import model as models
from onnxcomp.chains import chains
from onnxcomp.layers import layers
from onnxcomp.passes.simplify import Simplify

GELU = """
    half = Constant <value_float = 0.5> ()
    one = Constant <value_float = 1.0> ()
    d = Erf(a)
    e = Add(d, one)
    f = Mul(a, e)
    g = Mul(f, half)
"""


def rows(body: str, outputs: str = "float[n,8] y") -> list[list[str]]:
    """Names of the layers in each row; x is the input and w a weight for all."""
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
    agraph (float[n,8] x) => ({outputs}) <float[8,8] w = {{{", ".join(["0.1"] * 64)}}}> {{ {body} }}"""
    model = models.load(ir.from_onnx_text(text))
    for node in model.graph:
        node.name = node.outputs[0].name
    return [[layer.name for layer in row] for row in chains(list(layers(model)))]


def test_functions_of_one_layer_alone_lie_between() -> None:
    assert rows(f"a = MatMul(x, w) {GELU} y = MatMul(g, w)") == [["a", "y"]]


def test_layers_side_by_side_are_in_a_row_without_a_function() -> None:
    assert rows("a = MatMul(x, w) y = MatMul(a, w)") == [["a", "y"]]


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        ("a = MatMul(x, w) b = Relu(a) c = MatMul(b, w) y = Add(c, b)", "float[n,8] y"),  # read elsewhere
        ("a = MatMul(x, w) b = Add(a, x) y = MatMul(b, w)", "float[n,8] y"),  # of something else as well
        ("a = MatMul(x, w) b = Softmax(a) y = MatMul(b, w)", "float[n,8] y"),  # not element by element
        ("a = MatMul(x, w) b = Relu(a) y = MatMul(b, w)", "float[n,8] y, float[n,8] b"),  # an output of the graph
    ],
)
def test_what_breaks_a_row(body: str, outputs: str) -> None:
    assert all(len(row) == 1 for row in rows(body, outputs))


def test_rows_are_no_longer_than_three() -> None:
    names = [f"m{i}" for i in range(7)]
    body = " ".join(f"{name} = MatMul({before}, w)" for before, name in zip(["x", *names], [*names, "y"], strict=True))
    assert [len(row) for row in rows(body)] == [3, 3, 2]


def test_blocks_of_a_residual_network() -> None:
    model = Simplify()(models.load(zoo.build("resnet"))).model
    found = chains(list(layers(model)))
    assert sorted(layer.name for row in found for layer in row) == sorted(layer.name for layer in layers(model))
    assert any(len(row) == 2 for row in found)
    assert np.mean([len(row) for row in found]) < 2  # the first layer, shortcuts and the classifier stand alone
