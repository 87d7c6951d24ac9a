"""One streaming pass over the data: what goes through each tensor, in statistics that merge.

Nothing is kept per sample, so memory does not depend on how many there are. Gram matrices take as many input vectors as
their width needs.

The data are dealt out in shards of so many samples, whoever works on them: in this process or by the context's
executor. Each has chance of its own for each layer, and they are merged in order; runs are as long whatever of a model
is asked for. So results are the same to the last bit, also where others were gathered before.
"""

import functools
import zlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxcomp.channels import Slot
from onnxcomp.core import Context
from onnxcomp.errors import DataError
from onnxcomp.executors import ahead, mapped
from onnxcomp.layers import Layer, layers
from onnxcomp.model import content_hash, free_inputs
from onnxcomp.numerics.blas import one_thread
from onnxcomp.observations import Observed, Statistics, place_of
from onnxcomp.probe import HISTOGRAM_ELEMENTS, Probe, Reader, Requests
from onnxcomp.runtime import Session
from onnxcomp.samples import Dataset, Shard, shards

GRAM_ROWS = 32
"""Input vectors per column of a Gram matrix: enough to tell it from noise, few enough to stay fast."""

_LEAST_ROWS = 4096
_UNKNOWN_SIZE = 128
_BATCH = 64
_SHARD = 256


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
    new = Requests(
        [seen for seen in tensors if not known.answers(seen)],
        [layer for layer in layers if not known.answers(layer)],
        list({place_of(slot): slot for slot in channels if not known.answers(slot)}.values()),
    )
    size = _batch_size(model, context.memory, ranges_alone=not new.layers and not new.channels)
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
    model: ir.Model, data: Dataset, context: Context, requests: Requests, size: int, what: str
) -> Iterator[Statistics]:
    probe = Probe(model, requests)
    reader = probe.reader(Session(probe.model, context.target, spinning=False))
    share = {layer.name: max(_LEAST_ROWS, GRAM_ROWS * layer.input_width) / data.samples for layer in requests.layers}
    work = functools.partial(_gathered, reader, share, context.seed)
    sample, memory = _input_bytes(model), context.memory // 2
    most = int(np.clip(memory // (4 * max(sample, 1)), 1, _SHARD))
    room = memory // (sum(map(_kept_bytes, requests.all)) + most * sample) if reader.session.travels else 1
    done = 0
    for samples, part in mapped(work, shards(data.unpadded.batches(size), most), context.executor, room):
        yield part
        del part  # the next shard needs the room
        done += samples
        context.progress(done, data.samples, what)


def _gathered(reader: "Reader", share: Mapping[str, float], seed: int, shard: Shard) -> tuple[int, Statistics]:
    """How many samples a shard has, and their statistics."""
    chance = {name: np.random.default_rng([seed, shard.number, zlib.crc32(name.encode())]) for name in share}
    result = Statistics()
    runs = ahead((batch, reader.run(batch)) for batch in shard.batches())
    with one_thread():
        for batch, outputs in runs:
            result = result.merge(reader.read(batch, outputs, share, chance), in_place=True)
    return shard.samples, result


def _groups(requests: Requests, size: int, memory: int) -> Iterator[Requests]:
    """Requests in portions whose statistics stay below the cap together."""
    portion, used = Requests(), 0
    for request in requests.all:
        need = _bytes(request, size)
        if used and used + need > memory // 2:
            yield portion
            portion, used = Requests(), 0
        used += need
        if isinstance(request, Observed):
            portion.tensors.append(request)
        elif isinstance(request, Layer):
            portion.layers.append(request)
        else:
            portion.channels.append(request)
    if used:
        yield portion


def _batch_size(model: ir.Model, memory: int, *, ranges_alone: bool) -> int:
    """Samples per run, so many that what it holds at a time and what it may hand out leave room for statistics.

    Ranges are the same to the last bit however long runs are. For anything else all layers count, whichever are asked
    for, as sums depend on where they are split.
    """
    running, given = _activation_bytes(model), 0 if ranges_alone else sum(map(_given_bytes, layers(model)))
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
