"""Weights of a model replaced by encodings of them.

With data, layers of the main graph go in topological order: each is fitted on what the layers before it now give, then
encoded, so that it makes up for what encoding them lost. Other weights are encoded as they are, by the Gram matrix of
their inputs where that can be had. The decoding goes to the front of the graph, where a session folds it away.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxcomp.calibration import calibrate
from onnxcomp.constants import Weight, decode_weights, stored_bytes, weights_of
from onnxcomp.core import NOT_NAMED, Change, Context, Option, Outcome, Setting, Skip, name_nodes
from onnxcomp.encodings import Encoded
from onnxcomp.graph import Builder, prepared, remove_unused
from onnxcomp.layers import FLOATS, Layer, layers
from onnxcomp.model import file_bytes
from onnxcomp.numerics.feedback import grouped_error
from onnxcomp.numerics.sparse import refit_on
from onnxcomp.reconstruction import reconstruct as fit
from onnxcomp.samples import Dataset
from onnxcomp.unpacking import Unpacker

OPSET = 13
_NODES = 256
"""Bytes that the nodes of a decoding take, their names included, where many weights are unpacked together."""

_SPARSE = 0.2

S = TypeVar("S", bound=Setting)

Matrix: TypeAlias = NDArray[np.float64]
Encode: TypeAlias = Callable[[Weight, Matrix, Matrix], Encoded | str]
"""From a weight, its matrix (out, in) and H (groups, in, in): an encoding, or why there is none."""
Decoded: TypeAlias = Mapping[ir.Value, ir.Value]
"""The values from which weights were computed that are constants now."""


def compress(
    model: ir.Model,
    context: Context,
    encode: Encode,
    describe: Callable[[Encoded], str],
    *,
    reconstruct: bool = True,
    integers: bool = False,
) -> Outcome:
    """Encode every constant weight that becomes smaller by it.

    Args:
        model: the pass's own clone.
        context: data, exclusions.
        encode: the technique.
        describe: what is said of a weight.
        reconstruct: fit each layer before it is encoded.
        integers: also weights that are quantized to 8 bits.
    """
    before = file_bytes(model)
    original = prepared(model, OPSET)
    if isinstance(original, str):
        return Outcome(model, (), (Skip("model", original),))
    decoded = decode_weights(original)
    name_nodes(original)
    chosen, skips = [], []
    weights = weights_of(original, integers=integers)
    for weight in weights:
        reason = _obstacle(weight, context)
        if reason is None:
            chosen.append(weight)
        else:
            skips += [Skip(node.name or "", reason) for node in weight.nodes]
    made = original.clone()
    found: dict[Weight, Encoded | str] = {}
    fitted: list[Change] = []
    if reconstruct and context.data is not None:
        found, fitted, notes = _in_turn(original, made, chosen, decoded, context, context.data, encode)
        skips += notes
    others = [weight for weight in chosen if weight not in found]
    found |= _as_they_are(original, others, decoded, context, encode)
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
    _restore(made, [weight for weight in weights if weight not in smaller], decoded)
    remove_unused(made)
    after = file_bytes(made)
    if after >= before:
        reason = f"the model would take {after} bytes, and takes {before}"
        return Outcome(model, (), (*skips, *(Skip(node.name or "", reason) for w in smaller for node in w.nodes)))
    said = {change.node: change.what for change in fitted}
    said |= {node.name or "": describe(encoded) for weight, encoded in smaller.items() for node in weight.nodes}
    changes = [Change(name, what) for name, what in said.items()]
    return Outcome(made, tuple(changes), tuple(skips))


def by_part(encoder: Callable[[S], Encode], parts: Iterable[tuple[str, S]]) -> Encode:
    """Each weight by the setting of a node that reads it; what has none is left alone."""
    settings = dict(parts)

    def encode(weight: Weight, matrix: Matrix, H: Matrix) -> Encoded | str:
        named = [settings[node.name] for node in weight.nodes if node.name in settings]
        return encoder(named[0])(weight, matrix, H) if named else NOT_NAMED

    return encode


def options(
    model: ir.Model,
    context: Context,
    settings: Iterable[S],
    encoder: Callable[[S], Encode],
    *,
    integers: bool = False,
) -> Iterator[Option]:
    """What each weight would take and lose by each of several encodings, which one Gram matrix tells.

    Args:
        model: not touched.
        context: data, exclusions. Without data inputs count as white noise.
        settings: of the encodings.
        encoder: from a setting, how it encodes.
        integers: also weights that are quantized to 8 bits.
    """
    original = prepared(model.clone(), OPSET)
    if isinstance(original, str):
        return
    decoded = decode_weights(original)
    name_nodes(original)
    chosen = [weight for weight in weights_of(original, integers=integers) if _obstacle(weight, context) is None]
    encoders = [(setting, encoder(setting)) for setting in settings]
    for weight, matrix, H in _moments(original, chosen, context):
        energy = grouped_error(matrix, H) or 1.0
        for setting, encode in encoders:
            result = _smaller(weight, encode(weight, matrix, H), decoded)
            if isinstance(result, Encoded):
                error = grouped_error(matrix - result.decoded(), H) / energy
                yield Option(weight.nodes[0].name or "", setting, error, result.bytes)


def sparse(matrix: NDArray[Any]) -> bool:
    """Whether so many weights are zero that a bit for each, which says so, is worth it."""
    return bool(np.mean(matrix == 0) > _SPARSE)


def _obstacle(weight: Weight, context: Context) -> str | None:
    if any(context.excludes(use.node) for use in weight.value.uses()):
        return "excluded by the user, or shares its weight with an excluded node"
    if weight.value.is_graph_output():
        return "its weight is an output of the graph"
    if not np.isfinite(weight.array.astype(np.float64)).all():
        return "its weights are not finite"
    return None


def _smaller(weight: Weight, result: Encoded | str, decoded: Decoded) -> Encoded | str:
    """The encoding, unless it takes no fewer bytes than the weight."""
    computed = decoded.get(weight.value)
    takes = weight.array.nbytes if computed is None else stored_bytes(computed)
    if isinstance(result, Encoded) and result.bytes + _NODES >= takes:
        return f"it would take {result.bytes + _NODES} bytes, and takes {takes}"
    return result


def _in_turn(
    original: ir.Model,
    made: ir.Model,
    chosen: Sequence[Weight],
    decoded: Decoded,
    context: Context,
    data: Dataset,
    encode: Encode,
) -> tuple[dict[Weight, Encoded | str], list[Change], list[Skip]]:
    """Those of layers that can be fitted, one after another, in place; and what was fitted and what not."""
    by_layer = {weight.layer.name: weight for weight in chosen if weight.layer is not None}
    found: dict[Weight, Encoded | str] = {}

    def project(layer: Layer, matrix: Matrix, H: Matrix) -> Matrix:
        weight = by_layer.get(layer.name)
        if sparse(layer.matrix()):  # zeros stay zeros
            kept = np.split(layer.matrix() != 0, len(H))
            parts = zip(np.split(matrix, len(H)), H, kept, strict=True)
            matrix = np.concatenate([refit_on(W, moment, mask) for W, moment, mask in parts])
        if weight is None:
            return matrix
        found[weight] = result = _smaller(weight, encode(weight, matrix, H), decoded)
        if isinstance(result, Encoded):
            return result.decoded()
        return layer.matrix().astype(np.float64) if weight.value in decoded else matrix

    return found, *fit(original, made, {}, data, context, project=project)


def _as_they_are(
    original: ir.Model, weights: Sequence[Weight], decoded: Decoded, context: Context, encode: Encode
) -> dict[Weight, Encoded | str]:
    return {
        weight: _smaller(weight, encode(weight, matrix, H), decoded)
        for weight, matrix, H in _moments(original, weights, context)
    }


def _moments(
    original: ir.Model, weights: Sequence[Weight], context: Context
) -> Iterator[tuple[Weight, Matrix, Matrix]]:
    """Each weight as a matrix, and the second moment of its inputs; the identity where that cannot be had."""
    model, names = _in_floats(original, weights) if context.data else (original, {})
    known = {layer.name: layer for layer in layers(model) if layer.node.graph is model.graph}
    wanted = {weight: known[name] for weight, name in names.items() if name in known}
    grams = calibrate(model, context.data, context, layers=[*wanted.values()]).grams if context.data and wanted else {}
    for weight in weights:
        matrix = weight.view.matrix(weight.array).astype(np.float64)
        gram = grams[wanted[weight].name] if weight in wanted else None
        fits = gram is not None and gram.second_moment.shape[1] == matrix.shape[1]
        yield weight, matrix, gram.second_moment if gram is not None and fits else np.eye(matrix.shape[1])[None]


def _in_floats(original: ir.Model, weights: Sequence[Weight]) -> tuple[ir.Model, dict[Weight, str]]:
    """A model of which statistics can be had, and in it the name of the layer that multiplies by each weight.

    That is the model itself, unless weights are integers: then layers that multiply by floats stand beside those that
    multiply by them. What these give is not used.
    """
    names = {weight: weight.layer.name for weight in weights if weight.layer is not None}
    integers = [weight for weight in weights if weight.array.dtype.kind in "iu" and len(weight.uses) == 1]
    if not integers:
        return original, names
    model = original.clone()
    nodes, builder = {node.name: node for node in model.graph}, Builder(model.graph)
    for weight in integers:
        reader, multiplied = nodes.get(weight.nodes[0].name), nodes.get(weight.product[0].name)
        if reader is None or multiplied is None:  # in a body
            continue
        data, attributes = multiplied.inputs[0], {name: own.value for name, own in multiplied.attributes.items()}
        operator, dtype = multiplied.op_type, ir.DataType.FLOAT
        if reader.op_type == "DequantizeLinear":  # of what its scale is
            dtype = (reader.inputs[1] and reader.inputs[1].dtype) or dtype
        if operator == "MatMulInteger":
            maker = None if data is None else data.producer()
            if maker is None or maker.op_type != "DynamicQuantizeLinear":
                continue
            operator, data = "MatMul", maker.inputs[0]
        if weight.product[1] == 1 and operator in {"Conv", "ConvTranspose", "Gemm", "MatMul"} and dtype in FLOATS:
            floats = builder.constant(weight.array.astype(dtype.numpy()), f"{weight.value.name}_floats")
            beside = builder.node(operator, [data, floats], f"{reader.name}_floats", before=multiplied, **attributes)
            names[weight] = beside.producer().name or ""  # type: ignore[union-attr]
    return model, names


def _emit(model: ir.Model, encodings: Mapping[Weight, Encoded]) -> None:
    """Put what is encoded in place of the weights, in a model whose nodes have the names of the original's."""
    nodes = {node.name: node for node in model.graph.all_nodes()}
    places = {weight: (nodes[node.name], index) for weight in encodings for node, index in weight.uses[:1]}
    unpacker = Unpacker(Builder(model.graph), model.graph[0])
    streams = {weight: encoded.streams(weight.view) for weight, encoded in encodings.items()}
    integers = iter(unpacker.unpacked([stream for each in streams.values() for stream in each]))
    for weight, encoded in encodings.items():
        assert weight.value.dtype is not None
        own = [next(integers) for _ in streams[weight]]
        result = encoded.emit(unpacker, own, weight.view, weight.value.dtype)
        result.shape, result.dtype = ir.Shape(weight.view.shape), weight.value.dtype
        reader, place = places[weight]
        old = reader.inputs[place]
        assert old is not None
        for node, index in list(old.uses()):  # all of them: what reads it otherwise would keep it in the file
            _replace(node, index, result)


def _restore(model: ir.Model, weights: Sequence[Weight], decoded: Decoded) -> None:
    """Compute weights again that stay as they were encoded before."""
    nodes = {node.name: node for node in model.graph.all_nodes()}
    values = {value.name: value for node in model.graph for value in node.outputs}
    for weight in weights:
        if weight.value in decoded:
            for node, index in weight.uses:
                _replace(nodes[node.name], index, values[decoded[weight.value].name])


def _replace(node: ir.Node, index: int, value: ir.Value) -> None:
    """Let a node read another value, and forget the constant that it read if nothing else does."""
    old = node.inputs[index]
    node.replace_input_with(index, value)
    if old is not None and not old.uses() and isinstance(old.graph, ir.Graph) and old.is_initializer():
        del old.graph.initializers[old.name or ""]
