"""Weights of a pruned model fitted again, so that each layer gives what it gave in the original.

Layer by layer, in topological order: on inputs as the already fitted part of the pruned model makes them, ridge
regression towards the original's outputs, centred on the weights there are. In front of a residual sum the target is
what the sum is to be, less what the other branch now gives, so that the errors upstream cancel. Only one layer's Gram
matrix is held at a time, summed in float64 over float32 products of each batch. What a layer read is kept for the next
one to start from where the memory cap allows, else the model is run again from its inputs.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from numpy.typing import NDArray

from onnxcomp.core import Context
from onnxcomp.graph import Builder, constant_of, single_consumer
from onnxcomp.layers import Layer, layers
from onnxcomp.numerics.obs import refit
from onnxcomp.runtime import Session
from onnxcomp.samples import Batch, Dataset, Feeds

_BATCH = 64
_ROWS_PER_INPUT = 96
_LEAST_ROWS = 32768

Rows = NDArray[np.floating]


@dataclass(frozen=True, eq=False)
class Pair:
    """A layer in the original and in the pruned model.

    Attributes:
        before: in the original.
        after: in the pruned model.
        outputs: (out,) which of the original's output channels are left.
    """

    before: Layer
    after: Layer
    outputs: NDArray[np.bool_]


def reconstruct(
    original: ir.Model, pruned: ir.Model, pairs: list[Pair], data: Dataset, context: Context, damping: float = 1e-2
) -> None:
    """Fit the layers of the pruned model, in place.

    Args:
        original: with the layers' `before`.
        pruned: with the layers' `after`.
        pairs: in topological order.
        data: samples to fit on.
        context: target, seed, progress.
        damping: of the regression, as a share of the mean of H's diagonal.
    """
    prefixes = _Prefix(original, data, context), _Prefix(pruned, data, context)
    for done, pair in enumerate(pairs):
        share = max(_LEAST_ROWS, _ROWS_PER_INPUT * pair.after.input_width) / data.samples
        _fit(pair, prefixes, share, context, damping)
        context.progress(done + 1, len(pairs), "fitting layers again")


def _fit(pair: Pair, prefixes: tuple["_Prefix", "_Prefix"], share: float, context: Context, damping: float) -> None:
    before, after = pair.before, pair.after
    groups, width = after.groups, after.input_width
    kept = np.flatnonzero(pair.outputs)
    skips = _other_branch(before), _other_branch(after)
    wanted = [[before.data], [after.data]]
    if skips[0] is not None and skips[1] is not None:
        wanted = [[before.data, skips[0]], [after.data, skips[1]]]
    H = np.zeros((groups, width + 1, width + 1))
    G = np.zeros((groups, len(kept) // groups, width + 1))
    runs = zip(*(prefix.runs(values) for prefix, values in zip(prefixes, wanted, strict=True)), strict=True)
    for number, ((batch, original), (_, pruned)) in enumerate(runs):
        rows, seed = int(np.ceil(share * batch.valid)), [context.seed, number]  # the same positions in both models
        x = after.rows(pruned[0], rows, np.random.default_rng(seed))
        target = _outputs(before, before.rows(original[0], rows, np.random.default_rng(seed)), kept)
        if len(original) > 1:
            target += before.output_rows(original[1], rows, np.random.default_rng(seed))[:, kept]
            target -= after.output_rows(pruned[1], rows, np.random.default_rng(seed))
        x = np.concatenate([x, np.ones((*x.shape[:2], 1), x.dtype)], axis=2)
        H += np.matmul(x.swapaxes(1, 2), x)
        G += np.matmul(target.reshape(len(target), groups, -1).transpose(1, 2, 0).astype(x.dtype), x)
    H, G = H / H[:, -1:, -1:], G / H[:, -1:, -1:]
    biased = after.adds_bias
    matrices, biases = [], []
    for group, old in enumerate(after.matrix().astype(np.float64).reshape(groups, -1, width)):
        mean, output = (H[group, :-1, -1], G[group, :, -1]) if biased else (np.zeros(width), np.zeros(len(old)))
        moment, cross = H[group, :-1, :-1] - np.outer(mean, mean), G[group, :, :-1] - np.outer(output, mean)
        matrices.append(refit(old, moment, cross, damping))
        biases.append(output - matrices[-1] @ mean)
    set_matrix(after, np.concatenate(matrices))
    if biased:
        set_bias(after, np.concatenate(biases))


def _outputs(layer: Layer, x: NDArray[np.floating], kept: NDArray[np.int64]) -> Rows:
    """(rows, kept) what the layer gives for (groups, rows, in)."""
    matrix, per_group = layer.matrix(), layer.outputs // layer.groups
    result = np.empty((x.shape[1], len(kept)), x.dtype)
    for group in np.unique(kept // per_group):
        chosen = kept // per_group == group
        result[:, chosen] = x[group] @ matrix[kept[chosen]].T
    return result + layer.bias_vector()[kept].astype(x.dtype)


def set_matrix(layer: Layer, matrix: NDArray[np.floating]) -> None:
    """Give a layer another weight, in its own type and layout."""
    _replace(layer, layer.index, layer.from_matrix(matrix), layer.weight.name or "")


def set_bias(layer: Layer, bias: NDArray[np.floating]) -> None:
    """Give a convolution or Gemm another bias, (out,)."""
    name = f"{layer.name}_bias" if layer.bias is None else layer.bias.name or ""
    layer.node.resize_inputs(3)
    _replace(layer, 2, bias, name)


def _replace(layer: Layer, index: int, array: NDArray[Any], name: str) -> None:
    tensor, graph = layer.weight.const_value, layer.node.graph
    assert tensor is not None
    assert isinstance(graph, ir.Graph)
    value = Builder(graph).constant(array.astype(tensor.dtype.numpy()), f"{name.removesuffix('_fitted')}_fitted")
    layer.node.replace_input_with(index, value)


def _other_branch(layer: Layer) -> ir.Value | None:
    """What is added to the layer's output, where that is computed."""
    reader = single_consumer(layer.node.outputs[0])
    if reader is None or reader.op_type != "Add":
        return None
    other = next((value for value in reader.inputs if value is not None and value is not layer.node.outputs[0]), None)
    return None if other is None or constant_of(other) is not None or other.producer() is None else other


class _Prefix:
    """What leads to the layers of a model, run batch by batch.

    Args:
        model: weights of layers that were asked for before the last one asked for must not change any more.
        data: samples.
        context: target and memory cap.
    """

    def __init__(self, model: ir.Model, data: Dataset, context: Context) -> None:
        self._model, self._data, self._context = model, data, context
        self._known: list[Feeds] = []
        self._outlines: list[Batch] = []

    def runs(self, values: list[ir.Value]) -> Iterator[tuple[Batch, list[NDArray[Any]]]]:
        """Each batch, with the values of its real rows."""
        names = [value.name or "" for value in values]
        start = {name for known in self._known[:1] for name in known}
        missing = [name for name in names if name not in start]
        session = self._between(missing, start) if missing else None
        from_data = not self._outlines or (session is not None and not start.issuperset(session.inputs))
        found: list[Feeds] = []
        small = True
        for number, batch in enumerate(self._data.batches(_BATCH) if from_data else self._outlines):
            known = self._known[number] if self._known else {}
            outputs: Feeds = {}
            if session is not None:
                feeds = {name: array for name, array in {**batch.feeds, **known}.items() if name in session.inputs}
                outputs = dict(session.run(feeds, missing))
            outputs |= {name: known[name] for name in names if name in known}
            yield batch, [batch.trim(outputs)[name] for name in names]
            small = small and sum(a.nbytes for a in outputs.values()) * (number + 1) < self._context.memory // 4
            found = [*found, outputs] if small else []
            if number == len(self._outlines):
                self._outlines.append(replace(batch, feeds={}, targets={}))
        self._known = found

    def _between(self, names: list[str], start: set[str]) -> Session:
        """The part of the model that leads to some values from others that are known."""
        part = self._model.clone()
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
        return Session(part, self._context.target)


def ordered(model: ir.Model) -> Iterator[Layer]:
    """The main graph's layers in topological order."""
    for layer in layers(model):
        if layer.node.graph is model.graph:
            yield layer
