"""SmoothQuant: the same function, less error in INT8 where channels are outliers, a reason wherever it cannot be."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from models import transformers, zoo
from models.net import INT64, Net
from onnxcomp.core import Context, Outcome, Pass
from onnxcomp.data import open_dataset
from onnxcomp.equivalence import Reference
from onnxcomp.layers import layers
from onnxcomp.model import input_specs, load
from onnxcomp.numerics.affine import IntGrid, fake_quantize, parameters_from_range
from onnxcomp.numerics.equalize import smooth
from onnxcomp.passes.quantize_dynamic import QuantizeDynamic
from onnxcomp.passes.quantize_static import QuantizeStatic, Range
from onnxcomp.passes.simplify import Simplify
from onnxcomp.passes.smooth import Smooth, int8_error
from onnxcomp.runtime import Session
from onnxcomp.weights import Rounding

SIZE = transformers.SIZE
NEAREST = Rounding(gptq=False, sweeps=0, bias_correction=False)


def encoder(opset: int = 17) -> ir.Model:
    """Two transformer layers over embedded tokens, whose normalisations blow up a few channels."""
    net = Net(opset)
    ids = net.input("ids", ["batch", 12], INT64)
    x = net.op("Gather", transformers.table(net, 100), ids)
    for _ in range(2):
        x = net.op("Add", x, transformers.attention(net, net.layer_norm(x, SIZE)))
        x = net.op("Add", x, transformers.feed_forward(net, net.layer_norm(x, SIZE)))
    net.output("y", net.linear(net.layer_norm(x, SIZE), SIZE, 10), ["batch", 12, 10])
    model = net.model()
    for name, value in model.graph.initializers.items():
        if name.startswith(("norm.weight", "norm.bias")):
            assert value.const_value is not None
            loud = value.const_value.numpy().copy()
            loud[:3] *= 60  # outliers as large as in OPT and BLOOM: Xiao et al. 2022, Figure 4
            value.const_value = ir.tensor(loud, name=name)
    return Simplify()(model).model


def tokens(count: int = 32, seed: int = 0) -> dict[str, NDArray[np.int64]]:
    return {"ids": np.random.default_rng(seed).integers(0, 100, (count, 12))}


def context_of(model: ir.Model, feeds: dict[str, Any]) -> Context:
    return Context(data=open_dataset(feeds, input_specs(model)))


def reasons(outcome: Outcome) -> str:
    return "\n".join(skip.reason for skip in outcome.skips)


def difference(before: ir.Model, after: ir.Model, feeds: dict[str, Any], output: str = "y") -> float:
    """Relative error of an output."""
    exact, got = (np.asarray(Session(model).run(feeds)[output], np.float64) for model in (before, after))
    return float(np.linalg.norm(got - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("opset", [13, 17])
@pytest.mark.parametrize(
    "quantize", [QuantizeStatic(range=Range.MINMAX, rounding=NEAREST), QuantizeDynamic(rounding=NEAREST)]
)
def test_int8_error_falls_where_channels_are_outliers(opset: int, quantize: Pass) -> None:
    model, context = encoder(opset), context_of(encoder(opset), tokens())
    outcome = Smooth()(model, context)
    # Query, key and value, the first of the two linear layers, each twice, and the last layer.
    assert sum(not change.what.endswith("Mul") for change in outcome.changes) >= 9
    assert Reference(model, context).difference(outcome.model) is None
    assert len(list(outcome.model.graph)) <= len(list(model.graph))
    feeds = tokens(seed=1)
    plain = difference(model, quantize(model, context).model, feeds)
    smoothed = difference(model, quantize(outcome.model, context).model, feeds)
    assert smoothed < 0.6 * plain


def post_norm() -> ir.Model:
    """A loud normalisation that a residual reads too; `y` is what the layer makes of it."""
    net = Net(17)
    loud = net.uniform(0.8, 1.2, SIZE)
    loud[:3] *= 60
    gain, shift = net.weight(loud, "gain"), net.weight(net.uniform(-0.1, 0.1, SIZE), "shift")
    x = net.op("LayerNormalization", net.input("x", ["batch", 12, SIZE]), gain, shift)
    x.type, x.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", 12, SIZE])
    y = net.linear(x, SIZE, SIZE)
    net.output("z", net.op("Add", x, net.linear(net.relu(y), SIZE, SIZE)), ["batch", 12, SIZE])
    net.output("y", y, ["batch", 12, SIZE])
    return net.model()


def test_post_norm_is_left_alone_unless_a_mul_may_be_inserted() -> None:
    model = post_norm()
    random = np.random.default_rng(0)
    feeds, other = ({"x": random.normal(size=(16, 12, SIZE)).astype(np.float32)} for _ in range(2))
    context = context_of(model, feeds)
    first = next(layers(model))
    outcome = Smooth()(model, context)
    assert first.name not in {change.node for change in outcome.changes}
    assert "is also read by Add" in reasons(outcome)
    inserted = Smooth(insert=True)(model, context)
    assert (first.name, "input smoothed by a Mul") in {(change.node, change.what) for change in inserted.changes}
    assert Reference(model, context).difference(inserted.model) is None
    quantize = QuantizeStatic(range=Range.MINMAX, rounding=NEAREST)
    plain, smoothed = (difference(model, quantize(m, context).model, other, "y") for m in (model, inserted.model))
    assert smoothed < 0.75 * plain


def test_values_of_attention_take_the_scales_of_the_output_projection() -> None:
    model = attention_with()
    outcome = Smooth(alpha=0.5)(model, context_of(model, mixed()))
    value, projection = layers(model)
    assert [(change.node, change.what) for change in outcome.changes] == [
        (projection.name, f"input smoothed by '{value.name}'")
    ]
    scaled_value, scaled_projection = (layer.matrix() for layer in layers(outcome.model))
    ratio = value.matrix() / scaled_value
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1], ratio.shape), rtol=1e-5)
    expected = np.broadcast_to(ratio[:, 0], projection.matrix().shape)
    np.testing.assert_allclose(scaled_projection / projection.matrix(), expected, rtol=1e-5)


def attention_with(
    perm: tuple[int, ...] = (0, 2, 1, 3), heads: int = 4, wrap: Callable[[Net, ir.Value], ir.Value] = lambda net, x: x
) -> ir.Model:
    """Values split into heads, mixed by given weights, merged and projected."""
    net = Net(17)
    x, mixing = net.input("x", ["batch", 16, 32]), net.input("mixing", ["batch", 1, 16, 16])
    value = net.linear(x, 32, 32)
    split = net.op("Transpose", net.reshape(value, 0, 16, heads, 32 // heads), perm=list(perm))
    mixed = wrap(net, net.op("MatMul", mixing, split))
    merged = net.reshape(net.op("Transpose", mixed, perm=[0, 2, 1, 3]), 0, 16, 32)
    net.output("y", net.linear(merged, 32, 8), ["batch", 16, 8])
    return net.model()


def mixed() -> dict[str, NDArray[np.float32]]:
    random = np.random.default_rng(0)
    return {
        "x": random.normal(size=(6, 16, 32)).astype(np.float32),
        "mixing": random.uniform(size=(6, 1, 16, 16)).astype(np.float32),
    }


@pytest.mark.parametrize(
    ("model", "works"),
    [
        (attention_with(), True),
        (attention_with(heads=8), True),
        (attention_with(perm=(0, 1, 2, 3), heads=16), False),
        (attention_with(perm=(0, 3, 1, 2), heads=2), False),
        (attention_with(wrap=lambda net, x: net.op("Tanh", x)), False),
    ],
)
def test_scales_pass_attention_only_in_its_usual_form(model: ir.Model, works: bool) -> None:
    context = context_of(model, mixed())
    outcome = Smooth(alpha=0.5)(model, context)
    projection = list(layers(model))[1].name
    assert (projection in {change.node for change in outcome.changes}) == works
    assert Reference(model, context).difference(outcome.model) is None


@pytest.mark.parametrize("between", [Net.relu, lambda net, x: net.op("PRelu", x, net.weight(net.uniform(0, 1, 16)))])
def test_a_linear_layer_takes_the_scales_through_relu(between: Any) -> None:
    net = Net(17)
    net.output("y", net.gemm(between(net, net.gemm(net.input("x", ["batch", 8]), 8, 16)), 16, 4), ["batch", 4])
    model = net.model()
    context = context_of(model, {"x": np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32)})
    outcome = Smooth(alpha=0.4)(model, context)
    assert len(outcome.changes) == 1
    assert Reference(model, context).difference(outcome.model) is None


@pytest.mark.parametrize("name", ["bert", "vit", "gpt", "mixer", "functions", "control_flow", "fp16_weights"])
@pytest.mark.parametrize("settings", [{"alpha": 0.5}, {"insert": True}])
def test_the_zoo_computes_the_same(name: str, settings: dict[str, Any]) -> None:
    proto = zoo.build(name)
    model = Simplify()(load(proto)).model
    context = Context(data=open_dataset([zoo.feeds(proto, 1, seed) for seed in range(6)], input_specs(model)))
    outcome = Smooth(**settings)(model, context)
    assert Reference(model, context).difference(outcome.model) is None


def test_nothing_to_gain_is_said_and_changes_nothing() -> None:
    net = Net(17)
    random = np.random.default_rng(0)
    x = net.op("Mul", net.input("x", ["batch", 16]), net.weight(np.ones(16, np.float32), "gain"))
    signs = random.choice([-1, 1], (16, 8)).astype(np.float32)
    net.output("y", net.op("MatMul", x, net.weight(signs)), ["batch", 8])
    model = net.model()
    outcome = Smooth()(model, context_of(model, {"x": random.uniform(-1, 1, (64, 16)).astype(np.float32)}))
    assert not outcome.modified
    assert "would not lower the error" in reasons(outcome)


def test_without_data_or_when_excluded_nothing_happens() -> None:
    model = encoder()
    assert "needs calibration data" in reasons(Smooth()(model))
    data = open_dataset(tokens(), input_specs(model))
    outcome = Smooth()(model, Context(data=data, exclude=re.compile(".")))
    assert not outcome.modified
    assert "excluded by the user" in reasons(outcome)


def test_the_estimate_is_the_error_that_int8_makes() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(4000, 24)) * np.exp(random.normal(size=24))
    W = random.normal(size=(10, 24))
    signed, unsigned = IntGrid(8, signed=True, symmetric=True), IntGrid(8, signed=False, symmetric=False)
    low, high, squares = x.min(axis=0), x.max(axis=0), x.T @ x / len(x)
    largest, magnitude = np.abs(W).max(axis=0), np.abs(x).max(axis=0)
    for scales in (np.ones(24), smooth(magnitude, largest, 0.5)):
        estimate = int8_error([W], squares, low, high, scales)
        inputs, weights = x / scales, W * scales
        activation = parameters_from_range(inputs.min(), inputs.max(), unsigned)
        rows = parameters_from_range(weights.min(axis=1), weights.max(axis=1), signed)
        rounded_x = fake_quantize(inputs, activation.scale.astype(float), activation.zero_point, unsigned)
        rounded_w = fake_quantize(weights, rows.scale[:, None].astype(float), 0, signed)
        true = np.square(rounded_x @ rounded_w.T - x @ W.T).sum(axis=1).mean()
        # Rounding errors of activations are taken for uniform and independent.
        assert estimate == pytest.approx(true, rel=0.15)
