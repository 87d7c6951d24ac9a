"""Layers in a row: those between which there are only functions that work element by element."""

from collections.abc import Collection, Sequence

import onnx_ir as ir

from onnxcomp.graph import constant_of
from onnxcomp.layers import Layer
from onnxcomp.relations import ELEMENTWISE

_LONGEST = 3
"""Layers: what a bottleneck or an inverted residual has."""
_LONGEST_OF_FACTORS = 2


def chains(found: Sequence[Layer], factors: Collection[str] = ()) -> list[list[Layer]]:
    """Layers in rows of at most three, in the order of their first ones; each layer is in one row.

    Args:
        found: layers of one graph, in topological order.
        factors: names of those that are only a part of what they lead to: rows neither count them nor end with them.
    """
    by_output = {layer.node.outputs[0]: layer for layer in found}
    followers: dict[str, Layer] = {}
    for layer in found:
        source = _source(layer)
        if source in by_output:
            followers[by_output[source].name] = layer
    longest = _LONGEST_OF_FACTORS if factors else _LONGEST
    result: list[list[Layer]] = []
    taken: set[str] = set()
    for layer in found:
        if layer.name in taken:
            continue
        row = [layer]
        while (follower := followers.get(row[-1].name)) is not None and (
            sum(member.name not in factors for member in row) < longest
        ):
            row.append(follower)
        whole = max((place for place, member in enumerate(row) if member.name not in factors), default=len(row) - 1)
        del row[whole + 1 :]
        taken |= {member.name for member in row}
        result.append(row)
    return result


def _source(layer: Layer) -> ir.Value | None:
    """The value of which the layer's input is a function element by element, and which nothing else reads."""
    inside: dict[ir.Node, None] = {}
    sources: set[ir.Value] = set()
    open_ends = [layer.data]
    while open_ends:
        value = open_ends.pop()
        node = value.producer()
        if constant_of(value) is not None or node in inside or (node is not None and node.op_type == "Constant"):
            continue
        if node is None or not _is_elementwise(node):
            sources.add(value)
            continue
        inside[node] = None
        open_ends += [given for given in node.inputs if given is not None]
    if len(sources) != 1:
        return None
    source = sources.pop()
    readers = {*inside, layer.node}
    private = [source, *(value for node in inside for value in node.outputs)]
    if any(value.is_graph_output() or any(use.node not in readers for use in value.uses()) for value in private):
        return None
    return source


def _is_elementwise(node: ir.Node) -> bool:
    if node.domain not in {"", "ai.onnx"}:
        return False
    if node.op_type == "BatchNormalization":
        return len(node.outputs) == 1 and not node.attributes.get_int("training_mode", 0)
    return node.op_type in ELEMENTWISE
