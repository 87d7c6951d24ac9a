"""Where channels can change scale without changing the function.

    W2 f(W1 x + b1)  =  (W2 S) f(S^-1 W1 x + S^-1 b1)      for diagonal S > 0 and f(s x) = s f(x)

A `Site` is an activation that nothing but layers reads and whose channels something before it can divide: the rows of a
layer, the gain of a normalisation, or the values that attention mixes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import ArrayLike, NDArray

from onnxcomp.graph import Builder
from onnxcomp.layers import Layer, layer_of, layers

_HOMOGENEOUS = {"Relu", "LeakyRelu", "PRelu", "Identity"}
_POOLS = {"MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool"}
_HEADS_FIRST = [0, 2, 1, 3]

Slot = tuple[ir.Node, int]
"""A node and the index of one of its inputs, a constant."""


@dataclass(frozen=True, eq=False)
class Site:
    """An activation whose channels may be divided by s > 0 if the layers that read it multiply theirs by s.

    Attributes:
        value: the activation.
        readers: the layers that read it.
        layer: the layer whose outputs are divided, or None where a normalisation's gain is.
        vectors: biases, gains and shifts that are divided too, one element per channel each.
    """

    value: ir.Value
    readers: tuple[Layer, ...]
    layer: Layer | None
    vectors: tuple[Slot, ...]

    @property
    def channels(self) -> int:
        """How many scales there are."""
        return len(self.readers[0].by_input())

    @property
    def bias(self) -> NDArray[np.float64]:
        """(channels,) sum of the vectors: what the layer's output is shifted by."""
        return sum((_vector(slot) for slot in self.vectors), np.zeros(self.channels))

    def rescale(self, scales: NDArray[np.floating]) -> None:
        """Divide by the scales, (channels,), before the activation and multiply by them behind."""
        if self.layer is not None:
            _rewrite((self.layer.node, self.layer.index), self.layer.scaled(outputs=1 / scales))
        for slot in self.vectors:
            _rewrite(slot, _vector(slot) / scales)
        scale_readers(self.readers, scales)


def scale_readers(readers: tuple[Layer, ...], scales: ArrayLike) -> None:
    """Multiply the weights of each input channel by its scale, (channels,)."""
    for reader in readers:
        _rewrite((reader.node, reader.index), reader.scaled(inputs=scales))


def sites(model: ir.Model) -> Iterator[tuple[Layer, Site | str]]:
    """Each activation with layers that read it, once: the first of these layers and the site, or why it is none."""
    seen = set()
    for layer in layers(model):
        if layer.data not in seen:
            seen.add(layer.data)
            yield layer, _site(layer.data)


def _site(value: ir.Value) -> Site | str:
    readers = _readers(value)
    if isinstance(readers, str):
        return readers
    if value.is_graph_output():
        return f"its input '{value.name}' is also an output of the model"
    axes = {_input_axis(reader) for reader in readers}
    if len(axes) > 1:
        return "its input is read along different axes"
    source = _source(value, axes.pop(), len(readers[0].by_input()))
    return source if isinstance(source, str) else Site(value, readers, *source)


def obstacle(layer: Layer) -> str | None:
    """Why the channels of a layer cannot be scaled, as a reader or before one."""
    if layer.index == 0:
        return "its weight is on the left"
    value = layer.weight
    if len(value.uses()) > 1 or value.is_graph_output():
        return f"its weight '{value.name}' is shared"
    if not value.is_initializer():
        return f"its weight '{value.name}' is not an initializer"
    return None if np.isfinite(layer.matrix()).all() else "its weights are not finite"


def _readers(value: ir.Value) -> tuple[Layer, ...] | str:
    """The layers that read an activation if nothing else does and their weights are their own, or why not."""
    readers = []
    for node in _uses(value):
        layer = layer_of(node)
        if layer is None or layer.data is not value:
            return f"its input is also read by {node.op_type} '{node.name}'"
        if (problem := obstacle(layer)) is not None:
            return problem
        if node.graph is not (value.producer() or node).graph:
            return "its input comes from outside the control-flow body"
        readers.append(layer)
    return tuple(readers)


def _input_axis(layer: Layer) -> int:
    """The channel axis of a layer's input, counted from the end."""
    rank = 2 + len(layer.kernel)
    return layer.input_axis if layer.input_axis < 0 else layer.input_axis - rank


def _output_axis(layer: Layer) -> int:
    """The channel axis of a layer's output, counted from the end."""
    if layer.node.op_type == "MatMul":
        return layer.input_axis
    return -1 - len(layer.kernel)


def _source(value: ir.Value, axis: int, channels: int) -> tuple[Layer | None, tuple[Slot, ...]] | str:
    """What can divide the channels of an activation, found by walking towards the inputs; or why nothing can."""
    vectors: list[Slot] = []
    while (node := value.producer()) is not None:
        here = f"{node.op_type} '{node.name}'"
        layer = layer_of(node)
        if layer is not None:
            bias = _bias(layer, axis, channels)
            return bias if isinstance(bias, str) else (layer, (*bias, *vectors))
        if node.op_type == "LayerNormalization":
            slots = _norm_vectors(node, axis, channels)
            return slots if isinstance(slots, str) else (None, (*slots, *vectors))
        if node.op_type in {"Add", "Mul"} and (index := _vector_input(node, axis, channels)) is not None:
            vectors.insert(0, (node, index))
            if node.op_type == "Mul":
                return None, tuple(vectors)
            before = node.inputs[1 - index]
        elif node.op_type in _HOMOGENEOUS or (node.op_type in _POOLS and axis < -1 and len(node.outputs) == 1):
            before = node.inputs[0]
        elif node.op_type == "Reshape" and axis == -1:
            before = _attention_values(node, channels)
        elif node.op_type == "Clip":
            return f"{here} before it clips at fixed bounds, whatever the scale"
        else:
            return f"{here} before it does not pass a factor per channel through"
        if before is None:
            return f"{here} before it does not keep channels in their place"
        if before.is_graph_output() or len(_uses(before)) > 1 or node.graph is not (before.producer() or node).graph:
            return f"'{before.name}' before it is also used elsewhere"
        value = before
    return "its input comes from no layer or normalisation"


def _bias(layer: Layer, axis: int, channels: int) -> tuple[Slot, ...] | str:
    """The operator's own bias, if the layer's output channels lie along the axis."""
    if _output_axis(layer) != axis or len(layer.by_output()) != channels:
        return f"its input channels are not the output channels of '{layer.name}'"
    if (problem := obstacle(layer)) is not None:
        return f"'{layer.name}' before it cannot be scaled: {problem}"
    if layer.bias is None:
        return ()
    bias = _constant((layer.node, 2))
    if bias is None or bias.size != channels or bias.shape[-1] != channels:
        return f"'{layer.name}' before it cannot be scaled: its bias is not one constant per channel"
    return ((layer.node, 2),)


def _norm_vectors(node: ir.Node, axis: int, channels: int) -> tuple[Slot, ...] | str:
    slots = tuple((node, index) for index in (1, 2) if index < len(node.inputs) and node.inputs[index] is not None)
    vectors = [_constant(slot) for slot in slots]
    if axis != -1 or any(vector is None or vector.shape != (channels,) for vector in vectors):
        return f"LayerNormalization '{node.name}' before it has no constant gain and shift per channel"
    return slots


def _vector_input(node: ir.Node, axis: int, channels: int) -> int | None:
    """Which input of an element-wise node is a constant with one element per channel along the axis."""
    for index in (0, 1):
        vector = _constant((node, index))
        if vector is not None and vector.ndim >= -axis and vector.size == channels == vector.shape[axis]:
            return index
    return None


def _attention_values(merge: ir.Node, channels: int) -> ir.Value | None:
    """The values (batch, length, heads * size) that attention mixes, given the Reshape that merges the heads again.

    Softmax(...) V acts on each column of V alone, so a factor per channel passes, if heads are split, moved in front of
    the length, and moved back and merged in the usual way. Anything else gives None.
    """
    back = _producer(merge, 0, "Transpose")
    mixed = _producer(back, 0, "MatMul")
    front = _producer(mixed, 1, "Transpose")
    split = _producer(front, 0, "Reshape")
    if back is None or mixed is None or front is None or split is None or mixed.inputs[0] is mixed.inputs[1]:
        return None
    if any(list(node.attributes.get_ints("perm", [])) != _HEADS_FIRST for node in (back, front)):
        return None
    chain = (back.outputs[0], mixed.outputs[0], front.outputs[0], split.outputs[0])
    if any(value.is_graph_output() or len(_uses(value)) > 1 for value in chain):
        return None
    shape = split.outputs[0].shape
    tail = [] if shape is None else list(shape)[-2:]
    target = _constant((split, 1))
    if target is not None and (target[-2:] > 0).all():
        tail = target[-2:].tolist()
    whole = len(tail) == 2 and all(isinstance(size, int) for size in tail) and tail[0] * tail[1] == channels
    return split.inputs[0] if whole else None


def _producer(node: ir.Node | None, index: int, operator: str) -> ir.Node | None:
    """The node that makes an input, if it is of the wanted type."""
    value = None if node is None else node.inputs[index]
    producer = None if value is None else value.producer()
    return producer if producer is not None and producer.op_type == operator else None


def _uses(value: ir.Value) -> list[ir.Node]:
    """The nodes that read a value's elements; its shape is the same at any scale."""
    return [use.node for use in value.uses() if use.node.op_type != "Shape"]


def _vector(slot: Slot) -> NDArray[np.float64]:
    """A constant with one element per channel, whatever its shape."""
    array = _constant(slot)
    assert array is not None
    return array.astype(np.float64).reshape(-1)


def _constant(slot: Slot) -> NDArray[Any] | None:
    node, index = slot
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value.numpy()


def _rewrite(slot: Slot, array: NDArray[np.floating]) -> None:
    """Give a node another constant: in place of the old one, or beside it if others read that too."""
    node, index = slot
    value, graph = node.inputs[index], node.graph
    assert value is not None
    assert value.const_value is not None
    assert isinstance(graph, ir.Graph)
    old = value.const_value
    converted = array.reshape(old.shape.numpy()).astype(old.dtype.numpy())
    if value.is_initializer() and len(value.uses()) == 1 and not value.is_graph_output():
        value.const_value = ir.tensor(converted, name=value.name)
    else:
        node.replace_input_with(index, Builder(graph).constant(converted, f"{value.name}_scaled"))
