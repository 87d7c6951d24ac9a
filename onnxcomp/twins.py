"""The original and the changed model side by side, and what a layer of one has to do with its twin in the other."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxcomp.graph import constant_of, single_consumer
from onnxcomp.layers import Layer
from onnxcomp.prefix import Prefix
from onnxcomp.samples import Batch


@dataclass(frozen=True, eq=False)
class Pair:
    """A layer in the original and in the changed model.

    Attributes:
        before: in the original; None where the layer is one of several that took the place of a later one in the row.
        after: in the changed model.
        outputs: (out,) which of the original's output channels are left.
    """

    before: Layer | None
    after: Layer
    outputs: NDArray[np.bool_]


class Run(NamedTuple):
    """One batch in both models.

    Attributes:
        batch: of the data.
        before: a value of the original.
        data: what a layer, or the first of several in a row, reads in the changed model.
        skips: what is added to the last one's output, in the original and in the changed model, where that is computed.
    """

    batch: Batch
    before: NDArray[Any]
    data: NDArray[Any]
    skips: tuple[NDArray[Any], NDArray[Any]] | None


@dataclass(frozen=True)
class Twins:
    """The original and the changed model, run side by side."""

    original: Prefix
    changed: Prefix

    def values(self, before: ir.Value, after: ir.Value) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        """A value of the original and one of the changed model, batch by batch."""
        for (_, original), (_, changed) in zip(
            self.original.runs([before], starts=False), self.changed.runs([after], starts=False), strict=True
        ):
            yield original[0], changed[0]

    def runs(
        self, before: ir.Value, last: Pair, first: Layer | None = None, *, starts: Layer | None = None
    ) -> Iterator[Run]:
        """Each batch.

        Args:
            before: what is wanted of the original.
            last: the layer that is to give what it gave, together with what is added to it.
            first: the layer of whose input it is a function, if not of its own.
            starts: a layer of the changed model; all that is asked for later may be run from its input and these.
        """
        assert last.before is not None
        wanted = [[before], [(first or last.after).data]]
        skips = _other_branch(last.before), _other_branch(last.after)
        if skips[0] is not None and skips[1] is not None:
            wanted = [[*wanted[0], skips[0]], [*wanted[1], skips[1]]]
        added = len(wanted[0]) > 1
        if starts is not None and starts.data not in wanted[1]:
            wanted[1].append(starts.data)
        kept = starts is not None
        for (batch, original), (_, changed) in zip(
            self.original.runs(wanted[0], starts=kept), self.changed.runs(wanted[1], starts=kept), strict=True
        ):
            yield Run(batch, original[0], changed[0], (original[1], changed[1]) if added else None)


def as_outputs(run: Run, before: tuple[int, ...], after: tuple[int, ...]) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """What is added, in the shapes of the two outputs; None where there is nothing, or the sum is larger than they."""
    try:
        return run.skips and (np.broadcast_to(run.skips[0], before), np.broadcast_to(run.skips[1], after))
    except ValueError:
        return None


def _other_branch(layer: Layer) -> ir.Value | None:
    """What is added to the layer's output, where that is computed."""
    reader = single_consumer(layer.node.outputs[0])
    if reader is None or reader.op_type != "Add":
        return None
    other = next((value for value in reader.inputs if value is not None and value is not layer.node.outputs[0]), None)
    return None if other is None or constant_of(other) is not None or other.producer() is None else other
