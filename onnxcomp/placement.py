"""Which nodes run as integers: a minimum cut over measured times.

Every node that could be quantized has a measured time in float and in INT8, and every tensor between the two worlds
costs a conversion. The cheapest assignment of nodes to worlds is a minimum s-t cut (Picard and Ratliff 1975): cutting
the arc from the source pays a node's float time, cutting the arc to the sink its INT8 time, and a tensor that is
produced in one world and read in the other pays its conversion once, however many read it.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from onnxcomp.core import Context
from onnxcomp.graph import single_consumer
from onnxcomp.profiling import Profile
from onnxcomp.runtime import Session, Target

_NEVER = 2**30
_LARGEST_SUM = 2**29
_FINEST = 1000.0
_BLOCK = 5
_CONVERSION_SIZES = (1_000, 10_000, 100_000, 1_000_000)


@dataclass(frozen=True)
class Crossing:
    """Time to bring a tensor from one world into the other, in microseconds by number of elements.

    Attributes:
        sizes: elements measured.
        quantize: float to integers, with the change of memory layout that convolutions want.
        dequantize: the way back.
    """

    sizes: tuple[int, ...]
    quantize: tuple[float, ...]
    dequantize: tuple[float, ...]

    def cost(self, elements: int, *, to_integers: bool) -> float:
        """Interpolated between the sizes measured, proportional beyond them."""
        times = self.quantize if to_integers else self.dequantize
        largest = self.sizes[-1]
        scale = max(1.0, elements / largest)
        return scale * float(np.interp(min(elements, largest), self.sizes, times))


def crossing(context: Context) -> Crossing:
    """What `measure_crossing` found on the target, now or before."""
    return context.recall("crossing", (), lambda: measure_crossing(context.target))


def measure_crossing(target: Target, runs: int = 20) -> Crossing:
    """Time QuantizeLinear, DequantizeLinear and the transposes between channel-first and channel-last on the target."""
    nodes: list[ir.Node] = []
    inputs, outputs, constants = [], [], []
    scale = ir.val("scale", const_value=ir.tensor(np.float32(0.1), name="scale"))
    zero = ir.val("zero", const_value=ir.tensor(np.uint8(128), name="zero"))
    constants += [scale, zero]
    feeds = {}
    for size in _CONVERSION_SIZES:
        name = f"x{size}"
        channels = 16
        shape = (1, channels, size // channels)
        value = ir.val(name, dtype=ir.DataType.FLOAT, shape=ir.Shape(shape))
        inputs.append(value)
        feeds[name] = np.zeros(shape, np.float32)
        for operator, source, attributes in (
            ("QuantizeLinear", value, {}),
            ("Transpose", None, {"perm": [0, 2, 1]}),
            ("DequantizeLinear", None, {}),
        ):
            previous = source or nodes[-1].outputs[0]
            parameters = [scale, zero] if operator != "Transpose" else []
            node = ir.node(operator, [previous, *parameters], attributes, name=f"{operator}_{size}")
            node.outputs[0].name = f"{operator}_{size}"
            nodes.append(node)
        final = nodes[-1].outputs[0]
        final.type = ir.TensorType(ir.DataType.FLOAT)
        outputs.append(final)
    graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=constants, opset_imports={"": 13}, name="crossing")
    session = Session(ir.Model(graph, ir_version=8), target, profile=True, extended=False)
    for _ in range(runs):
        session.run(feeds)
    profile = session.profile()

    def measured(operator: str, size: int) -> float:
        return profile[f"{operator}_{size}"].microseconds

    transposes = [measured("Transpose", size) for size in _CONVERSION_SIZES]
    return Crossing(
        _CONVERSION_SIZES,
        tuple(
            measured("QuantizeLinear", size) + move for size, move in zip(_CONVERSION_SIZES, transposes, strict=True)
        ),
        tuple(
            measured("DequantizeLinear", size) + move for size, move in zip(_CONVERSION_SIZES, transposes, strict=True)
        ),
    )


def place(
    model: ir.Model,
    candidates: Iterable[str],
    floats: Profile,
    integers: Profile,
    crossing: Crossing,
    scale: float = 1.0,
) -> frozenset[str]:
    """The nodes that should run as integers.

    Args:
        model: the float model.
        candidates: names of the nodes with an INT8 form; all others stay in float.
        floats: profile of the float model.
        integers: profile of the fully quantized model.
        crossing: conversion times.
        scale: factor on the conversion times, to vary the answer.
    """
    float_times, integer_times, elements = floats.times, integers.times, floats.elements
    network = _Network()
    names = set(candidates)
    for node in model.graph:
        name = node.name or ""
        if name in names:
            network.arc(network.SOURCE, name, float_times.get(name, 0.0))
            network.arc(name, network.SINK, integer_times.get(name, 0.0))
        else:
            network.arc(name, network.SINK, None)
        # A node without a time of its own was fused into the one that reads it, or into the one before: a unit.
        reader = single_consumer(node.outputs[0])
        next_name = "" if reader is None else reader.name or ""
        fused = name not in float_times or (next_name not in integer_times and next_name in float_times)
        if name in names and next_name in names and fused:
            network.arc(name, next_name, None)
            network.arc(next_name, name, None)
    for value in [*model.graph.inputs, *(node.outputs[0] for node in model.graph)]:
        producer = value.producer()
        origin = (producer.name or "") if producer is not None else network.SINK
        readers = {use.node.name or "" for use in value.uses()}
        if value.is_graph_output():
            readers.add(network.SINK)
        size = elements.get(origin) or _static_elements(value)
        if origin in names:
            leaving = f"{value.name} leaves"
            network.arc(origin, leaving, scale * crossing.cost(size, to_integers=False))
            for name in readers:
                network.arc(leaving, name, None)
        if readers & names:
            entering = f"{value.name} enters"
            network.arc(entering, origin, scale * crossing.cost(size, to_integers=True))
            for name in readers & names:
                network.arc(name, entering, None)
    return frozenset(network.source_side() & names)


def _static_elements(value: ir.Value) -> int:
    return int(np.prod([size if isinstance(size, int) else 1 for size in value.shape or ()], initial=1))


@dataclass
class _Network:
    """A flow network with nodes by name; capacities in microseconds, None for arcs that must not be cut."""

    SOURCE = "\0integers"
    SINK = "\0floats"
    _index: dict[str, int] = field(default_factory=dict)
    _arcs: dict[tuple[int, int], float] = field(default_factory=dict)

    def arc(self, tail: str, head: str, microseconds: float | None) -> None:
        if tail == head:
            return
        key = (self._number(tail), self._number(head))
        self._arcs[key] = self._arcs.get(key, 0.0) + (math.inf if microseconds is None else microseconds)

    def _number(self, name: str) -> int:
        return self._index.setdefault(name, len(self._index))

    def source_side(self) -> set[str]:
        """The names on the source's side of a minimum cut; of several cuts the one with the fewest names there."""
        source, sink = self._number(self.SOURCE), self._number(self.SINK)
        rows, columns = np.asarray(list(self._arcs), np.int32).reshape(-1, 2).T
        size = len(self._index)
        residual = csr_array((self._capacities(), (rows, columns)), shape=(size, size))
        residual = csr_array(residual - maximum_flow(residual, source, sink).flow)
        residual.data = np.maximum(residual.data, 0)
        residual.eliminate_zeros()
        reached = set(breadth_first_order(residual, source, return_predecessors=False).tolist())
        return {name for name, number in self._index.items() if number in reached}

    def _capacities(self) -> NDArray[np.int32]:
        """Nanoseconds, or coarser so that a slow model's sum stays below what must not be cut: SciPy flows in int32."""
        times = np.asarray(list(self._arcs.values()), np.float64)
        finite = np.isfinite(times)
        scale = min(_FINEST, _LARGEST_SUM / max(times[finite].sum(), 1.0))
        return np.where(finite, np.rint(np.where(finite, times, 0.0) * scale), _NEVER).astype(np.int32)
