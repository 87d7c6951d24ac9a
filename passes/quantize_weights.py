"""Weight-only quantization: weights of 4 or 8 bits in the file, activations in float.

    W'[r, c] = s[r, b] (q[r, c] - z[r, b])    for input c in block b

Rules, by what reads a weight:

1. MatMul and Gemm multiply by it packed (`MatMulNBits`); in the decoding form they fall under rule 3.
2. A lookup of rows (Gather along axis 0) reads them packed (`GatherBlockQuantized`): the table is never expanded.
3. Everything else reads the weight decoded, which ONNX Runtime does once, when it loads the model. So does whatever
   shares a weight with a lookup, such as the output layer of a language model with tied embeddings.
4. A table of up to 1,024 rows (positions, kinds of tokens) has 8 bits: all samples read the same few rows, and an error
   in them would not average out.
5. A weight is rounded where that takes fewer bytes than it did, new nodes included, and it has at least 1,024 elements.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxcomp.calibration import calibrate
from onnxcomp.constants import Weight, weights_of
from onnxcomp.core import Change, Choice, Context, Outcome, Pass, Skip, name_nodes
from onnxcomp.decode import (
    CONTRIB,
    PackedMatrix,
    StoredMatrix,
    even_block,
    kernel_block,
    stored_bytes,
)
from onnxcomp.graph import Builder, prepared, remove_unused, replace
from onnxcomp.layers import Layer
from onnxcomp.numerics.affine import IntGrid
from onnxcomp.observations import Gram
from onnxcomp.settings import Limits, among, within
from onnxcomp.weights import Rounding, Wanted, round_ahead, round_weights

_OPSET = 13
_LEAST_ELEMENTS = 1024
_SMALL_TABLE = 1024
_GRAPH_BYTES = 2048  # what the nodes of a decoding take, their names included
_BLOCK = Limits(
    " that is a power of two, 16 or more", lambda block: block >= 16 and not block & block - 1, {"minimum": 16}
)


class Form(Choice):
    """What multiplies by a quantized matrix."""

    MATMULNBITS = "matmulnbits"
    """ONNX Runtime's kernel for packed weights."""
    DECODE = "decode"
    """The float kernel, on weights decoded at load."""


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Weights of 4 or 8 bits.

    Attributes:
        bits: 4 or 8.
        block: inputs that share a scale, a power of two from 16 on; None for one scale per output channel.
        symmetric: no zero points, the grid is centred on zero: 3% smaller at 4 bits, and less accurate.
        form: what MatMul and Gemm become.
        accuracy_level: of `MatMulNBits`: 4 rounds activations to int8 in blocks and multiplies integers, 0 does not.
        rounding: how weights are rounded; without calibration data to the nearest.
        keep: names of the nodes that stay in float.

    Raises:
        OptionError: a setting out of range.
    """

    name: ClassVar[str] = "quantize-weights"
    summary: ClassVar[str] = "weight-only INT4 or INT8 in blocks, for every weighted layer and for embeddings"

    bits: Annotated[int, among(4, 8)] = 4
    block: Annotated[int, _BLOCK] | None = 128
    symmetric: bool = False
    form: Form = Form.MATMULNBITS
    accuracy_level: Annotated[int, within(0, 4)] = 4
    rounding: Rounding = field(default_factory=Rounding)
    keep: tuple[str, ...] = ()

    def apply(self, model: ir.Model, context: Context) -> Outcome:
        """Quantize every constant weight that gains by it."""
        converted = prepared(model, _OPSET)
        if isinstance(converted, str):
            return Outcome(model, (), (Skip("model", converted),))
        name_nodes(converted)
        plans, skips = [], []
        for weight in weights_of(converted):
            if not self._gains(weight):
                continue
            planned = self._obstacle(weight, context) or self._plan(weight)
            if isinstance(planned, str):
                skips += [Skip(node.name or "", planned) for node in weight.nodes]
            else:
                plans.append(planned)
        grams = self._grams(converted, plans, context)
        round_ahead(self._wanted(plans, grams), self.rounding, context)
        changes: list[Change] = []
        for plan in plans:
            changes += self._quantize(plan, grams, context)
        remove_unused(converted)
        if any(node.domain == CONTRIB for node in converted.graph.all_nodes()):
            converted.opset_imports.setdefault(CONTRIB, 1)
        return Outcome(converted if changes else model, tuple(changes), tuple(skips))

    def _gains(self, weight: "Weight") -> bool:
        array, view = weight.array, weight.view
        block = even_block(view.columns, self.block, self.bits)
        rows = array.size // view.columns
        stored = stored_bytes(rows, view.columns, self._bits(weight), block, symmetric=self.symmetric)
        return array.size >= _LEAST_ELEMENTS and stored + _GRAPH_BYTES < array.nbytes

    def _bits(self, weight: "Weight") -> int:
        return 8 if weight.lookups and weight.view.split[0] <= _SMALL_TABLE else self.bits

    def _obstacle(self, weight: "Weight", context: Context) -> str | None:
        if any(context.excludes(node) for node in weight.nodes):
            return "excluded by the user, or shares its weight with an excluded node"
        if any(node.name in self.keep for node in weight.nodes):
            return "left out: faster or more accurate so"
        if weight.value.is_graph_output():
            return "its weight is an output of the graph"
        if not np.isfinite(weight.array).all():
            return "its weights are not finite"
        return None

    def _plan(self, weight: "Weight") -> "_Plan | str":
        """How a weight is stored and read, or why it cannot be."""
        columns, bits = weight.view.columns, self._bits(weight)
        if weight.lookups:
            block = self.block if self.block is not None and columns % self.block == 0 else columns
            if weight.value.dtype != ir.DataType.FLOAT:
                return f"its table is {weight.value.dtype}, not FLOAT"
            if columns * bits % 8:
                return f"a row of {columns} values does not fill whole bytes"
            return _Plan(weight, bits, min(block, columns), multiplied=False)
        kernel = kernel_block(columns, self.block)
        if self.form == Form.MATMULNBITS and kernel is not None and weight.only_multiplied:
            return _Plan(weight, bits, kernel, multiplied=True)
        return _Plan(weight, bits, even_block(columns, self.block, bits), multiplied=False)

    def _grams(self, model: ir.Model, plans: list["_Plan"], context: Context) -> Mapping[str, Gram]:
        """Gram matrices of the layers in the main graph, where there are data and a step that uses them."""
        layers = [layer for plan in plans if (layer := plan.weight.layer) and layer.node.graph is model.graph]
        if context.data is None or not self.rounding.needs_gram or not layers:
            return {}
        return calibrate(model, context.data, context, layers=layers).grams

    def _wanted(self, plans: list["_Plan"], grams: Mapping[str, Gram]) -> Iterator[Wanted]:
        for plan in plans:
            if (layer := plan.weight.layer) is not None:
                yield Wanted(layer, self._grid(plan), grams.get(layer.name), plan.block)

    def _grid(self, plan: "_Plan") -> IntGrid:
        return IntGrid(plan.bits, signed=False, symmetric=self.symmetric)

    def _quantize(self, plan: "_Plan", grams: Mapping[str, Gram], context: Context) -> list[Change]:
        weight, value = plan.weight, plan.weight.value
        owner = value.graph
        assert isinstance(owner, ir.Graph)
        builder = Builder(owner)
        stored = StoredMatrix(builder, self._packed(plan, grams, context), value.name or "weight")
        changes = []
        for node in dict.fromkeys(weight.nodes):
            inside = builder if node.graph is owner else Builder(_graph(node))
            if plan.multiplied:
                data = node.inputs[0]
                assert data is not None
                result = stored.multiplied(data, inside, node, self.accuracy_level)
                if node.op_type == "Gemm" and len(node.inputs) > 2:
                    result = inside.node("Add", [result, node.inputs[2]], f"{node.name}_sum", like=result, before=node)
                replace(node, result)
                how = "multiplied packed"
            elif node in weight.lookups:
                indices = node.inputs[1]
                assert indices is not None
                replace(node, stored.looked_up(indices, inside, node))
                how = "rows decoded when looked up"
            else:
                how = "decoded at load"
            changes.append(Change(node.name or "", f"{plan.bits}-bit weights in blocks of {plan.block}, {how}"))
        if value.uses():
            assert value.dtype is not None
            readers = list(value.uses())
            decoded = stored.decoded(weight.view, value.dtype, before=owner[0])
            for reader, index in readers:
                reader.replace_input_with(index, decoded)
        assert value.name is not None
        del owner.initializers[value.name]
        return changes

    def _packed(self, plan: "_Plan", grams: Mapping[str, Gram], context: Context) -> PackedMatrix:
        weight, layer = plan.weight, plan.weight.layer
        if layer is None:
            matrix = weight.view.matrix(weight.array).astype(np.float32)
            search = self.rounding.search
            return PackedMatrix.nearest(matrix, plan.bits, plan.block, symmetric=self.symmetric, search=search)
        gram = grams.get(layer.name)
        rounded = round_weights(layer, self._grid(plan), self.rounding, gram, block=plan.block, cache=context.cache)
        if len(weight.nodes) == 1:
            _shift_bias(layer, rounded.bias_shift)
        zeros = None if rounded.zero_point is None else rounded.zero_point.astype(np.uint8)
        return PackedMatrix(rounded.integers.astype(np.uint8), rounded.scale, zeros, plan.bits, plan.block)


@dataclass(frozen=True, eq=False)
class _Plan:
    weight: Weight
    bits: int
    block: int
    multiplied: bool


def _graph(node: ir.Node) -> ir.Graph:
    assert isinstance(node.graph, ir.Graph)
    return node.graph


def _shift_bias(layer: Layer, shift: NDArray[np.float64]) -> None:
    """Add to the layer's bias, where it is a constant of one value per output channel."""
    bias = layer.bias
    if bias is None or bias.const_value is None or bias.is_graph_input() or not shift.any():
        return
    array = bias.const_value.numpy()
    if array.shape != shift.shape or layer.node.attributes.get_float("beta", 1.0) != 1.0:
        return
    shifted = (array + shift).astype(array.dtype)
    layer.node.replace_input_with(2, Builder(_graph(layer.node)).constant(shifted, f"{bias.name}_shifted"))
