"""Static INT8: activations and weights as integers, in QDQ form.

    x' = (clip(round(x / s) + z) - z) s      for activations: one scale and zero point per tensor, from calibration
    W' = Q_W s_W                             for weights: one scale per output channel, zero point 0

A QuantizeLinear/DequantizeLinear pair marks every tensor that crosses into an integer kernel, and ONNX Runtime fuses
DequantizeLinear -> operator -> QuantizeLinear into one. (Jacob et al. 2018, "Quantization and Training of Neural
Networks for Efficient Integer-Arithmetic-Only Inference".) Rules:

1. Relu and Clip behind a quantized operator become part of its output range; no pair stands between them.
2. What only moves data keeps its input's scale and works on the integers themselves.
3. A bias is int32 with scale s_x s_W, as the kernels add it to the accumulator.
4. What feeds a Softmax stays in float: masks reach -3e38 there, and scores want the resolution.
5. A MatMul or Gemm whose output nothing quantized reads gives float.
"""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxcomp.calibration import Observed, Statistics, calibrate
from onnxcomp.core import Change, Context, Outcome, Pass, Skip, name_nodes
from onnxcomp.graph import Builder, at_least_opset, remove_unused, single_consumer
from onnxcomp.layers import Layer, layer_of
from onnxcomp.numerics import ranges
from onnxcomp.numerics.affine import AffineParameters, IntGrid, parameters_from_range, quantize
from onnxcomp.numerics.histogram import Histogram
from onnxcomp.weights import Rounding, RoundedWeights, round_weights

_OPSET = 13  # the first with per-channel DequantizeLinear
_ACTIVATIONS = {"Relu", "Clip"}
_COMPUTING = {"Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "LeakyRelu", "Sigmoid"}
_MOVING = {
    *("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Expand", "Identity", "Tile"),
    *("MaxPool", "Pad", "Resize", "DepthToSpace"),
}
_TRANSPARENT = _MOVING | {
    *("Add", "Sub", "Mul", "Div", "Where", "Cast", "Clip", "Min", "Max", "Concat", "Neg"),
}


class Range(StrEnum):
    """How the range of an activation is chosen from its histogram."""

    MINMAX = "minmax"
    PERCENTILE = "percentile"
    ENTROPY = "entropy"
    MSE = "mse"

    def of(self, histogram: Histogram, grid: IntGrid) -> tuple[float, float]:
        """Low and high end of the range."""
        match self:
            case Range.MINMAX:
                return ranges.minmax(histogram)
            case Range.PERCENTILE:
                return ranges.percentile(histogram)
            case Range.ENTROPY:
                return ranges.entropy(histogram, grid)
            case Range.MSE:
                return ranges.mse(histogram, grid)


@dataclass(frozen=True)
class QuantizeStatic(Pass):
    """Static INT8 in QDQ form.

    Attributes:
        range: how activation ranges are chosen.
        signed: int8 activations instead of uint8. On x86 CPUs ONNX Runtime has fast kernels for uint8 only.
        weight_bits: 8, or 7 where the processor adds pairs of products in 16 bits and would saturate.
        rounding: how weights are rounded.
        keep: names of the nodes that stay in float.
    """

    name: ClassVar[str] = "quantize-static"
    summary: ClassVar[str] = "static INT8 (QDQ): Conv, Gemm, MatMul and what lies between them, calibrated"

    range: Range = Range.MSE
    signed: bool = False
    weight_bits: int = 8
    rounding: Rounding = field(default_factory=Rounding)
    keep: tuple[str, ...] = ()

    def apply(self, model: ir.Model, context: Context) -> Outcome:
        """Choose the nodes, calibrate, insert the pairs."""
        if context.data is None:
            return Outcome(model, (), (Skip("model", "static INT8 needs calibration data (--calib)"),))
        converted = at_least_opset(model, _OPSET)
        if isinstance(converted, str):
            return Outcome(model, (), (Skip("model", converted),))
        name_nodes(converted)
        chosen, skips = quantizable(converted, context, frozenset(self.keep))
        surgery = _Surgery(converted, chosen, self, context.cache)
        grams = [layer for layer in surgery.layers if self.rounding.needs_gram]
        statistics = calibrate(converted, context.data, context, surgery.observed(), grams)
        changes = surgery.run(statistics)
        return Outcome(converted if changes else model, changes, skips)


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
        elif reason and node.op_type in {"Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN"}:
            skips.append(Skip(node.name or "", reason))
    inner = {id(node) for node in model.graph}
    for node in model.graph.all_nodes():
        if id(node) not in inner and layer_of(node) is not None:
            skips.append(Skip(node.name or "", "inside a control-flow body, where activations cannot be observed"))
    return _connected(chosen), tuple(skips)


def _obstacle(node: ir.Node, scores: set[str]) -> str | None:
    """Why a node has no INT8 form: empty where nobody would expect one."""
    if node.domain not in {"", "ai.onnx"}:
        return ""
    floats = [value for value in node.inputs if value is not None and value.dtype == ir.DataType.FLOAT]
    if not floats or node.outputs[0].dtype != ir.DataType.FLOAT:
        kinds = {str(v.dtype) for v in node.inputs if v is not None and v.dtype is not None and v.dtype.is_floating_point()}
        return f"its activations are {', '.join(sorted(kinds))}, not FLOAT" if kinds else ""
    if node.op_type in {"Conv", "Gemm"}:
        layer = layer_of(node)
        if layer is None:
            return "its weight is not a constant"
        if node.op_type == "Gemm" and (
            node.attributes.get_float("alpha", 1.0) != 1.0
            or node.attributes.get_float("beta", 1.0) != 1.0
            or node.attributes.get_int("transA", 0)
        ):
            return "Gemm with alpha, beta or transA has no INT8 kernel"
        if layer.bias is not None and (layer.bias.const_value is None or layer.bias.is_graph_input()):
            return "its bias is not a constant"
        if layer.bias is not None and layer.bias.const_value is not None and len(layer.bias.const_value.shape) != 1:
            return "its bias is not one value per channel"
        if not np.isfinite(layer.matrix()).all():
            return "its weights are not finite"
        return None
    if node.op_type == "MatMul":
        layer = layer_of(node)
        return "its weight is on the left" if layer is not None and layer.index == 0 else None
    if node.op_type in {"ConvTranspose", "LSTM", "GRU", "RNN"}:
        return f"ONNX Runtime has no static INT8 kernel for {node.op_type}"
    if node.outputs[0].name in scores:
        return ""
    if node.op_type == "Resize" and node.attributes.get_string("mode", "nearest") not in {"nearest", "linear"}:
        return ""
    if node.op_type in {"MaxPool"} and len(node.outputs) > 1:
        return ""
    if node.op_type == "Pad" and _pad_value(node) is None:
        return ""
    return None if node.op_type in _COMPUTING | _MOVING | _ACTIVATIONS else ""


def _pad_value(node: ir.Node) -> float | None:
    """The constant that a Pad fills in, or None where it is not known."""
    if node.attributes.get_string("mode", "constant") != "constant":
        return 0.0
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if value is None:
        return 0.0
    return None if value.const_value is None else float(value.const_value.numpy().reshape(-1)[0])


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
    """Without what stands between no two integer kernels: it would only pay for conversions."""
    result = dict(chosen)
    anchors = {"Conv", "Gemm", "MatMul"}
    while True:
        dropped = [
            name
            for name, node in result.items()
            if node.op_type not in anchors
            and not (
                all(_quantized_producer(value, result) for value in _data_inputs(node))
                and any(use.node.name in result for use in node.outputs[0].uses())
            )
        ]
        # A Relu behind the last integer kernel still folds into its output range.
        dropped = [
            name
            for name in dropped
            if not (result[name].op_type in _ACTIVATIONS and _quantized_producer(result[name].inputs[0], result))
        ]
        if not dropped:
            return result
        for name in dropped:
            del result[name]


def _quantized_producer(value: ir.Value | None, chosen: dict[str, ir.Node]) -> bool:
    if value is None:
        return False
    producer = value.producer()
    return value.const_value is not None or (producer is not None and producer.name in chosen)


def _data_inputs(node: ir.Node) -> Iterator[ir.Value]:
    """The activations that a node transforms, constants among them."""
    count = 1 if node.op_type in _MOVING | _ACTIVATIONS | {"Conv", "Gemm"} else len(node.inputs)
    for value in node.inputs[:count]:
        if value is not None:
            yield value


class _Surgery:
    """Inserts the pairs for a chosen set of nodes.

    Nodes are handled in graph order, and each rewires only its own inputs: until then they are the original values.
    """

    def __init__(self, model: ir.Model, chosen: dict[str, ir.Node], settings: QuantizeStatic, cache: dict[Hashable, Any]) -> None:
        self._model = model
        self._chosen = chosen
        self._settings = settings
        self._cache = cache
        self._grid = IntGrid(8, settings.signed, symmetric=settings.signed)
        self._dtype = ir.DataType.from_numpy(self._grid.dtype)
        self._builder = Builder(model.graph)
        self.layers = [layer for node in chosen.values() if (layer := layer_of(node)) is not None]
        self._root: dict[ir.Value, ir.Value] = {}
        for node in chosen.values():
            if node.op_type in _MOVING and node.inputs[0] is not None:
                self._root[node.outputs[0]] = self._root.get(node.inputs[0], node.inputs[0])
        self._parameters: dict[ir.Value, _Parameters] = {}
        self._integers: dict[ir.Value, ir.Value] = {}
        self._floats: dict[ir.Value, ir.Value] = {}
        self._zero_points: dict[tuple[int, str], ir.Value] = {}
        self._weights: dict[tuple[ir.Value, int], tuple[ir.Value, RoundedWeights]] = {}

    def observed(self) -> list[Observed]:
        """The tensors whose range must be known: one for all that share its scale."""
        roots = []
        for node in self._chosen.values():
            values = [] if self._folds(node) else [v for v in _data_inputs(node) if v.const_value is None]
            values += [node.outputs[0]] if self._needs_pair(node) else []
            roots += [self._root.get(value, value) for value in values]
        return [Observed(value) for value in dict.fromkeys(roots)]

    def run(self, statistics: Statistics) -> tuple[Change, ...]:
        """Edit the graph."""
        self._statistics = statistics
        readers = {
            value: [(use.node, use.idx) for use in value.uses() if use.node.name not in self._chosen]
            for node in self._chosen.values()
            for value in node.outputs[:1]
        }
        changes = [self._quantize(node) for node in [n for n in self._model.graph if n.name in self._chosen]]
        for value, uses in readers.items():
            if value in self._integers:
                self._restore(value, uses)
        remove_unused(self._model)
        return tuple(changes)

    def _quantize(self, node: ir.Node) -> Change:
        layer = layer_of(node)
        if node.op_type in _MOVING:
            self._move_integers(node)
            return Change(node.name or "", f"moves {self._grid.dtype}")
        if layer is not None:
            self._quantize_layer(layer)
        elif not self._folds(node):
            for index, value in enumerate(node.inputs[: len(list(_data_inputs(node)))]):
                if value is not None:
                    node.replace_input_with(index, self._round_trip(value))
        if self._needs_pair(node):
            self._to_integers(node.outputs[0])
        what = f"int8 weights per channel, {self._grid.dtype} activations" if layer else str(self._grid.dtype)
        return Change(node.name or "", what)

    def _needs_pair(self, node: ir.Node) -> bool:
        """Whether the output of a computing node goes through integers (rules 1 and 5)."""
        output = node.outputs[0]
        reader = single_consumer(output)
        if node.op_type in _MOVING or (reader is not None and self._folds(reader)):
            return False
        if node.op_type in {"MatMul", "Gemm"}:
            return any(use.node.name in self._chosen for use in output.uses())
        return True

    def _folds(self, node: ir.Node) -> bool:
        """Whether a node is an activation function that becomes part of its producer's output range."""
        if node.op_type not in _ACTIVATIONS or node.name not in self._chosen or node.inputs[0] is None:
            return False
        producer = node.inputs[0].producer()
        return (
            producer is not None
            and producer.name in self._chosen
            and producer.op_type not in _MOVING
            and single_consumer(node.inputs[0]) is node
        )

    def _of_range(self, value: ir.Value) -> "_Parameters":
        """Scale and zero point of an activation, shared by all that only move its data."""
        root = self._root.get(value, value)
        if root not in self._parameters:
            low, high = self._settings.range.of(self._statistics.tensors[root.name or ""].histogram, self._grid)
            self._parameters[root] = self._constants(parameters_from_range(low, high, self._grid), root.name)
        return self._parameters[root]

    def _constants(self, parameters: AffineParameters, name: str | None) -> "_Parameters":
        scale = self._builder.constant(parameters.scale, f"{name}_scale")
        return _Parameters(parameters, scale, self._builder.constant(parameters.zero_point, f"{name}_zero"))

    def _to_integers(self, value: ir.Value) -> ir.Value:
        """The integers of an activation."""
        if value not in self._integers:
            parameters, producer = self._of_range(value), value.producer()
            self._integers[value] = self._builder.node(
                "QuantizeLinear",
                [value, parameters.scale, parameters.zero_point],
                f"{value.name}_q",
                like=value,
                dtype=self._dtype,
                after=producer,
                before=None if producer is not None else self._model.graph[0],
            )
        return self._integers[value]

    def _round_trip(self, value: ir.Value) -> ir.Value:
        """An activation or constant after its way through integers."""
        if value in self._floats:
            return self._floats[value]
        if value.const_value is None:
            integers, parameters = self._to_integers(value), self._of_range(value)
        else:
            array = value.const_value.numpy().astype(np.float32)
            parameters = self._constants(parameters_from_range(array.min(), array.max(), self._grid), value.name)
            integers = self._builder.constant(
                quantize(array, *parameters.numbers, self._grid), f"{value.name}_int"
            )
        self._floats[value] = self._dequantize(integers, parameters.scale, parameters.zero_point, value)
        return self._floats[value]

    def _dequantize(
        self, integers: ir.Value, scale: ir.Value, zero_point: ir.Value, like: ir.Value, **attributes: int
    ) -> ir.Value:
        producer = integers.producer()
        return self._builder.node(
            "DequantizeLinear",
            [integers, scale, zero_point],
            f"{like.name}_dq",
            like=like,
            dtype=ir.DataType.FLOAT,
            after=producer,
            before=None if producer is not None else self._model.graph[0],
            **attributes,
        )

    def _restore(self, value: ir.Value, readers: list[tuple[ir.Node, int]]) -> None:
        """What stays in float reads the round trip too: a kernel gives either integers or floats, not both."""
        if not readers and not value.is_graph_output():
            return
        output = self._round_trip(value)
        for node, index in readers:
            node.replace_input_with(index, output)
        if value.is_graph_output():
            position = next(i for i, v in enumerate(self._model.graph.outputs) if v is value)
            output.name, value.name = value.name, self._builder.name(f"{value.name}_int")
            self._model.graph.outputs[position] = output

    def _move_integers(self, node: ir.Node) -> None:
        source, output = node.inputs[0], node.outputs[0]
        assert source is not None
        node.replace_input_with(0, self._to_integers(source))
        if node.op_type == "Pad" and node.attributes.get_string("mode", "constant") == "constant":
            fill = quantize(np.asarray(_pad_value(node), np.float32), *self._of_range(source).numbers, self._grid)
            node.resize_inputs(max(3, len(node.inputs)))
            node.replace_input_with(2, self._builder.constant(fill, f"{node.name}_value"))
        output.type = ir.TensorType(self._dtype)  # not `.dtype =`: clones share their types
        self._integers[output] = output

    def _quantize_layer(self, layer: Layer) -> None:
        node, builder, weight = layer.node, self._builder, layer.weight
        data = self._of_range(layer.data).numbers.scale.astype(np.float64)
        bias = None
        if layer.bias is not None and layer.bias.const_value is not None:
            bias = layer.bias.const_value.numpy().astype(np.float64)
        integers, rounded = self._round_weights(layer, 0.0 if bias is None else np.abs(bias) / (data * 2**30))
        scale = rounded.scale[:, 0]
        node.replace_input_with(1 - layer.index, self._round_trip(layer.data))
        node.replace_input_with(
            layer.index,
            self._dequantize(
                integers,
                builder.constant(scale, f"{weight.name}_scale"),
                self._zeros(len(scale), np.int8),
                weight,
                axis=layer.channel_axis,
            ),
        )
        if node.op_type == "MatMul" or (bias is None and not rounded.bias_shift.any()):
            return
        name = f"{node.name}_bias" if layer.bias is None else layer.bias.name
        step = data * scale
        limits = np.iinfo(np.int32)
        steps = np.clip(np.rint(((0 if bias is None else bias) + rounded.bias_shift) / step), limits.min, limits.max)
        node.resize_inputs(3)
        node.replace_input_with(
            2,
            self._dequantize(
                builder.constant(steps.astype(np.int32), f"{name}_int"),
                builder.constant(step.astype(np.float32), f"{name}_scale"),
                self._zeros(len(step), np.int32),
                ir.val(name, shape=ir.Shape([len(step)])),
                axis=0,
            ),
        )

    def _zeros(self, size: int, dtype: type[np.integer]) -> ir.Value:
        """Zero points of weights and biases, one tensor for all of a size: small models are mostly such constants."""
        key = (size, np.dtype(dtype).name)
        if key not in self._zero_points:
            self._zero_points[key] = self._builder.constant(np.zeros(size, dtype), f"zeros_{key[1]}_{size}")
        return self._zero_points[key]

    def _round_weights(self, layer: Layer, least: NDArray[np.float64] | float) -> tuple[ir.Value, RoundedWeights]:
        """Integers of a weight in its own layout; a weight that several layers share is stored once.

        Args:
            layer: the layer.
            least: (out,) smallest scales, or the bias would not fit 32 bits in steps of s_x s_W.
        """
        key = (layer.weight, layer.channel_axis)
        if key not in self._weights:
            grid = IntGrid(self._settings.weight_bits, signed=True, symmetric=True)
            gram = self._statistics.grams.get(layer.name)
            rounded = round_weights(layer, grid, self._settings.rounding, gram, least_scale=least, cache=self._cache)
            tensor = layer.from_matrix(rounded.integers)
            self._weights[key] = (self._builder.constant(tensor, f"{layer.weight.name}_int"), rounded)
        return self._weights[key]


class _Parameters(NamedTuple):
    """Scale and zero point as numbers and as constants of the graph."""

    numbers: AffineParameters
    scale: ir.Value
    zero_point: ir.Value
