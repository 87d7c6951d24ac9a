"""Static INT8: what loads, stays accurate, fuses to integer kernels, and says why not where it does not."""

import functools
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from models import zoo
from models.net import Net
from onnxcomp.core import Context, Outcome
from onnxcomp.data import open_dataset
from onnxcomp.layers import layers
from onnxcomp.model import input_specs, load, to_bytes
from onnxcomp.numerics.affine import dequantize
from onnxcomp.passes.quantize_static import QuantizeStatic, Range
from onnxcomp.passes.simplify import Simplify
from onnxcomp.runtime import Session, Target, weight_bits
from onnxcomp.weights import Rounding

MODELS = Path(zoo.__file__).parent
RUNNABLE = [name for name in zoo.BUILDERS if name not in zoo.UNRUNNABLE]
NEAREST = Rounding(gptq=False, sweeps=0, bias_correction=False)
FAST = QuantizeStatic(range=Range.MINMAX, rounding=NEAREST)
WEIGHTED = {"Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU"}


class Quantized(NamedTuple):
    """A cleaned-up model, what became of it, and where it was calibrated."""

    before: ir.Model
    outcome: Outcome
    context: Context


@functools.cache
def zoo_model(name: str) -> Quantized:
    proto = zoo.build(name)
    model = Simplify()(load(proto)).model
    samples = [zoo.feeds(proto, 1, seed) for seed in range(1, 17)]
    context = Context(data=open_dataset(samples, input_specs(model)))
    return Quantized(model, FAST(model, context), context)


@functools.cache
def shipped(name: str) -> Quantized:
    model = Simplify()(load(MODELS / f"{name}.onnx")).model
    calibration = dict(np.load(MODELS / f"{name}_calib.npz"))
    context = Context(data=open_dataset({key: array[:64] for key, array in calibration.items()}, input_specs(model)))
    settings = QuantizeStatic() if name == "letters" else QuantizeStatic(rounding=NEAREST)  # the other takes long
    return Quantized(model, settings(model, context), context)


def with_context(net: Net, feeds: dict[str, NDArray[Any]]) -> tuple[ir.Model, Context]:
    model = net.model()
    return model, Context(data=open_dataset(feeds, input_specs(model)))


def relative_error(before: ir.Model, after: ir.Model, feeds: dict[str, Any]) -> dict[str, float]:
    """Of each float output."""
    expected, got = Session(before).run(feeds), Session(after).run(feeds)
    assert list(expected) == list(got)
    return {
        name: float(np.linalg.norm(got[name].astype(float) - exact) / np.linalg.norm(exact))
        for name, exact in ((name, array.astype(float)) for name, array in expected.items() if array.dtype.kind == "f")
    }


def executed(model: ir.Model, folder: Path) -> onnx.GraphProto:
    """The graph as ONNX Runtime runs it on the CPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(to_bytes(model), options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "optimized.onnx").graph


def operators(graph: onnx.GraphProto) -> Counter[str]:
    return Counter(node.op_type for node in graph.node)


def reasons(outcome: Outcome) -> dict[str, str]:
    return {skip.node: skip.reason for skip in outcome.skips}


@pytest.mark.parametrize("name", RUNNABLE)
def test_every_model_loads_and_answers_nearly_the_same(name: str) -> None:
    before, outcome, _ = zoo_model(name)
    errors = relative_error(before, outcome.model, zoo.feeds(zoo.build(name), 1, seed=99))
    # Random weights, so errors add up like noise: about 1% per handful of layers.
    assert max(errors.values()) < 0.1


@pytest.mark.parametrize("name", RUNNABLE)
def test_every_weighted_node_is_quantized_or_has_a_reason(name: str) -> None:
    before, outcome, _ = zoo_model(name)
    changed, skipped = {change.node for change in outcome.changes}, reasons(outcome)
    for node in before.graph.all_nodes():
        if node.op_type in WEIGHTED and node.domain == "":
            assert (node.name in changed) != bool(skipped.get(node.name or "")), node.name


@pytest.mark.parametrize("name", RUNNABLE)
def test_pairs_stand_on_float_tensors_with_sane_scales(name: str) -> None:
    model = zoo_model(name).outcome.model
    proto = onnx.shape_inference.infer_shapes(onnx.ModelProto.FromString(to_bytes(model)), strict_mode=True)
    types = {info.name: info.type.tensor_type.elem_type for info in [*proto.graph.value_info, *proto.graph.input]}
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type == "QuantizeLinear":
            assert types[node.input[0]] == onnx.TensorProto.FLOAT
        if node.op_type in {"QuantizeLinear", "DequantizeLinear"}:
            assert np.isfinite(arrays[node.input[1]]).all()
            assert 0 < arrays[node.input[1]].max() < 1e4
            assert arrays[node.input[2]].dtype in (np.uint8, np.int8, np.int32)


@pytest.mark.parametrize("name", ["digits", "letters"])
def test_shipped_models_keep_their_accuracy(name: str) -> None:
    before, outcome, _ = shipped(name)
    feeds = dict(np.load(MODELS / f"{name}_eval.npz"))
    labels = feeds.pop("label")
    scores = [float((Session(m).run(feeds)["logits"].argmax(1) == labels).mean()) for m in (before, outcome.model)]
    assert scores[1] > scores[0] - 0.01
    assert len(to_bytes(outcome.model)) < 0.4 * len(to_bytes(before))  # a quarter, the graph itself, and scales


@pytest.mark.parametrize("name", ["letters", "bert"])
def test_masks_never_reach_a_scale_and_scores_stay_in_float(name: str) -> None:
    before, outcome, _ = shipped(name) if name == "letters" else zoo_model(name)
    for node in outcome.model.graph:
        if node.op_type == "QuantizeLinear":
            scale = node.inputs[1]
            assert scale is not None
            assert scale.const_value is not None
            assert scale.const_value.numpy() < 1e4
    products = [
        node
        for node in before.graph
        if node.op_type == "MatMul" and all(v.const_value is None for v in node.inputs if v)
    ]
    scores = [node for node in products if any(use.node.op_type != "Transpose" for use in node.outputs[0].uses())]
    assert len(scores) == 2
    for node in scores:
        assert "attention scores" in reasons(outcome)[node.name or ""]


def test_digits_runs_in_integers_from_end_to_end(tmp_path: Path) -> None:
    _, outcome, _ = shipped("digits")
    graph = executed(outcome.model, tmp_path)
    counts = operators(graph)
    assert counts["QLinearConv"] == 8
    assert counts["QLinearAdd"] == 3
    assert counts["Conv"] == counts["Relu"] == 0
    assert counts["QuantizeLinear"] <= 1
    producers = {name: node.op_type for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type == "DequantizeLinear":
            assert not any(node.output[0] in other.input for other in graph.node if "Conv" in other.op_type)
        if node.op_type == "QLinearConv":
            assert producers[node.input[0]] in {"QLinearConv", "QLinearAdd", "QuantizeLinear"}


@pytest.mark.parametrize(
    ("name", "integer", "float_"),
    [
        ("resnet", {"QLinearConv": 8, "QLinearAdd": 3, "QLinearGlobalAveragePool": 1, "QGemm": 1}, ("Conv", "Relu")),
        ("mobilenetv2", {"QLinearConv": 13, "QLinearAdd": 2}, ("Conv", "Clip")),
        ("inception", {"QLinearConv": 13, "QLinearConcat": 2}, ("Conv", "Relu", "Concat")),
        ("shufflenet", {"QLinearConv": 7, "QLinearAdd": 2}, ("Conv", "Relu")),
        ("vgg", {"QLinearConv": 3, "QGemm": 2}, ("Conv", "Gemm", "Relu")),
        ("conv3d", {"QLinearConv": 3}, ("Conv", "Relu")),
        ("senet", {"QLinearConv": 6, "QLinearSigmoid": 4, "QLinearMul": 4}, ("Conv", "Sigmoid", "Mul")),
    ],
)
def test_networks_fuse_without_float_islands(
    name: str, integer: dict[str, int], float_: tuple[str, ...], tmp_path: Path
) -> None:
    counts = operators(executed(zoo_model(name).outcome.model, tmp_path))
    assert {operator: counts[operator] for operator in integer} == integer
    assert not any(counts[operator] for operator in float_)


def test_residual_sums_stay_in_integers_behind_a_layer_in_float(tmp_path: Path) -> None:
    before, _, context = zoo_model("resnet")
    first = next(layer.name for layer in layers(before))
    counts = operators(executed(replace(FAST, keep=(first,))(before, context).model, tmp_path))
    assert (counts["Conv"], counts["QLinearConv"], counts["QLinearAdd"], counts["Add"]) == (1, 7, 3, 0)


def test_an_activation_function_of_a_float_that_a_layer_reads_too_stays_in_float(tmp_path: Path) -> None:
    net = Net(17)
    x = net.op("Erf", net.input("x", ["batch", 8, 8, 8]))  # has no integer kernel
    total = net.op("Concat", net.conv(x, 8, 8), net.conv(net.relu(x), 8, 8), axis=1)
    net.output("y", net.conv(total, 16, 4), ["batch", 4, "height", "width"])
    images = np.random.default_rng(0).normal(size=(16, 8, 8, 8)).astype(np.float32)
    model, context = with_context(net, {"x": images})
    made = FAST(model, context).model
    (relu,) = (node for node in made.graph if node.op_type == "Relu")
    assert relu.inputs[0] is not None
    producer = relu.inputs[0].producer()
    assert producer is not None
    assert producer.op_type == "Erf"
    assert operators(executed(made, tmp_path))["QLinearConv"] == 3


@pytest.mark.parametrize("operator", ["Pad", "Slice", "Concat", "Split", "Transpose", "MaxPool", "Resize"])
def test_what_moves_data_moves_integers(operator: str, tmp_path: Path) -> None:
    net = Net(17)
    x = net.relu(net.conv(net.input("x", ["batch", 3, 8, 8]), 3, 8))
    match operator:
        case "Pad":
            x = net.op("Pad", x, net.constant([0, 0, 1, 1, 0, 0, 1, 1]), net.constant(0.5, np.float32))
        case "Slice":
            x = net.op("Slice", x, net.constant([1]), net.constant([5]), net.constant([2]))
        case "Concat":
            x = net.op("Concat", x, net.relu(net.conv(x, 8, 8)), axis=1)
        case "Split":
            first, second = net.ops(2, "Split", x, net.constant([3, 5]), axis=1)
            x = net.op("Concat", net.conv(first, 3, 8), second, axis=1)
        case "Transpose":
            x = net.op("Transpose", x, perm=[0, 1, 3, 2])
        case "MaxPool":
            x = net.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
        case "Resize":
            x = net.upsample(x, 2, "nearest")
    channels = {"Concat": 16, "Split": 13}.get(operator, 8)
    net.output("y", net.conv(x, channels, 4), ["batch", 4, "height", "width"])
    images = np.random.default_rng(0).normal(size=(16, 3, 8, 8)).astype(np.float32)
    model, context = with_context(net, {"x": images})
    outcome = FAST(model, context)
    graph = executed(outcome.model, tmp_path)
    counts = operators(graph)
    assert counts["Conv"] == 0
    # One conversion at each end of the network, none between.
    assert (counts["QuantizeLinear"], counts["DequantizeLinear"]) == (1, 1)
    assert max(relative_error(model, outcome.model, {"x": images}).values()) < 0.05


def test_conversion_from_an_old_opset() -> None:
    for name, opset in (("weights_as_inputs", 9), ("densenet", 9), ("gru_tagger", 11)):
        before, outcome, _ = zoo_model(name)
        assert before.opset_imports[""] == opset
        assert outcome.model.opset_imports[""] == 13
        assert outcome.modified


def test_recurrent_transposed_and_inner_layers_have_their_reasons() -> None:
    expected = {
        "lstm_tagger": "no static INT8 kernel for LSTM",
        "gru_tagger": "no static INT8 kernel for GRU",
        "unet": "no static INT8 kernel for ConvTranspose",
        "control_flow": "inside a control-flow body",
        "quantized_already": "its weight is not a constant",
    }
    for name, reason in expected.items():
        assert reason in " ".join(reasons(zoo_model(name).outcome).values())


def test_half_precision_and_integers_get_no_pair() -> None:
    net = Net(17)
    x = net.op("Cast", net.input("x", ["batch", 8]), to=ir.DataType.FLOAT16)
    weight = net.weight(net.normal(8, 8, fan_in=8).astype(np.float16))
    net.output("y", net.op("MatMul", net.relu(net.op("MatMul", x, weight)), weight), ["batch", 8], ir.DataType.FLOAT16)
    model, context = with_context(net, {"x": np.ones((4, 8), np.float32)})
    outcome = FAST(model, context)
    assert not outcome.modified
    assert all("FLOAT16, not FLOAT" in reason for reason in reasons(outcome).values())
    assert len(outcome.skips) == 2


def test_without_data_or_when_excluded_or_kept_nothing_happens() -> None:
    model, _, context = zoo_model("vgg")
    assert "needs calibration data" in QuantizeStatic()(model).skips[0].reason
    names = tuple(layer.name for layer in layers(model))
    kept = QuantizeStatic(rounding=NEAREST, keep=names)(model, context)
    excluded = FAST(model, Context(data=context.data, exclude=re.compile("Conv|Gemm")))
    for outcome, reason in ((kept, "kept in float"), (excluded, "excluded by the user")):
        assert not outcome.modified
        assert all(reason in text for text in reasons(outcome).values())
        assert set(reasons(outcome)) == set(names)


def test_a_shared_weight_is_stored_once_with_a_bias_for_each_layer() -> None:
    net = Net(17)
    x = net.input("x", ["batch", 8])
    weight = net.weight(net.normal(8, 8, fan_in=8), "shared")
    y = x
    for gain in (1.0, 300.0):  # input scales far apart
        y = net.op("Mul", y, net.constant(gain, np.float32))
        y = net.relu(net.op("Gemm", y, weight, net.weight(net.uniform(-2, 2, 8) * np.float32(gain), "bias")))
    net.output("y", y, ["batch", 8])
    feeds = {"x": np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32)}
    model, context = with_context(net, feeds)
    for rounding in (NEAREST, Rounding()):
        outcome = QuantizeStatic(range=Range.MINMAX, rounding=rounding)(model, context)
        constants = outcome.model.graph.initializers
        assert sum(name.startswith("shared") and name.endswith("_int") for name in constants) == 1
        for layer in layers(model):
            assert layer.bias is not None
            assert layer.bias.const_value is not None
            parts = [constants[f"{layer.bias.name}_{part}"].const_value for part in ("int", "scale")]
            integers, scale = (part.numpy() for part in parts if part is not None)
            exact = layer.bias.const_value.numpy()
            np.testing.assert_allclose(dequantize(integers, scale, 0), exact, atol=0.02 * np.abs(exact).max())
        assert relative_error(model, outcome.model, feeds)["y"] < 0.02


def test_a_shared_weight_of_two_convolutions_is_stored_once() -> None:
    model = zoo_model("shared_weights").outcome.model
    kernels = [v for v in model.graph.initializers.values() if v.shape is not None and len(v.shape) == 4]
    assert len(kernels) == 2  # the first convolution's own, and the shared one
    assert all(value.dtype == ir.DataType.INT8 for value in kernels)


def test_graph_outputs_keep_their_names_though_a_kernel_reads_them_too() -> None:
    net = Net(17)
    hidden = net.relu(net.conv(net.input("x", ["batch", 3, 8, 8]), 3, 8))
    net.output("y", net.conv(hidden, 8, 4), ["batch", 4, 8, 8])
    net.output("hidden", hidden, ["batch", 8, 8, 8])
    images = np.random.default_rng(0).normal(size=(8, 3, 8, 8)).astype(np.float32)
    model, context = with_context(net, {"x": images})
    outcome = FAST(model, context)
    assert [value.name for value in outcome.model.graph.outputs] == ["y", "hidden"]
    assert max(relative_error(model, outcome.model, {"x": images}).values()) < 0.03


def test_a_huge_bias_over_tiny_inputs_still_fits_32_bits() -> None:
    net = Net(17)
    weight, bias = net.weight(net.normal(8, 4, fan_in=4) * 1e-6), net.weight(np.full(8, 1e4, np.float32))
    net.output("y", net.op("Gemm", net.input("x", ["batch", 4]), weight, bias, transB=1), ["batch", 8])
    feeds = {"x": np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32) * np.float32(1e-3)}
    model, context = with_context(net, feeds)
    assert relative_error(model, FAST(model, context).model, feeds)["y"] < 0.01


@pytest.mark.parametrize("settings", [{"signed": True}, {"weight_bits": 7}])
def test_other_grids_load_and_stay_accurate(settings: dict[str, Any]) -> None:
    for name in ("resnet", "superres", "vit"):
        before, _, context = zoo_model(name)
        outcome = QuantizeStatic(range=Range.MINMAX, rounding=NEAREST, **settings)(before, context)
        errors = relative_error(before, outcome.model, zoo.feeds(zoo.build(name), 1, seed=99))
        assert max(errors.values()) < 0.12
        types = {value.dtype for value in outcome.model.graph.initializers.values()}
        assert (ir.DataType.UINT8 in types) != settings.get("signed", False)
        if "weight_bits" in settings:
            kernels = [v.const_value for v in outcome.model.graph.initializers.values() if v.dtype == ir.DataType.INT8]
            assert max(int(np.abs(tensor.numpy().astype(int)).max()) for tensor in kernels if tensor is not None) == 64


@pytest.mark.parametrize("name", [pytest.param("digits", marks=pytest.mark.slow), "letters"])
def test_each_step_lowers_the_output_error(name: str) -> None:
    before, _, context = shipped(name)
    feeds = {key: array for key, array in np.load(MODELS / f"{name}_eval.npz").items() if key != "label"}

    def error(rounding: Rounding, bits: int) -> float:
        outcome = QuantizeStatic(rounding=rounding, weight_bits=bits)(before, context)
        return relative_error(before, outcome.model, feeds)["logits"]

    # At 4 bits it is the weights that make the error, not the activations.
    nearest = error(NEAREST, 4)
    assert error(Rounding(gptq=False, sweeps=0), 4) < nearest
    assert error(Rounding(sweeps=0, bias_correction=False), 4) < 0.8 * nearest
    assert error(Rounding(), 4) < 0.7 * nearest


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("name", ["resnet", "shared_weights", "mobilenetv2", "conv1d"])
def test_convolutions_as_products_give_the_same_and_never_saturate(name: str, bits: int) -> None:
    if bits > weight_bits(Target()):
        pytest.skip("the kernels of this CPU saturate with 8 bits, each in its own way")
    before, _, context = zoo_model(name)
    usual = replace(FAST, weight_bits=bits)
    names = tuple(layer.name for layer in layers(before) if layer.node.op_type == "Conv")
    outcome = replace(usual, as_gemm=names)(before, context)
    feeds = zoo.feeds(zoo.build(name), 3, seed=7)
    session, other = Session(usual(before, context).model), Session(outcome.model)
    for key, wanted in session.run(feeds).items():
        np.testing.assert_array_equal(other.run(feeds)[key], wanted)
    told = {change.node for change in outcome.changes if change.what.endswith("as a matrix product")}
    assert told == set(names) & {change.node for change in outcome.changes}
    for node in (node for node in outcome.model.graph if node.name in told):
        integers, _, zero = node.inputs[1].producer().inputs  # type: ignore[union-attr]
        assert (zero.const_value.numpy() == (1 if bits == 7 else -1)).all()  # type: ignore[union-attr]
        assert np.abs(integers.const_value.numpy().astype(int)).max() <= (64 if bits == 7 else 128)  # type: ignore[union-attr]


def test_a_weight_is_stored_for_the_kernel_of_all_its_layers() -> None:
    before, outcome, context = zoo_model("shared_weights")
    one, *others = [layer.name for layer in layers(before) if layer.weight.uses() and len(layer.weight.uses()) > 1]
    assert others
    mixed = replace(FAST, as_gemm=(one,))(before, context)
    assert to_bytes(mixed.model) == to_bytes(outcome.model)
