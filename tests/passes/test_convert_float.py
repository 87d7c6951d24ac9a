"""Half precision answers like float32, keeps the model's face, and stays away from where it would overflow."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from models import zoo
from onnxcomp import model as models
from onnxcomp.core import Context
from onnxcomp.data import open_dataset
from onnxcomp.model import input_specs
from onnxcomp.passes.convert_float import ConvertFloat, Float
from onnxcomp.runtime import Session

MODELS = Path(zoo.__file__).parent
DIVERSE = [
    *("resnet", "mobilenetv2", "detector", "bert", "gpt", "lstm_tagger", "gru_tagger", "conv3d"),
    *("control_flow", "functions", "shared_weights", "weights_as_inputs", "fp16_weights", "string_lookup"),
]


def parse(text: str, **constants: NDArray[Any]) -> ir.Model:
    """A graph in ONNX's text form with opset 17, some of its inputs turned into initializers."""
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    for name, array in constants.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    kept = [value for value in proto.graph.input if value.name not in constants]
    del proto.graph.input[:]
    proto.graph.input.extend(kept)
    return models.load(proto)


def normal(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32) / np.float32(np.sqrt(shape[0]))


def data(model: ir.Model, *feeds: dict[str, NDArray[Any]]) -> Context:
    return Context(open_dataset(list(feeds), input_specs(model)))


def types(model: ir.Model) -> dict[str, ir.DataType | None]:
    """Type of the output of each operator, Casts aside; the operators of these graphs are all different."""
    return {node.op_type: node.outputs[0].dtype for node in model.graph if node.op_type != "Cast"}


@pytest.mark.parametrize("name", DIVERSE)
@pytest.mark.parametrize("to", Float)
def test_answers_are_close_and_faces_the_same(name: str, to: Float) -> None:
    proto = zoo.build(name)
    model = models.load(proto)
    before = models.to_bytes(model)
    outcome = ConvertFloat(to)(model)
    assert models.to_bytes(model) == before
    fixed = proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    feeds = zoo.feeds(proto, fixed or 2)
    expected, actual = Session(model).run(feeds), Session(outcome.model).run(feeds)
    assert list(actual) == list(expected)
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype
        if value.dtype == np.float32:
            error = np.linalg.norm(np.subtract(actual[key], value)) / np.linalg.norm(np.asarray(value, np.float64))
            assert error < 1e-2
    if outcome.modified and name != "fp16_weights":
        assert len(models.to_bytes(outcome.model)) < 0.9 * len(before)
    assert not ConvertFloat(to)(outcome.model).modified


def test_a_network_needs_casts_at_its_edges_only() -> None:
    model = models.load(zoo.build("resnet"))
    outcome = ConvertFloat()(model)
    casts = [node for node in outcome.model.graph if node.op_type == "Cast"]
    assert [cast.inputs[0] in outcome.model.graph.inputs for cast in casts] == [True, False]
    assert casts[1].outputs[0] in outcome.model.graph.outputs
    assert outcome.skips == ()
    floats = [value for value in outcome.model.graph.initializers.values() if value.dtype == ir.DataType.FLOAT]
    assert floats == []
    assert len(models.to_bytes(outcome.model)) < 0.51 * len(models.to_bytes(model))


def test_without_a_kernel_only_weights_are_half() -> None:
    model = models.load(zoo.build("resnet"))
    outcome = ConvertFloat(Float.BF16)(model)
    assert {change.what for change in outcome.changes} == {"bf16 weights"}
    assert all(node.outputs[0].dtype == ir.DataType.FLOAT for node in outcome.model.graph)
    assert len(models.to_bytes(outcome.model)) < 0.55 * len(models.to_bytes(model))


@pytest.mark.parametrize("name", ["letters", "digits"])
def test_trained_models_keep_their_answers(name: str) -> None:
    model = models.load(MODELS / f"{name}.onnx")
    context = Context(open_dataset(MODELS / f"{name}_calib.npz", input_specs(model)).select(range(32)))
    outcome = ConvertFloat()(model, context)
    feeds = dict(np.load(MODELS / f"{name}_eval.npz"))
    feeds.pop("label")
    expected, actual = (Session(m).run(feeds)["logits"].astype(np.float64) for m in (model, outcome.model))
    assert np.linalg.norm(actual - expected) < 1e-2 * np.linalg.norm(expected)
    assert (actual.argmax(1) == expected.argmax(1)).mean() > 0.995
    assert len(models.to_bytes(outcome.model)) < 0.7 * len(models.to_bytes(model))


MLP = """
g (float[n, 64] x, float[64, 64] w, float[64, 64] v) => (float[n, 64] y) {
    h = MatMul(x, w)
    r = Relu(h)
    e = Exp(r)
    l = Log(e)
    y = Gemm(l, v)
}
"""


def test_what_overflows_on_data_stays_float32() -> None:
    model = parse(MLP, w=normal(64, 64), v=normal(64, 64))
    calm, hot = np.zeros((4, 64), np.float32), 20 * normal(64, 64)
    half, single = ir.DataType.FLOAT16, ir.DataType.FLOAT
    everywhere = {"MatMul": half, "Relu": half, "Exp": half, "Log": half, "Gemm": half}
    assert types(ConvertFloat()(model, data(model, {"x": calm})).model) == everywhere
    outcome = ConvertFloat()(model, data(model, {"x": 8 * hot}))
    assert types(outcome.model) == everywhere | {"Exp": single, "Log": single}
    assert Counter("reaches" in skip.reason for skip in outcome.skips) == {True: 2}
    feeds = {"x": 8 * hot}
    expected, actual = (Session(m).run(feeds)["y"] for m in (model, outcome.model))
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), atol=0.05)  # values to 70, 11 bits of mantissa
    # bfloat16 has the range of float32.
    assert not any("reaches" in skip.reason for skip in ConvertFloat(Float.BF16)(model, data(model, feeds)).skips)


@pytest.mark.parametrize(("factor", "survives"), [(1.0, True), (1e6, False), (1e-9, False), (0.0, True)])
def test_weights_that_would_be_lost_stay_float32(factor: float, survives: bool) -> None:
    model = parse(MLP, w=normal(64, 64), v=normal(64, 64) * np.float32(factor))
    outcome = ConvertFloat()(model)
    assert (types(outcome.model)["Gemm"] == ir.DataType.FLOAT16) == survives
    assert types(outcome.model)["MatMul"] == ir.DataType.FLOAT16
    assert [skip.reason for skip in outcome.skips] == ([] if survives else ["'v' does not survive rounding to fp16"])


@pytest.mark.parametrize("name", ["bert", "gpt"])
def test_masks_are_cut_and_still_hide(name: str) -> None:
    proto = zoo.build(name)
    model = models.load(proto)
    feeds = zoo.feeds(proto)
    outcome = ConvertFloat()(model, data(model, feeds))
    assert not any("reaches" in skip.reason or "survive" in skip.reason for skip in outcome.skips)
    lowest = min(
        float(value.const_value.numpy().min())
        for value in outcome.model.graph.initializers.values()
        if value.const_value is not None and value.dtype == ir.DataType.FLOAT16
    )
    assert lowest == -65504 / 2
    key = next(iter(Session(model).run(feeds)))
    expected, actual = (np.asarray(Session(m).run(feeds)[key], np.float64) for m in (model, outcome.model))
    assert np.linalg.norm(actual - expected) < 1e-2 * np.linalg.norm(expected)


def test_what_becomes_an_integer_stays_exact() -> None:
    text = """
    g (float[n, 64] x, float[64, 64] w, float half) => (float[n, 64] y) {
        h = MatMul(x, w)
        s = Shape <start=0, end=1> (x)
        f = Cast <to=1> (s)
        m = Mul(f, half)
        k = Cast <to=7> (m)
        z = Constant <value_ints=[0]> ()
        y = Slice(h, z, k, z)
    }
    """
    model = parse(text, w=normal(64, 64), half=np.asarray(0.5, np.float32))
    outcome = ConvertFloat()(model)
    assert types(outcome.model)["Mul"] == ir.DataType.FLOAT
    assert [skip.reason for skip in outcome.skips] == ["its result becomes an integer"]
    rows = {"x": normal(64, 64).repeat(100, axis=0)[:6002]}  # 3,001 is no float16
    assert Session(outcome.model).run(rows)["y"].shape == Session(model).run(rows)["y"].shape == (3001, 64)


def test_slots_that_the_schema_fixes_stay_float32() -> None:
    text = """
    g (float[1, 64, 4, 4] x, float[64, 64, 1, 1] w, float[4] scales) => (float[1, 64, 8, 8] y) {
        h = Conv(x, w)
        y = Resize <mode="nearest"> (h, , scales)
    }
    """
    model = parse(text, w=normal(64, 64, 1, 1), scales=np.array([1, 1, 2, 2], np.float32))
    resize = next(node for node in ConvertFloat()(model).model.graph if node.op_type == "Resize")
    dtypes = [None if value is None else value.dtype for value in resize.inputs]
    assert dtypes == [ir.DataType.FLOAT16, None, ir.DataType.FLOAT]


def test_operators_without_half_in_this_opset_stay_float32() -> None:
    text = """
    g (float[n, 64] x, float[64, 64] w, float zero, float one, float end) => (float[n, 64] y) {
        h = MatMul(x, w)
        r = Range(zero, end, one)
        y = Add(h, r)
    }
    """
    scalars = {name: np.asarray(value, np.float32) for name, value in (("zero", 0), ("one", 1), ("end", 64))}
    outcome = ConvertFloat()(parse(text, w=normal(64, 64), **scalars))
    assert types(outcome.model) == {
        "MatMul": ir.DataType.FLOAT16, "Range": ir.DataType.FLOAT, "Add": ir.DataType.FLOAT16,
    }  # fmt: skip
    assert [skip.reason for skip in outcome.skips] == ["the standard has no Range in fp16"]


def test_quantized_models_are_left_alone() -> None:
    outcome = ConvertFloat()(models.load(zoo.build("quantized_already")))
    assert not outcome.modified
    assert "stands beside quantized operators" in {skip.reason for skip in outcome.skips}


def test_bodies_are_converted_inside() -> None:
    outcome = ConvertFloat()(models.load(zoo.build("control_flow")))
    inside = [node for node in outcome.model.graph.all_nodes() if node.graph is not outcome.model.graph]
    assert {node.outputs[0].dtype for node in inside if node.op_type == "Gemm"} == {ir.DataType.FLOAT16}
    for graph in outcome.model.graphs():
        assert all(value.dtype != ir.DataType.FLOAT16 for value in graph.outputs)


def test_products_behind_a_batch_transpose_do_not_crash() -> None:
    text = """
    g (float[a, b, 64] x, float[64, 64] w) => (float[b, a, 64] y) {
        t = Transpose <perm=[1, 0, 2]> (x)
        y = MatMul(t, w)
    }
    """
    model = parse(text, w=normal(64, 64))
    outcome = ConvertFloat()(model)  # half would end the process when ONNX Runtime loads it
    assert not outcome.modified
    assert {"crashes" in skip.reason for skip in outcome.skips} == {True}


def test_kept_and_excluded_nodes_stay_float32() -> None:
    model = parse(MLP, w=normal(64, 64), v=normal(64, 64))
    names = {node.op_type: node.name or "" for node in ConvertFloat()(model).model.graph}
    kept = ConvertFloat(keep=(names["Gemm"],))(model)
    assert types(kept.model)["Gemm"] == ir.DataType.FLOAT
    excluded = ConvertFloat()(model, Context(exclude=re.compile("MatMul|Gemm")))
    assert not excluded.modified
    assert "excluded by the user" in {skip.reason for skip in excluded.skips}


def test_a_result_that_does_not_run_is_not_given() -> None:
    text = """
    g (float[64, 64] x, int64[32, 1] rows, float[32, 64] added) => (float[64, 64] y) {
        y = ScatterND <reduction="add"> (x, rows, added)
    }
    """
    model = parse(text, rows=np.arange(32)[:, None], added=normal(32, 64))
    outcome = ConvertFloat()(model)
    assert not outcome.modified
    assert "ScatterND" in outcome.skips[0].reason
