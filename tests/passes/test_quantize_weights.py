"""Packed weights compute what their formula says, in every operator that has weights, and take less room."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from models import zoo
from models.net import Net
from onnxcomp import model as models
from onnxcomp.core import Context, Outcome
from onnxcomp.data import open_dataset
from onnxcomp.errors import OptionError
from onnxcomp.model import input_specs
from onnxcomp.passes.quantize_weights import Form, QuantizeWeights
from onnxcomp.runtime import Session
from onnxcomp.samples import Dataset
from onnxcomp.weights import Rounding

MODELS = Path(zoo.__file__).parent
DECODING = {"BitShift", "Sub", "Cast", "Reshape", "Transpose", "Slice"}
LOOKED_UP, MULTIPLIED, DECODED = "rows decoded when looked up", "multiplied packed", "decoded at load"


def error(name: str, quantized: ir.Model) -> float:
    """Largest relative error of an output, ||y - y'|| / ||y||."""
    proto = zoo.build(name)
    feeds = zoo.feeds(proto)
    before, after = answers(models.load(proto), feeds), answers(quantized, feeds)
    return max(float(np.linalg.norm(before[key] - after[key]) / np.linalg.norm(before[key])) for key in before)


def answers(model: ir.Model, feeds: dict[str, Any]) -> dict[str, NDArray[Any]]:
    return dict(Session(model).run(feeds))


def quantize(name: str, **settings: Any) -> Outcome:
    return QuantizeWeights(block=32, **settings)(models.load(zoo.build(name)))


def loaded(model: ir.Model, folder: Path) -> onnx.GraphProto:
    """The graph that ONNX Runtime makes of a model when it loads it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "loaded.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    onnxruntime.InferenceSession(models.to_bytes(model), options, providers=["CPUExecutionProvider"])
    return onnx.load(options.optimized_model_filepath).graph


@pytest.mark.parametrize(
    ("name", "ways"),
    [
        ("conv1d", {DECODED: 3}),
        ("conv3d", {DECODED: 2}),
        ("mobilenetv2", {DECODED: 9, MULTIPLIED: 1}),
        ("unet", {DECODED: 10}),  # with ConvTranspose
        ("mixer", {DECODED: 1, MULTIPLIED: 8}),
        ("lstm_tagger", {DECODED: 2, MULTIPLIED: 1, LOOKED_UP: 1}),
        ("gru_tagger", {DECODED: 4}),
        ("gpt", {MULTIPLIED: 8, LOOKED_UP: 1}),
        ("bert", {MULTIPLIED: 13, LOOKED_UP: 1}),
        ("control_flow", {MULTIPLIED: 5}),
        ("shared_weights", {DECODED: 5}),
    ],
)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_weighted_operator(name: str, ways: dict[str, int], bits: int) -> None:
    outcome = quantize(name, bits=bits)
    assert Counter(change.what.split(", ")[1] for change in outcome.changes) == ways
    # Random weights, some ten layers deep: a step of 1/15 or 1/255 of the range in each.
    assert error(name, outcome.model) < (0.25 if bits == 4 else 0.025)
    before = len(models.to_bytes(models.load(zoo.build(name))))
    assert len(models.to_bytes(outcome.model)) < 0.6 * before
    assert not QuantizeWeights(bits=bits, block=32)(outcome.model).modified


@pytest.mark.parametrize("name", ["unet", "conv1d", "gru_tagger", "control_flow"])
def test_decoded_weights_cost_no_node_once_loaded(name: str, tmp_path: Path) -> None:
    def decoding(model: ir.Model) -> Counter[str]:
        graphs, counts = [loaded(model, tmp_path)], Counter[str]()
        while graphs:
            for node in graphs.pop().node:
                counts[node.op_type] += node.op_type in DECODING
                graphs += [attribute.g for attribute in node.attribute if attribute.HasField("g")]
        return +counts

    original = models.load(zoo.build(name))
    outcome = QuantizeWeights(form=Form.DECODE)(original)
    assert any(node.op_type == "BitShift" for node in outcome.model.graph.all_nodes())
    assert decoding(outcome.model) == decoding(original)


def test_a_table_is_never_expanded(tmp_path: Path) -> None:
    graph = loaded(quantize("lstm_tagger").model, tmp_path)
    table = next(node.input[0] for node in graph.node if node.op_type == "GatherBlockQuantized")
    packed = next(tensor for tensor in graph.initializer if tensor.name == table)
    assert packed.data_type == onnx.TensorProto.UINT8
    original = next(node for node in zoo.build("lstm_tagger").graph.node if node.op_type == "Gather").input[0]
    shape = next(list(tensor.dims) for tensor in zoo.build("lstm_tagger").graph.initializer if tensor.name == original)
    assert list(packed.dims) == shape  # 100 rows: 8 bits each
    floats = [tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT]
    assert not any(list(tensor.dims) == shape for tensor in floats)


def test_a_tied_table_is_stored_once() -> None:
    outcome = quantize("gpt")
    lookup = next(node for node in outcome.model.graph if node.op_type == "GatherBlockQuantized")
    table = lookup.inputs[0]
    assert table is not None
    assert Counter(use.node.op_type for use in table.uses()) == {"GatherBlockQuantized": 1, "Reshape": 1}


@pytest.mark.parametrize("form", Form)
def test_forms_agree(form: Form) -> None:
    outcome = quantize("mixer", form=form, accuracy_level=0)
    reference = quantize("mixer", form=Form.DECODE)
    feeds = zoo.feeds(zoo.build("mixer"))
    expected = answers(reference.model, feeds)["logits"]
    # The same integers; only float sums run in another order.
    np.testing.assert_allclose(answers(outcome.model, feeds)["logits"], expected, rtol=1e-3, atol=1e-3)


def test_calibrated_rounding_beats_nearest_on_data() -> None:
    net = Net(17)
    x = net.relu(net.gemm(net.input("x", ["batch", 8]), 8, 64))  # 64 inputs that vary in 8 directions
    net.output("y", net.gemm(x, 64, 96), ["batch", 96])
    model = net.model()
    random = np.random.default_rng(0)
    given, other = ({"x": random.normal(size=(256, 8)).astype(np.float32)} for _ in range(2))
    data, expected = open_dataset(given, input_specs(model)), answers(model, other)["y"]

    def loss(rounding: Rounding, data: Dataset | None) -> float:
        outcome = QuantizeWeights(rounding=rounding, accuracy_level=0)(model, Context(data=data))
        assert len(outcome.changes) == 1
        return float(np.linalg.norm(answers(outcome.model, other)["y"] - expected) / np.linalg.norm(expected))

    nearest = loss(Rounding(), None)
    assert loss(Rounding(sweeps=0, bias_correction=False), data) < 0.8 * nearest
    assert loss(Rounding(), data) < 0.7 * nearest


def test_four_bits_keep_the_letters() -> None:
    model = models.load(MODELS / "letters.onnx")
    outcome = QuantizeWeights()(model)
    evaluation = dict(np.load(MODELS / "letters_eval.npz"))
    labels = evaluation.pop("label")
    logits = answers(outcome.model, evaluation)["logits"]
    assert (logits.argmax(axis=1) == labels).mean() > 0.94  # 0.977 in float32, and no data were used
    assert len(models.to_bytes(outcome.model)) < 0.26 * len(models.to_bytes(model))


def test_what_is_left_alone_says_why() -> None:
    model = models.load(zoo.build("mixer"))
    first = QuantizeWeights()(model)
    kept = first.changes[0].node
    outcome = QuantizeWeights(keep=(kept,))(model)
    assert [skip.node for skip in outcome.skips] == [kept]
    assert outcome.changes == first.changes[1:]
    excluded = QuantizeWeights()(model, Context(exclude=re.compile("MatMul|Gemm|Conv")))
    assert not excluded.modified
    assert {skip.reason.split(",")[0] for skip in excluded.skips} == {"excluded by the user"}


def test_weights_that_are_not_finite_are_left_alone() -> None:
    model = models.load(zoo.build("shared_weights"))
    value = next(value for name, value in model.graph.initializers.items() if name.startswith("shared.kernel"))
    assert value.const_value is not None
    broken = value.const_value.numpy().copy()
    broken.flat[0] = np.nan
    value.const_value = ir.tensor(broken, name=value.name)
    outcome = QuantizeWeights()(model)
    assert [skip.reason for skip in outcome.skips] == ["its weights are not finite"] * 2
    assert len(outcome.changes) == 3


@pytest.mark.parametrize("settings", [{"bits": 3}, {"block": 48}, {"block": 8}])
def test_settings_out_of_range(settings: dict[str, int]) -> None:
    with pytest.raises(OptionError):
        QuantizeWeights(**settings)  # type: ignore[arg-type]
