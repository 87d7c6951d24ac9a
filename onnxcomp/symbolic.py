"""What shape arithmetic computes, without running it: small integer tensors as ints and named dimensions."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

Dimension = int | str
"""A known size, or a name: equal names are equal sizes."""

_SAME_CONTENT = {"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze"}
_MOST_ELEMENTS = 64


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

    Axes whose size is the input's size on the same axis become 0 (copy), and at most one further unknown axis -1.
    """
    data, target = node.inputs[0], contents(node.inputs[1])
    if data is None or target is None or node.attributes.get_int("allowzero", 0) != 0 or 0 in target:
        return None
    source = dimensions(data) or ()
    result: list[int] = []
    for axis, wanted in enumerate(target):
        if isinstance(wanted, int):
            result.append(wanted)
        elif axis < len(source) and source[axis] == wanted:
            result.append(0)
        else:
            result.append(-1)
    return np.asarray(result, np.int64) if result.count(-1) <= 1 else None
