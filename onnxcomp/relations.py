"""Which axes of a node's tensors run over the same index, by operator.

A relation names the axes of every tensor that a node reads or writes, as an einsum does: axes of one name lose an index
together. A convolution reads (n, i, ...) and weights (o, i, ...), and writes (n, o, ...). Operators that only move data
have no relation here; `movement` runs them instead.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

Shapes = Mapping[ir.Value, tuple[int, ...]]
"""The shape of each tensor in one run of the model."""


@dataclass(frozen=True)
class Axis:
    """An axis that runs over a named index, with each step `repeats` times, and all of that `tiles` times."""

    name: Hashable
    tiles: int = 1
    repeats: int = 1


Axes = tuple[Axis | None, ...]
"""The axes of a tensor; None for one over which the operator mixes or that it changes."""


@dataclass(frozen=True)
class Relation:
    """How a node's tensors hang together.

    Attributes:
        tensors: each with its axes.
        crossing: indices over which the operator reduces or normalises: losing one changes what the others get.
        blocked: indices that must stay as they are, and why.
    """

    tensors: tuple[tuple[ir.Value, Axes], ...]
    crossing: frozenset[Hashable] = frozenset()
    blocked: Mapping[Any, str] = field(default_factory=dict)


def relations(node: ir.Node, shapes: Shapes) -> tuple[Relation, ...]:
    """The ways in which a node may lose indices: one, for grouped convolutions two; none for unknown operators.

    Args:
        node: of the standard operator set.
        shapes: of all its tensors.
    """
    if node.domain not in {"", "ai.onnx"}:
        return ()
    if node.op_type in ELEMENTWISE:
        return (_elementwise(node, shapes),)
    rule = _RULES.get(node.op_type)
    return () if rule is None else tuple(rule(node, shapes))


def _tensor(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _pairs(*tensors: tuple[ir.Value | None, Sequence[Axis | None]]) -> tuple[tuple[ir.Value, Axes], ...]:
    return tuple((value, tuple(axes)) for value, axes in tensors if value is not None)


def _numbered(rank: int, first: int = 0) -> list[Axis | None]:
    """Axes named by their number."""
    return [Axis(first + number) for number in range(rank)]


def _elementwise(node: ir.Node, shapes: Shapes) -> Relation:
    """Axes are aligned at the end; one of length 1 that is broadcast runs over nothing."""
    out = shapes[node.outputs[0]]
    tensors = []
    for value in dict.fromkeys([*node.inputs, *node.outputs]):
        if value is not None and value in shapes:
            shape = shapes[value]
            offset = len(out) - len(shape)
            names = [Axis(k + offset) if size == out[k + offset] else Axis((value, k)) for k, size in enumerate(shape)]
            tensors.append((value, tuple(names)))
    return Relation(tuple(tensors))


def _convolution(node: ir.Node, shapes: Shapes) -> list[Relation]:
    data, weight, bias, out = _tensor(node, 0), _tensor(node, 1), _tensor(node, 2), node.outputs[0]
    assert data is not None
    assert weight is not None
    groups = node.attributes.get_int("group", 1)
    transposed = node.op_type == "ConvTranspose"
    inputs, outputs = shapes[data][1] // groups, shapes[out][1] // groups
    spatial: list[Axis | None] = [None] * (len(shapes[weight]) - 2)
    batch = Axis("batch")
    result = []
    if groups == 1 or inputs > 1 or outputs > 1:  # the same indices within each group
        i, o = Axis("in", tiles=groups), Axis("out", tiles=groups)
        sides = [i, Axis("out")] if transposed else [o, Axis("in")]
        result.append(
            Relation(
                _pairs(
                    (data, [batch, i, *spatial]),
                    (weight, [*sides, *spatial]),
                    (bias, [o]),
                    (out, [batch, o, *spatial]),
                )
            )
        )
    if groups > 1:  # whole groups
        i, o = Axis("group", repeats=inputs), Axis("group", repeats=outputs)
        within = None
        result.insert(
            0 if inputs == 1 else 1,
            Relation(
                _pairs(
                    (data, [batch, i, *spatial]),
                    (weight, [i if transposed else o, within, *spatial]),
                    (bias, [o]),
                    (out, [batch, o, *spatial]),
                ),
            ),
        )
    return result


def _matmul(node: ir.Node, shapes: Shapes) -> list[Relation]:
    a, b = node.inputs[0], node.inputs[1]
    out = node.outputs[0]
    assert a is not None
    assert b is not None
    ranks = len(shapes[a]), len(shapes[b])
    batch = len(shapes[out]) - (ranks[0] > 1) - (ranks[1] > 1)

    def leading(value: ir.Value) -> list[Axis | None]:
        own = shapes[value][:-2] if value is not out else shapes[out][:batch]
        skipped = batch - len(own)
        return [
            Axis(k + skipped) if size == shapes[out][k + skipped] else Axis((value, k)) for k, size in enumerate(own)
        ]

    rows, columns = [Axis("rows")] if ranks[0] > 1 else [], [Axis("columns")] if ranks[1] > 1 else []
    inner = Axis("inner")
    return [
        Relation(
            _pairs(
                (a, [*leading(a), *rows, inner]),
                (b, [*leading(b), inner, *columns]),
                (out, [*leading(out), *rows, *columns]),
            )
        )
    ]


def _gemm(node: ir.Node, shapes: Shapes) -> list[Relation]:
    a, b, c, out = node.inputs[0], node.inputs[1], _tensor(node, 2), node.outputs[0]
    left, right = [Axis(0), Axis("inner")], [Axis("inner"), Axis(1)]
    if node.attributes.get_int("transA", 0):
        left.reverse()
    if node.attributes.get_int("transB", 0):
        right.reverse()
    added: list[Axis | None] = []
    if c is not None:
        offset = 2 - len(shapes[c])
        added = [
            Axis(k + offset) if size == shapes[out][k + offset] else Axis((c, k)) for k, size in enumerate(shapes[c])
        ]
    return [Relation(_pairs((a, left), (b, right), (c, added), (out, [Axis(0), Axis(1)])))]


def _einsum(node: ir.Node, shapes: Shapes) -> list[Relation]:
    equation = node.attributes.get_string("equation", "").replace(" ", "")
    if "." in equation or "->" not in equation:
        return []
    inputs, output = equation.split("->")
    terms = [*zip(node.inputs, inputs.split(","), strict=True), (node.outputs[0], output)]
    return [Relation(_pairs(*((value, [Axis(letter) for letter in term]) for value, term in terms)))]


def _batch_norm(node: ir.Node, shapes: Shapes) -> list[Relation]:
    out = node.outputs[0]
    axes = _numbered(len(shapes[out]))
    parameters = [(value, [Axis(1)]) for value in node.inputs[1:]]
    return [Relation(_pairs((node.inputs[0], axes), *parameters, (out, axes)))]


def _instance_norm(node: ir.Node, shapes: Shapes) -> list[Relation]:
    relation = _batch_norm(node, shapes)[0]
    return [Relation(relation.tensors, crossing=frozenset(range(2, len(shapes[node.outputs[0]]))))]


def _group_norm(node: ir.Node, shapes: Shapes) -> list[Relation]:
    data, out, groups = node.inputs[0], node.outputs[0], node.attributes.get_int("num_groups", 1)
    size = shapes[out][1]
    spatial = _numbered(len(shapes[out]) - 2, 2)
    parameters = node.inputs[1:]
    found = []
    for channel in (Axis("within", tiles=groups), Axis("group", repeats=size // groups)):
        own: list[Axis | None] = [channel]
        if shapes[parameters[0]] == (groups,):  # type: ignore[index]  # before opset 21
            own = [Axis("group")]
        axes = [Axis(0), channel, *spatial]
        crossing = frozenset([*range(2, len(shapes[out])), "within"])
        found.append(Relation(_pairs((data, axes), *((p, own) for p in parameters), (out, axes)), crossing))
    return found


def _layer_norm(node: ir.Node, shapes: Shapes) -> list[Relation]:
    data, out = node.inputs[0], node.outputs[0]
    rank = len(shapes[out])
    first = node.attributes.get_int("axis", -1) % rank
    axes = _numbered(rank)
    parameters = [(value, axes[rank - len(shapes[value]) :]) for value in node.inputs[1:] if value is not None]
    statistics = [(value, [*axes[:first], *[None] * (rank - first)]) for value in node.outputs[1:] if value in shapes]
    return [Relation(_pairs((data, axes), *parameters, (out, axes), *statistics), frozenset(range(first, rank)))]


def _response_norm(node: ir.Node, shapes: Shapes) -> list[Relation]:
    axes = _numbered(len(shapes[node.outputs[0]]))
    reason = {1: "LRN weighs each channel by its neighbours"}
    return [Relation(_pairs((node.inputs[0], axes), (node.outputs[0], axes)), blocked=reason)]


def _normalised(node: ir.Node, shapes: Shapes) -> list[Relation]:
    """What divides by a sum over some axes."""
    rank = len(shapes[node.outputs[0]])
    named = node.attributes.get_ints("axes", [0, 2, 3]) if node.op_type == "MeanVarianceNormalization" else []
    over = [axis % rank for axis in named] or [node.attributes.get_int("axis", -1) % rank]
    axes = _numbered(rank)
    return [Relation(_pairs((node.inputs[0], axes), (node.outputs[0], axes)), frozenset(over))]


def _softmax(node: ir.Node, shapes: Shapes) -> list[Relation]:
    rank = len(shapes[node.outputs[0]])
    coerced = (node.version or 13) < 13
    first = node.attributes.get_int("axis", 1 if coerced else -1) % max(rank, 1)
    over = range(first, rank) if coerced else [first]
    axes = _numbered(rank)
    reason = f"{node.op_type} compares along it"
    return [Relation(_pairs((node.inputs[0], axes), (node.outputs[0], axes)), blocked=dict.fromkeys(over, reason))]


def _pool(node: ir.Node, shapes: Shapes) -> list[Relation]:
    rank = len(shapes[node.outputs[0]])
    axes = [Axis(0), Axis(1), *[None] * (rank - 2)]
    return [Relation(_pairs((node.inputs[0], axes), *((out, axes) for out in node.outputs if out in shapes)))]


def _reduce(node: ir.Node, shapes: Shapes) -> list[Relation]:
    data, out = node.inputs[0], node.outputs[0]
    assert data is not None
    rank = len(shapes[data])
    given = _tensor(node, 1)
    if given is not None and given.const_value is None:
        return []
    listed = given.const_value.numpy().tolist() if given is not None and given.const_value is not None else None
    listed = node.attributes.get_ints("axes", None) if listed is None else listed
    if node.op_type in {"ArgMax", "ArgMin"}:
        listed = [node.attributes.get_int("axis", 0)]
    if not listed and node.attributes.get_int("noop_with_empty_axes", 0) == 1:
        return [_elementwise(node, shapes)]
    over = {axis % rank for axis in listed} if listed else set(range(rank))
    axes = _numbered(rank)
    if node.attributes.get_int("keepdims", 1):
        kept: list[Axis | None] = [Axis((out, k)) if k in over else axis for k, axis in enumerate(axes)]
    else:
        kept = [axis for k, axis in enumerate(axes) if k not in over]
    pairs = _pairs((data, axes), (out, kept))
    if node.op_type in {"ArgMax", "ArgMin"}:
        return [Relation(pairs, blocked=dict.fromkeys(over, f"{node.op_type} tells its position"))]
    return [Relation(pairs, frozenset(over))]


def _along(node: ir.Node, shapes: Shapes) -> list[Relation]:
    """What ranks or accumulates along one axis."""
    data = node.inputs[0]
    assert data is not None
    rank = len(shapes[data])
    axis = node.attributes.get_int("axis", -1) % rank
    if node.op_type == "CumSum":
        given = _tensor(node, 1)
        if given is None or given.const_value is None:
            return []
        axis = int(given.const_value.numpy().reshape(-1)[0]) % rank
    axes = [None if k == axis else Axis(k) for k in range(rank)]
    return [Relation(_pairs((data, axes), *((out, axes) for out in node.outputs if out in shapes)))]


def _gather(node: ir.Node, shapes: Shapes) -> list[Relation]:
    """A look-up with indices that are known at run time only."""
    data, indices, out = node.inputs[0], node.inputs[1], node.outputs[0]
    assert data is not None
    assert indices is not None
    axis = node.attributes.get_int("axis", 0) % len(shapes[data])
    axes = _numbered(len(shapes[data]))
    places = [Axis(("place", k)) for k in range(len(shapes[indices]))]
    looked_up = [*axes[:axis], *places, *axes[axis + 1 :]]
    blocked = {axis: "indices that are known at run time only choose along it"}
    return [Relation(_pairs((data, axes), (indices, places), (out, looked_up)), blocked=blocked)]


def _resize(node: ir.Node, shapes: Shapes) -> list[Relation]:
    data, out = node.inputs[0], node.outputs[0]
    assert data is not None
    kept = [Axis(k) if a == b else None for k, (a, b) in enumerate(zip(shapes[data], shapes[out], strict=True))]
    return [Relation(_pairs((data, kept), (out, kept)))]


_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def _recurrent(node: ir.Node, shapes: Shapes) -> list[Relation]:
    gates = _GATES[node.op_type]
    inputs: list[ir.Value | None] = [*node.inputs, *[None] * (8 - len(node.inputs))]
    outputs = [value if value in shapes else None for value in [*node.outputs, *[None] * (3 - len(node.outputs))]]
    data, weight, recurrence, bias, _, hidden, cell, peepholes = inputs
    first, second = Axis("first"), Axis("second")
    state = [Axis("one"), Axis("other"), Axis("hidden")]
    return [
        Relation(
            _pairs(
                (data, [first, second, Axis("in")]),
                (weight, [None, Axis("hidden", tiles=gates), Axis("in")]),
                (recurrence, [None, Axis("hidden", tiles=gates), Axis("hidden")]),
                (bias, [None, Axis("hidden", tiles=2 * gates)]),
                (hidden, state),
                (cell, state),
                (peepholes, [None, Axis("hidden", tiles=3)]),
                (outputs[0], [None, None, None, Axis("hidden")]),
                (outputs[1], state),
                (outputs[2], state),
            ),
        )
    ]


def _linear_quantization(node: ir.Node, shapes: Shapes) -> list[Relation]:
    data, out = node.inputs[0], node.outputs[0]
    axes = _numbered(len(shapes[out]))
    axis = node.attributes.get_int("axis", 1)
    parameters = []
    for value in node.inputs[1:]:
        if value is not None and math.prod(shapes[value]) > 1:
            if len(shapes[value]) != 1:
                return []
            parameters.append((value, [axes[axis]]))
    return [Relation(_pairs((data, axes), *parameters, (out, axes)))]


ELEMENTWISE = {
    *("Abs", "Acos", "Acosh", "Add", "And", "Asin", "Asinh", "Atan", "Atanh", "BitwiseAnd", "BitwiseNot", "BitwiseOr"),
    *("BitwiseXor", "Cast", "CastLike", "Ceil", "Celu", "Clip", "Cos", "Cosh", "Div", "Dropout", "Elu", "Equal", "Erf"),
    *("Exp", "Floor", "Gelu", "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN"),
    *("LeakyRelu", "Less", "LessOrEqual", "Log", "Max", "Mean", "Min", "Mish", "Mod", "Mul", "Neg", "Not", "Or", "Pow"),
    *("PRelu", "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh", "Softplus"),
    *("Softsign", "Sqrt", "Sub", "Sum", "Swish", "Tan", "Tanh", "ThresholdedRelu", "Where", "Xor"),
}

_RULES: Mapping[str, Callable[[ir.Node, Shapes], list[Relation]]] = {
    "Conv": _convolution,
    "ConvTranspose": _convolution,
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Einsum": _einsum,
    "BatchNormalization": _batch_norm,
    "InstanceNormalization": _instance_norm,
    "GroupNormalization": _group_norm,
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _layer_norm,
    "LRN": _response_norm,
    "LpNormalization": _normalised,
    "MeanVarianceNormalization": _normalised,
    "Gather": _gather,
    "Resize": _resize,
    "Upsample": _resize,
    "TopK": _along,
    "CumSum": _along,
    "QuantizeLinear": _linear_quantization,
    "DequantizeLinear": _linear_quantization,
    **dict.fromkeys(("LSTM", "GRU", "RNN"), _recurrent),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), _softmax),
    **dict.fromkeys(("AveragePool", "MaxPool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"), _pool),
    **dict.fromkeys(
        (
            *("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2"),
            *("ReduceLogSum", "ReduceLogSumExp", "ReduceSumSquare", "ArgMax", "ArgMin"),
        ),
        _reduce,
    ),
}
