"""Dynamic INT8: weights as integers in the file, activations turned into integers anew for each run.

    (q, s, z) = DynamicQuantizeLinear(x)
    y = s s_W (q - z) Q_W + b

Each run takes the range of its own activations, so outliers of other inputs cost no resolution: the mode for
transformers and recurrent networks. ONNX Runtime fuses the chain into one kernel. Embedding tables become int8 rows with
one scale each; they are looked up as integers, so that the table is never expanded.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxcomp.calibration import Gram, calibrate
from onnxcomp.core import Change, Context, Outcome, Pass, Skip, name_nodes
from onnxcomp.graph import Builder, constant_of, prepared, remove_unused
from onnxcomp.layers import Layer, layer_of, layers
from onnxcomp.numerics.affine import IntGrid
from onnxcomp.weights import Rounding, round_weights

_OPSET = 13


@dataclass(frozen=True)
class QuantizeDynamic(Pass):
    """Dynamic INT8 for matrix products, recurrent layers and embeddings.

    Attributes:
        rounding: how weights are rounded; without calibration data to the nearest.
        weight_bits: 8, or 7 where the processor adds pairs of products in 16 bits and would saturate.
        keep: names of the nodes that stay in float.
    """

    name: ClassVar[str] = "quantize-dynamic"
    summary: ClassVar[str] = "dynamic INT8: MatMul, Gemm and embeddings; activation ranges taken at run time"

    rounding: Rounding = field(default_factory=Rounding)
    weight_bits: int = 8
    keep: tuple[str, ...] = ()

    def apply(self, model: ir.Model, context: Context) -> Outcome:
        """Quantize every matrix product with a constant weight."""
        converted = prepared(model, _OPSET)
        if isinstance(converted, str):
            return Outcome(model, (), (Skip("model", converted),))
        name_nodes(converted)
        chosen, skips = [], []
        for layer in layers(converted):
            reason = _obstacle(layer)
            if context.excludes(layer.node):
                reason = "excluded by the user"
            elif layer.name in self.keep:
                reason = "kept in float: faster or more accurate so"
            if reason is not None:
                skips.append(Skip(layer.name, reason))
            else:
                chosen.append(layer)
        grams = _grams(converted, chosen, self.rounding, context)
        changes = []
        for layer in chosen:
            _quantize(layer, IntGrid(self.weight_bits, signed=True, symmetric=True), self.rounding, grams.get(layer.name), context.cache)
            changes.append(Change(layer.name, "int8 weights per channel, dynamic uint8 activations"))
        remove_unused(converted)
        return Outcome(converted if changes else model, tuple(changes), tuple(skips))


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
    if layer.node.op_type == "Gemm" and (attributes.get_float("alpha", 1.0) != 1.0 or attributes.get_int("transA", 0)):
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
    wide = builder.node(
        "Cast", [product], f"{node.name}_cast", like=node.outputs[0], before=node, to=ir.DataType.FLOAT
    )
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


def replace(node: ir.Node, result: ir.Value) -> None:
    """Put a value in the place of a node's only output, its name included, and remove the node."""
    graph, output = node.graph, node.outputs[0]
    assert graph is not None
    name = output.name
    output.replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    result.name = name
