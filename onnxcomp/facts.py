"""What one run of a model shows: the shape of every tensor, and the numbers that tell operators what shape to make."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as common
from numpy.typing import NDArray

from onnxcomp import movement
from onnxcomp.core import name_nodes
from onnxcomp.graph import constant_of, declared_outputs
from onnxcomp.model import input_specs, opset, vocabularies
from onnxcomp.relations import Shapes
from onnxcomp.runtime import Feeds, Session
from onnxcomp.synthetic import synthetic


@dataclass(frozen=True)
class Facts:
    """What one run of a model shows.

    Attributes:
        shapes: of every tensor.
        contents: of the constants and computed integers that tell operators what to do.
        opset: version of the standard operator set.
    """

    shapes: Shapes
    contents: Mapping[ir.Value, NDArray[Any]]
    opset: int


def traceable(model: ir.Model) -> ir.Model:
    """A copy with functions inlined, constants as initializers, shapes inferred and every node named."""
    copy = model.clone()
    common.InlinePass()(copy)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(copy)
    with declared_outputs(copy):
        common.ShapeInferencePass()(copy)
    name_nodes(copy)
    return copy


def observe(model: ir.Model, feeds: Feeds) -> Facts:
    """Shapes and shape-like contents of every tensor in one run; in bodies, as far as inference gets.

    Raises:
        OnnxcompError: the model does not run on the inputs.
    """
    inferred = model.clone()
    for value in inferred.graph.inputs:
        if value.name is not None and value.name in feeds:
            value.shape = ir.Shape(feeds[value.name].shape)
    with declared_outputs(inferred):
        common.ShapeInferencePass()(inferred)
    twins = dict(zip(all_values(inferred), all_values(model), strict=True))
    shapes = {twin: shape for value, twin in twins.items() if (shape := _static_shape(value)) is not None}
    parameters = [
        value
        for node in model.graph.all_nodes()
        if node.op_type in movement.DATA
        for value in node.inputs[movement.DATA[node.op_type].stop or len(node.inputs) :]
        if value is not None
    ]
    contents = {value: array for value in parameters if (array := constant_of(value)) is not None}
    outer = {value: name for name, value in _observable(model)}
    computed = [value for value in parameters if value not in contents and value in outer and _from_shapes(value)]
    probe = inferred.clone()
    tensors = dict(_observable(probe))
    shape_nodes = {name: ir.node("Shape", [value], name=f"shape of {name}") for name, value in tensors.items()}
    probe.graph.extend(shape_nodes.values())
    for node in shape_nodes.values():
        node.outputs[0].name, node.outputs[0].type = node.name, ir.TensorType(ir.DataType.INT64)
    wanted = [tensors[name] for name in dict.fromkeys(outer[value] for value in computed)]
    for value in wanted:
        if value.dtype is None:
            value.type = ir.TensorType(ir.DataType.INT64)
    probe.graph.outputs[:] = [*(node.outputs[0] for node in shape_nodes.values()), *wanted]
    found = Session(probe, extended=False).run(feeds)
    shapes |= {value: tuple(found[f"shape of {name}"].tolist()) for value, name in outer.items()}
    shapes |= {value: feeds[value.name or ""].shape for value in model.graph.inputs if value.name in feeds}
    contents |= {value: found[outer[value]] for value in computed}
    return Facts(shapes, contents, opset(model))


def sized(model: ir.Model, shapes: Shapes) -> ir.Model:
    """A copy that declares the shapes that were observed, of this model or of a clone."""
    names = {value.name: shape for value, shape in shapes.items()}
    copy = model.clone()
    values = [*copy.graph.inputs, *(value for node in copy.graph for value in node.outputs)]
    for value in (value for value in values if value.name in names):
        value.shape = ir.Shape(names[value.name])
    return copy


def made_up(model: ir.Model) -> Feeds:
    """Inputs of one run that the model accepts."""
    return next(iter(synthetic(input_specs(model), 1, vocabulary=vocabularies(model)).batches(1))).feeds


def all_values(model: ir.Model) -> Iterator[ir.Value]:
    """Every value of the model, bodies included, in an order that clones share."""
    for graph in model.graphs():
        yield from graph.inputs
        for name in sorted(graph.initializers):
            yield graph.initializers[name]
        for node in graph:
            yield from node.outputs


def _observable(model: ir.Model) -> Iterator[tuple[str, ir.Value]]:
    """The computed tensors of the main graph by name."""
    for node in model.graph:
        for value in node.outputs:
            if value.name and (value.type is None or isinstance(value.type, ir.TensorType)):
                yield value.name, value


def _static_shape(value: ir.Value) -> tuple[int, ...] | None:
    if value.const_value is not None:
        return tuple(value.const_value.shape.numpy())
    if value.shape is None or not all(isinstance(size, int) for size in value.shape):
        return None
    return tuple(value.shape.numpy())


def _from_shapes(value: ir.Value) -> bool:
    return is_fixed(value, sources={"Shape", "Size"})


def is_fixed(value: ir.Value, sources: Collection[str] = (), *, overridable: bool = False) -> bool:
    """Whether a tensor is computed from constants alone, and what these operators give.

    Args:
        value: the tensor.
        sources: operators whose outputs count as constants.
        overridable: whether defaults of inputs count as constants too.
    """
    front, seen = [value], set()
    while front:
        value = front.pop()
        if value in seen or constant_of(value) is not None or (overridable and value.const_value is not None):
            continue
        seen.add(value)
        node = value.producer()
        if node is None or node.domain not in {"", "ai.onnx"} or node.op_type.startswith("Random"):
            return False
        if node.op_type in {"Shape", "Size"} and node.op_type not in sources:
            return False
        if node.op_type not in sources:
            front.extend(source for source in node.inputs if source is not None)
    return True
