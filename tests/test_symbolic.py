"""Shape arithmetic: what is said of a shape must be what ONNX Runtime computes, and else nothing may be said."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxcomp.runtime import Session
from onnxcomp.symbolic import Dimension, contents, dimensions, reshape_target

SHAPE = ("batch", 12, "length", 4)
SIZES = {"batch": 3, "length": 5}


def tensor(name: str, shape: Sequence[int | str | None], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    return ir.val(name, dtype, shape)


class Graph:
    """x of SHAPE and nodes over it."""

    def __init__(self) -> None:
        self.x = tensor("x", SHAPE)
        self.graph = ir.Graph([self.x], [], nodes=[], opset_imports={"": 17}, name="shapes")

    def op(
        self, op_type: str, *inputs: ir.Value, rank: int | None = 1, domain: str = "", **attributes: Any
    ) -> ir.Value:
        """A node whose output has so many axes of unknown length."""
        node = ir.node(op_type, inputs, attributes, domain=domain)
        node.outputs[0].shape = None if rank is None else ir.Shape([None] * rank)
        self.graph.append(node)
        return node.outputs[0]

    def constant(self, values: Any) -> ir.Value:
        array = np.asarray(values, np.int64)
        value = ir.val(f"constant_{len(self.graph.initializers)}", const_value=ir.tensor(array))
        self.graph.register_initializer(value)
        return value

    def run(self, value: ir.Value) -> Any:
        """What ONNX Runtime says the value is, for x of SIZES."""
        value.dtype = ir.DataType.INT64
        self.graph.outputs.append(value)
        x = np.zeros(sized(SHAPE), np.float32)
        (result,) = Session(ir.Model(self.graph, ir_version=8)).run({"x": x}).values()
        return result


def sized(elements: tuple[Dimension, ...] | None) -> list[int]:
    assert elements is not None
    return [SIZES[element] if isinstance(element, str) else element for element in elements]


def shape(g: Graph) -> ir.Value:
    return g.op("Shape", g.x)


def gather(g: Graph, index: Any, rank: int = 1) -> ir.Value:
    return g.op("Gather", shape(g), g.constant(index), rank=rank)


def slice_(g: Graph, *bounds: int) -> ir.Value:
    return g.op("Slice", shape(g), *(g.constant([bound]) for bound in bounds))


KNOWN: dict[str, Callable[[Graph], ir.Value]] = {
    "shape": shape,
    "part of a shape": lambda g: g.op("Shape", g.x, start=1, end=3),
    "shape from the end": lambda g: g.op("Shape", g.x, start=-2),
    "shape beyond its ends": lambda g: g.op("Shape", g.x, start=-9, end=9),
    "gather": lambda g: gather(g, [2, 0]),
    "gather from the end": lambda g: gather(g, [-1]),
    "gather one": lambda g: gather(g, 2, rank=0),
    "slice": lambda g: slice_(g, 1, 3),
    "slice from the end": lambda g: slice_(g, -3, -1),
    "slice to the end": lambda g: slice_(g, 2, np.iinfo(np.int64).max),
    "slice by axis": lambda g: slice_(g, 0, 4, -1),
    "slice by steps": lambda g: slice_(g, 0, 4, 0, 2),
    "concat": lambda g: g.op("Concat", gather(g, [0]), g.constant([-1]), g.constant([7, 8]), axis=0),
    "unsqueeze": lambda g: g.op("Unsqueeze", gather(g, 0, rank=0), g.constant([0])),
    "cast": lambda g: g.op("Cast", shape(g), to=ir.DataType.INT64),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_contents_are_what_the_runtime_computes(name: str) -> None:
    g = Graph()
    value = KNOWN[name](g)
    assert sized(contents(value)) == g.run(value).reshape(-1).tolist()


def matrix(g: Graph) -> ir.Value:
    value = g.constant([[1, 2], [3, 4]])
    value.shape = ir.Shape([2, 2])
    return value


UNKNOWN: dict[str, Callable[[Graph], ir.Value | None]] = {
    "nothing": lambda g: None,
    "an input": lambda g: g.x,
    "an unknown operator": lambda g: g.op("Mul", shape(g), g.constant([2])),
    "another domain": lambda g: g.op("Shape", g.x, domain="com.example"),
    "gather out of range": lambda g: gather(g, [4]),
    "gather by unknown indices": lambda g: g.op("Gather", shape(g), g.op("Mul", shape(g), shape(g))),
    "gather rows": lambda g: g.op("Gather", matrix(g), g.constant([1]), rank=2),
    "slice backwards": lambda g: slice_(g, 3, 0, 0, -1),
    "slice rows": lambda g: g.op("Slice", matrix(g), g.constant([0]), g.constant([1]), rank=2),
    "slice to an unknown end": lambda g: g.op("Slice", shape(g), g.constant([0]), g.op("Mul", shape(g), shape(g))),
    "concat of columns": lambda g: g.op("Concat", matrix(g), matrix(g), rank=2, axis=1),
    "concat with an unknown part": lambda g: g.op("Concat", shape(g), g.op("Mul", shape(g), shape(g)), axis=0),
    "cast to float": lambda g: g.op("Cast", shape(g), to=ir.DataType.FLOAT),
    "too long": lambda g: g.constant(range(65)),
    "floats": lambda g: ir.val("f", const_value=ir.tensor(np.ones(2, np.float32))),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_nothing_is_said_of_what_is_not_sure(name: str) -> None:
    g = Graph()
    assert contents(UNKNOWN[name](g)) is None


def test_defaults_of_inputs_are_not_constants() -> None:
    g = Graph()
    value = g.constant([1, 2])
    assert contents(value) == (1, 2)
    g.graph.inputs.append(value)
    assert contents(value) is None


def test_unnamed_axes_get_a_name_of_their_own() -> None:
    assert dimensions(tensor("x", [None, 3, None, "n"])) == ("x:0", 3, "x:2", "n")
    assert dimensions(ir.val("y", ir.DataType.FLOAT)) is None


def reshape(g: Graph, *parts: ir.Value, **attributes: Any) -> ir.Node:
    node = g.op("Reshape", g.x, g.op("Concat", *parts, axis=0), rank=None, **attributes).producer()
    assert node is not None
    return node


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (["batch", 12, "length", 4], [0, 12, 0, 4]),  # copied where it is
        (["batch", -1], [0, -1]),
        ([-1, "batch"], None),  # two unknown axes
        (["length", "batch"], None),
        (["length", 12], [-1, 12]),  # computed elsewhere
        (["batch", 12, 4, "length"], [0, 12, 4, -1]),
        (["batch", 0], None),  # 0 already means something
    ],
)
def test_reshape_targets(parts: list[Any], expected: list[int] | None) -> None:
    g = Graph()
    axes = {name: axis for axis, name in enumerate(SHAPE) if isinstance(name, str)}
    values = [g.constant([part]) if isinstance(part, int) else gather(g, [axes[part]]) for part in parts]
    target = reshape_target(reshape(g, *values))
    assert (None if target is None else target.tolist()) == expected


def test_reshape_with_allowzero_is_left_alone() -> None:
    g = Graph()
    assert reshape_target(reshape(g, gather(g, [0]), g.constant([-1]), allowzero=1)) is None
