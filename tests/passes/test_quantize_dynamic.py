"""Dynamic INT8: what loads, stays accurate and fuses, and says why not where it does not."""

import functools
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from models import zoo
from models.net import Net
from onnxcomp.core import Context, Outcome
from onnxcomp.data import open_dataset
from onnxcomp.layers import layers
from onnxcomp.model import input_specs, load, to_bytes
from onnxcomp.passes.quantize_dynamic import QuantizeDynamic
from onnxcomp.passes.simplify import Simplify
from onnxcomp.runtime import Session
from onnxcomp.weights import Rounding

MODELS = Path(zoo.__file__).parent
RUNNABLE = [name for name in zoo.BUILDERS if name not in zoo.UNRUNNABLE]
NEAREST = Rounding(gptq=False, sweeps=0, bias_correction=False)


class Quantized(NamedTuple):
    """A cleaned-up model and what became of it, without data."""

    before: ir.Model
    outcome: Outcome


@functools.cache
def zoo_model(name: str) -> Quantized:
    model = Simplify()(load(zoo.build(name))).model
    return Quantized(model, QuantizeDynamic()(model))


def relative_error(before: ir.Model, after: ir.Model, feeds: dict[str, Any]) -> dict[str, float]:
    """Of each float output."""
    expected, got = Session(before).run(feeds), Session(after).run(feeds)
    assert list(expected) == list(got)
    return {
        name: float(np.linalg.norm(got[name].astype(float) - exact) / np.linalg.norm(exact))
        for name, exact in ((name, array.astype(float)) for name, array in expected.items() if array.dtype.kind == "f")
    }


def operators(model: ir.Model, folder: Path) -> Counter[str]:
    """What ONNX Runtime executes on the CPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(to_bytes(model), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def reasons(outcome: Outcome) -> dict[str, str]:
    return {skip.node: skip.reason for skip in outcome.skips}


@pytest.mark.parametrize("name", RUNNABLE)
def test_every_model_loads_and_answers_nearly_the_same(name: str) -> None:
    before, outcome = zoo_model(name)
    feeds = zoo.feeds(zoo.build(name), 1 if name == "weights_as_inputs" else 3, seed=99)
    errors = relative_error(before, outcome.model, feeds)
    assert max(errors.values()) < 0.1
    assert outcome.modified == (max(errors.values()) > 0)


@pytest.mark.parametrize("name", RUNNABLE)
def test_every_matrix_product_is_quantized_or_has_a_reason(name: str) -> None:
    before, outcome = zoo_model(name)
    changed, skipped = {change.node for change in outcome.changes}, reasons(outcome)
    for layer in layers(before):
        assert (layer.name in changed) != bool(skipped.get(layer.name)), layer.name


def test_products_fuse_into_one_kernel(tmp_path: Path) -> None:
    _, outcome = zoo_model("bert")
    counts = operators(outcome.model, tmp_path)
    products = sum(node.op_type == "MatMulInteger" for node in outcome.model.graph)
    assert products == 13
    assert counts["MatMulInteger"] == 0
    assert counts["DynamicQuantizeMatMul"] + counts["MatMulIntegerToFloat"] == products


def test_layers_that_share_an_input_quantize_it_once() -> None:
    net = Net(17)
    x = net.input("x", ["batch", 16])
    net.output(
        "y", net.op("Add", net.gemm(x, 16, 8), net.op("Mul", net.gemm(x, 16, 8), net.gemm(x, 16, 8))), ["batch", 8]
    )
    outcome = QuantizeDynamic()(net.model())
    counts = Counter(node.op_type for node in outcome.model.graph)
    assert counts["MatMulInteger"] == 3
    assert counts["DynamicQuantizeLinear"] == 1


def test_letters_keeps_its_accuracy_without_and_with_data() -> None:
    model = Simplify()(load(MODELS / "letters.onnx")).model
    calibration = {key: array[:64] for key, array in np.load(MODELS / "letters_calib.npz").items()}
    feeds = dict(np.load(MODELS / "letters_eval.npz"))
    labels = feeds.pop("label")
    context = Context(data=open_dataset(calibration, input_specs(model)))
    plain, tuned = QuantizeDynamic()(model).model, QuantizeDynamic()(model, context).model
    exact, *scores = ((Session(m).run(feeds)["logits"].argmax(1) == labels).mean() for m in (model, plain, tuned))
    assert min(scores) > exact - 0.01
    assert len(to_bytes(tuned)) < 0.4 * len(to_bytes(model))


def test_data_lower_the_error_of_few_bits() -> None:
    net = Net(17)
    x = net.relu(net.gemm(net.input("x", ["batch", 8]), 8, 64))  # 64 inputs that vary in 8 directions
    net.output("y", net.gemm(x, 64, 32), ["batch", 32])
    model = net.model()
    random = np.random.default_rng(0)
    data, other = ({"x": random.normal(size=(256, 8)).astype(np.float32)} for _ in range(2))
    context = Context(data=open_dataset(data, input_specs(model)))

    def error(rounding: Rounding) -> float:
        outcome = QuantizeDynamic(rounding=rounding, weight_bits=4)(model, context)
        return relative_error(model, outcome.model, other)["y"]

    nearest = error(NEAREST)
    assert error(Rounding(gptq=False, sweeps=0)) < nearest
    assert error(Rounding(sweeps=0, bias_correction=False)) < 0.9 * nearest
    assert error(Rounding()) < 0.8 * nearest


def test_what_has_no_kernel_says_so() -> None:
    expected = {"resnet": "slower than float", "mixer": "slower than float", "unet": "slower than float"}
    for name, reason in expected.items():
        assert reason in " ".join(reasons(zoo_model(name).outcome).values())
    net = Net(17)
    x = net.input("x", ["batch", 8])
    left = net.op("MatMul", net.weight(net.normal(8, 8, fan_in=8)), net.op("Transpose", x))
    scaled = net.op("Gemm", x, net.weight(net.normal(8, 8, fan_in=8)), alpha=0.5)
    broken = net.op("MatMul", x, net.weight(np.full((8, 8), np.nan, np.float32)))
    net.output("a", left, [8, "batch"])
    net.output("b", scaled, ["batch", 8])
    net.output("c", broken, ["batch", 8])
    outcome = QuantizeDynamic()(net.model())
    assert not outcome.modified
    texts = " ".join(reasons(outcome).values())
    assert all(part in texts for part in ("on the left", "alpha", "not finite"))


def test_when_excluded_or_kept_nothing_happens() -> None:
    model = zoo_model("lstm_tagger").before
    names = tuple(layer.name for layer in layers(model))
    kept = QuantizeDynamic(keep=names)(model)
    excluded = QuantizeDynamic()(model, Context(exclude=re.compile(".")))
    assert set(names) <= set(reasons(kept))
    assert set(names) <= set(reasons(excluded))
    assert not {change.node for change in kept.changes} & set(names)
    assert not excluded.modified


def test_an_lstm_becomes_one_integer_kernel() -> None:
    net = Net(17)
    x = net.input("x", ["length", "batch", 48])
    weights = [net.weight(net.normal(2, 4 * 32, size, fan_in=size)) for size in (48, 32)]
    bias, lengths = net.weight(net.uniform(-0.1, 0.1, 2, 8 * 32)), net.constant([7, 4], np.int32)
    net.output(
        "y", net.op("LSTM", x, *weights, bias, lengths, hidden_size=32, direction="bidirectional"), [7, 2, 2, 32]
    )
    model = net.model()
    outcome = QuantizeDynamic()(model)
    assert [node.op_type for node in outcome.model.graph] == ["DynamicQuantizeLSTM"]
    feeds = {"x": np.random.default_rng(0).normal(size=(7, 2, 48)).astype(np.float32)}
    # A step of 1/127 in each weight and of 1/255 in each activation, over 7 turns.
    assert relative_error(model, outcome.model, feeds)["y"] < 0.03
    assert len(to_bytes(outcome.model)) < 0.32 * len(to_bytes(model))
    assert "GRU" in " ".join(reasons(zoo_model("gru_tagger").outcome).values())


def test_tables_are_looked_up_as_integers(tmp_path: Path) -> None:
    net = Net(17)
    ids = net.input("ids", ["batch", "length"], ir.DataType.INT64)
    table = net.normal(500, 40, fan_in=1) * np.geomspace(0.01, 1, 500, dtype=np.float32)[:, None]
    net.output("rows", net.op("Gather", net.weight(table), ids), ["batch", "length", 40])
    model = net.model()
    outcome = QuantizeDynamic()(model)
    assert operators(outcome.model, tmp_path) == {"GatherBlockQuantized": 1}
    indices = np.array([[0, 499, 7], [250, 250, 1]])
    rows = np.asarray(Session(outcome.model).run({"ids": indices})["rows"])
    step = np.abs(table[indices]).max(axis=-1, keepdims=True) / 127
    assert (np.abs(rows - table[indices]) < 1.01 * step).all()  # half a step, and a clipped end of the range
    assert len(to_bytes(outcome.model)) < 0.3 * len(to_bytes(model))
    assert not QuantizeDynamic()(outcome.model).modified


def test_a_table_with_other_readers_is_stored_once() -> None:
    _, outcome = zoo_model("gpt")
    lookup = next(node for node in outcome.model.graph if node.op_type == "GatherBlockQuantized")
    assert lookup.inputs[0] is not None
    assert {use.node.op_type for use in lookup.inputs[0].uses()} == {"GatherBlockQuantized", "Reshape"}
