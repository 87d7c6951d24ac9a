"""A model that also gives statistics of what goes through it, and how to read them off a run.

Activations are reduced inside the graph: per-channel extremes are exact, histograms come from elements at evenly spaced
positions of each sample (all of them where it has few), the same however samples are batched. Gram matrices take input
vectors at random positions. Moments of channels come from sums over each sample.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxcomp.channels import Slot
from onnxcomp.layers import FLOATS, Layer, layers
from onnxcomp.model import load, opset
from onnxcomp.numerics.moments import Moments
from onnxcomp.observations import Channels, Gram, Observed, Statistics, TensorStatistics, place_of
from onnxcomp.runtime import Session
from onnxcomp.samples import Batch

HISTOGRAM_ELEMENTS = 384
"""Elements per sample of a tensor that its histogram sees, up to a factor of two: where it has few, all of them."""


@dataclass(frozen=True)
class Requests:
    """What one pass over the data is to gather."""

    tensors: list[Observed] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    channels: list[Slot] = field(default_factory=list)

    @property
    def all(self) -> list[Observed | Layer | Slot]:
        """Whatever their kind."""
        return [*self.tensors, *self.layers, *self.channels]


@dataclass(frozen=True, eq=False)
class Reader:
    """Runs a probe and knows what its outputs mean. It pickles without the layers: they are in the model.

    Attributes:
        session: the probe, loaded.
        outputs: their names.
        reduced: names of sample, lowest and highest elements, by tensor.
        sums: names of the shape and the sums, by tensor and axis.
        layers: whose input vectors are drawn.
        channels: whose moments are taken.
    """

    session: Session
    outputs: list[str]
    reduced: dict[str, tuple[str, str, str]]
    sums: dict[tuple[str, int], tuple[str, ...]]
    layers: list[Layer]
    channels: list[Channels]

    def __reduce__(self) -> tuple[object, ...]:
        names = [layer.name for layer in self.layers]
        return _arrived, (self.session, self.outputs, self.reduced, self.sums, names, self.channels)

    def run(self, batch: Batch) -> Mapping[str, NDArray[np.generic]]:
        """What the probe gives."""
        return self.session.run(batch.feeds, self.outputs)

    def read(
        self,
        batch: Batch,
        outputs: Mapping[str, NDArray[np.generic]],
        share: Mapping[str, float],
        chance: Mapping[str, np.random.Generator],
    ) -> Statistics:
        """The statistics of one run; of each layer's input vectors that many per sample."""
        tensors, grams, trimmed = {}, {}, batch.trim(outputs)
        for tensor, (sample, low, high) in self.reduced.items():
            arrays = trimmed[sample], outputs[low], outputs[high]  # padding repeats a row: no news for the extremes
            tensors[tensor] = TensorStatistics.of(*(array.astype(np.float32) for array in arrays))
        for layer in self.layers:
            count = int(np.ceil(share[layer.name] * batch.valid))
            data = trimmed[layer.data.name or ""]
            grams[layer.name] = Gram.of(layer.rows(data, count, chance[layer.name]))
        channels = {place_of(slot): self._moments(slot, outputs, trimmed) for slot in self.channels}
        return Statistics(tensors, grams, channels)

    def _moments(
        self, slot: Channels, outputs: Mapping[str, NDArray[np.generic]], trimmed: Mapping[str, NDArray[np.generic]]
    ) -> Moments:
        """Of one run, each channel with all the positions that belong to it."""
        shape, *names = self.sums[slot.tensor, slot.axis]
        rows, length = outputs[names[0]].shape
        count = int(np.prod(outputs[shape].tolist())) // max(rows * length, 1) * slot.positions.shape[1]
        sums, squares, magnitudes, nonzeros = (
            trimmed[name].astype(np.float64)[:, slot.positions].sum(axis=2) for name in names
        )
        return Moments.of(count, sums=sums, squares=squares, magnitudes=magnitudes, nonzeros=nonzeros)


def _arrived(
    session: Session,
    outputs: list[str],
    reduced: dict[str, tuple[str, str, str]],
    sums: dict[tuple[str, int], tuple[str, ...]],
    names: list[str],
    channels: list[Channels],
) -> Reader:
    known = _layers_of(session.content) if names else {}
    return Reader(session, outputs, reduced, sums, [known[name] for name in names], channels)


@functools.lru_cache(maxsize=1)
def _layers_of(content: bytes) -> dict[str, Layer]:
    """By name; kept for the shards of the same model that follow."""
    return {layer.name: layer for layer in layers(load(content))}


class Probe:
    """The model with the statistics it must output.

    Nothing is fused across any tensor, so that each has the same numbers to the last bit whatever else is asked for.
    """

    def __init__(self, model: ir.Model, requests: Requests) -> None:
        self.model = model.clone()
        self._graph = self.model.graph
        self._values = {value.name: value for value in self._all_values()}
        self._version = opset(model)
        self._names: dict[str, tuple[str, str, str]] = {}
        self._sums: dict[tuple[str, int], tuple[str, ...]] = {}
        self._count = 0
        originals = {value.name for value in self._graph.outputs}
        # ONNX Runtime runs the leaves added last first, each with all that leads to it. From the front of the model to
        # its end, a tensor is reduced while it is still in the cache, and its memory is free again.
        places = {name: place for place, name in enumerate(self._values)}
        watched: list[Observed | Slot] = [*requests.tensors, *requests.channels]
        for seen in sorted(watched, key=lambda seen: places[seen.value.name], reverse=True):
            if isinstance(seen, Observed):
                self._observe(seen)
            elif (seen.tensor, seen.axis) not in self._sums:
                self._sum(seen.tensor, seen.axis)
        self._requests = requests
        self._inputs = dict.fromkeys(layer.data.name or "" for layer in requests.layers)
        for name in self._inputs:
            if name not in originals:
                self._output(self._values[name])
        for value in self._values.values():
            if value.producer() is not None and value.dtype in FLOATS and value.shape:
                self._keep_apart(value, value.dtype)

    def _keep_apart(self, value: ir.Value, dtype: ir.DataType) -> None:
        """What makes a tensor and what reads it are not fused, as something else reads a little of it too."""
        first, end, last = [0], [1], [-1]  # of the last axis
        if self._version >= 10:
            little = self._node("Slice", [value, *map(self._constant, (first, end, last))])
        else:
            little = self._node("Slice", [value], starts=first, ends=end, axes=[len(value.shape or ()) - 1])
        little.dtype = dtype
        self._output(little)

    def reader(self, session: Session) -> Reader:
        """How to read what the loaded probe gives."""
        reduced = [*self._names.values(), *self._sums.values()]
        outputs = [*(name for names in reduced for name in names), *self._inputs]
        channels = [Channels(slot.tensor, slot.axis, slot.positions) for slot in self._requests.channels]
        return Reader(session, outputs, self._names, self._sums, self._requests.layers, channels)

    def _all_values(self) -> Iterator[ir.Value]:
        yield from self._graph.inputs
        for node in self._graph:
            yield from node.outputs

    def _observe(self, seen: Observed) -> None:
        value = self._values[seen.value.name or ""]
        source = self._float(value)
        rank = None if value.shape is None else len(value.shape)
        axes = None
        if rank is not None and seen.axis is not None:
            axes = [axis for axis in range(rank) if axis != seen.axis % rank]
        low, high = self._reduce("ReduceMin", source, axes), self._reduce("ReduceMax", source, axes)
        # The step is odd, so as not to meet one channel only.
        flat = self._node("Reshape", [source, self._constant([0, -1] if rank else [1, -1])])
        first, second, end = self._constant([0]), self._constant([1]), self._constant([np.iinfo(np.int64).max])
        size = self._node("Slice", [self._node("Shape", [flat]), second, end])
        step = self._node("Div", [size, self._constant([2 * HISTOGRAM_ELEMENTS])])
        step = self._node("Add", [self._node("Mul", [step, self._constant([2])]), second])
        sample = self._node("Slice", [flat, first, end, second, step])
        for output in (sample, low, high):
            self._output(output)
        self._names[value.name or ""] = (sample.name or "", low.name or "", high.name or "")

    def _sum(self, name: str, axis: int) -> None:
        """Sums over all but the first axis and that of the channels: of x, x^2, |x| and of whether x is not zero."""
        value = self._values[name]
        source = self._float(value)
        assert value.shape is not None, f"the rank of '{name}' is unknown"
        channels = axis % len(value.shape)
        axes = [other for other in range(1, len(value.shape)) if other != channels]
        # Sign would count in one step, but ONNX Runtime takes four times as long for it.
        nonzero = self._node("Cast", [self._node("Cast", [source], to=ir.DataType.BOOL)], to=ir.DataType.FLOAT)
        terms = source, self._node("Mul", [source, source]), self._node("Abs", [source]), nonzero
        reduced = [self._reduce("ReduceSum", term, axes) for term in terms]
        if channels == 0:
            reduced = [self._node("Reshape", [each, self._constant([1, -1])]) for each in reduced]
        shape = self._node("Shape", [value])
        shape.dtype = ir.DataType.INT64
        for output in (shape, *reduced):
            self._output(output)
        self._sums[name, axis] = tuple(output.name or "" for output in (shape, *reduced))

    def _float(self, value: ir.Value) -> ir.Value:
        return value if value.dtype == ir.DataType.FLOAT else self._node("Cast", [value], to=ir.DataType.FLOAT)

    def _reduce(self, operator: str, value: ir.Value, axes: list[int] | None) -> ir.Value:
        if axes is None:
            return self._node(operator, [value], keepdims=0)
        if not axes:
            return self._node("Identity", [value])
        if self._version >= (13 if operator == "ReduceSum" else 18):
            return self._node(operator, [value, self._constant(axes)], keepdims=0)
        return self._node(operator, [value], axes=axes, keepdims=0)

    def _node(self, operator: str, inputs: list[ir.Value], **attributes: Any) -> ir.Value:
        self._count += 1
        node = ir.node(operator, inputs, attributes=attributes, name=f"onnxcomp_probe_{self._count}")
        node.outputs[0].name = f"onnxcomp_probe_{self._count}"
        self._graph.append(node)
        return node.outputs[0]

    def _constant(self, elements: list[int]) -> ir.Value:
        name = "onnxcomp_constant_" + "_".join(str(element) for element in elements)
        if name not in self._graph.initializers:
            self._graph.register_initializer(
                ir.val(name, const_value=ir.tensor(np.asarray(elements, np.int64), name=name))
            )
        return self._graph.initializers[name]

    def _output(self, value: ir.Value) -> None:
        if value.dtype is None:
            value.dtype = ir.DataType.FLOAT
        self._graph.outputs.append(value)
