"""Models at the edges of what ONNX allows go through every pass, with and without data."""

from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

from onnxcomp import model as models
from onnxcomp.core import Context
from onnxcomp.data import open_dataset
from onnxcomp.equivalence import unequal
from onnxcomp.errors import DataError
from onnxcomp.registry import passes
from onnxcomp.runtime import Session, Target

GRAPHS = {
    "no nodes": "(float[2,8] x) => (float[2,8] x) {}",
    "no inputs": "() => (float[8,8] y) { y = Relu(w) }",
    "an input that nothing reads": "(float[2,8] x, float[3] z) => (float[2,8] y) { y = Relu(x) }",
    "an output that is a weight": "(float[2,8] x) => (float[2,8] y, float[8,8] w) { y = MatMul(x, w) }",
    "an output that others read": """(float[2,8] x) => (float[2,8] a, float[2,8] c)
        { a = MatMul(x, w) r = Relu(a) c = MatMul(r, w) }""",
    "an output given twice": "(float[2,8] x) => (float[2,8] a, float[2,8] i) { a = MatMul(x, w) i = Identity(a) }",
    "an empty batch": "(float[0,8] x) => (float[0,8] y) { a = MatMul(x, w) y = Relu(a) }",
    "an empty sum": "(float[2,0] x) => (float[2,8] y) { y = MatMul(x, empty) }",
    "weights of NaN": "(float[2,8] x) => (float[2,8] y) { y = MatMul(x, nan) }",
    "weights of zero": "(float[2,8] x) => (float[2,8] y) { y = MatMul(x, zero) }",
    "subnormal weights": "(float[2,8] x) => (float[2,8] y) { y = MatMul(x, tiny) }",
    "activations of zero": "(float[2,8] x) => (float[2,8] y) { z = Sub(x, x) y = MatMul(z, w) }",
    "infinite activations": """(float[2,8] x) => (float[2,8] y)
        { z = Sub(x, x) i = Reciprocal(z) y = MatMul(i, w) }""",
    "branches that capture": """(float[2,8] x, bool c) => (float[2,8] y) { h = MatMul(x, w) y = If (c)
        <then_branch = t () => (float[2,8] p) { q = Gemm(h, w, b) p = Relu(q) },
         else_branch = e () => (float[2,8] r) { r = MatMul(h, w) }> }""",
    "a loop that captures": """(float[2,8] x) => (float[2,8] y) { y = Loop (three, true, x)
        <body = t (int64 i, bool ci, float[2,8] s) => (bool co, float[2,8] so)
            { co = Identity(ci) so = MatMul(s, w) }> }""",
    "a weight on both sides": "(float[8,8] x) => (float[8,8] y) { a = MatMul(x, w) d = MatMul(w, a) y = Add(d, w) }",
    "a weight moved about": "(float[8,8] x) => (float[8,8] y) { t = Transpose <perm = [1, 0]> (w) y = MatMul(x, t) }",
    "a product with itself": "(float[8,8] x) => (float[8,8] y) { y = MatMul(x, x) }",
    "a vector of weights": "(float[3,8] x) => (float[3] y) { y = MatMul(x, b) }",
    "a bias with two axes": "(float[2,8] x) => (float[2,8] y) { y = Gemm <transB = 1> (x, w, x2) }",
    "a scaled bias": "(float[2,8] x) => (float[2,8] y) { y = Gemm <alpha = 0.5, beta = 2.0> (x, w, b) }",
    "strings": "(string[2] x) => (string[2] y) { y = Identity(x) }",
    "names that passes would choose": """(float[2,8] x) => (float[2,8] y)
        { x_q = MatMul(x, w) w_int = Relu(x_q) y = MatMul(w_int, w) }""",
}


def values() -> dict[str, Any]:
    random = np.random.default_rng(0)
    w = random.standard_normal((8, 8)).astype(np.float32)
    return {
        "w": w,
        "b": w[0],
        "x2": w[:2],
        "nan": w * np.float32("nan"),
        "zero": 0 * w,
        "tiny": w * np.float32(1e-42),
        "empty": w[:0],
        "three": np.array(3),
        "true": np.array(True),
    }


def build(name: str) -> onnx.ModelProto:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> edge {GRAPHS[name]}')
    wanted = {value for graph in _graphs(model.graph) for node in graph.node for value in node.input}
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in values().items() if name in wanted]
    model.graph.initializer.extend(tensors)
    return model


def _graphs(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    bodies = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    return [graph, *bodies]


def feeds(model: onnx.ModelProto) -> dict[str, Any]:
    random = np.random.default_rng(1)
    result: dict[str, Any] = {}
    for info in model.graph.input:
        shape = [dim.dim_value for dim in info.type.tensor_type.shape.dim]
        match info.type.tensor_type.elem_type:
            case onnx.TensorProto.STRING:
                result[info.name] = np.full(shape, "word", object)
            case onnx.TensorProto.BOOL:
                result[info.name] = np.ones(shape, bool)
            case _:
                result[info.name] = random.standard_normal(shape).astype(np.float32)
    return result


COARSE = {"binarize", "sparsify", "factorize", "share"}
"""Passes that leave little of random weights, which have no structure to be found."""


@pytest.mark.parametrize("with_data", [False, True], ids=["without data", "with data"])
@pytest.mark.parametrize("name", GRAPHS)
def test_every_pass_leaves_a_model_that_answers_alike(name: str, with_data: bool) -> None:
    proto = build(name)
    model, fed = models.load(proto), feeds(proto)
    expected = Session(model).run(fed)
    data = open_dataset([fed], models.input_specs(model)) if with_data and fed else None
    for technique in (kind() for kind in passes().values()):
        try:
            outcome = technique(model, Context(data, Target(threads=1)))
        except DataError:
            assert (name, with_data) == ("infinite activations", True), "integers stand for anything finite"
            continue
        actual = Session(models.load(models.to_bytes(outcome.model))).run(fed)
        for output, value in expected.items():
            if technique.exact or not outcome.modified:
                assert unequal(value, actual[output]) is None
            else:
                assert np.asarray(actual[output]).shape == np.asarray(value).shape
                error_norm = np.linalg.norm(np.nan_to_num(actual[output]) - np.nan_to_num(value))
                limit = 1.0 if technique.name in COARSE else 0.1
                assert error_norm <= limit * np.linalg.norm(np.nan_to_num(value))
