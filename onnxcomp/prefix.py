"""Activations inside a model, batch by batch, without running it from its inputs each time."""

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as common
from numpy.typing import NDArray

from onnxcomp.core import Context
from onnxcomp.runtime import Session
from onnxcomp.samples import Batch, Dataset, Feeds

BATCH = 64
"""Samples per run, where the model leaves that open."""


class Prefix:
    """What leads to the layers of a model, run batch by batch.

    Args:
        model: weights of layers that were asked for before the last one asked for must not change any more.
        data: samples.
        context: target and memory cap.
    """

    def __init__(self, model: ir.Model, data: Dataset, context: Context) -> None:
        self._model, self._data, self._context = model, data.unpadded, context
        self._known: list[Feeds] = []
        self._outlines: list[Batch] = []

    def runs(
        self, values: list[ir.Value], *, starts: bool = False, settled: Collection[ir.Value] = ()
    ) -> Iterator[tuple[Batch, list[NDArray[Any]]]]:
        """Each batch, with the values of its real rows.

        Args:
            values: of the model.
            starts: whether all that is asked for later may be run from these values, so that they are kept instead of
                what was.
            settled: those that are kept beside that, as no weight that they depend on will change.
        """
        names = [value.name or "" for value in values]
        start = {name for known in self._known[:1] for name in known}
        missing = [name for name in names if name not in start]
        session = self._session(start, missing) if missing else None
        from_data = not self._outlines or (session is not None and not start.issuperset(session.inputs))
        kept = {*names} if starts else {value.name or "" for value in settled}
        found: list[Feeds] = []
        small = bool(kept)
        for number, batch in enumerate(self._data.batches(BATCH) if from_data else self._outlines):
            known = self._known[number] if self._known else {}
            outputs: Feeds = {}
            if session is not None:
                feeds = {name: array for name, array in {**batch.feeds, **known}.items() if name in session.inputs}
                outputs = dict(session.run(feeds, missing))
            outputs |= {name: known[name] for name in names if name in known}
            yield batch, [batch.trim(outputs)[name] for name in names]
            keeping = ({} if starts else known) | {name: outputs[name] for name in names if name in kept}
            small = small and sum(a.nbytes for a in keeping.values()) * (number + 1) < self._context.memory // 4
            found = [*found, keeping] if small else []
            if number == len(self._outlines):
                self._outlines.append(replace(batch, feeds={}, targets={}))
        if starts or small:
            self._known = found

    def _session(self, start: set[str], names: list[str]) -> Session:
        return Session(part_between(self._model, start, names), self._context.target, spinning=False)


def part_between(model: ir.Model, start: set[str], names: list[str]) -> ir.Model:
    """The part of a model that leads to some values from others that are known."""
    part = model.clone()
    values = {value.name: value for node in part.graph for value in node.outputs}
    for name in start & values.keys():
        value = values[name]
        given = ir.Value(name=name, shape=value.shape, type=value.type or ir.TensorType(ir.DataType.FLOAT))
        value.replace_all_uses_with(given, replace_graph_outputs=True)
        value.name = f"{name}_computed"
        part.graph.inputs.append(given)
    values |= {value.name: value for value in part.graph.inputs}
    for name in names:
        if values[name].dtype is None:
            values[name].type = ir.TensorType(ir.DataType.FLOAT)
    part.graph.outputs[:] = [values[name] for name in names]
    common.RemoveUnusedNodesPass()(part)
    for value in list(part.graph.inputs):
        if not value.uses() and value.name not in names:
            part.graph.inputs.remove(value)
    return part
