"""Dynamic INT8: weights as integers in the file, activations turned into integers anew for each run.

    (q, s, z) = DynamicQuantizeLinear(x)
    y = s s_W (q - z) Q_W + b

Each run takes the range of its own activations, so outliers of other inputs cost no resolution: the mode for
transformers and recurrent networks. ONNX Runtime fuses the chain into one kernel, and has one for a whole LSTM.
Embedding tables become 8-bit rows with one scale each; they are looked up as integers, so that the table is never
expanded.
"""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from dataclasses import replace as changed
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from onnxcomp.calibration import calibrate
from onnxcomp.core import Change, Context, Outcome, Pass, Skip, name_nodes
from onnxcomp.decode import CONTRIB, PackedMatrix, StoredMatrix, View, lookups, stored_bytes
from onnxcomp.graph import Builder, constant_of, prepared, remove_unused, replace
from onnxcomp.layers import Layer, layers
from onnxcomp.numerics.affine import IntGrid, quantize
from onnxcomp.numerics.ranges import weight_scales
from onnxcomp.observations import Gram
from onnxcomp.runtime import Target, weight_bits
from onnxcomp.weights import DRAFTED, Rounding, Wanted, WeightBits, round_ahead, round_weights

_OPSET = 13
_LEAST_ELEMENTS = 1024  # of a table
_RECURRENT = {"LSTM", "GRU", "RNN"}


@dataclass(frozen=True)
class QuantizeDynamic(Pass):
    """Dynamic INT8 for matrix products, recurrent layers and embeddings.

    Attributes:
        rounding: how weights are rounded; without calibration data to the nearest.
        weight_bits: null: 7 where the target's kernels add pairs of products in 16 bits and would saturate, else 8.
        keep: names of the nodes that stay in float.
    """

    name: ClassVar[str] = "quantize-dynamic"
    summary: ClassVar[str] = "dynamic INT8: MatMul, Gemm and embeddings; activation ranges taken at run time"

    rounding: Rounding = field(default_factory=Rounding)
    weight_bits: WeightBits | None = None
    keep: tuple[str, ...] = ()

    @classmethod
    def for_target(cls, target: Target) -> "QuantizeDynamic":
        """The types that the target has kernels for."""
        return cls(weight_bits=weight_bits(target))

    def settled(self, context: Context) -> "QuantizeDynamic":  # noqa: D102
        return self if self.weight_bits is not None else changed(self, weight_bits=weight_bits(context.target))

    def drafted(self) -> "QuantizeDynamic":  # noqa: D102
        return changed(self, rounding=DRAFTED)

    def apply(self, model: ir.Model, context: Context) -> Outcome:
        """Quantize every matrix product with a constant weight, every LSTM and every table."""
        converted = prepared(model, _OPSET)
        if isinstance(converted, str):
            return Outcome(model, (), (Skip("model", converted),))
        name_nodes(converted)
        chosen, skips = [], []
        for layer in layers(converted):
            reason = self._refused([layer.node], context) or _obstacle(layer)
            if reason is not None:
                skips.append(Skip(layer.name, reason))
            else:
                chosen.append(layer)
        grams = _grams(converted, chosen, self.rounding, context)
        bits = self.settled(context).weight_bits
        assert bits is not None
        grid = IntGrid(bits, signed=True, symmetric=True)
        changes, done = [], f"{grid} weights per channel, dynamic uint8 activations"
        round_ahead([Wanted(layer, grid, grams.get(layer.name)) for layer in chosen], self.rounding, context)
        for layer in chosen:
            _quantize(layer, grid, self.rounding, grams.get(layer.name), context.cache)
            changes.append(Change(layer.name, done))
        for node in [node for node in converted.graph.all_nodes() if node.op_type in _RECURRENT and node.domain == ""]:
            reason = self._refused([node], context) or _recurrent_obstacle(node)
            if reason is not None:
                skips.append(Skip(node.name or "", reason))
            else:
                _quantize_lstm(node, grid, search=self.rounding.search)
                changes.append(Change(node.name or "", done))
        for table, nodes in lookups(converted).items():
            if (reason := self._refused(nodes, context) or _table_obstacle(table)) is not None:
                skips += [Skip(node.name or "", reason) for node in nodes if reason]
            else:
                _quantize_table(table, nodes, search=self.rounding.search)
                changes += [Change(node.name or "", "8-bit rows, decoded when looked up") for node in nodes]
        remove_unused(converted)
        if any(node.domain == CONTRIB for node in converted.graph.all_nodes()):
            converted.opset_imports.setdefault(CONTRIB, 1)
        return Outcome(converted if changes else model, tuple(changes), tuple(skips))

    def _refused(self, nodes: Iterable[ir.Node], context: Context) -> str | None:
        """Why nodes that share a weight shall not be touched."""
        if any(context.excludes(node) for node in nodes):
            return "excluded by the user"
        return "kept in float: faster or more accurate so" if any(node.name in self.keep for node in nodes) else None


def _grams(model: ir.Model, chosen: list[Layer], rounding: Rounding, context: Context) -> dict[str, Gram]:
    """Gram matrices of the layers in the main graph, where there are data and a step that uses them."""
    if context.data is None or not rounding.needs_gram:
        return {}
    observable = [layer for layer in chosen if layer.node.graph is model.graph]
    return dict(calibrate(model, context.data, context, layers=observable).grams)


def _obstacle(layer: Layer) -> str | None:
    if layer.node.op_type not in {"MatMul", "Gemm"}:
        return f"dynamic INT8 {layer.node.op_type} is slower than float on every provider"
    if layer.index == 0:
        return "its weight is on the left"
    if layer.weight.dtype != ir.DataType.FLOAT:
        return f"its weight is {layer.weight.dtype}, not FLOAT"
    attributes = layer.node.attributes
    if layer.node.op_type == "Gemm" and (
        attributes.get_float("alpha", 1.0) != 1.0 or attributes.get_int("transA", 0) != 0
    ):
        return "Gemm with alpha or transA has no INT8 kernel"
    if layer.bias is not None and attributes.get_float("beta", 1.0) != 1.0:
        return "Gemm with beta has no INT8 kernel"
    if not np.isfinite(layer.matrix()).all():
        return "its weights are not finite"
    return None


def _quantize(layer: Layer, grid: IntGrid, rounding: Rounding, gram: Gram | None, cache: dict[Hashable, Any]) -> None:
    node, weight = layer.node, layer.weight
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    builder = Builder(graph)
    rounded = round_weights(layer, grid, rounding, gram, cache=cache)
    integers = builder.constant(np.ascontiguousarray(rounded.integers.T), f"{weight.name}_int")
    scale = builder.constant(rounded.scale[:, 0], f"{weight.name}_scale")
    zeros = builder.constant(np.zeros(len(rounded.scale), np.int8), f"{weight.name}_zero")
    quantized = _dynamic(layer.data, builder, node)
    data, data_scale, data_zero = quantized.outputs
    product = builder.node(
        "MatMulInteger", [data, integers, data_zero, zeros], f"{node.name}_int",
        dtype=ir.DataType.INT32, before=node,
    )  # fmt: skip
    product.shape = node.outputs[0].shape
    step = builder.node("Mul", [data_scale, scale], f"{node.name}_scale", dtype=ir.DataType.FLOAT, before=node)
    wide = builder.node("Cast", [product], f"{node.name}_cast", like=node.outputs[0], before=node, to=ir.DataType.FLOAT)
    result = builder.node("Mul", [wide, step], f"{node.name}_product", like=node.outputs[0], before=node)
    if layer.bias is not None:
        bias = layer.bias
        values = constant_of(bias)
        if rounded.bias_shift.any() and values is not None:
            shifted = values + rounded.bias_shift
            bias = builder.constant(shifted.astype(np.float32), f"{bias.name}_shifted")
        result = builder.node("Add", [result, bias], f"{node.name}_sum", like=node.outputs[0], before=node)
    replace(node, result)


def _dynamic(data: ir.Value, builder: Builder, before: ir.Node) -> ir.Node:
    """The DynamicQuantizeLinear of an activation, shared by all in this graph that read it."""
    for use in data.uses():
        if use.node.op_type == "DynamicQuantizeLinear" and use.node.graph is before.graph:
            return use.node
    producer = data.producer()
    here = producer is not None and producer.graph is before.graph
    value = builder.node(
        "DynamicQuantizeLinear", [data], f"{data.name}_q", dtype=ir.DataType.UINT8, outputs=3,
        after=producer if here else None, before=None if here else before,
    )  # fmt: skip
    value.shape = data.shape
    node = value.producer()
    assert node is not None
    node.outputs[1].type, node.outputs[2].type = ir.TensorType(ir.DataType.FLOAT), ir.TensorType(ir.DataType.UINT8)
    return node


def _recurrent_obstacle(node: ir.Node) -> str | None:
    if node.op_type != "LSTM":
        return f"ONNX Runtime has no dynamic INT8 kernel for {node.op_type}"
    if node.attributes.get_int("layout", 0) != 0:
        return "LSTM with the batch first has no INT8 kernel"
    weights = [constant_of(value) for value in node.inputs[1:3]]
    if any(weight is None or weight.dtype != np.float32 for weight in weights):
        return "its weights are not constants of type FLOAT"
    if not all(np.isfinite(weight).all() for weight in weights if weight is not None):
        return "its weights are not finite"
    return None


def _quantize_lstm(node: ir.Node, grid: IntGrid, *, search: bool) -> None:
    """Turn the node into a DynamicQuantizeLSTM, which takes weights as (directions, inputs, 4 hidden)."""
    assert isinstance(node.graph, ir.Graph)
    builder = Builder(node.graph)
    node.resize_inputs(12)
    for index, place in ((1, 8), (2, 10)):
        value = node.inputs[index]
        weight = constant_of(value)
        assert value is not None
        assert weight is not None
        matrix = weight.reshape(-1, weight.shape[2])
        scale = weight_scales(matrix, grid, search=search)
        integers = quantize(matrix, scale[:, None], 0, grid).reshape(weight.shape).swapaxes(1, 2)
        scales = scale.reshape(weight.shape[:2])
        node.replace_input_with(index, builder.constant(integers, f"{value.name}_int"))
        node.replace_input_with(place, builder.constant(scales, f"{value.name}_scale"))
        node.replace_input_with(place + 1, builder.constant(np.zeros(scales.shape, np.int8), f"{value.name}_zero"))
    node.op_type, node.domain = "DynamicQuantizeLSTM", CONTRIB
    node.attributes.pop("layout", None)


def _table_obstacle(table: ir.Value) -> str | None:
    """Why a table stays in float: empty where nothing would be gained."""
    content = constant_of(table)
    assert content is not None
    rows, columns = content.shape
    if content.size < _LEAST_ELEMENTS or stored_bytes(rows, columns, 8, columns, symmetric=True) >= content.nbytes:
        return ""
    if table.is_graph_output():
        return "its table is an output of the graph"
    return None if np.isfinite(content).all() else "its table is not finite"


def _quantize_table(table: ir.Value, nodes: list[ir.Node], *, search: bool) -> None:
    content = constant_of(table)
    assert content is not None
    assert isinstance(table.graph, ir.Graph)
    packed = PackedMatrix.nearest(content, 8, content.shape[1], search=search)
    stored = StoredMatrix(Builder(table.graph), packed, table.name or "table")
    for node in nodes:
        indices = node.inputs[1]
        assert indices is not None
        assert isinstance(node.graph, ir.Graph)
        replace(node, stored.looked_up(indices, Builder(node.graph), node))
    readers = list(table.uses())
    if readers:
        whole = View(content.shape, content.shape, (0, 1))
        decoded = stored.decoded(whole, ir.DataType.FLOAT, before=table.graph[0])
        for reader, index in readers:
            reader.replace_input_with(index, decoded)
