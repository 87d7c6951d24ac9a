"""What became of each layer: its time, bytes, error and weights before and after."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import ShapeInferencePass

from onnxcomp.core import name_nodes
from onnxcomp.cost import node_costs
from onnxcomp.graph import constant_of, single_consumer
from onnxcomp.numerics.pack import unpack
from onnxcomp.profiling import profiles
from onnxcomp.report import Histogram, LayerRow, Step
from onnxcomp.runtime import Feeds, Target
from onnxcomp.sensitivity import observe, output_errors
from onnxcomp.units import Units, is_computed

_BINS = 40

_WEIGHTED = frozenset({"Conv", "ConvTranspose", "Einsum", "GRU", "Gather", "Gemm", "LSTM", "MatMul", "RNN"})
"""What multiplies with a constant, or looks it up, as it is: others read scales, or integers."""


def layer_rows(
    original: ir.Model, result: ir.Model, steps: Sequence[Step], target: Target, run: Feeds, samples: Feeds
) -> tuple[LayerRow, ...]:
    """Every layer that takes time or stores weights before or after, in the original's order; what was added follows.

    A layer is a node with the element-wise nodes behind it, for ONNX Runtime runs them as one. What passes add is named
    after the node or the tensor that it stands for, so its time and its bytes count with that node's layer.

    Args:
        original: the model as it came.
        result: what was made of it.
        steps: how.
        target: where to run.
        run: one run, for times.
        samples: one run, for errors.
    """
    original, result = original.clone(), result.clone()
    for model in (original, result):
        name_nodes(model)
        ShapeInferencePass()(model)
    costs = node_costs(original), node_costs(result)
    units = _Units(original, {cost.name for cost in costs[0]})
    before, after = profiles((original, result), target, run)
    both = units, units.of_result(result, {cost.name for cost in costs[1]})
    times = tuple(of.times(profile) for of, profile in zip(both, (before, after), strict=True))
    parameters = {cost.name: cost.parameters for cost in costs[0]}
    sizes = tuple(of.bytes(found, parameters) for of, found in zip(both, costs, strict=True))
    techniques = units.techniques(steps)
    errors = units.errors(original, result, target, samples)
    histograms = _histograms(
        *(
            units.weights(model, {cost.name for cost in found}, target, run)
            for model, found in zip((original, result), costs, strict=True)
        )
    )
    operators = {node.name or "": _operator(node) for model in (result, original) for node in model.graph.all_nodes()}
    rows = [
        LayerRow(
            name,
            operators[name],
            times[0].get(name),
            times[1].get(name),
            sizes[0].get(name),
            sizes[1].get(name),
            techniques.get(name, ()),
            errors.get(name),
            *histograms.get(name, (None, None)),
        )
        for name in dict.fromkeys([*units.heads.values(), *times[1], *sizes[1]])
    ]
    rows = [row for row in rows if any((row.microseconds, row.microseconds_after, row.bytes, row.bytes_after))]
    if before.untraced or after.untraced:
        rows.append(LayerRow("", "", before.untraced, after.untraced))
    return tuple(rows)


class _Units(Units):
    """The original's layers, with what else is known of them."""

    def techniques(self, steps: Iterable[Step]) -> dict[str, tuple[str, ...]]:
        """What was done to each layer, pass by pass: to its first node, or else to those behind it."""
        found: dict[str, tuple[str, ...]] = defaultdict(tuple)
        for step in steps:
            own: dict[str, dict[str, None]] = defaultdict(dict)
            others: dict[str, dict[str, None]] = defaultdict(dict)
            for change in step.changes:
                head = self.of(change.node)
                (own if head == change.node else others)[head][change.what] = None
            for head in {**own, **others}:
                what = own.get(head) or others[head]
                found[head] += (f"{step.recipe.partition('(')[0]}: {', '.join(what)}",)
        return found

    def errors(self, original: ir.Model, result: ir.Model, target: Target, feeds: Feeds) -> dict[str, float]:
        """Relative squared error of what each layer gives, where both models have that tensor."""
        there = {value.name for node in result.graph for value in node.outputs}
        tensors: dict[str, tuple[str, ir.Value]] = {}
        for head, members in self.members.items():
            for value in (node.outputs[0] for node in reversed(members) if node.outputs):
                if value.name in there or f"{value.name}_dq" in there:
                    tensors[value.name or ""] = head, value
                    break
        errors = output_errors(original, result, {name: value for name, (_, value) in tensors.items()}, target, feeds)
        return {tensors[name][0]: error for name, error in errors.items()}

    def weights(
        self, model: ir.Model, running: set[str], target: Target, feeds: Feeds
    ) -> dict[str, NDArray[np.floating]]:
        """The weight of each layer of a model that has one, and not several; stored, or decoded from what is stored."""
        found: dict[str, list[ir.Value | NDArray[np.floating]]] = defaultdict(list)
        for node in model.graph:
            if node.name in running:
                unpacked = _of_kernel(node)
                found[self.of(node.name or "")] += _matrices(node, running) if unpacked is None else [unpacked]
        arrays = {head: weights[0] for head, weights in found.items() if len(weights) == 1}
        stored = {
            value: value.const_value or ir.convenience.get_const_tensor(value)
            for value in arrays.values()
            if isinstance(value, ir.Value)
        }
        decoded = observe(
            model, [value.name or "" for value, tensor in stored.items() if tensor is None], target, feeds
        )

        def read(value: ir.Value | NDArray[np.floating]) -> NDArray[np.floating]:
            if not isinstance(value, ir.Value):
                return value
            tensor = stored[value]
            return (decoded[value.name or ""] if tensor is None else tensor.numpy()).astype(np.float32, copy=False)

        return {head: array for head, value in arrays.items() if (array := read(value)).size}


def _operator(node: ir.Node) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


def _matrices(node: ir.Node, running: set[str]) -> Iterator[ir.Value]:
    """The weights that a node reads: floating-point tensors of two and more axes, the same in every run."""
    if node.op_type not in _WEIGHTED:
        return
    for value in node.inputs:
        if value is None or is_computed(value, running):
            continue
        tensor = value.const_value or ir.convenience.get_const_tensor(value)
        dtype, shape = (value.dtype, value.shape) if tensor is None else (tensor.dtype, tensor.shape)
        if dtype is not None and dtype.is_floating_point() and shape is not None and len(shape) > 1:
            yield value


def _of_kernel(node: ir.Node) -> NDArray[np.floating] | None:
    """The weight of a kernel that reads integers, scale * (integers - zero point); None for another node."""
    if node.op_type not in {"MatMulInteger", "MatMulNBits"}:
        return None
    constants = [*map(constant_of, node.inputs), None, None]
    weight, scale, zero = constants[1:4]
    if node.op_type == "MatMulNBits" and weight is not None and scale is not None:
        bits, columns = node.attributes.get_int("bits", 4), node.attributes.get_int("K", 0)
        rows, blocks, width = weight.shape
        if zero is None:
            zero = np.asarray(1 << bits - 1, np.float32)
        elif zero.dtype == np.uint8:
            zero = unpack(zero.reshape(rows, -1), bits, blocks, signed=False).astype(np.float32)[..., None]
        else:
            zero = zero.reshape(rows, blocks, 1)
        integers = unpack(weight, bits, width * 8 // bits, signed=False).astype(np.float32)
        matrix: NDArray[np.floating] = scale.reshape(rows, blocks, 1) * (integers - zero)
        return matrix.reshape(rows, -1)[:, :columns]
    scale = _scale_behind(node)
    if node.op_type == "MatMulInteger" and weight is not None and scale is not None:
        product: NDArray[np.floating] = scale * (weight.astype(np.float32) - (0 if zero is None else zero))
        return product
    return None


def _scale_behind(node: ir.Node) -> NDArray[np.floating] | None:
    """What the sums of a MatMulInteger are multiplied with, but for the scale of the data: Cast, Mul by Mul."""
    cast = single_consumer(node.outputs[0])
    product = None if cast is None or cast.op_type != "Cast" else single_consumer(cast.outputs[0])
    if product is None or product.op_type != "Mul":
        return None
    factors = (value.producer() for value in product.inputs if value is not None)
    scales = next((maker for maker in factors if maker is not None and maker.op_type == "Mul"), None)
    return (
        next((array for value in scales.inputs if (array := constant_of(value)) is not None), None) if scales else None
    )


def _histograms(
    before: Mapping[str, NDArray[np.floating]], after: Mapping[str, NDArray[np.floating]]
) -> dict[str, tuple[Histogram, Histogram | None]]:
    """Of each weight of the original, and in the same bins of what became of it."""
    found: dict[str, tuple[Histogram, Histogram | None]] = {}
    for head, weight in before.items():
        other = after.get(head)
        both = [array[np.isfinite(array)] for array in ([weight] if other is None else [weight, other])]
        ends = [end for array in both if array.size for end in (float(array.min()), float(array.max()))]
        low, high = min(ends, default=0.0), max(ends, default=0.0)
        if low == high:
            low, high = low - 0.5, high + 0.5
        first, *rest = (
            Histogram(low, high, tuple(np.histogram(array, _BINS, (low, high))[0].tolist())) for array in both
        )
        found[head] = first, rest[0] if rest else None
    return found
