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

ONNX Runtime's CPU provider convolves uint8 by int8 directly where all zero points of the weights are 0. With any other
it gathers patches and multiplies matrices, which is faster where the CPU has instructions for those (AMX), and in some
shapes elsewhere. Symmetric weights leave one integer unused, so that one lower or higher they stand for the same
numbers (`as_gemm`).

TensorRT fuses by other rules: pairs go in front of layers and residual sums only, int8 with zero point 0, and biases
stay in float (`inputs_only`).
"""

from collections import defaultdict
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import ClassVar, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxcomp.calibration import calibrate
from onnxcomp.core import Change, Choice, Context, Outcome, Pass, Skip, name_nodes
from onnxcomp.graph import Builder, constant_of, is_sum, prepared, remove_unused, single_consumer
from onnxcomp.integers import MOVING, data_inputs, folds, pad_value, quantizable, shared_scales
from onnxcomp.layers import Layer, layer_of
from onnxcomp.numerics import ranges
from onnxcomp.numerics.affine import AffineParameters, IntGrid, parameters_from_range, quantize
from onnxcomp.numerics.histogram import Histogram
from onnxcomp.observations import Gram, Observed, Statistics
from onnxcomp.runtime import Target, weight_bits
from onnxcomp.weights import DRAFTED, Rounding, Wanted, WeightBits, mean_error, round_ahead, round_weights

_OPSET = 13  # the first with per-channel DequantizeLinear
_INPUTS_ONLY = {"tensorrt", "nvtensorrtrtx"}


class Range(Choice):
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
        weight_bits: null: 7 where the target's kernels add pairs of products in 16 bits and would saturate, else 8.
        rounding: how weights are rounded.
        inputs_only: pairs in front of layers and residual sums only, as TensorRT wants them, instead of around
            everything that ONNX Runtime computes or moves in integers.
        keep: names of the nodes that stay in float.
        as_gemm: names of the convolutions that ONNX Runtime's CPU provider is to compute as matrix products; their
            weights get another zero point, and outputs stay the same. It does so for unsigned activations only; others
            stay as they are.
    """

    name: ClassVar[str] = "quantize-static"
    summary: ClassVar[str] = "static INT8 (QDQ): Conv, Gemm, MatMul and what lies between them, calibrated"
    needs_data: ClassVar[bool] = True

    range: Range = Range.MSE
    signed: bool = False
    weight_bits: WeightBits | None = None
    rounding: Rounding = field(default_factory=Rounding)
    inputs_only: bool = False
    keep: tuple[str, ...] = ()
    as_gemm: tuple[str, ...] = ()

    @classmethod
    def for_target(cls, target: Target) -> "QuantizeStatic":
        """The placement and types that the target has kernels for."""
        if target.short in _INPUTS_ONLY:
            return cls(weight_bits=8, signed=True, inputs_only=True)
        return cls(weight_bits=weight_bits(target))

    def settled(self, context: Context) -> "QuantizeStatic":  # noqa: D102
        return self if self.weight_bits is not None else replace(self, weight_bits=weight_bits(context.target))

    def drafted(self) -> "QuantizeStatic":  # noqa: D102
        return replace(self, range=Range.MINMAX, rounding=DRAFTED)

    def apply(self, model: ir.Model, context: Context) -> Outcome:
        """Choose the nodes, calibrate, insert the pairs."""
        if context.data is None:
            return Outcome(model, (), (Skip("model", "static INT8 needs calibration data (--calib)"),))
        converted = prepared(model, _OPSET)
        if isinstance(converted, str):
            return Outcome(model, (), (Skip("model", converted),))
        name_nodes(converted)
        sums = [node for node in converted.graph if node.op_type == "Sum" and is_sum(node)]
        for node in sums:
            node.op_type = "Add"  # which has a kernel for integers, and is not fused between them
        chosen, skips = quantizable(converted, context, frozenset(self.keep))
        if self.inputs_only:
            chosen = {
                name: node for name, node in chosen.items() if layer_of(node) or node.op_type in {"Add", "MatMul"}
            }
        for node in sums:
            node.op_type = "Add" if node.name in chosen else "Sum"
        surgery = _Surgery(converted, chosen, self.settled(context), context)
        grams = [layer for layer in surgery.layers if self.rounding.needs_gram]
        statistics = calibrate(converted, context.data, context, surgery.observed(), grams)
        changes = surgery.run(statistics)
        return Outcome(converted if changes else model, changes, skips)


class _Surgery:
    """Inserts the pairs for a chosen set of nodes.

    Nodes are handled in graph order, and each rewires only its own inputs: until then they are the original values.
    """

    def __init__(self, model: ir.Model, chosen: dict[str, ir.Node], settings: QuantizeStatic, context: Context) -> None:
        self._model = model
        self._chosen = chosen
        self._settings = settings
        self._context = context
        self._grid = IntGrid(8, settings.signed, symmetric=settings.signed)
        assert settings.weight_bits is not None
        self._weight_grid = IntGrid(settings.weight_bits, signed=True, symmetric=True)
        self._dtype = ir.DataType.from_numpy(self._grid.dtype)
        self._builder = Builder(model.graph)
        self.layers = [layer for node in chosen.values() if (layer := layer_of(node)) is not None]
        self._root = shared_scales(chosen)
        self._parameters: dict[ir.Value, _Parameters] = {}
        self._integers: dict[ir.Value, ir.Value] = {}
        self._floats: dict[ir.Value, ir.Value] = {}
        self._zero_points: dict[tuple[int, int, str], ir.Value] = {}
        self._weights: dict[str, _Weights] = {}

    def observed(self) -> list[Observed]:
        """The tensors whose range must be known: one for all that share its scale."""
        roots = []
        for node in self._chosen.values():
            values = [] if folds(node, self._chosen) else [v for v in data_inputs(node) if constant_of(v) is None]
            values += [node.outputs[0]] if self._needs_pair(node) else []
            roots += [self._root.get(value, value) for value in values]
        return [Observed(value) for value in dict.fromkeys(roots)]

    def run(self, statistics: Statistics) -> tuple[Change, ...]:
        """Edit the graph."""
        self._statistics = statistics
        self._weights = self._round_weights()
        readers = {
            value: [(use.node, use.idx) for use in value.uses() if use.node.name not in self._chosen]
            for node in self._chosen.values()
            for value in node.outputs
        }
        changes = [self._quantize(node) for node in [n for n in self._model.graph if n.name in self._chosen]]
        for value, uses in readers.items():
            if value in self._integers and not self._settings.inputs_only:
                self._restore(value, uses)
        remove_unused(self._model)
        return tuple(changes)

    def _quantize(self, node: ir.Node) -> Change:
        layer = layer_of(node)
        if node.op_type in MOVING:
            self._move_integers(node)
            return Change(node.name or "", f"moves {self._grid.dtype}")
        if layer is not None:
            self._quantize_layer(layer)
        elif not folds(node, self._chosen):
            for index, value in enumerate(node.inputs[: len(list(data_inputs(node)))]):
                if value is not None:
                    node.replace_input_with(index, self._round_trip(value))
        if self._needs_pair(node):
            self._to_integers(node.outputs[0])
        if layer is None:
            return Change(node.name or "", str(self._grid))
        how = ", as a matrix product" if self._weights[layer.name].zero else ""
        return Change(node.name or "", f"{self._weight_grid} weights per channel, {self._grid} activations{how}")

    def _needs_pair(self, node: ir.Node) -> bool:
        """Whether the output of a computing node goes through integers (rules 1 and 5)."""
        if self._settings.inputs_only:
            return False
        output = node.outputs[0]
        reader = single_consumer(output)
        if node.op_type in MOVING or (reader is not None and folds(reader, self._chosen)):
            return False
        if node.op_type in {"MatMul", "Gemm"}:
            return any(use.node.name in self._chosen for use in output.uses())
        return True

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
        array = constant_of(value)
        if array is None:
            integers, parameters = self._to_integers(value), self._of_range(value)
        else:
            parameters = self._constants(parameters_from_range(array.min(), array.max(), self._grid), value.name)
            integers = self._builder.constant(quantize(array, *parameters.numbers, self._grid), f"{value.name}_int")
        self._floats[value] = self._dequantize(integers, parameters.scale, parameters.zero_point, value)
        return self._floats[value]

    def _dequantize(
        self, integers: ir.Value, scale: ir.Value, zero_point: ir.Value, like: ir.Value, axis: int = 1
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
            axis=axis,
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
        source = node.inputs[0]
        assert source is not None
        node.replace_input_with(0, self._to_integers(source))
        if node.op_type == "Pad" and node.attributes.get_string("mode", "constant") == "constant":
            fill = quantize(np.asarray(pad_value(node), np.float32), *self._of_range(source).numbers, self._grid)
            node.resize_inputs(max(3, len(node.inputs)))
            node.replace_input_with(2, self._builder.constant(fill, f"{node.name}_value"))
        for output in node.outputs:
            output.type = ir.TensorType(self._dtype)  # not `.dtype =`: clones share their types
            self._integers[output] = output

    def _quantize_layer(self, layer: Layer) -> None:
        node, builder, weights = layer.node, self._builder, self._weights[layer.name]
        size, own = len(weights.steps), layer.bias
        step = self._of_range(layer.data).numbers.scale.astype(np.float64) * weights.steps
        integers = self._dequantize(
            weights.integers, weights.scale, self._zero_point(weights.zero, size, np.int8), layer.weight,
            axis=layer.channel_axis,
        )  # fmt: skip
        node.replace_input_with(1 - layer.index, self._round_trip(layer.data))
        node.replace_input_with(layer.index, integers)
        if node.op_type == "MatMul":
            self._shift_sum(node, weights.shift)
        elif own is not None or weights.bias.any():
            name = f"{node.name}_bias" if own is None else own.name
            node.resize_inputs(3)
            if self._settings.inputs_only:
                node.replace_input_with(2, builder.constant(weights.bias.astype(np.float32), f"{name}_shifted"))
                return
            limits = np.iinfo(np.int32)
            steps = np.clip(np.rint(weights.bias / step), limits.min, limits.max).astype(np.int32)
            bias = self._dequantize(
                builder.constant(steps, f"{name}_int"),
                builder.constant(step.astype(np.float32), f"{name}_scale"),
                self._zero_point(0, size, np.int32),
                ir.val(name, shape=ir.Shape([size])),
                axis=0,
            )
            node.replace_input_with(2, bias)

    def _zero_point(self, zero: int, size: int, dtype: type[np.integer]) -> ir.Value:
        """Zero points of weights and biases, one tensor for all of a size: small models are mostly such constants."""
        key = (zero, size, np.dtype(dtype).name)
        if key not in self._zero_points:
            name = f"{'aside' if zero else 'zeros'}_{key[2]}_{size}"
            self._zero_points[key] = self._builder.constant(np.full(size, zero, dtype), name)
        return self._zero_points[key]

    def _shift_sum(self, product: ir.Node, shift: NDArray[np.float64]) -> None:
        """Correct the bias that is added to a product, where one is: MatMul has none of its own."""
        reader = single_consumer(product.outputs[0])
        if reader is None or reader.op_type != "Add" or not shift.any():
            return
        index = 1 - next(use.idx for use in product.outputs[0].uses())
        bias = constant_of(reader.inputs[index])
        if bias is not None and bias.shape == shift.shape:
            shifted = (bias + shift).astype(np.float32)
            reader.replace_input_with(index, self._builder.constant(shifted, f"{product.name}_shifted_bias"))

    def _is_product(self, layer: Layer) -> bool:
        """Whether ONNX Runtime is to compute it so: only for unsigned activations has its CPU provider both ways."""
        settings = self._settings
        allowed = not settings.signed and not settings.inputs_only and layer.node.op_type == "Conv"
        return allowed and layer.name in settings.as_gemm

    def _round_weights(self) -> dict[str, "_Weights"]:
        """The layers' weights by name; what several layers share is rounded for the inputs of all and stored once."""
        sharing: dict[tuple[ir.Value, int], list[Layer]] = defaultdict(list)
        for layer in self.layers:
            sharing[layer.weight, layer.channel_axis].append(layer)
        grid, rounding = self._weight_grid, self._settings.rounding
        wanted = []
        for group in sharing.values():
            # With smaller scales a bias would not fit 32 bits in steps of s_x s_W.
            steps = [float(self._of_range(layer.data).numbers.scale) * 2**30 for layer in group]
            least = np.max(
                [np.abs(layer.bias_vector()) / step for layer, step in zip(group, steps, strict=True)], axis=0
            )
            grams = [self._statistics.grams[layer.name] for layer in group if rounding.needs_gram]
            gram = reduce(Gram.merge, grams) if grams else None
            wanted.append(Wanted(group[0], grid, gram, least_scale=least))
        round_ahead(wanted, rounding, self._context)
        result = {}
        aside = 1 if grid.qmax < np.iinfo(grid.dtype).max else -1
        for ((weight, _), group), (_, _, gram, _, least) in zip(sharing.items(), wanted, strict=True):
            rounded = round_weights(group[0], grid, rounding, gram, least_scale=least, cache=self._context.cache)
            zero = aside if all(self._is_product(layer) for layer in group) else 0
            shifted = rounded.integers + np.int8(zero)
            integers = self._builder.constant(group[0].from_matrix(shifted), f"{weight.name}_int")
            scale = self._builder.constant(rounded.scale[:, 0], f"{weight.name}_scale")
            for layer in group:
                shift = rounded.bias_shift
                if len(group) > 1 and rounding.bias_correction:
                    shift = mean_error(layer.matrix(), rounded, self._statistics.grams[layer.name], grid)
                bias = layer.bias_vector() + shift
                result[layer.name] = _Weights(integers, zero, scale, rounded.scale[:, 0], bias, shift)
        return result


class _Parameters(NamedTuple):
    """Scale and zero point as numbers and as constants of the graph."""

    numbers: AffineParameters
    scale: ir.Value
    zero_point: ir.Value


class _Weights(NamedTuple):
    """A layer's weights as constants of the graph, and what comes with them.

    Attributes:
        integers: in the weight's own layout.
        zero: what stands for zero among them.
        scale: (out,).
        steps: (out,) the scale in numbers.
        bias: (out,) the layer's own, corrected.
        shift: (out,) the correction alone.
    """

    integers: ir.Value
    zero: int
    scale: ir.Value
    steps: NDArray[np.float32]
    bias: NDArray[np.float64]
    shift: NDArray[np.float64]
