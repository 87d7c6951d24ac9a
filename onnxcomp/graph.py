"""Small steps of graph surgery: new constants and nodes with free names, in the right place."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.version_converter
import onnx_ir as ir
import onnx_ir.passes.common as common
from numpy.typing import ArrayLike, NDArray

from onnxcomp import model as models


class Builder:
    """Adds constants and nodes to one graph under names that nothing else uses."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._taken: set[str | None] = set()
        # ONNX forbids a body to reuse a name of the graphs around it, whose values it may capture.
        captured = (value.graph for node in graph.all_nodes() for value in node.inputs if value is not None)
        for scope in {graph, *graph.subgraphs(), *(scope for scope in captured if scope is not None)}:
            self._taken |= set(scope.initializers) | {value.name for value in scope.inputs}
            for node in scope:
                self._taken |= {value.name for value in node.outputs} | {node.name}

    def name(self, wanted: str) -> str:
        """A free name like the one wanted, taken from now on."""
        name, count = wanted, 1
        while name in self._taken:
            name, count = f"{wanted}_{count}", count + 1
        self._taken.add(name)
        return name

    def constant(self, array: ArrayLike, wanted: str) -> ir.Value:
        """A new initializer."""
        name = self.name(wanted)
        tensor = ir.tensor(np.asarray(array, order="C"), name=name)
        value = ir.val(name, const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def node(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        wanted: str,
        *,
        like: ir.Value | None = None,
        dtype: ir.DataType | None = None,
        domain: str = "",
        outputs: int = 1,
        before: ir.Node | None = None,
        after: ir.Node | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """A new node, and its first output.

        Args:
            operator: operator type.
            inputs: its inputs.
            wanted: name of the node and its output.
            like: the output takes the shape, and the type unless `dtype` is given, of this value.
            dtype: element type of the output.
            domain: operator domain.
            outputs: number of outputs.
            before: insert there; at the end of the graph by default.
            after: insert there.
            **attributes: the operator's attributes.
        """
        name = self.name(wanted)
        node = ir.node(operator, inputs, attributes, domain=domain, num_outputs=outputs, name=name)
        for index, value in enumerate(node.outputs):
            value.name = name if index == 0 else self.name(f"{wanted}_{index}")
        value = node.outputs[0]
        if like is not None:
            value.shape, dtype = like.shape, dtype or like.dtype
        if dtype is not None:
            value.dtype = dtype
        if before is not None:
            self.graph.insert_before(before, node)
        elif after is not None:
            self.graph.insert_after(after, node)
        else:
            self.graph.append(node)
        return value


def constant_of(value: ir.Value | None) -> NDArray[Any] | None:
    """The content of a constant; None for what is computed, and for a default that a caller may override."""
    return None if value is None or value.const_value is None or value.is_graph_input() else value.const_value.numpy()


def single_consumer(value: ir.Value) -> ir.Node | None:
    """The one node that reads a value which nothing else reads, or None."""
    uses = value.uses()
    return next(iter(uses)).node if len(uses) == 1 and not value.is_graph_output() else None


def is_sum(node: ir.Node) -> bool:
    """Whether it adds two tensors."""
    return not node.domain and (node.op_type == "Add" or (node.op_type == "Sum" and len(node.inputs) == 2))


def replace(node: ir.Node, result: ir.Value) -> None:
    """Put a value in the place of a node's only output, its name included, and remove the node."""
    graph, output = node.graph, node.outputs[0]
    assert graph is not None
    name = output.name
    output.replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    result.name = name


def remove_unused(model: ir.Model) -> None:
    """Remove nodes and initializers that nothing reads; onnx_ir leaves such initializers in bodies of control flow."""
    common.RemoveUnusedNodesPass()(model)
    for graph in model.graphs():
        if graph is not model.graph:
            for name, value in list(graph.initializers.items()):
                if not (value.uses() or value.is_graph_output() or value.is_graph_input()):
                    del graph.initializers[name]


@contextlib.contextmanager
def declared_outputs(model: ir.Model) -> Iterator[None]:
    """Keep what the model declares of its outputs: what shape inference finds out meanwhile was promised to nobody."""
    declared = [(value.type, value.shape and value.shape.copy()) for value in model.graph.outputs]
    yield
    for value, (kind, shape) in zip(model.graph.outputs, declared, strict=True):
        value.type, value.shape = kind, shape


def at_least_opset(model: ir.Model, version: int) -> ir.Model | str:
    """The model converted to a later operator set, itself if it has it, or why that cannot be done."""
    if models.opset(model) >= version:
        return model
    if models.opset(model) == 0:
        return "it has no operators of the ONNX standard"
    if models.opset(model) < 9 and any(node.op_type == "Scan" for node in models.all_nodes(model)):
        return "Scan lost its batch axis in opset 9, which the converter overlooks"
    try:
        proto = onnx.ModelProto.FromString(models.to_bytes(model))
        # Before IR version 4 every initializer had to be an input too, and the converter insists on it.
        proto.ir_version = max(proto.ir_version, 4)
        converted = ir.from_proto(onnx.version_converter.convert_version(proto, version))
    except Exception as error:  # noqa: BLE001  (the C++ converter raises anything, and lacks some adapters)
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        return f"opset {models.opset(model)} cannot be converted to {version}: {reason}"
    converted.metadata_props.update(model.metadata_props)
    return converted


def prepared(model: ir.Model, version: int) -> ir.Model | str:
    """The model at a later operator set if need be, with types and shapes inferred and Constant nodes as initializers.

    Returns:
        The model, or why it cannot be converted.
    """
    converted = at_least_opset(model, version)
    if isinstance(converted, ir.Model):
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(converted)
        with declared_outputs(converted):
            common.ShapeInferencePass()(converted)
    return converted
