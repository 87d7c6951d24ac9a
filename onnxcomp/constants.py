"""The constants that weighted operators read, and the matrices that they are taken for."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxcomp.decode import View
from onnxcomp.graph import Builder, constant_of
from onnxcomp.layers import FLOATS, Layer, layer_of
from onnxcomp.prefix import part_between
from onnxcomp.runtime import Session

_WEIGHT_INPUTS: dict[str, tuple[int, ...]] = {
    "MatMul": (0, 1),
    "Gather": (0,),
    "LSTM": (1, 2),
    "GRU": (1, 2),
    "RNN": (1, 2),
}
_WEIGHT_INPUTS |= dict.fromkeys(("Conv", "ConvTranspose", "Gemm"), (1,))
_INTEGER_INPUTS: dict[str, tuple[int, ...]] = {"DequantizeLinear": (0,), "QLinearConv": (3,), "QLinearMatMul": (3,)}
_INTEGER_INPUTS |= {"ConvInteger": (1,), "MatMulInteger": (0, 1)}
_INTEGERS = {ir.DataType.INT8, ir.DataType.UINT8}


@dataclass(frozen=True, eq=False)
class Weight:
    """A constant and the weighted operators that read it."""

    value: ir.Value
    uses: tuple[tuple[ir.Node, int], ...]

    @property
    def nodes(self) -> list[ir.Node]:
        """The operators, in order."""
        return [node for node, _ in self.uses]

    @property
    def array(self) -> NDArray[Any]:
        """The content."""
        content = constant_of(self.value)
        assert content is not None
        return content

    @property
    def lookups(self) -> list[ir.Node]:
        """The nodes that gather whole rows of a table."""
        if len(_shape(self.value)) != 2:
            return []
        return [node for node in self.nodes if node.op_type == "Gather" and node.attributes.get_int("axis", 0) == 0]

    @property
    def view(self) -> View:
        """The matrix that is rounded: the table where there are lookups, else as the first reader multiplies by it."""
        lookups = [use for use in self.uses if use[0] in self.lookups]
        return matrix_view(*(lookups[0] if lookups else self.product), _shape(self.value))

    @property
    def product(self) -> tuple[ir.Node, int]:
        """What first multiplies by it, or by the floats that its integers are for it alone; and as which input."""
        reader, index = self.uses[0]
        uses = list(reader.outputs[0].uses()) if reader.op_type == "DequantizeLinear" else []
        if len(uses) == 1 and uses[0].idx in _WEIGHT_INPUTS.get(uses[0].node.op_type, ()):
            return uses[0].node, uses[0].idx
        return reader, index

    @property
    def layer(self) -> Layer | None:
        """The first reader, where it is a layer whose matrix is the one that is rounded."""
        layer = layer_of(self.nodes[0])
        return None if layer is None or self.lookups or layer.weight is not self.value else layer

    @property
    def only_multiplied(self) -> bool:
        """Whether every reader is a product with the same matrix on the right."""
        view, shape = self.view, _shape(self.value)
        return len(self.value.uses()) == len(self.uses) and all(
            is_product(node, index) and matrix_view(node, index, shape) == view for node, index in self.uses
        )


def weights_of(model: ir.Model, *, integers: bool = False) -> list[Weight]:
    """The constant weights of the graph and its bodies, in order of their first use.

    Not those of nodes that compute from constants alone: a session does away with them.

    Args:
        model: with constants as initializers.
        integers: also those that are quantized to 8 bits.
    """
    uses: dict[ir.Value, list[tuple[ir.Node, int]]] = {}
    kinds = [(_WEIGHT_INPUTS, FLOATS), *([(_INTEGER_INPUTS, _INTEGERS)] if integers else [])]
    computed = _computed(model)
    for node in model.graph.all_nodes():
        for inputs, dtypes in kinds if node.domain == "" and computed.isdisjoint(node.outputs) else ():
            for index in inputs.get(node.op_type, ()):
                value = node.inputs[index] if index < len(node.inputs) else None
                if value is None or not value.is_initializer() or value.is_graph_input() or value.dtype not in dtypes:
                    continue
                if len(_shape(value)) > 1 and 0 not in _shape(value):
                    uses.setdefault(value, []).append((node, index))
    return [Weight(value, tuple(found)) for value, found in uses.items()]


def decode_weights(model: ir.Model) -> dict[ir.Value, ir.Value]:
    """Put constants in the place of weights that are computed from constants alone, in the main graph, in place.

    What is quantized stays so, and what is another view of a weight (a tied embedding, transposed). The nodes that
    computed the weights stay, too, should a weight go back.

    Returns:
        The values that were computed, by the constants.
    """
    constant = _computed(model)
    inputs = _WEIGHT_INPUTS | _INTEGER_INPUTS
    direct = {weight.value for weight in weights_of(model, integers=True)}
    wanted = {
        value: None
        for node in model.graph.all_nodes()
        for index in inputs.get(node.op_type, ())
        if index < len(node.inputs) and (value := node.inputs[index]) in constant and value
        if not direct & _sources(value)
    }
    if not wanted:
        return {}
    names = [value.name or "" for value in wanted]
    found = Session(part_between(model, set(), names)).run({})
    builder, result = Builder(model.graph), dict[ir.Value, ir.Value]()
    for value, name in zip(wanted, names, strict=True):
        if found[name].ndim < 2:
            continue
        decoded = builder.constant(found[name], f"{name}_decoded")
        for reader, index in list(value.uses()):
            if index in inputs.get(reader.op_type, ()):
                reader.replace_input_with(index, decoded)
        result[decoded] = value
    return result


def _computed(model: ir.Model) -> set[ir.Value]:
    """What the main graph computes from constants alone, but for what it only dequantizes."""
    found: set[ir.Value] = set()
    for node in model.graph:  # in topological order
        given = [value for value in node.inputs if value is not None]
        if node.op_type == "DequantizeLinear":
            continue
        if given and all(value in found or constant_of(value) is not None for value in given):
            found |= set(node.outputs)
    return found


def stored_bytes(value: ir.Value) -> int:
    """Bytes of all constants that a value is computed from."""
    return sum(source.const_value.nbytes for source in _sources(value) if source.const_value is not None)


def _sources(value: ir.Value) -> set[ir.Value]:
    """The values without a producer that a value is computed from."""
    found: set[ir.Value] = set()
    open_ends = [value]
    while open_ends:
        end = open_ends.pop()
        node = end.producer()
        if node is None:
            found.add(end)
        else:
            open_ends += [given for given in node.inputs if given is not None]
    return found


def _shape(value: ir.Value) -> tuple[int, ...]:
    assert value.const_value is not None
    return tuple(value.const_value.shape.numpy())


def matrix_view(node: ir.Node, index: int, shape: tuple[int, ...]) -> View:
    """The matrix (out, in) that the node takes from a weight of this shape."""
    match node.op_type:
        case "ConvTranspose":
            groups = node.attributes.get_int("group", 1)
            return View(shape, (groups, shape[0] // groups, int(np.prod(shape[1:]))), (0, 2, 1))
        case "Gemm":
            return View(shape, shape, (0, 1) if node.attributes.get_int("transB", 0) else (1, 0))
        case "MatMul" | "MatMulInteger" | "QLinearMatMul":
            split = (int(np.prod(shape[:-2])), *shape[-2:])
            return View(shape, split, (0, 1, 2) if index == 0 else (0, 2, 1))
        case "LSTM" | "GRU" | "RNN":
            return View(shape, (int(np.prod(shape[:-1])), shape[-1]), (0, 1))
        case _:
            return View(shape, (shape[0], int(np.prod(shape[1:]))), (0, 1))


def is_product(node: ir.Node, index: int) -> bool:
    """Whether `MatMulNBits` can stand for the node."""
    data, weight = node.inputs[0], node.inputs[1]
    if index != 1 or weight is None or data is None or weight.dtype != ir.DataType.FLOAT or len(_shape(weight)) != 2:
        return False
    attributes = node.attributes
    plain = attributes.get_float("alpha", 1.0) == attributes.get_float("beta", 1.0) == 1.0
    return node.op_type == "MatMul" or (node.op_type == "Gemm" and plain and not attributes.get_int("transA", 0))
