"""One view of every weighted operator: `Y = W X + b` with W of shape (out, in * kernel)."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import ArrayLike, NDArray

from onnxcomp.errors import ModelError
from onnxcomp.graph import Builder, constant_of
from onnxcomp.model import all_nodes

Array = NDArray[np.floating]

_WEIGHT_INPUT = {"Conv": 1, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1}
FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}


@dataclass(frozen=True)
class Layer:
    """A node with a constant floating-point weight, seen as a matrix product.

    Attributes:
        node: Conv, ConvTranspose, Gemm or MatMul.
        index: which input is the weight.
    """

    node: ir.Node
    index: int

    @property
    def name(self) -> str:
        """The node's name."""
        return self.node.name or ""

    @property
    def weight(self) -> ir.Value:
        """The weight, a constant."""
        value = self.node.inputs[self.index]
        assert value is not None
        return value

    @property
    def data(self) -> ir.Value:
        """The activation that the layer transforms."""
        value = self.node.inputs[1 - self.index]
        assert value is not None
        return value

    @property
    def bias(self) -> ir.Value | None:
        """The bias input of the operator itself, where it has one."""
        return self.node.inputs[2] if len(self.node.inputs) > 2 else None

    def bias_vector(self) -> NDArray[np.float64]:
        """The operator's own bias, (out,); zeros where it has none, or one that is computed or differs by row."""
        array = constant_of(self.bias)
        if array is None or not _is_vector(array):
            return np.zeros(self.outputs)
        return np.array(np.broadcast_to(array.astype(np.float64).reshape(-1), (self.outputs,)))

    @property
    def groups(self) -> int:
        """Groups of a convolution; 1 otherwise."""
        return self.node.attributes.get_int("group", 1) if "Conv" in self.node.op_type else 1

    @property
    def is_depthwise(self) -> bool:
        """One input channel per group."""
        return self.node.op_type == "Conv" and self.groups > 1 and self.weight_shape[1] == 1

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The weight's own shape."""
        assert self.weight.const_value is not None
        return tuple(self.weight.const_value.shape.numpy())

    @property
    def kernel(self) -> tuple[int, ...]:
        """Spatial kernel size; empty for matrix products."""
        return self.weight_shape[2:] if "Conv" in self.node.op_type else ()

    @property
    def channel_axis(self) -> int:
        """The axis of the weight's own layout that runs over output channels (within a group for ConvTranspose)."""
        if self.node.op_type == "Conv":
            return 0
        if self.node.op_type == "ConvTranspose":
            return 1
        if self.node.op_type == "Gemm":
            return 0 if self.node.attributes.get_int("transB", 0) else 1
        return len(self.weight_shape) - (1 if self.index == 1 else 2)

    @property
    def input_axis(self) -> int:
        """The axis of the activation that runs over input channels."""
        if "Conv" in self.node.op_type:
            return 1
        if self.node.op_type == "Gemm":
            return 0 if self.node.attributes.get_int("transA", 0) else 1
        return -1 if self.index == 1 else -2

    @property
    def output_axis(self) -> int:
        """The axis of the output that runs over output channels."""
        return 1 if "Conv" in self.node.op_type else -1 if self.index == 1 else -2

    @property
    def outputs(self) -> int:
        """Output channels, of all groups."""
        return len(self.by_output())

    @property
    def adds_bias(self) -> bool:
        """Whether the operator has, or can be given, a constant vector to add, one element for each output channel."""
        array = constant_of(self.bias)
        if self.node.op_type not in {"Conv", "Gemm"} or self.is_scaled:
            return False
        return self.bias is None or (array is not None and _is_vector(array))

    @property
    def is_scaled(self) -> bool:
        """Whether a Gemm multiplies its product or its bias by a factor."""
        return self.node.op_type == "Gemm" and any(
            self.node.attributes.get_float(name, 1.0) != 1.0 for name in ("alpha", "beta")
        )

    @property
    def input_width(self) -> int:
        """Columns of the matrix: inputs of one group times kernel taps, the side of its Gram matrix."""
        if self.node.op_type == "Conv":
            return int(np.prod(self.weight_shape[1:]))
        if self.node.op_type == "ConvTranspose":
            return self.weight_shape[0] // self.groups
        return self.weight_shape[1 - self.channel_axis]

    def matrix(self) -> Array:
        """The weight as float32 (out, in * kernel); out runs over groups for a grouped convolution.

        ConvTranspose: (groups * out/group * kernel, in/group), each tap a row of its own.
        """
        return self.to_matrix(self._array().astype(np.float32))

    def to_matrix(self, weight: Array) -> Array:
        """A tensor in the weight's own layout, as `matrix()` gives it."""
        if self.node.op_type == "Conv":
            return weight.reshape(len(weight), -1)
        if self.node.op_type == "ConvTranspose":
            grouped = weight.reshape(self.groups, len(weight) // self.groups, -1)
            return np.swapaxes(grouped, 1, 2).reshape(-1, grouped.shape[1])
        return np.ascontiguousarray(weight.T) if self.channel_axis == 1 else weight

    def from_matrix(self, matrix: NDArray[np.generic]) -> NDArray[np.generic]:
        """The inverse of `to_matrix`, for floats as for quantized integers."""
        shape = self.weight_shape
        if self.node.op_type == "Conv":
            return matrix.reshape(shape)
        if self.node.op_type == "ConvTranspose":
            grouped = matrix.reshape(self.groups, -1, matrix.shape[1])
            return np.ascontiguousarray(np.swapaxes(grouped, 1, 2)).reshape(shape)
        return np.ascontiguousarray(matrix.T) if self.channel_axis == 1 else matrix

    def set_matrix(self, matrix: NDArray[np.floating]) -> None:
        """Give the node another weight of the same shape and type, in a constant of its own."""
        self._replace(self.index, self.from_matrix(matrix), self.weight.name or "")

    def set_bias(self, bias: NDArray[np.floating]) -> None:
        """Give a convolution or Gemm another bias, (out,), in a constant of its own."""
        name = f"{self.name}_bias" if self.bias is None else self.bias.name or ""
        self.node.resize_inputs(3)
        self._replace(2, bias, name)

    def _replace(self, index: int, array: NDArray[np.generic], name: str) -> None:
        tensor, graph = self.weight.const_value, self.node.graph
        assert tensor is not None
        assert isinstance(graph, ir.Graph)
        wanted = f"{name.removesuffix('_fitted')}_fitted"
        self.node.replace_input_with(index, Builder(graph).constant(array.astype(tensor.dtype.numpy()), wanted))

    def by_output(self, weight: Array | None = None) -> Array:
        """The weights of each output channel: (out, ...), of all groups."""
        return self._by_channel(self.channel_axis, weight)

    def by_input(self, weight: Array | None = None) -> Array:
        """The weights that each input channel meets: (in, ...), of all groups."""
        return self._by_channel(1 - self.channel_axis, weight)

    def scaled(self, outputs: ArrayLike = 1.0, inputs: ArrayLike = 1.0) -> Array:
        """The weight, in its own layout and float64, with each channel multiplied by its factor.

        Args:
            outputs: (out,) or scalar.
            inputs: (in,) or scalar.
        """
        result = self._blocks(self._array().astype(np.float64))
        for factors, axis in ((outputs, self.channel_axis), (inputs, 1 - self.channel_axis)):
            sides = [self.groups, 1, 1, 1]
            sides[1 + axis] = -1
            grouped = np.asarray(factors, np.float64)
            result = result * (grouped.reshape(sides) if grouped.ndim else grouped)
        return result.reshape(self.weight_shape)

    def _by_channel(self, axis: int, weight: Array | None) -> Array:
        blocks = np.moveaxis(self._blocks(self._array() if weight is None else weight), 1 + axis, 1)
        return blocks.reshape(blocks.shape[0] * blocks.shape[1], -1)

    def _blocks(self, weight: Array) -> Array:
        """(groups, ., ., taps), the two in the middle the weight's own first axes within a group."""
        return weight.reshape(self.groups, len(weight) // self.groups, weight.shape[1], -1)

    def _array(self) -> Array:
        assert self.weight.const_value is not None
        return self.weight.const_value.numpy()

    def rows(self, data: Array, count: int, generator: np.random.Generator) -> NDArray[np.float32]:
        """Some of the input vectors that the layer multiplies, drawn at random positions.

        Args:
            data: the layer's input activation, one batch.
            count: how many vectors at most; all of them where there are no more.
            generator: draws the positions.

        Returns:
            (groups, rows, in/group * kernel).
        """
        if self.node.op_type == "Conv":
            return self._patches(data, count, generator)
        chosen = np.asarray(_drawn(np.moveaxis(data, self.input_axis, -1), count, generator), np.float32)
        return np.ascontiguousarray(np.swapaxes(chosen.reshape(len(chosen), self.groups, -1), 0, 1))

    def output_rows(self, output: Array, count: int, generator: np.random.Generator) -> Array:
        """The vectors that the layer gives, or what is added to them, at the positions that `rows` draws.

        Args:
            output: a tensor of the output's shape.
            count: as for `rows`.
            generator: in the state that `rows` had it in.

        Returns:
            (rows, out).
        """
        return _drawn(np.moveaxis(output, self.output_axis, -1), count, generator)

    def from_output_rows(self, rows: Array, shape: tuple[int, ...]) -> Array:
        """The inverse of `output_rows` where all positions were drawn.

        Args:
            rows: (rows, out).
            shape: of the layer's input.
        """
        return np.moveaxis(rows.reshape(*self.positions(shape), -1), -1, self.output_axis)

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the output for an input of some shape; not for ConvTranspose."""
        result = list(self.positions(shape))
        axis = self.output_axis
        result.insert(axis if axis >= 0 else len(shape) + axis, self.outputs)
        return tuple(result)

    def positions(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """How many rows there are along each axis, for an input of some shape."""
        if self.node.op_type != "Conv":
            return tuple(np.delete(shape, self.input_axis).tolist())
        one = self._windows(np.zeros((1, 1, *shape[2:]), np.float32))
        return (shape[0], *one.shape[1 : len(shape) - 1])

    def from_rows(self, rows: Array, shape: tuple[int, ...]) -> Array:
        """The adjoint of `rows` where all positions were drawn: each element of the input sums what its copies hold.

        Args:
            rows: (groups, rows, in/group * kernel).
            shape: of the layer's input.
        """
        if self.node.op_type != "Conv":
            axis, flat = self.input_axis, np.swapaxes(rows, 0, 1)
            return np.moveaxis(flat.reshape(*np.delete(shape, axis), shape[axis]), -1, axis)
        inside = tuple(slice(before, before + size) for (before, _), size in zip(self._pads(shape), shape, strict=True))
        padded = np.zeros([size + sum(pads) for size, pads in zip(shape, self._pads(shape), strict=True)], rows.dtype)
        windows = self._positions_last(self._windows(padded, padded=True))
        parts = np.swapaxes(rows, 1, 2).reshape(windows.shape)
        for tap in np.ndindex(*self.kernel):
            windows[:, *tap] += parts[:, *tap]
        return padded[inside]

    def _patches(self, data: Array, count: int, generator: np.random.Generator) -> NDArray[np.float32]:
        places = self._windows(data)
        shape = places.shape[: 1 + len(self.kernel)]
        total = math.prod(shape)
        if total > count:
            chosen = places[np.unravel_index(_draw(total, count, generator), shape)]
            patches = np.asarray(chosen, np.float32).reshape(count, self.groups, -1)
            return np.ascontiguousarray(np.swapaxes(patches, 0, 1))
        columns = np.ascontiguousarray(self._positions_last(places), np.float32).reshape(self.groups, -1, total)
        return np.swapaxes(columns, 1, 2)

    def _windows(self, data: Array, *, padded: bool = False) -> Array:
        """What a convolution reads at each position: (batch, *positions, channel, *kernel), a view on padded data."""
        rank, attributes = len(self.kernel), self.node.attributes
        strides, dilations = (attributes.get_ints(name, [1] * rank) for name in ("strides", "dilations"))
        data = data if padded else np.pad(data, self._pads(data.shape))
        axes = tuple(range(2, 2 + rank))
        view = np.lib.stride_tricks.sliding_window_view(data, self._spans, axis=axes, writeable=padded)
        keep = slice(None)
        view = view[(keep, keep, *(slice(None, None, step) for step in (*strides, *dilations)))]
        return np.moveaxis(view, 1, 1 + rank)

    def _positions_last(self, windows: Array) -> Array:
        """The same as (channel, *kernel, batch, *positions): lines of images are then copied, not of kernels."""
        rank = 1 + len(self.kernel)
        return np.moveaxis(windows, range(rank), range(-rank, 0))

    @property
    def _spans(self) -> list[int]:
        """How far the kernel reaches along each spatial axis."""
        dilations = self.node.attributes.get_ints("dilations", [1] * len(self.kernel))
        return [dilation * (size - 1) + 1 for dilation, size in zip(dilations, self.kernel, strict=True)]

    def _pads(self, shape: tuple[int, ...]) -> list[tuple[int, int]]:
        """Padding of each axis of a convolution's input."""
        strides = list(self.node.attributes.get_ints("strides", [1] * len(self.kernel)))
        return [(0, 0), (0, 0), *_pads(self.node, shape[2:], self._spans, strides)]


def _is_vector(array: NDArray[Any]) -> bool:
    """Whether it is the same for each row that it is added to."""
    return array.size == (array.shape[-1] if array.ndim else 1)


def _draw(total: int, count: int, generator: np.random.Generator) -> NDArray[np.int64]:
    return np.arange(total) if total <= count else np.sort(generator.choice(total, count, replace=False))


def _drawn(moved: Array, count: int, generator: np.random.Generator) -> Array:
    """(rows, channels) vectors of a tensor (*positions, channels) at as many positions, or at all."""
    positions = moved.shape[:-1]
    total = math.prod(positions)
    if total <= count:
        return moved.reshape(total, moved.shape[-1])
    return moved[np.unravel_index(_draw(total, count, generator), positions)]


def _pads(node: ir.Node, sizes: tuple[int, ...], spans: list[int], strides: list[int]) -> list[tuple[int, int]]:
    """Padding before and after each spatial axis, `auto_pad` resolved."""
    mode = node.attributes.get_string("auto_pad", "NOTSET")
    if mode in {"SAME_UPPER", "SAME_LOWER"}:
        totals = [
            max((-(-size // stride) - 1) * stride + span - size, 0)
            for size, span, stride in zip(sizes, spans, strides, strict=True)
        ]
        halves = [(total // 2, total - total // 2) for total in totals]
        return halves if mode == "SAME_UPPER" else [(after, before) for before, after in halves]
    flat = list(node.attributes.get_ints("pads", [0] * 2 * len(sizes)))
    return list(zip(flat[: len(sizes)], flat[len(sizes) :], strict=True))


def layer_of(node: ir.Node) -> Layer | None:
    """The node as a layer, or None where it has no constant floating-point weight matrix, or nothing to transform."""
    if node.domain not in {"", "ai.onnx"} or node.op_type not in _WEIGHT_INPUT or is_empty(node.outputs[0]):
        return None
    indices = (1, 0) if node.op_type == "MatMul" else (1,)
    for index in indices:
        value = node.inputs[index] if index < len(node.inputs) else None
        tensor = value.const_value if value is not None and not value.is_graph_input() else None
        if tensor is None or tensor.dtype not in FLOATS or tensor.size == 0:
            continue
        if ("Conv" in node.op_type and len(tensor.shape) < 3) or (node.op_type == "MatMul" and len(tensor.shape) != 2):
            continue
        return Layer(node, index)
    return None


def end_layers(model: ir.Model) -> set[str]:
    """Names of the main graph's first and last layers: no other stands between them and an input, or an output."""
    known = {layer.node: layer.name for layer in layers(model)}
    forwards = _met(model.graph.inputs, known, lambda value: [use.node for use in value.uses()], lambda n: n.outputs)
    backwards = _met(model.graph.outputs, known, lambda value: [value.producer()], lambda node: node.inputs)
    return forwards | backwards


def _met(
    values: Iterable[ir.Value | None],
    known: Mapping[ir.Node, str],
    nodes: Callable[[ir.Value], Iterable[ir.Node | None]],
    beyond: Callable[[ir.Node], Iterable[ir.Value | None]],
) -> set[str]:
    """The layers that are met first on the way from some values."""
    found, seen, open_ends = set(), set(), [value for value in values if value is not None]
    while open_ends:
        for node in nodes(open_ends.pop()):
            if node is None or node in seen:
                continue
            seen.add(node)
            if node in known:
                found.add(known[node])
            else:
                open_ends += [value for value in beyond(node) if value is not None]
    return found


def is_empty(value: ir.Value) -> bool:
    """Whether a tensor is known to have no elements."""
    return value.shape is not None and 0 in value.shape


def layers(model: ir.Model) -> Iterator[Layer]:
    """Every layer of the model, bodies and functions included, in graph order."""
    for node in all_nodes(model):
        if (layer := layer_of(node)) is not None:
            yield layer


def refuse_broken_weights(model: ir.Model) -> None:
    """Raise where a layer's weights are not finite: nothing learnt from such a model would mean anything.

    Raises:
        ModelError: naming the weight.
    """
    for layer in layers(model):
        if not np.isfinite(layer.matrix()).all():
            raise ModelError(
                f"weight '{layer.weight.name}' of {layer.node.op_type} '{layer.name}' holds NaN or infinity",
                "training diverged, or a conversion overflowed",
                "export the model again from an earlier checkpoint",
            )
