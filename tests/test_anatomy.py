"""What became of each layer, against sums and cases that are known."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxcomp import model as models
from onnxcomp.anatomy import layer_rows
from onnxcomp.core import Change, Context, Pass, name_nodes
from onnxcomp.cost import Totals, node_costs
from onnxcomp.layers import layers
from onnxcomp.passes.factorize import Factorize
from onnxcomp.passes.prune import Prune
from onnxcomp.passes.prune_depth import PruneDepth
from onnxcomp.passes.quantize_dynamic import QuantizeDynamic
from onnxcomp.passes.quantize_static import QuantizeStatic
from onnxcomp.passes.quantize_weights import Form, QuantizeWeights
from onnxcomp.passes.share import Share
from onnxcomp.profiling import _traced
from onnxcomp.report import LayerRow, Step
from onnxcomp.runtime import NodeTime, Target
from onnxcomp.synthetic import synthetic
from tests.passes.small import context, network
from tests.passes.test_prune_depth import joins, residual

TARGET = Target(threads=1)


def rows_of(original: ir.Model, result: ir.Model, steps: Sequence[Step] = ()) -> dict[str, LayerRow]:
    data = synthetic(models.input_specs(original), 4, 0, {})
    run, samples = (next(iter(data.batches(size))).feeds for size in (1, 4))
    return {row.name: row for row in layer_rows(original, result, steps, TARGET, run, samples)}


def made(*passes: Pass) -> dict[str, LayerRow]:
    original = result = network()
    data = synthetic(models.input_specs(original), 8, 0, {})
    steps: list[Step] = []
    for technique in passes:
        outcome = technique(result, Context(data, TARGET))
        result, steps = outcome.model, [*steps, Step.of(technique, outcome)]
    found = rows_of(original, result, steps)
    for field, model in (("bytes", original), ("bytes_after", result)):
        whole = Totals.of(node_costs(model)).bytes
        assert sum(getattr(row, field) or 0 for row in found.values()) == pytest.approx(whole, abs=len(found)), field
    return found


def weighted(rows: dict[str, LayerRow]) -> list[LayerRow]:
    return [row for row in rows.values() if row.op in {"Conv", "Gemm"} and row.weights is not None]


def test_an_unchanged_model_has_no_error_and_the_same_weights() -> None:
    rows = made()
    layers = weighted(rows)
    assert len(layers) == 7
    for row in layers:
        assert row.sensitivity == 0
        assert row.weights == row.weights_after
        assert row.bytes == row.bytes_after
        assert row.techniques == ()
        assert row.microseconds is not None
        assert row.microseconds_after is not None


def test_integers_are_a_quarter_and_leave_an_error() -> None:
    rows = made(QuantizeStatic())
    for row in weighted(rows):
        assert row.bytes is not None
        assert row.bytes_after is not None
        assert row.bytes_after < 0.6 * row.bytes
        assert row.sensitivity is not None
        assert 0 < row.sensitivity < 0.1
        assert row.microseconds_after is not None
        assert row.weights is not None
        assert row.weights_after is not None
        assert sum(row.weights.counts) == sum(row.weights_after.counts)
        assert re.fullmatch(r"QuantizeStatic: (7-bit )?int8 weights per channel, uint8 activations", row.techniques[0])


def test_what_stands_in_for_a_layer_counts_with_it() -> None:
    rows = made(QuantizeDynamic())
    assert not [name for name in rows if name.endswith("_int")]
    (gemm,) = (row for row in weighted(rows) if row.op == "Gemm")
    assert gemm.microseconds_after is not None
    assert gemm.bytes is not None
    assert gemm.bytes_after is not None
    assert gemm.bytes_after < gemm.bytes
    near(gemm)


def near(row: LayerRow) -> None:
    """Bounds and spread of the weights are about those of the original."""
    assert row.weights is not None
    assert row.weights_after is not None
    assert row.weights_after.low == row.weights.low
    first, second = (np.asarray(histogram.counts, float) for histogram in (row.weights, row.weights_after))
    assert first.sum() == second.sum()
    places = np.arange(len(first))
    for moment in (1, 2):
        assert np.dot(first, places**moment) == pytest.approx(np.dot(second, places**moment), rel=0.03)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("form", [Form.MATMULNBITS, Form.DECODE])
def test_packed_weights_are_read_as_their_kernel_reads_them(bits: int, symmetric: bool, form: Form) -> None:
    rows = made(QuantizeWeights(bits=bits, symmetric=symmetric, form=form))
    quantized = [row for row in weighted(rows) if any("QuantizeWeights" in text for text in row.techniques)]
    assert quantized
    for row in quantized:
        near(row)


def test_a_layer_that_was_split_sums_up_its_parts() -> None:
    rows = made(Factorize(remains=0.6))
    split = [row for row in weighted(rows) if any("of rank" in text for text in row.techniques)]
    assert split
    for row in split:
        assert row.weights_after is None
        assert row.bytes is not None
        assert row.bytes_after is not None
        assert row.bytes_after < row.bytes


@pytest.mark.parametrize("deep", [True, False])
def test_whatever_has_other_weights_or_is_gone_has_a_technique(deep: bool) -> None:
    model = residual(1, 1, 1)
    stem, *inside, _ = [layer.name for layer in layers(model)]
    gone, narrow = ((joins(model)[1], 1),), ((inside[4], 8),)
    technique: Pass = (
        PruneDepth(parts=gone, jointly=False) if deep else Prune(parts=narrow, branches=gone, jointly=False)
    )
    outcome = technique(model, context(16))
    before, after = ({layer.name: layer.matrix() for layer in layers(each)} for each in (model, outcome.model))
    same = {name for name in after if np.array_equal(before[name], after[name])}
    rows = rows_of(model, outcome.model, [Step.of(technique, outcome)])
    untold = {row.name for row in rows.values() if row.op in {"Conv", "Gemm"} and not row.techniques}
    assert untold == same
    assert stem in same
    assert rows[inside[2]].techniques == (f"{type(technique).__name__}: gone with the branch at '{gone[0][0]}'",)


def test_what_follows_a_sum_that_is_gone_counts_with_what_it_follows_now() -> None:
    """Where the sum came right behind a layer: Relu(Relu(x)) = Relu(x), and the second one stays."""
    model = residual(1, 1)
    join = joins(model)[0]
    outcome = PruneDepth(parts=((join, 1),), jointly=False)(model, context())
    rows = rows_of(model, outcome.model)
    stem = next(layers(model)).name
    assert rows[stem].microseconds_after
    assert join not in rows or rows[join].microseconds_after is None


def test_bytes_that_layers_share_are_shared_out() -> None:
    sizes = [(row.bytes, row.bytes_after) for row in weighted(made(Share(4))) if row.bytes and row.bytes > 10_000]
    assert sizes
    for before, after in sizes:
        assert after is not None
        assert before is not None
        assert after < 0.3 * before


def test_what_the_runtime_renames_is_traced_and_what_it_adds_is_summed_up() -> None:
    model = parsed("net (float[2,4] x) => (float[2,4] y) { h = Relu (x)  y = Neg (h) }")
    first, second = (node.name or "" for node in model.graph)
    events = {
        f"{first}_nchwc": NodeTime("Conv", 8, 3.0),
        f"{second}/MatMulScaleFusion/": NodeTime("FusedMatMul", 8, 4.0),
        "ReorderOutput_token_7": NodeTime("ReorderOutput", 8, 5.0),
        "BiasGelu": NodeTime("BiasGelu", 8, 6.0),
    }
    found = _traced(model, events)
    assert found.times == {first: 3.0, second: 4.0}
    assert found.untraced == 11.0


# --- units ----------------------------------------------------------------------------------------------------------


def parsed(text: str, **arrays: Any) -> ir.Model:
    model = ir.from_onnx_text(f'<ir_version: 8, opset_import: ["": 17]> {text}')
    for name, array in arrays.items():
        value = next(value for value in model.graph.inputs if value.name == name)
        value.const_value = ir.tensor(np.asarray(array, np.float32), name=name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    name_nodes(model)
    return model


def test_element_wise_nodes_belong_to_what_they_follow_and_sums_do_not() -> None:
    model = parsed(
        """net (float[2,4] x, float[4,4] w, float[4] b) => (float[2,4] y)
        { h = MatMul (x, w)  s = Add (h, b)  r = Relu (s)  y = Add (r, x) }""",
        w=np.eye(4),
        b=np.ones(4),
    )
    names = [node.name for node in model.graph]
    rows = rows_of(model, model, [Step("P()", (Change(names[2] or "", "done"),))])
    assert set(rows) - {""} == {names[0], names[3]}
    layer = rows[names[0] or ""]
    assert layer.bytes == 4 * (16 + 4)
    assert layer.techniques == ("P: done",)
    assert rows[names[3] or ""].bytes == 0


def test_a_layer_that_is_gone_has_nothing_after() -> None:
    text = """net (float[2,4] x, float[4,4] v, float[4,4] w) => (float[2,4] y)
        { h = MatMul (x, v)  y = MatMul (h, w) }"""
    before = parsed(text, v=np.eye(4), w=np.eye(4))
    after = parsed("net (float[2,4] x, float[4,4] w) => (float[2,4] y) { y = MatMul (x, w) }", w=np.eye(4))
    first, second = (node.name or "" for node in before.graph)
    next(iter(after.graph)).name = second
    rows = rows_of(before, after)
    gone = rows[first]
    assert (gone.bytes, gone.bytes_after, gone.microseconds_after, gone.sensitivity) == (64, None, None, None)
    assert rows[second].sensitivity == 0


def test_a_weight_of_one_value_has_a_histogram() -> None:
    text = "net (float[2,4] x, float[4,4] w) => (float[2,4] y) { y = MatMul (x, w) }"
    rows = rows_of(parsed(text, w=np.ones((4, 4))), parsed(text, w=np.ones((4, 4))))
    (row,) = (row for row in rows.values() if row.weights is not None)
    assert row.weights is not None
    assert sum(row.weights.counts) == 16
    assert row.weights.low < 1 < row.weights.high
