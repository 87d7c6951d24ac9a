"""What shape arithmetic computes, without running it: small integer tensors as ints and named dimensions."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

Dimension = int | str
"""A known size, or a name: equal names are equal sizes."""

_SAME_CONTENT = {"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze"}
_MOST_ELEMENTS = 64
_BROADCASTING = {
    *("Add", "Sub", "Sum", "Mul", "Div", "Where", "Softmax", "Identity", "Cast", "Relu", "Erf", "Sigmoid", "Tanh"),
}


def dimensions(value: ir.Value) -> tuple[Dimension, ...] | None:
    """The shape of a value, a name of its own for each axis that nothing is known of; None without a rank."""
    if value.shape is None:
        return None
    return tuple(
        size if isinstance(size, int) else size.value or f"{value.name}:{axis}" for axis, size in enumerate(value.shape)
    )


def contents(value: ir.Value | None) -> tuple[Dimension, ...] | None:
    """The flattened elements of an integer tensor computed from shapes and constants, or None.

    Follows Shape, Gather, Slice and Concat of vectors and what only reshapes, as exporters chain them. Graph inputs
    give None, those with a default too: a caller may override it.
    """
    if value is None or value.is_graph_input():
        return None
    if value.const_value is not None:
        tensor = value.const_value
        if tensor.size > _MOST_ELEMENTS or tensor.dtype not in {ir.DataType.INT64, ir.DataType.INT32}:
            return None
        return tuple(int(v) for v in tensor.numpy().reshape(-1))
    node = value.producer()
    if node is None or node.domain not in {"", "ai.onnx"}:
        return None
    if node.op_type in _SAME_CONTENT:
        if node.op_type == "Cast" and node.attributes.get_int("to", 0) not in (ir.DataType.INT64, ir.DataType.INT32):
            return None
        return contents(node.inputs[0])
    if node.op_type == "Shape" and node.inputs[0] is not None:
        shape = dimensions(node.inputs[0])
        end = node.attributes.get_int("end", None)
        return None if shape is None else shape[node.attributes.get_int("start", 0) : end]
    if not _is_vector(node.inputs[0]):
        return None
    if node.op_type == "Concat":
        return _concatenated([contents(part) for part in node.inputs])
    if node.op_type == "Gather":
        return _gathered(contents(node.inputs[0]), node.inputs[1])
    if node.op_type == "Slice" and len(node.inputs) >= 3:
        return _sliced(contents(node.inputs[0]), [contents(part) for part in node.inputs[1:]])
    return None


def _is_vector(value: ir.Value | None) -> bool:
    """Whether the value surely has one axis, along which its flattened elements then lie."""
    if value is None:
        return False
    producer = value.producer()
    return (value.shape is not None and len(value.shape) == 1) or (producer is not None and producer.op_type == "Shape")


def _concatenated(parts: Sequence[tuple[Dimension, ...] | None]) -> tuple[Dimension, ...] | None:
    known = [part for part in parts if part is not None]
    return tuple(element for part in known for element in part) if len(known) == len(parts) else None


def _gathered(data: tuple[Dimension, ...] | None, indices: ir.Value | None) -> tuple[Dimension, ...] | None:
    wanted = contents(indices)
    if data is None or wanted is None:
        return None
    chosen = [data[i] for i in wanted if isinstance(i, int) and -len(data) <= i < len(data)]
    return tuple(chosen) if len(chosen) == len(wanted) else None


def _sliced(
    data: tuple[Dimension, ...] | None, bounds: Sequence[tuple[Dimension, ...] | None]
) -> tuple[Dimension, ...] | None:
    numbers = [part[0] for part in bounds if part is not None and len(part) == 1 and isinstance(part[0], int)]
    if data is None or len(numbers) != len(bounds):
        return None
    ints = [int(n) for n in numbers]
    step = ints[3] if len(ints) > 3 else 1
    if step < 1 or (len(ints) > 2 and ints[2] not in (0, -1)):
        return None
    return data[ints[0] : ints[1] : step]


def reshape_target(node: ir.Node) -> NDArray[np.int64] | None:
    """Constant contents for the `shape` input of a Reshape whose target is computed, or None where not provable.

    1. An axis whose size is the input's size on the same axis becomes 0 (copy).
    2. So do the leading axes of (..., -1) when the input's sizes are at least the target's, as behind a broadcast, and
       the reader fixes the last axis to what the input's other axes amount to: sizes that are no smaller and multiply
       to the same are the same.
    3. At most one further unknown axis becomes -1.
    """
    data, target = node.inputs[0], contents(node.inputs[1])
    if data is None or target is None or node.attributes.get_int("allowzero", 0) != 0 or 0 in target:
        return None
    source = dimensions(data) or ()
    if _only_merges(node, source, target):
        return np.asarray([0] * (len(target) - 1) + [-1], np.int64)
    result: list[int] = []
    for axis, wanted in enumerate(target):
        if isinstance(wanted, int):
            result.append(wanted)
        elif axis < len(source) and source[axis] == wanted:
            result.append(0)
        else:
            result.append(-1)
    return np.asarray(result, np.int64) if result.count(-1) <= 1 else None


def _only_merges(node: ir.Node, source: Sequence[Dimension], target: Sequence[Dimension]) -> bool:
    """Rule 2 of `reshape_target`: whether all that happens is that the trailing axes become one."""
    data, kept = node.inputs[0], len(target) - 1
    rest = source[kept:]
    if data is None or target[-1] != -1 or len(source) <= kept or not all(isinstance(size, int) for size in rest):
        return False
    merged = int(np.prod([size for size in rest if isinstance(size, int)]))
    readers = [use.node for use in node.outputs[0].uses()]
    if merged not in {_width_read(reader, node.outputs[0]) for reader in readers}:
        return False
    least = _lower_bounds(data)
    return all(wanted in bounds for wanted, bounds in zip(target[:-1], least, strict=False))


def _width_read(reader: ir.Node, value: ir.Value) -> int | None:
    """The last axis that a matrix product with a constant on its right demands of its left operand."""
    if reader.op_type not in {"MatMul", "Gemm"} or reader.inputs[0] is not value or reader.inputs[1] is None:
        return None
    shape = dimensions(reader.inputs[1])
    if shape is None or len(shape) != 2 or reader.attributes.get_int("transA", 0) != 0:
        return None
    rows = shape[1] if reader.attributes.get_int("transB", 0) else shape[0]
    return rows if isinstance(rows, int) else None


def _lower_bounds(value: ir.Value, depth: int = 8) -> list[set[Dimension]]:
    """For each axis, sizes that its size is at least, since broadcasting only ever widens."""
    shape = dimensions(value)
    if shape is None:
        return []
    result: list[set[Dimension]] = [{size} for size in shape]
    node = value.producer()
    if node is None or not depth or node.domain not in {"", "ai.onnx"}:
        return result
    parts = [_lower_bounds(part, depth - 1) if part is not None else [] for part in node.inputs]
    if node.op_type == "Transpose":
        order = node.attributes.get_ints("perm", None) or tuple(reversed(range(len(shape))))
        parts = [[parts[0][axis] for axis in order]] if len(parts[0]) == len(shape) else []
    elif node.op_type == "MatMul" and min(map(len, parts)) >= 2:
        left, right = parts
        parts = [[*left[:-2], left[-2], set()], [*right[:-2], set(), right[-1]]]
    elif node.op_type not in _BROADCASTING:
        return result
    for part in parts:
        for axis, bounds in enumerate(reversed(part)):
            if axis < len(result):
                result[-1 - axis] |= bounds
    return result
