"""Cross-layer equalization: the same function, equal ranges, less error in INT8, and a reason wherever it cannot be."""

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from models import zoo
from models.net import Net
from onnxcomp.core import Context, Outcome
from onnxcomp.data import open_dataset
from onnxcomp.equivalence import Reference
from onnxcomp.layers import layers
from onnxcomp.model import input_specs, load
from onnxcomp.passes.equalize import Equalize
from onnxcomp.passes.quantize_static import QuantizeStatic, Range
from onnxcomp.passes.simplify import Simplify
from onnxcomp.runtime import Session
from onnxcomp.weights import Rounding

MODELS = Path(zoo.__file__).parent
RUNNABLE = [name for name in zoo.BUILDERS if name not in zoo.UNRUNNABLE]


def reasons(outcome: Outcome) -> str:
    return "\n".join(skip.reason for skip in outcome.skips)


def chain(between: Any = Net.relu, group: int = 1, after: str = "conv") -> ir.Model:
    """Two layers with something between."""
    net = Net(opset=17)
    x = between(net, net.conv(net.input("x", ["batch", 4, 8, 8]), 4, 8))
    if after == "conv":
        x = net.conv(x, 8, 6, group=group)
    elif after == "transposed":
        weight = net.weight(net.normal(8, 3, 2, 2, fan_in=32), "up")
        x = net.op("ConvTranspose", x, weight, kernel_shape=[2, 2], strides=[2, 2], group=group)
    net.output("y", net.relu(x), ["batch", "channels", "height", "width"])
    return net.model()


def unbalanced(seed: int = 0) -> ir.Model:
    """A depthwise separable network whose channels differ in range by up to a thousand."""
    net = Net(opset=17)
    x = net.relu(net.conv(net.input("x", ["batch", 3, 16, 16]), 3, 24))
    x = net.relu(net.conv(x, 24, 24, group=24))
    x = net.relu(net.conv(x, 24, 32, kernel=1))
    net.classify(net.conv(x, 32, 16), 16)
    model = net.model()
    random = np.random.default_rng(seed)
    convolutions = list(layers(model))[:3]
    for first, second in itertools.pairwise(convolutions):
        s = np.exp(random.uniform(-3.5, 3.5, len(first.by_output())))
        replace(first.weight, first.scaled(outputs=s))
        assert first.bias is not None
        assert first.bias.const_value is not None
        replace(first.bias, first.bias.const_value.numpy() * s)
        replace(second.weight, second.scaled(inputs=1 / s))
    return model


def replace(value: ir.Value, array: NDArray[Any]) -> None:
    value.const_value = ir.tensor(array.astype(np.float32), name=value.name)


@pytest.mark.parametrize("name", RUNNABLE)
def test_every_model_computes_the_same(name: str) -> None:
    model = load(zoo.build(name))
    outcome = Equalize()(model)
    assert Reference(model, Context(batch=2)).difference(outcome.model) is None
    assert not Equalize()(outcome.model).modified


@pytest.mark.parametrize(
    "between",
    [
        Net.relu,
        lambda net, x: x,
        lambda net, x: net.op("Identity", x),
        lambda net, x: net.op("LeakyRelu", x, alpha=0.3),
        lambda net, x: net.op("PRelu", x, net.weight(net.uniform(0.1, 0.5, 8, 1, 1))),
        lambda net, x: net.op("MaxPool", net.relu(x), kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        lambda net, x: net.relu(net.op("AveragePool", x, kernel_shape=[2, 2], pads=[1, 1, 0, 0])),
        lambda net, x: net.relu(net.op("Add", x, net.weight(net.uniform(-1, 1, 8, 1, 1)))),
    ],
)
def test_ranges_meet_across_what_scales(between: Any) -> None:
    model = chain(between)
    outcome = Equalize()(model)
    assert len(outcome.changes) == 1
    assert Reference(model, Context()).difference(outcome.model) is None
    first, second = layers(outcome.model)
    ratio = np.abs(first.by_output()).max(axis=1) / np.abs(second.by_input()).max(axis=1)
    # The guard for the bias keeps channels with a large bias above.
    assert np.median(np.abs(np.log(ratio))) < 0.02
    assert [node.op_type for node in outcome.model.graph] == [node.op_type for node in model.graph]


@pytest.mark.parametrize(("after", "group"), [("conv", 2), ("transposed", 1), ("transposed", 4)])
def test_groups_and_transposed_convolutions(after: str, group: int) -> None:
    model = chain(group=group, after=after)
    outcome = Equalize()(model)
    assert outcome.modified
    assert Reference(model, Context()).difference(outcome.model) is None


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (Net.relu6, "clips at fixed bounds"),
        (lambda net, x: net.op("Sigmoid", x), "does not pass a factor per channel through"),
        (lambda net, x: net.op("Add", net.relu(x), net.op("Tanh", x)), "does not pass a factor"),
        (lambda net, x: net.op("Transpose", x, perm=[0, 1, 3, 2]), "does not pass a factor"),
    ],
)
def test_what_does_not_scale_is_skipped(between: Any, reason: str) -> None:
    outcome = Equalize()(chain(between))
    assert not outcome.modified
    assert reason in reasons(outcome)


def test_other_readers_outputs_shared_and_broken_weights_are_skipped() -> None:
    shared = Equalize()(load(zoo.build("shared_weights")))
    assert "is shared" in reasons(shared)
    net = Net(opset=17)
    hidden = net.relu(net.gemm(net.input("x", ["batch", 4]), 4, 4))
    net.output("y", net.gemm(hidden, 4, 2), ["batch", 2])
    net.output("hidden", hidden, ["batch", 4])
    assert "is also an output of the model" in reasons(Equalize()(net.model()))
    model = chain()
    first = next(layers(model))
    replace(first.weight, np.full(first.weight_shape, np.nan))
    assert "not finite" in reasons(Equalize()(model))


def test_bodies_are_equalized_within_themselves_only() -> None:
    outcome = Equalize()(load(zoo.build("control_flow")))
    (change,) = outcome.changes
    body = next(node.graph for node in outcome.model.graph.all_nodes() if node.name == change.node)
    assert isinstance(body, ir.Graph)
    assert body.name == "wide_branch"
    assert "from outside the control-flow body" in reasons(outcome)


def test_excluded_layers_stay() -> None:

    outcome = Equalize()(chain(), Context(exclude=re.compile("Conv")))
    assert not outcome.modified
    assert "excluded by the user" in reasons(outcome)


def test_the_model_given_stays_as_it_was() -> None:
    model = unbalanced()
    before = [layer.matrix().copy() for layer in layers(model)]
    assert Equalize()(model).modified
    for layer, matrix in zip(layers(model), before, strict=True):
        np.testing.assert_array_equal(layer.matrix(), matrix)


def test_int8_error_falls_in_an_unbalanced_depthwise_network() -> None:
    model = unbalanced()
    x = np.random.default_rng(1).normal(size=(64, 3, 16, 16)).astype(np.float32)
    context = Context(data=open_dataset({"x": x}, input_specs(model)))
    expected = Session(model).run({"x": x})["logits"].astype(np.float64)
    quantize = QuantizeStatic(range=Range.MINMAX, rounding=Rounding(gptq=False, sweeps=0, bias_correction=False))

    def error(candidate: ir.Model) -> float:
        got = Session(quantize(candidate, context).model).run({"x": x})["logits"].astype(np.float64)
        return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))

    outcome = Equalize()(model)
    assert len(outcome.changes) == 3
    assert Reference(model, context).difference(outcome.model) is None
    assert error(outcome.model) < 0.5 * error(model)


def test_a_chain_of_three_settles() -> None:
    outcome = Equalize()(unbalanced())
    producer, depthwise, reader, *_ = layers(outcome.model)
    assert depthwise.is_depthwise
    own = np.abs(depthwise.by_output()).max(axis=1)
    for other in (np.abs(producer.by_output()).max(axis=1), np.abs(reader.by_input()).max(axis=1)):
        assert np.median(np.abs(np.log(other / own))) < 0.02


def test_digits_keeps_every_answer() -> None:
    model = Simplify()(load(MODELS / "digits.onnx")).model
    outcome = Equalize()(model)
    assert outcome.modified
    feeds = {"input": np.load(MODELS / "digits_eval.npz")["input"]}
    before, after = (Session(m).run(feeds)["logits"] for m in (model, outcome.model))
    np.testing.assert_array_equal(before.argmax(axis=1), after.argmax(axis=1))
