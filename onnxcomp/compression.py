"""Weights of a model replaced by encodings of them.

With data, layers of the main graph go in topological order: each is fitted on what the layers before it now give, then
encoded, so that it makes up for what encoding them lost. Other weights are encoded as they are, by the Gram matrix of
their inputs where that can be had. The decoding goes to the front of the graph, where a session folds it away.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxcomp.calibration import calibrate
from onnxcomp.constants import Weight, weights_of
from onnxcomp.core import Change, Context, Outcome, Skip, name_nodes
from onnxcomp.encodings import Encoded
from onnxcomp.graph import Builder, prepared, remove_unused
from onnxcomp.layers import Layer
from onnxcomp.reconstruction import reconstruct
from onnxcomp.unpacking import Unpacker

OPSET = 13
_NODES = 256
"""Bytes that the nodes of a decoding take, their names included, where many weights are unpacked together."""

Matrix: TypeAlias = NDArray[np.float64]
Encode: TypeAlias = Callable[[Weight, Matrix, Matrix], Encoded | str]
"""From a weight, its matrix (out, in) and H (groups, in, in): an encoding, or why there is none."""


def compress(model: ir.Model, context: Context, encode: Encode, describe: Callable[[Encoded], str]) -> Outcome:
    """Encode every constant weight that becomes smaller by it.

    Args:
        model: the pass's own clone.
        context: data, exclusions.
        encode: the technique.
        describe: what is said of a weight.
    """
    original = prepared(model, OPSET)
    if isinstance(original, str):
        return Outcome(model, (), (Skip("model", original),))
    name_nodes(original)
    chosen, skips = [], []
    for weight in weights_of(original):
        reason = _obstacle(weight, context)
        if reason is None:
            chosen.append(weight)
        else:
            skips += [Skip(node.name or "", reason) for node in weight.nodes]
    made = original.clone()
    found, fitted, notes = _in_turn(original, made, chosen, context, encode)
    found |= _as_they_are(original, [weight for weight in chosen if weight not in found], context, encode)
    smaller: dict[Weight, Encoded] = {}
    for weight in chosen:
        result = found[weight]
        if isinstance(result, Encoded):
            smaller[weight] = result
        else:
            skips += [Skip(node.name or "", result) for node in weight.nodes]
    if not smaller:
        return Outcome(model, (), tuple(skips))
    _emit(made, smaller)
    remove_unused(made)
    changes = [
        Change(node.name or "", describe(encoded)) for weight, encoded in smaller.items() for node in weight.nodes
    ]
    treated = {change.node for change in changes}
    changes += [Change(name, "fitted again") for name in fitted if name not in treated]
    return Outcome(made, tuple(changes), (*skips, *notes))


def _obstacle(weight: Weight, context: Context) -> str | None:
    if any(context.excludes(node) for node in weight.nodes):
        return "excluded by the user, or shares its weight with an excluded node"
    if weight.value.is_graph_output():
        return "its weight is an output of the graph"
    if not np.isfinite(weight.array.astype(np.float64)).all():
        return "its weights are not finite"
    return None


def _smaller(weight: Weight, result: Encoded | str) -> Encoded | str:
    """The encoding, unless it takes no fewer bytes than the weight."""
    if isinstance(result, Encoded) and result.bytes + _NODES >= weight.array.nbytes:
        return f"it would take {result.bytes + _NODES} bytes, and takes {weight.array.nbytes}"
    return result


def _in_turn(
    original: ir.Model, made: ir.Model, chosen: Sequence[Weight], context: Context, encode: Encode
) -> tuple[dict[Weight, Encoded | str], list[str], list[Skip]]:
    """Those of layers that can be fitted, one after another, in place; and the layers that were."""
    if context.data is None:
        return {}, [], []
    by_layer = {weight.layer.name: weight for weight in chosen if weight.layer is not None}
    found: dict[Weight, Encoded | str] = {}
    fitted: list[str] = []

    def project(layer: Layer, matrix: Matrix, H: Matrix) -> Matrix:
        fitted.append(layer.name)
        weight = by_layer.get(layer.name)
        if weight is None:
            return matrix
        found[weight] = result = _smaller(weight, encode(weight, matrix, H))
        return matrix if isinstance(result, str) else result.decoded()

    notes = reconstruct(original, made, {}, context.data, context, project=project)
    return found, fitted, notes


def _as_they_are(
    original: ir.Model, weights: Sequence[Weight], context: Context, encode: Encode
) -> dict[Weight, Encoded | str]:
    layers = [layer for weight in weights if (layer := weight.layer) and layer.node.graph is original.graph]
    grams = calibrate(original, context.data, context, layers=layers).grams if context.data and layers else {}
    result = {}
    for weight in weights:
        matrix = weight.view.matrix(weight.array).astype(np.float64)
        gram = grams.get(weight.layer.name) if weight.layer else None
        H = np.eye(matrix.shape[1])[None] if gram is None else gram.second_moment
        result[weight] = _smaller(weight, encode(weight, matrix, H))
    return result


def _emit(model: ir.Model, encodings: Mapping[Weight, Encoded]) -> None:
    """Put what is encoded in place of the weights, in a model whose nodes have the names of the original's."""
    nodes = {node.name: node for node in model.graph.all_nodes()}
    uses = {weight: [(nodes[node.name], index) for node, index in weight.uses] for weight in encodings}
    unpacker = Unpacker(Builder(model.graph), model.graph[0])
    streams = {weight: encoded.streams(weight.view) for weight, encoded in encodings.items()}
    integers = iter(unpacker.unpacked([stream for each in streams.values() for stream in each]))
    for weight, encoded in encodings.items():
        assert weight.value.dtype is not None
        own = [next(integers) for _ in streams[weight]]
        result = encoded.emit(unpacker, own, weight.view, weight.value.dtype)
        result.shape, result.dtype = ir.Shape(weight.view.shape), weight.value.dtype
        for node, index in uses[weight]:
            node.replace_input_with(index, result)
