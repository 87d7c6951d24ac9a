"""Which nodes have an INT8 form, and which of them stand together so that integers flow between."""

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir

from onnxcomp.core import Context, Skip
from onnxcomp.graph import constant_of, single_consumer
from onnxcomp.layers import FLOATS, is_empty, layer_of

ANCHORS = {"Conv", "Gemm", "MatMul"}
"""Operators that are worth converting for."""

ACTIVATIONS = {"Relu", "Clip"}
"""Operators that are nothing but a bound on the output range of what they follow."""

COMPUTING = {"Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "LeakyRelu", "Sigmoid"}
"""Operators with an integer kernel of their own, worth it only between others."""

MOVING = {
    *("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Split", "Expand", "Identity", "Tile"),
    *("MaxPool", "Pad", "Resize", "DepthToSpace"),
}
"""Operators that take integers as they come: their output has the scale of their input."""

_TRANSPARENT = MOVING | {"Add", "Sub", "Mul", "Div", "Where", "Cast", "Clip", "Min", "Max", "Concat", "Neg"}
_WEIGHTED = ANCHORS | {"ConvTranspose", "LSTM", "GRU", "RNN"}


def quantizable(
    model: ir.Model, context: Context, keep: frozenset[str] = frozenset()
) -> tuple[dict[str, ir.Node], tuple[Skip, ...]]:
    """The nodes of the main graph with an INT8 form, by name, and why weighted ones have none."""
    chosen: dict[str, ir.Node] = {}
    skips = []
    scores = _before_softmax(model)
    for node in model.graph:
        reason = _obstacle(node, scores)
        if reason is None and context.excludes(node):
            reason = "excluded by the user"
        if reason is None and node.name in keep:
            reason = "kept in float: faster or more accurate so"
        if reason is None:
            chosen[node.name or ""] = node
        elif reason and node.op_type in _WEIGHTED:
            skips.append(Skip(node.name or "", reason))
    inner = {id(node) for node in model.graph}
    for node in model.graph.all_nodes():
        if id(node) not in inner and layer_of(node) is not None:
            skips.append(Skip(node.name or "", "inside a control-flow body, where activations cannot be observed"))
    return _connected(chosen), tuple(skips)


def _obstacle(node: ir.Node, scores: set[str]) -> str | None:
    """Why a node has no INT8 form: empty where nobody would expect one."""
    if node.domain not in {"", "ai.onnx"} or any(is_empty(value) for value in (*data_inputs(node), node.outputs[0])):
        return ""
    floats = [value for value in node.inputs if value is not None and value.dtype == ir.DataType.FLOAT]
    if not floats or node.outputs[0].dtype != ir.DataType.FLOAT:
        if any(value is not None and value.dtype is None for value in (*node.inputs[:1], node.outputs[0])):
            return "the type of its activations is not known"
        kinds = {value.dtype.name for value in node.inputs if value is not None and value.dtype in FLOATS}
        return f"its activations are {', '.join(sorted(kinds))}, not FLOAT" if kinds else ""
    if node.op_type in {"Conv", "Gemm"}:
        layer = layer_of(node)
        if layer is None:
            return "its weight is not a constant"
        if node.op_type == "Gemm" and (
            node.attributes.get_float("alpha", 1.0) != 1.0
            or node.attributes.get_float("beta", 1.0) != 1.0
            or node.attributes.get_int("transA", False)
        ):
            return "Gemm with alpha, beta or transA has no INT8 kernel"
        bias = constant_of(layer.bias)
        if layer.bias is not None and bias is None:
            return "its bias is not a constant"
        if bias is not None and bias.shape != (layer.outputs,):
            return "its bias is not one value per channel"
        if bias is not None and not np.isfinite(bias).all():
            return "its bias is not finite"
        if not np.isfinite(layer.matrix()).all():
            return "its weights are not finite"
        return None
    if node.op_type == "MatMul":
        layer = layer_of(node)
        if layer is None:
            return "attention scores need more resolution than 8 bits" if node.outputs[0].name in scores else None
        if layer.index == 0:
            return "its weight is on the left"
        return None if np.isfinite(layer.matrix()).all() else "its weights are not finite"
    if node.op_type in {"ConvTranspose", "LSTM", "GRU", "RNN"}:
        return f"ONNX Runtime has no static INT8 kernel for {node.op_type}"
    if node.outputs[0].name in scores:
        return ""
    if node.op_type == "Resize" and node.attributes.get_string("mode", "nearest") not in {"nearest", "linear"}:
        return ""
    if node.op_type == "MaxPool" and len(node.outputs) > 1:
        return ""
    if node.op_type == "Pad" and pad_value(node) is None:
        return ""
    constants = [array for value in data_inputs(node) if (array := constant_of(value)) is not None]
    if constants and node.op_type in MOVING:
        return ""  # its output is a constant too, which clean-up folds
    if not all(array.size and np.isfinite(array).all() for array in constants):
        return ""
    return None if node.op_type in COMPUTING | MOVING | ACTIVATIONS else ""


def pad_value(node: ir.Node) -> float | None:
    """The constant that a Pad fills in, or None where it is not known."""
    if node.attributes.get_string("mode", "constant") != "constant":
        return 0.0
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if value is None:
        return 0.0
    array = constant_of(value)
    return None if array is None else float(array.reshape(-1)[0])


def _before_softmax(model: ir.Model) -> set[str]:
    """Names of the values between the last weighted operator and a Softmax, where masks saturate."""
    found: set[str] = set()
    front = [node.inputs[0] for node in model.graph if node.op_type in {"Softmax", "LogSoftmax"}]
    while front:
        value = front.pop()
        if value is None or value.name in found:
            continue
        found.add(value.name or "")
        node = value.producer()
        if node is not None and node.op_type in _TRANSPARENT:
            front.extend(node.inputs)
    return found


def _connected(chosen: dict[str, ir.Node]) -> dict[str, ir.Node]:
    """Without what stands between no two integer kernels: it would only pay for conversions.

    What layers read is converted for them anyway.
    """
    result = dict(chosen)
    converted = {value for node in chosen.values() if node.op_type in ANCHORS for value in data_inputs(node)}
    while True:
        dropped = [
            name
            for name, node in result.items()
            if node.op_type not in ANCHORS
            and not (
                all(
                    _quantized_producer(value, result) or (value in converted and node.op_type not in ACTIVATIONS)
                    for value in data_inputs(node)
                )
                and any(use.node.name in result for output in node.outputs for use in output.uses())
            )
        ]
        # A Relu behind the last integer kernel still folds into its output range.
        dropped = [
            name
            for name in dropped
            if not (result[name].op_type in ACTIVATIONS and _quantized_producer(result[name].inputs[0], result))
        ]
        if not dropped:
            return result
        for name in dropped:
            del result[name]


def _quantized_producer(value: ir.Value | None, chosen: Mapping[str, ir.Node]) -> bool:
    if value is None:
        return False
    producer = value.producer()
    return constant_of(value) is not None or (producer is not None and producer.name in chosen)


def data_inputs(node: ir.Node) -> Iterator[ir.Value]:
    """The activations that a node transforms, constants among them."""
    count = 1 if node.op_type in MOVING | ACTIVATIONS | {"Conv", "Gemm"} else len(node.inputs)
    for value in node.inputs[:count]:
        if value is not None:
            yield value


def folds(node: ir.Node, chosen: Mapping[str, ir.Node]) -> bool:
    """Whether a node is an activation function that becomes part of its producer's output range."""
    if node.op_type not in ACTIVATIONS or node.name not in chosen or node.inputs[0] is None:
        return False
    producer = node.inputs[0].producer()
    return (
        producer is not None
        and producer.name in chosen
        and producer.op_type not in MOVING
        and single_consumer(node.inputs[0]) is node
    )


def shared_scales(chosen: Mapping[str, ir.Node]) -> dict[ir.Value, ir.Value]:
    """For each output of an operator that only moves data, the activation whose scale it has."""
    roots: dict[ir.Value, ir.Value] = {}
    for node in chosen.values():
        if node.op_type in MOVING and (source := node.inputs[0]) is not None:
            roots.update(dict.fromkeys(node.outputs, roots.get(source, source)))
    return roots
