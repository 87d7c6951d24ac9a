"""One streaming pass over the data: what goes through each tensor, in statistics that merge.

Activations are reduced inside the graph: per-channel extremes are exact, histograms come from elements at evenly spaced
positions of each sample (all of them where it has few), the same however samples are batched. Gram matrices take input
vectors at random positions, as many as their width needs. Moments of channels come from sums over each sample. Nothing
is kept per sample, so memory does not depend on how many there are.

The data are dealt out in shards of so many samples, whoever works on them: in this process or by the context's
executor. Each has chance of its own, and they are merged in order, so that results are the same to the last bit.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self, TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxcomp.channels import Slot
from onnxcomp.core import Context
from onnxcomp.errors import DataError
from onnxcomp.executors import ahead, mapped
from onnxcomp.layers import Layer, layers
from onnxcomp.model import content_hash, free_inputs, load, opset
from onnxcomp.numerics.blas import one_thread
from onnxcomp.numerics.histogram import Histogram
from onnxcomp.numerics.moments import Moments
from onnxcomp.runtime import Session
from onnxcomp.samples import Batch, Dataset, Shard, shards

HISTOGRAM_ELEMENTS = 384
"""Elements per sample of a tensor that its histogram sees, up to a factor of two: where it has few, all of them."""

GRAM_ROWS = 32
"""Input vectors per column of a Gram matrix: enough to tell it from noise, few enough to stay fast."""

_ROUNDING = 1e-12
"""Of a float64 sum over up to a million squares, relative to it."""

_LEAST_ROWS = 4096
_UNKNOWN_SIZE = 128
_BATCH = 64
_SHARD = 256

Place: TypeAlias = tuple[str, int, bytes]
"""Where channels lie: the tensor's name, the axis, and the bytes of their positions along it."""


@dataclass(frozen=True)
class Observed:
    """A tensor to observe, with the axis over which its channels run, if any."""

    value: ir.Value
    axis: int | None = None


@dataclass(frozen=True, eq=False)
class TensorStatistics:
    """What went through one tensor; a monoid under `merge`.

    Attributes:
        histogram: of all its elements or evenly spaced ones; its extremes are exact.
        low, high: (channels,) exact extremes per channel, or (1,) where the tensor has no channel axis.
    """

    histogram: Histogram
    low: NDArray[np.float64]
    high: NDArray[np.float64]

    @classmethod
    def of(cls, elements: NDArray[np.floating], low: NDArray[np.floating], high: NDArray[np.floating]) -> Self:
        """Statistics of one batch; extremes that are not among the elements are counted once."""
        values, least, largest = np.ravel(elements), np.min(low, initial=np.inf), np.max(high, initial=-np.inf)
        nothing = least > largest  # an empty tensor: the reductions gave their neutral elements
        if not (nothing or (values.size and values.min() <= least and values.max() >= largest)):  # also if one is NaN
            values = np.append(values, [least, largest])
        return cls(Histogram.of(values), np.ravel(low).astype(np.float64), np.ravel(high).astype(np.float64))

    def merge(self, other: "TensorStatistics") -> "TensorStatistics":
        """Statistics of both together."""
        return TensorStatistics(
            self.histogram.merge(other.histogram), np.minimum(self.low, other.low), np.maximum(self.high, other.high)
        )

    @property
    def absolute_maximum(self) -> NDArray[np.float64]:
        """(channels,) largest magnitude."""
        return np.maximum(np.abs(self.low), np.abs(self.high))


@dataclass(frozen=True, eq=False)
class Gram:
    """Sum of x x^T over a layer's input vectors x, each with a 1 appended; a monoid under `merge`.

    Attributes:
        total: (groups, in + 1, in + 1) float64.
        rows: how many vectors.
    """

    total: NDArray[np.float64]
    rows: int

    @classmethod
    def of(cls, rows: NDArray[np.floating]) -> Self:
        """The Gram matrix of (groups, rows, in) vectors."""
        wide = np.ones((*rows.shape[:2], rows.shape[2] + 1))
        wide[..., :-1] = rows
        with np.errstate(invalid="ignore", over="ignore"):  # `calibrate` refuses what is not finite, by name
            return cls(np.matmul(wide.swapaxes(1, 2), wide), rows.shape[1])

    def merge(self, other: "Gram", *, in_place: bool = False) -> "Gram":
        """The Gram matrix of both sets of vectors; in the memory of this one, which is then spent, if asked for.

        What came from another process may be read-only: then in memory of its own.
        """
        total = np.add(self.total, other.total, out=self.total if in_place and self.total.flags.writeable else None)
        return Gram(total, self.rows + other.rows)

    @property
    def second_moment(self) -> NDArray[np.float64]:
        """(groups, in, in): H = E[x x^T]."""
        result: NDArray[np.float64] = self.total[:, :-1, :-1] / max(self.rows, 1)
        return result

    @property
    def mean(self) -> NDArray[np.float64]:
        """(groups, in): E[x]."""
        result: NDArray[np.float64] = self.total[:, :-1, -1] / max(self.rows, 1)
        return result

    @property
    def covariance(self) -> NDArray[np.float64]:
        """(groups, in, in), exactly zero for inputs that are constant but for rounding."""
        mean = self.mean
        result = self.second_moment
        before = np.diagonal(result, axis1=1, axis2=2).copy()
        result -= mean[:, :, None] * mean[:, None, :]
        varies = np.diagonal(result, axis1=1, axis2=2) > _ROUNDING * before
        if not varies.all():
            result *= varies[:, :, None] * varies[:, None, :]
        return result


@dataclass(frozen=True, eq=False)
class Statistics:
    """Everything one pass learnt; N parts merge to what the whole gives.

    Attributes:
        tensors: by tensor name.
        grams: by layer name.
        channels: by place, as `moments` looks them up.
    """

    tensors: Mapping[str, TensorStatistics] = field(default_factory=dict)
    grams: Mapping[str, Gram] = field(default_factory=dict)
    channels: Mapping[Place, Moments] = field(default_factory=dict)

    def merge(self, other: "Statistics", *, in_place: bool = False) -> "Statistics":
        """Statistics of both data together; in the memory of these, which are then spent, if asked for."""
        tensors = dict(self.tensors)
        for name, part in other.tensors.items():
            tensors[name] = tensors[name].merge(part) if name in tensors else part
        grams = dict(self.grams)
        for name, gram in other.grams.items():
            grams[name] = grams[name].merge(gram, in_place=in_place) if name in grams else gram
        channels = dict(self.channels)
        for place, moments in other.channels.items():
            channels[place] = channels[place].merge(moments) if place in channels else moments
        return Statistics(tensors, grams, channels)

    def moments(self, slot: Slot) -> Moments:
        """Of the channels that lie there; they must have been asked for."""
        return self.channels[_place(slot)]

    def answers(self, request: Observed | Slot | Layer) -> bool:
        """Whether this holds what is asked for: of a tensor per channel, if an axis is given."""
        if isinstance(request, Slot):
            return _place(request) in self.channels
        if isinstance(request, Layer):
            return request.name in self.grams
        known = self.tensors.get(request.value.name or "")
        return known is not None and (request.axis is None or known.low.size > 1)


def _place(slot: "Slot | _Channels") -> Place:
    return slot.tensor, slot.axis, slot.positions.tobytes()


@dataclass(frozen=True)
class _Requests:
    """What one pass over the data is to gather."""

    tensors: list[Observed] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    channels: list[Slot] = field(default_factory=list)

    @property
    def all(self) -> list[Observed | Layer | Slot]:
        """Whatever their kind."""
        return [*self.tensors, *self.layers, *self.channels]


def calibrate(
    model: ir.Model,
    data: Dataset,
    context: Context,
    tensors: Sequence[Observed] = (),
    layers: Sequence[Layer] = (),
    *,
    channels: Sequence[Slot] = (),
    finite: bool = True,
) -> Statistics:
    """Run the model over the data and gather what is asked for.

    Args:
        model: opset 13 or later; not modified.
        data: the samples.
        context: target, memory cap, seed, progress, cache, executor. What exceeds the cap is split into groups, with a
            pass over the data for each.
        tensors: tensors of the main graph whose ranges are wanted.
        layers: layers of the main graph whose Gram matrix is wanted.
        channels: where channels lie in activations of the main graph, of known rank, whose moments are wanted. The
            first axis counts samples; where it counts channels, a run is one sample.
        finite: refuse NaN and infinity, for which no integers stand.

    Raises:
        DataError: what is asked for is not finite, unless that is allowed.
    """
    key = ("statistics", content_hash(model))
    seen_data, known = context.cache.get(key, (data, Statistics()))
    if seen_data is not data:
        known = Statistics()
    new = _Requests(
        [seen for seen in tensors if not known.answers(seen)],
        [layer for layer in layers if not known.answers(layer)],
        list({_place(slot): slot for slot in channels if not known.answers(slot)}.values()),
    )
    size = _batch_size(model, new, context.memory)
    groups = list(_groups(new, size, context.memory))
    result = Statistics()
    for done, requests in enumerate(groups):
        what = "calibrating" if len(groups) == 1 else f"calibrating, part {done + 1} of {len(groups)}"
        for part in _pass(model, data, context, requests, size, what):
            result = result.merge(part, in_place=True)
            del part  # the next shard needs the room
    result = Statistics(
        {**known.tensors, **result.tensors},
        {**known.grams, **result.grams},
        {**known.channels, **result.channels},
    )
    if sum(gram.total.nbytes for gram in result.grams.values()) <= context.memory // 2:
        context.cache[key] = (data, result)
    if finite:
        _refuse_nonfinite(result, tensors, layers, channels)
    return result


def _refuse_nonfinite(
    statistics: Statistics, tensors: Sequence[Observed], layers: Sequence[Layer], channels: Sequence[Slot]
) -> None:
    names = [seen.value.name or "" for seen in tensors]
    broken = [f"tensor '{name}'" for name in names if statistics.tensors[name].histogram.nonfinite]
    totals = {layer.name: statistics.grams[layer.name].total for layer in layers}
    broken += [f"the input of '{name}'" for name, total in totals.items() if not np.isfinite(total).all()]
    infinite = [slot.tensor for slot in channels if not np.isfinite(statistics.moments(slot).magnitudes).all()]
    broken += [f"tensor '{name}'" for name in infinite]
    if broken:
        raise DataError(
            f"{broken[0]} is not finite on the calibration data",
            "the model overflows, divides by zero, or has NaN in its weights",
            "run the model on the data and look for NaN",
        )


def _pass(
    model: ir.Model, data: Dataset, context: Context, requests: _Requests, size: int, what: str
) -> Iterator[Statistics]:
    probe = _Probe(model, requests)
    reader = probe.reader(Session(probe.model, context.target, spinning=False))
    share = {layer.name: max(_LEAST_ROWS, GRAM_ROWS * layer.input_width) / data.samples for layer in requests.layers}
    work = functools.partial(_gathered, reader, share, context.seed)
    sample, memory = _input_bytes(model), context.memory // 2
    most = int(np.clip(memory // (4 * max(sample, 1)), 1, _SHARD))
    room = memory // (sum(map(_kept_bytes, requests.all)) + most * sample) if reader.session.travels else 1
    done = 0
    for samples, part in mapped(work, shards(data.batches(size), most), context.executor, room):
        yield part
        del part  # the next shard needs the room
        done += samples
        context.progress(done, data.samples, what)


def _gathered(reader: "_Reader", share: Mapping[str, float], seed: int, shard: Shard) -> tuple[int, Statistics]:
    """How many samples a shard has, and their statistics."""
    generator = np.random.default_rng([seed, shard.number])
    result = Statistics()
    runs = ahead((batch, reader.run(batch)) for batch in shard.batches())
    with one_thread():
        for batch, outputs in runs:
            result = result.merge(reader.read(batch, outputs, share, generator), in_place=True)
    return shard.samples, result


class _Channels(NamedTuple):
    """A slot without its value."""

    tensor: str
    axis: int
    positions: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class _Reader:
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
    channels: list[_Channels]

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
        generator: np.random.Generator,
    ) -> Statistics:
        """The statistics of one run; of each layer's input vectors that many per sample."""
        tensors, grams, trimmed = {}, {}, batch.trim(outputs)
        for tensor, (sample, low, high) in self.reduced.items():
            arrays = trimmed[sample], outputs[low], outputs[high]  # padding repeats a row: no news for the extremes
            tensors[tensor] = TensorStatistics.of(*(array.astype(np.float32) for array in arrays))
        for layer in self.layers:
            count = int(np.ceil(share[layer.name] * batch.valid))
            data = trimmed[layer.data.name or ""]
            grams[layer.name] = Gram.of(layer.rows(data, count, generator))
        channels = {_place(slot): self._moments(slot, outputs, trimmed) for slot in self.channels}
        return Statistics(tensors, grams, channels)

    def _moments(
        self, slot: _Channels, outputs: Mapping[str, NDArray[np.generic]], trimmed: Mapping[str, NDArray[np.generic]]
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
    channels: list[_Channels],
) -> _Reader:
    known = _layers_of(session.content) if names else {}
    return _Reader(session, outputs, reduced, sums, [known[name] for name in names], channels)


@functools.lru_cache(maxsize=1)
def _layers_of(content: bytes) -> dict[str, Layer]:
    """By name; kept for the shards of the same model that follow."""
    return {layer.name: layer for layer in layers(load(content))}


class _Probe:
    """The model with the statistics it must output."""

    def __init__(self, model: ir.Model, requests: _Requests) -> None:
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

    def reader(self, session: Session) -> _Reader:
        """How to read what the loaded probe gives."""
        reduced = [*self._names.values(), *self._sums.values()]
        outputs = [*(name for names in reduced for name in names), *self._inputs]
        channels = [_Channels(slot.tensor, slot.axis, slot.positions) for slot in self._requests.channels]
        return _Reader(session, outputs, self._names, self._sums, self._requests.layers, channels)

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


def _groups(requests: _Requests, size: int, memory: int) -> Iterator[_Requests]:
    """Requests in portions whose statistics stay below the cap together."""
    portion, used = _Requests(), 0
    for request in requests.all:
        need = _bytes(request, size)
        if used and used + need > memory // 2:
            yield portion
            portion, used = _Requests(), 0
        used += need
        if isinstance(request, Observed):
            portion.tensors.append(request)
        elif isinstance(request, Layer):
            portion.layers.append(request)
        else:
            portion.channels.append(request)
    if used:
        yield portion


def _batch_size(model: ir.Model, requests: _Requests, memory: int) -> int:
    """Samples per run, so many that what it holds at a time and what it hands out leave room for statistics."""
    running, given = _activation_bytes(model), sum(_given_bytes(request) for request in requests.all)
    return int(np.clip(min(memory // (4 * running), memory // (8 * max(given, 1))), 1, _BATCH))


def _bytes(request: Observed | Layer | Slot, size: int) -> int:
    """What a request needs: its statistics, those of a shard and of a run, and what a run of so many hands out."""
    kept = _kept_bytes(request)
    return (3 if isinstance(request, Layer) else 4) * kept + size * _given_bytes(request)


def _given_bytes(request: Observed | Layer | Slot) -> int:
    """What a run hands out for each sample; the next one is under way meanwhile."""
    if isinstance(request, Observed):
        return 2 * 4 * HISTOGRAM_ELEMENTS
    if isinstance(request, Layer):
        return 12 * _elements(request.data)
    return 4 * (4 + 2 * 8) * (int(request.positions.max(initial=0)) + 1)


def _kept_bytes(request: Observed | Layer | Slot) -> int:
    """Of the statistics themselves."""
    if isinstance(request, Observed):
        return 8 * 4096
    if isinstance(request, Layer):
        return 8 * request.groups * (request.input_width + 1) ** 2
    return 6 * 8 * len(request.positions)


def _input_bytes(model: ir.Model) -> int:
    """Bytes of a sample, whatever its type; strings as a guess."""
    return sum(8 * _elements(value) for value in free_inputs(model))


def _elements(value: ir.Value) -> int:
    """Elements per sample; the first axis counts as the batch, unknown sizes as a guess."""
    sizes = [size if isinstance(size, int) else _UNKNOWN_SIZE for size in (value.shape or ())]
    return int(np.prod(sizes[1:], initial=1))


def _activation_bytes(model: ir.Model) -> int:
    """Bytes per sample of the largest activation and its neighbours: what a run holds at a time."""
    return max(4 * max((sum(_elements(output) for output in node.outputs) for node in model.graph), default=1), 1)
