"""Operators that only move data: where each element of their outputs comes from, found by running them on numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from onnxcomp.relations import Shapes

Indices = NDArray[np.int64]

DATA: Mapping[str, slice] = {
    **dict.fromkeys(("Transpose", "DepthToSpace", "SpaceToDepth", "Flatten", "Unsqueeze", "Squeeze"), slice(1)),
    **dict.fromkeys(("Reshape", "Expand", "Slice", "Split", "Pad", "Tile", "Gather", "GatherElements"), slice(1)),
    "Concat": slice(None),
}
"""Operators that only move data, and which of their inputs are the data; the others are parameters."""

_SHAPES = {
    *(("Reshape", 1), ("Expand", 1), ("Tile", 1), ("ConstantOfShape", 0), ("Resize", 3), ("Split", 1)),
    *(("Slice", 1), ("Slice", 2), ("Range", 0), ("Range", 1)),
}

FILL = -1
"""Where an element comes from that a Pad made up."""


def is_movement(node: ir.Node, parameters: Mapping[ir.Value, NDArray[Any]]) -> bool:
    """Whether the node only moves data, by parameters that are known."""
    if node.domain not in {"", "ai.onnx"} or node.op_type not in DATA:
        return False
    return all(value is None or value in parameters for value in _parameters(node))


def data_inputs(node: ir.Node) -> list[ir.Value]:
    """The tensors whose elements the node moves."""
    return [value for value in node.inputs[DATA[node.op_type]] if value is not None]


def origins(
    node: ir.Node, shapes: Shapes, parameters: Mapping[ir.Value, NDArray[Any]], opset: int
) -> list[tuple[ir.Value, Indices]]:
    """For each output: the element of the data inputs, flattened and laid end to end, that each of its elements is.

    Args:
        node: one that `is_movement`.
        shapes: of its data.
        parameters: the other inputs' content.
        opset: version of the standard operator set.
    """
    feeds: list[NDArray[Any] | None] = []
    start = 0
    for value in node.inputs[DATA[node.op_type]]:
        assert value is not None
        size = int(np.prod(shapes[value]))
        feeds.append(np.arange(start, start + size).reshape(shapes[value]))
        start += size
    for value in _parameters(node):
        feeds.append(None if value is None else parameters[value])
    outputs = moved(node, feeds, opset)
    return [(value, output) for value, output in zip(node.outputs, outputs, strict=True) if value in shapes]


def follow(
    node: ir.Node,
    source: ir.Value,
    elements: Indices,
    shapes: Shapes,
    parameters: Mapping[ir.Value, NDArray[Any]],
    opset: int,
) -> list[tuple[ir.Value, Indices]]:
    """The outputs of a node that moves `source`, with its elements replaced by others, and `FILL` for the rest."""
    parts = [elements.ravel() if v is source else np.full(int(np.prod(shapes[v])), FILL) for v in data_inputs(node)]
    pool = np.append(np.concatenate(parts), FILL)  # so that FILL as an index finds FILL
    return [(output, pool[origin]) for output, origin in origins(node, shapes, parameters, opset)]


def takes_shape(node: ir.Node, index: int) -> bool:
    """Whether that input of the node is a shape or sizes for it to make."""
    return node.domain in {"", "ai.onnx"} and (node.op_type, index) in _SHAPES


def moved(node: ir.Node, inputs: Sequence[NDArray[Any] | None], opset: int) -> list[NDArray[Any]]:
    """The node's outputs for integers in place of its data."""
    proto = ir.to_proto(node)
    proto.domain = ""
    names = [f"i{k}" if array is not None else "" for k, array in enumerate(inputs)]
    arrays = {name: array for name, array in zip(names, inputs, strict=True) if array is not None}
    if node.op_type == "Pad":
        for attribute in proto.attribute:
            if attribute.name == "value":
                attribute.f = FILL
        if node.attributes.get_string("mode", "constant") == "constant" and opset >= 11:
            names = [*names[:2], "fill", *names[3:]]
            arrays["fill"] = np.asarray(FILL)
    del proto.input[:], proto.output[:]
    proto.input.extend(names)
    proto.output.extend(f"o{k}" for k in range(len(node.outputs)))
    graph = onnx.helper.make_graph(
        [proto],
        "one node",
        [onnx.helper.make_value_info(name, onnx.TypeProto()) for name in arrays],
        [onnx.helper.make_value_info(name, onnx.TypeProto()) for name in proto.output],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    return [np.asarray(array) for array in ReferenceEvaluator(model).run(None, arrays)]


def _parameters(node: ir.Node) -> list[ir.Value | None]:
    kept = DATA[node.op_type].stop
    return [] if kept is None else list(node.inputs[kept:])
