"""What each node stores and computes, read off the graph without running it.

FLOPs are floating-point operations, two for each multiply-accumulate; biases are left out. Element-wise operators,
normalisations and activation functions count one per output element, reductions one per input element, operators that
only move data none. Integer versions of an operator count as the float one.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

Shape = tuple[int, ...]
Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Weight:
    """A constant that a node reads, directly or through nodes that only work on constants (a dequantization, a cast).

    Attributes:
        main: the largest stored tensor behind it.
        parameters: its elements; none for scales, zero points, shapes, indices and masks.
        stored: all stored tensors behind it, scales and zero points included.
    """

    main: ir.Value
    parameters: int
    stored: frozenset[ir.Value]


@dataclass(frozen=True)
class NodeCost:
    """The static cost of one node.

    Attributes:
        name, op, domain: of the node.
        output_shape: of its first output; None where even the rank is unknown.
        flops: None where unknown.
        note: why the FLOPs are unknown, or what was assumed; mostly empty.
        weights: the constants that it reads.
    """

    name: str
    op: str
    domain: str
    output_shape: Shape | None
    flops: int | None
    note: str = ""
    weights: tuple[Weight, ...] = field(default=(), repr=False)

    @property
    def parameters(self) -> int:
        """Elements of its weights."""
        return Totals.of([self]).parameters

    @property
    def bytes(self) -> int:
        """Bytes of its weights as stored, scales included: two 4-bit elements to a byte."""
        return Totals.of([self]).bytes


@dataclass(frozen=True)
class Totals:
    """Sums over nodes, with a tensor that several of them share counted once.

    Attributes:
        parameters: elements of weights.
        bytes: bytes of weights as stored.
        flops: of the nodes where they are known.
        unknown: how many nodes have unknown FLOPs.
    """

    parameters: int
    bytes: int
    flops: int
    unknown: int

    @classmethod
    def of(cls, costs: Iterable[NodeCost]) -> "Totals":
        """Add up."""
        costs = list(costs)
        weights = [weight for cost in costs for weight in cost.weights]
        stored = {value for weight in weights for value in weight.stored}
        return cls(
            parameters=sum({weight.main: weight.parameters for weight in weights}.values()),
            bytes=sum(tensor.nbytes for value in stored if (tensor := _tensor(value)) is not None),
            flops=sum(cost.flops or 0 for cost in costs),
            unknown=sum(cost.flops is None for cost in costs),
        )


def node_costs(model: ir.Model, batch: int = 1, sizes: Sizes | None = None) -> list[NodeCost]:
    """The cost of every node that runs, control-flow bodies included, once each.

    Nodes that only make constants are left out: they are folded when the model is loaded, and what they store counts
    with the node that reads it. Shapes are taken from the model: infer them first, and where inference only finds
    unnamed axes, write the shapes of a run onto a clone.

    Args:
        model: with shapes on its values.
        batch: size of the inputs' first axes, where they are dynamic.
        sizes: sizes of other dynamic axes, by name. An axis that is not there counts as `batch` if it comes first, else
            as 1, which a note says.
    """
    bindings = _batch_axes(model, batch) | dict(sizes or {})
    folded = _folded(model)
    return [_cost(node, bindings, batch, folded) for node in model.graph.all_nodes() if node not in folded]


def shape_of(value: ir.Value, sizes: Sizes, batch: int = 1) -> Shape | None:
    """The shape of a value, its dynamic axes replaced as in `node_costs`; None where the rank is unknown."""
    tensor = _tensor(value)
    shape = value.shape if tensor is None else tensor.shape
    if shape is None:
        return None
    return tuple(
        known if (known := _size(axis, sizes)) is not None else batch if place == 0 else 1
        for place, axis in enumerate(shape)
    )


def _size(axis: int | ir.SymbolicDimProtocol, sizes: Sizes) -> int | None:
    """The length of an axis: fixed, stated by name, or an expression like `2*height` of such names."""
    if isinstance(axis, int):
        return axis
    if axis.value in sizes:
        return sizes[str(axis.value)]
    try:
        result = ir.SymbolicDim(axis.value).evaluate(sizes)
    except ValueError:  # a name that is no expression
        return None
    return result if isinstance(result, int) else None


def _batch_axes(model: ir.Model, batch: int) -> dict[str, int]:
    first = [value.shape[0] for value in model.graph.inputs if value.shape]
    return {axis.value: batch for axis in first if isinstance(axis, ir.SymbolicDim) and axis.value}


# --- weights --------------------------------------------------------------------------------------------------------

_RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}
_NOT_WEIGHTS = {ir.DataType.INT64, ir.DataType.BOOL, ir.DataType.STRING}
_QUANTIZATION = {
    "QuantizeLinear": {1, 2},
    "DequantizeLinear": {1, 2},
    "QLinearConv": {1, 2, 4, 5, 6, 7},
    "QLinearMatMul": {1, 2, 4, 5, 6, 7},
    "ConvInteger": {2, 3},
    "MatMulInteger": {2, 3},
    "MatMulNBits": {2, 3},
}
"""Which inputs are scales and zero points."""


def _tensor(value: ir.Value) -> ir.TensorProtocol | None:
    """What is stored under this value: an initializer, or the tensor of a Constant node."""
    return value.const_value if value.const_value is not None else ir.convenience.get_const_tensor(value)


def _folded(model: ir.Model) -> set[ir.Node]:
    """Nodes whose result is the same in every run."""
    folded: set[ir.Node] = set()
    for node in model.graph.all_nodes():
        constant = all(value is None or _tensor(value) or value.producer() in folded for value in node.inputs)
        fixed = node.domain in _KNOWN_DOMAINS and node.op_type not in _RANDOM and node.op_type not in _BODIES
        if constant and fixed and not any(value.is_graph_output() for value in node.outputs):
            folded.add(node)
    return folded


def _weights(node: ir.Node, folded: set[ir.Node]) -> Iterator[Weight]:
    for index, value in enumerate(node.inputs):
        stored = _stored(value, folded)
        if not stored:
            continue
        main = max(stored, key=_elements)
        parameters = 0
        if index not in _QUANTIZATION.get(node.op_type, ()) and main.dtype not in _NOT_WEIGHTS:
            parameters = _elements(main)
        if node.op_type == "MatMulNBits" and index == 1:  # several weights are packed into each stored byte
            parameters = node.attributes.get_int("K", 0) * node.attributes.get_int("N", 0)
        yield Weight(main, parameters, frozenset(stored))


def _stored(value: ir.Value | None, folded: set[ir.Node]) -> list[ir.Value]:
    """The tensors stored behind a value that is the same in every run, the data before its scale; else nothing."""
    if value is None:
        return []
    if _tensor(value) is not None:
        return [value]
    producer = value.producer()
    if producer is None or producer not in folded:
        return []
    return [stored for source in producer.inputs for stored in _stored(source, folded)]


def _elements(value: ir.Value) -> int:
    tensor = _tensor(value)
    return 0 if tensor is None else tensor.size


# --- FLOPs ----------------------------------------------------------------------------------------------------------


class _UnknownError(Exception):
    """The FLOPs cannot be told; the message says why."""


class _Shapes:
    """The shapes around one node, with a record of the axes whose size had to be assumed."""

    def __init__(self, node: ir.Node, sizes: Sizes, batch: int) -> None:
        self.node, self._sizes, self._batch = node, sizes, batch
        self.assumed: dict[str, int] = {}

    def input(self, index: int) -> Shape:
        value = self.node.inputs[index] if index < len(self.node.inputs) else None
        if value is None:
            raise _UnknownError(f"input {index} is absent")
        return self._shape(value)

    def output(self, index: int = 0) -> Shape:
        return self._shape(self.node.outputs[index])

    def _shape(self, value: ir.Value) -> Shape:
        shape = shape_of(value, self._sizes, self._batch)
        if shape is None:
            raise _UnknownError(f"the shape of '{value.name}' is unknown")
        for axis, size in list(zip(value.shape or (), shape, strict=False))[1:]:
            if _size(axis, self._sizes) is None:
                self.assumed[str(axis)] = size
        return shape


def _cost(node: ir.Node, sizes: Sizes, batch: int, folded: set[ir.Node]) -> NodeCost:
    shapes = _Shapes(node, sizes, batch)
    flops: int | None = None
    rules = _KNOWN_DOMAINS.get(node.domain, {})
    try:
        if node.op_type not in rules:
            raise _UnknownError(f"no rule for {f'{node.domain}::' if node.domain else ''}{node.op_type}")
        flops = rules[node.op_type](shapes)
        note = "; ".join(f"axis '{axis}' taken as {size}" for axis, size in shapes.assumed.items())
    except _UnknownError as unknown:
        note = str(unknown)
    if node.op_type in _BODIES:
        note = _BODIES[node.op_type]
    return NodeCost(
        name=node.name or "",
        op=node.op_type,
        domain=node.domain,
        output_shape=shape_of(node.outputs[0], sizes, batch) if node.outputs else None,
        flops=flops,
        note=note,
        weights=tuple(_weights(node, folded)),
    )


_Rule = Callable[[_Shapes], int]


def _nothing(shapes: _Shapes) -> int:
    return 0


def _per_output_element(shapes: _Shapes) -> int:
    return math.prod(shapes.output())


def _per_input_element(shapes: _Shapes) -> int:
    return math.prod(shapes.input(0))


def _pool(shapes: _Shapes) -> int:
    kernel = shapes.node.attributes.get_ints("kernel_shape", None) or ()
    return math.prod(shapes.output()) * math.prod(kernel)


def _convolution(weight: int) -> _Rule:
    """Weight of shape (out, in/group, kernel...): each output element takes one multiply-accumulate per tap."""
    return lambda shapes: 2 * math.prod(shapes.output()) * math.prod(shapes.input(weight)[1:])


def _transposed_convolution(shapes: _Shapes) -> int:
    """Weight of shape (in, out/group, kernel...): each input element is spread over one tap each."""
    return 2 * math.prod(shapes.input(0)) * math.prod(shapes.input(1)[1:])


def _product(shapes: _Shapes) -> int:
    """(..., M, K) x (..., K, N), the first operand transposed where an attribute says so."""
    left, attributes = shapes.input(0), shapes.node.attributes
    inner = left[-2 if attributes.get_int("transA", 0) and len(left) > 1 else -1] if left else 1
    return 2 * math.prod(shapes.output()) * inner


def _packed_product(shapes: _Shapes) -> int:
    return 2 * math.prod(shapes.output()) * shapes.node.attributes.get_int("K", 0)


def _recurrent(shapes: _Shapes) -> int:
    """Input (sequence, batch, features); each step multiplies once by W and once by R."""
    steps = math.prod(shapes.input(0)[:2])
    return 2 * steps * (math.prod(shapes.input(1)) + math.prod(shapes.input(2)))


def _attention(past: int) -> _Rule:
    """Scores Q K^T and their product with V, softmax left out; the key's length is its last axis but one."""

    def rule(shapes: _Shapes) -> int:
        length = shapes.input(1)[-2]
        if past < len(shapes.node.inputs) and shapes.node.inputs[past] is not None:
            length += shapes.input(past)[-2]
        return 2 * length * (math.prod(shapes.input(0)) + math.prod(shapes.output()))

    return rule


def _einsum(shapes: _Shapes) -> int:
    """One multiply-accumulate per combination of indices, for at most two operands."""
    equation = shapes.node.attributes.get_string("equation", "").replace(" ", "")
    terms = equation.partition("->")[0].split(",")
    if "." in equation or len(terms) > 2:
        raise _UnknownError("no rule for Einsum with an ellipsis or more than two operands")
    length = {letter: size for i, term in enumerate(terms) for letter, size in zip(term, shapes.input(i), strict=True)}
    return len(terms) * math.prod(length.values())


def _table(rule: _Rule, names: str) -> dict[str, _Rule]:
    return dict.fromkeys(names.split(), rule)


_BODIES = {
    "If": "both branches are counted",
    "Loop": "its body is counted for one iteration",
    "Scan": "its body is counted for one iteration",
}

_STANDARD: dict[str, _Rule] = {
    **_table(_nothing, " ".join(_BODIES)),
    **_table(
        _nothing,
        """CenterCropPad Compress Concat ConcatFromSequence Constant ConstantOfShape DepthToSpace Dropout Expand EyeLike
        Flatten Gather GatherElements GatherND Identity OneHot Optional OptionalGetElement OptionalHasElement Pad Range
        Reshape ReverseSequence Scatter ScatterElements ScatterND SequenceAt SequenceConstruct SequenceEmpty
        SequenceErase SequenceInsert SequenceLength Shape Size Slice SpaceToDepth Split SplitToSequence Squeeze
        TensorScatter Tile Transpose Trilu Unsqueeze""",
    ),
    **_table(
        _per_output_element,
        """Abs Acos Acosh Add And Asin Asinh Atan Atanh BatchNormalization Bernoulli BitCast BitShift BitwiseAnd
        BitwiseNot BitwiseOr BitwiseXor Cast CastLike Ceil Celu Clip Cos Cosh CumProd CumSum DequantizeLinear Div
        DynamicQuantizeLinear Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual GroupNormalization HardSigmoid
        HardSwish Hardmax InstanceNormalization IsInf IsNaN LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax
        LpNormalization LRN Max Mean MeanVarianceNormalization Min Mish Mod Mul Neg Not Or PRelu Pow QuantizeLinear
        RMSNormalization RandomNormal RandomNormalLike RandomUniform RandomUniformLike Reciprocal Relu Resize
        RotaryEmbedding Round Selu Shrink Sigmoid Sign Sin Sinh Softmax Softplus Softsign Sqrt Sub Sum Swish Tan Tanh
        ThresholdedRelu Upsample Where Xor""",
    ),
    **_table(
        _per_input_element,
        """ArgMax ArgMin GlobalAveragePool GlobalLpPool GlobalMaxPool NonZero ReduceL1 ReduceL2 ReduceLogSum
        ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare""",
    ),
    **_table(_pool, "AveragePool LpPool MaxPool"),
    **_table(_convolution(1), "Conv ConvInteger"),
    **_table(_convolution(3), "QLinearConv"),
    **_table(_transposed_convolution, "ConvTranspose"),
    **_table(_product, "Gemm MatMul MatMulInteger QLinearMatMul"),
    **_table(_recurrent, "GRU LSTM RNN"),
    **_table(_attention(4), "Attention"),
    **_table(_einsum, "Einsum"),
}

_MICROSOFT: dict[str, _Rule] = {
    **_table(_nothing, "QLinearConcat"),
    **_table(
        _per_output_element,
        """BiasGelu BiasSoftmax BiasSplitGelu FastGelu Gelu QLinearAdd QLinearLeakyRelu QLinearMul QLinearSigmoid
        QLinearSoftmax QuickGelu RotaryEmbedding SimplifiedLayerNormalization SkipLayerNormalization
        SkipSimplifiedLayerNormalization DequantizeLinear QuantizeLinear""",
    ),
    **_table(_per_input_element, "QLinearGlobalAveragePool QLinearReduceMean"),
    **_table(_pool, "QLinearAveragePool"),
    **_table(_convolution(1), "FusedConv"),
    **_table(_product, "DynamicQuantizeMatMul FusedGemm FusedMatMul MatMulIntegerToFloat QGemm"),
    **_table(_packed_product, "MatMulNBits"),
    **_table(_recurrent, "DynamicQuantizeLSTM"),
    **_table(_attention(6), "MultiHeadAttention"),
}

_KNOWN_DOMAINS: dict[str, dict[str, _Rule]] = {"": _STANDARD, "ai.onnx": _STANDARD, "com.microsoft": _MICROSOFT}
