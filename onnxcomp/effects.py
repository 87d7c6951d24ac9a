"""What a change to a model does to its outputs."""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxcomp import model as models
from onnxcomp.core import Context
from onnxcomp.executors import mapped
from onnxcomp.runtime import Session
from onnxcomp.samples import Dataset

_SAMPLES = 64
_ENOUGH = 32
"""Samples, where each gives many numbers: the error of 384 numbers on 32 sentences has a standard error of 6 to 10%,
that of 10 logits on 64 images 9 to 12%."""
_MANY = 100
_BATCH = 16
_COPIES = 4
"""Of a model, that a process has in memory while it runs it."""


def abroad(model: ir.Model, context: Context) -> tuple[Executor | None, int]:
    """The executor that can work on versions of a model, and on how many at a time; None where they do not pickle."""
    size = models.tensor_bytes(model)
    return context.executor if size < models.PROTOBUF_LIMIT else None, context.memory // (_COPIES * size + 1)


def _floats(outputs: Mapping[str, Any]) -> dict[str, NDArray[np.floating[Any]]]:
    """The outputs of which there are errors: no integers, and no sequences."""
    return {name: own for name, own in outputs.items() if isinstance(own, np.ndarray) and own.dtype.kind == "f"}


class Answers:
    """What a model says on a few samples.

    Args:
        model: the original.
        data: drawn from.
        context: target, seed.
    """

    def __init__(self, model: ir.Model, data: Dataset, context: Context) -> None:
        self._target = context.target
        session = Session(model, self._target, spinning=False)
        first = next(iter(data.batches(1)))
        numbers = sum(array.size for array in _floats(session.run(first.feeds)).values())
        many = numbers >= _MANY * (first.valid + first.padding)
        samples = data.at_most(_ENOUGH if many else _SAMPLES, context.seed)
        self._pairs = [(batch.feeds, _floats(session.run(batch.feeds))) for batch in samples.unpadded.batches(_BATCH)]

    def error(self, model: ir.Model | bytes) -> float:
        """Relative squared error of another model's outputs; 1 where it is not finite or there is nothing to lose."""
        session = Session(model, self._target, spinning=False)
        signal = noise = 0.0
        for feeds, expected in self._pairs:
            actual = session.run(feeds)
            for name, array in expected.items():
                want, found = array.astype(np.float64), np.asarray(actual[name], np.float64)
                power = float(np.square(want).sum())
                signal += power
                # Of outputs as long as what a model finds, one of another length says nothing of the same things.
                noise += float(np.square(want - found).sum()) if found.shape == want.shape else power
        return noise / signal if signal and np.isfinite(noise) else 1.0

    def errors(self, made: Iterable[ir.Model], executor: Executor | None, room: int) -> Iterator[float]:
        """Those of several models, in order, as many beside each other as `abroad` says."""
        given: Iterable[ir.Model | bytes] = made if executor is None else map(models.to_bytes, made)
        return mapped(self.error, given, executor, room)
