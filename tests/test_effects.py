"""What a change to a model does to its outputs, and on how many samples that is measured."""

import numpy as np
import onnx_ir as ir
import pytest

from onnxcomp import effects
from onnxcomp.core import Context
from onnxcomp.data import open_dataset
from onnxcomp.effects import Answers
from onnxcomp.layers import layers
from onnxcomp.model import input_specs
from onnxcomp.runtime import Target

SAMPLES = 100


def linear(outputs: int) -> ir.Model:
    random = np.random.default_rng(0)
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=ir.Shape(["n", 8]))
    weight = ir.val("w", const_value=ir.tensor(random.standard_normal((8, outputs)).astype(np.float32), name="w"))
    node = ir.node("MatMul", [x, weight], name="product")
    node.outputs[0].name, node.outputs[0].dtype = "y", ir.DataType.FLOAT
    node.outputs[0].shape = ir.Shape(["n", outputs])
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[weight], opset_imports={"": 17})
    return ir.Model(graph, ir_version=8)


def answers(model: ir.Model, count: int = SAMPLES) -> Answers:
    x = np.random.default_rng(1).standard_normal((count, 8)).astype(np.float32)
    return Answers(model, open_dataset({"x": x}, input_specs(model)), Context(None, Target(threads=1)))


def scaled(model: ir.Model, factor: float) -> ir.Model:
    copy = model.clone()
    for layer in layers(copy):
        layer.set_matrix(layer.matrix() * np.float32(factor))
    return copy


@pytest.mark.parametrize(("outputs", "count", "seen"), [(10, 100, 64), (200, 100, 32), (200, 20, 20), (10, 20, 20)])
def test_outputs_of_many_numbers_need_fewer_samples(outputs: int, count: int, seen: int) -> None:
    found = answers(linear(outputs), count)
    assert sum(len(feeds["x"]) for feeds, _ in found._pairs) == seen


@pytest.mark.parametrize("count", [60, 1000])
def test_the_samples_are_drawn_from_all(count: int) -> None:
    """Data often come class by class."""
    model = linear(200)
    x = np.repeat(np.arange(count, dtype=np.float32)[:, None], 8, axis=1)
    found = Answers(model, open_dataset({"x": x}, input_specs(model)), Context(None, Target(threads=1)))
    seen = np.concatenate([feeds["x"][:, 0] for feeds, _ in found._pairs])
    assert len(seen) == effects._ENOUGH
    assert seen.max() > 0.8 * count
    assert seen.min() < 0.2 * count


def test_outputs_whose_length_depends_on_the_numbers_are_lost_where_it_differs() -> None:
    """A selection of what is likely enough, say."""

    def selecting(least: float) -> ir.Model:
        x = ir.val("x", dtype=ir.DataType.FLOAT, shape=ir.Shape(["n", 8]))
        bound = ir.val("least", const_value=ir.tensor(np.float32(least), name="least"))
        scores = ir.node("ReduceMax", [x], attributes={"axes": [1], "keepdims": 0}, name="scores")
        more = ir.node("Greater", [scores.outputs[0], bound], name="more")
        chosen = ir.node("Compress", [x, more.outputs[0]], attributes={"axis": 0}, name="chosen")
        chosen.outputs[0].name, chosen.outputs[0].dtype = "y", ir.DataType.FLOAT
        return ir.Model(
            ir.Graph([x], chosen.outputs, nodes=[scores, more, chosen], initializers=[bound], opset_imports={"": 17}),
            ir_version=8,
        )

    found = answers(selecting(1.0))
    assert found.error(selecting(1.0)) == 0
    assert found.error(selecting(1.5)) == 1


def test_sequences_and_integers_have_no_errors_and_count_for_nothing() -> None:
    model = linear(10)
    product = model.graph.outputs[0]
    pair = ir.node("SequenceConstruct", [product, product])
    pair.outputs[0].name, pair.outputs[0].type = "pair", ir.SequenceType(ir.TensorType(ir.DataType.FLOAT))
    steps = ir.val("steps", const_value=ir.tensor(np.ones((1, 300), np.int64), name="steps"))
    model.graph.register_initializer(steps)
    as_is = ir.node("Identity", [steps])
    as_is.outputs[0].name, as_is.outputs[0].dtype, as_is.outputs[0].shape = "i", ir.DataType.INT64, ir.Shape([1, 300])
    model.graph.extend([pair, as_is])
    model.graph.outputs.extend([pair.outputs[0], as_is.outputs[0]])
    found = answers(model)
    assert sum(len(feeds["x"]) for feeds, _ in found._pairs) == effects._SAMPLES
    assert found.error(scaled(model, 0.9)) == pytest.approx(0.01, rel=1e-4)


def test_the_error_is_squared_and_relative() -> None:
    model = linear(10)
    assert answers(model).error(scaled(model, 0.9)) == pytest.approx(0.01, rel=1e-4)
    assert answers(model).error(model) == 0
    assert answers(model).error(scaled(model, np.nan)) == 1
