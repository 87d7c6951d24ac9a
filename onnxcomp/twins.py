"""The original and the changed model side by side, and what a layer of one has to do with its twin in the other."""

from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxcomp.executors import ahead
from onnxcomp.graph import constant_of, is_sum, single_consumer
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
        wanted: what a layer is to give, together with what is added to it.
        data: what that layer, or the first of several in a row, reads in the changed model.
        added: what is added to the layer's output in the changed model; None where nothing is.
    """

    batch: Batch
    wanted: NDArray[Any]
    data: NDArray[Any]
    added: NDArray[Any] | None

    def target(self, pair: Pair, rows: int, generator: Callable[[], np.random.Generator]) -> NDArray[np.floating]:
        """(rows, left) what the layer alone is to give, in its output channels that are left."""
        assert pair.before is not None
        target = pair.before.output_rows(self.wanted, rows, generator())[:, np.flatnonzero(pair.outputs)]
        return target if self.added is None else target - pair.after.output_rows(self.added, rows, generator())


@dataclass(frozen=True)
class Twins:
    """The original and the changed model, run side by side.

    Attributes:
        original, changed: the two.
        nodes: the original's, by name.
        left: names of those of the changed model.
    """

    original: Prefix
    changed: Prefix
    nodes: Mapping[str, ir.Node]
    left: Set[str]

    def values(self, before: ir.Value, after: ir.Value) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        """A value of the original and one of the changed model, batch by batch."""
        for (_, original), (_, changed) in zip(self.original.runs([before]), self.changed.runs([after]), strict=True):
            yield original[0], changed[0]

    def runs(
        self, last: Pair, first: Layer | None = None, *, starts: Layer | None = None, settled: bool = False
    ) -> Iterator[Run]:
        """Each batch.

        A layer is to give what it gave. If it is a term of a sum, it is to give what its sum is to be less the other
        term, so that it makes up for that; and where later sums are gone, the sum is to be what the last of them was.

        Args:
            last: the layer that is to give it.
            first: the layer of whose input it is a function, if not of its own.
            starts: the layer in the changed model, if all that is asked for later may be run from its input, its twin's
                and these.
            settled: whether no layer before that one will be fitted again.
        """
        assert last.before is not None
        own, changed_values = last.before.node.outputs[0], [(first or last.after).data]
        gone = self._last_sum(last.after.node.outputs[0])
        wanted = [own] if gone is None else [gone, own]
        term = _term(last.after)
        if term is not None:
            join, other = term
            same = self.nodes.get(join.name or "")
            wanted = [self._last_sum(join.outputs[0]) or (own if same is None else same.outputs[0]), own]
            changed_values.append(other)
        kept = starts is not None
        if starts is not None:
            changed_values += [starts.data] if starts.data not in changed_values else []
            wanted += [last.before.data] if last.before.data not in wanted else []
        both = (
            ahead(self.original.runs(wanted, starts=kept, settled=wanted)),
            self.changed.runs(changed_values, starts=kept, settled=changed_values[:1] if settled else ()),
        )
        for (batch, original), (_, changed) in zip(*both, strict=True):
            added = None
            if term is not None:
                added = _as_output(changed[1], last, original)
            alone = term is None and (gone is None or original[0].shape == original[1].shape)
            yield Run(batch, original[0] if added is not None or alone else original[1], changed[0], added)

    def _last_sum(self, value: ir.Value) -> ir.Value | None:
        """The sum that the readers of a value of the changed model read in the original, where it is gone."""
        for use in value.uses():
            twin = self.nodes.get(use.node.name or "")
            read = twin.inputs[use.idx] if twin is not None and use.idx < len(twin.inputs) else None
            maker = None if read is None else read.producer()
            if maker is not None and is_sum(maker) and maker.name not in self.left:
                return read
        return None


def _as_output(added: NDArray[Any], last: Pair, original: list[NDArray[Any]]) -> NDArray[Any] | None:
    """What is added, in the shape of the layer's output; None where the sum is larger than that."""
    whole, own, *_ = original
    if whole.shape != own.shape:
        return None
    shape = list(own.shape)
    shape[last.after.output_axis] = int(last.outputs.sum())
    try:
        return np.broadcast_to(added, shape)
    except ValueError:
        return None


def _term(layer: Layer) -> tuple[ir.Node, ir.Value] | None:
    """The sum that alone reads the layer's output, and what else goes into it, where that is computed."""
    reader = single_consumer(layer.node.outputs[0])
    if reader is None or not is_sum(reader):
        return None
    other = next((value for value in reader.inputs if value is not None and value is not layer.node.outputs[0]), None)
    return None if other is None or constant_of(other) is not None or other.producer() is None else (reader, other)
