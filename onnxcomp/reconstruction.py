"""Weights of a pruned model fitted again, so that each layer gives what it gave in the original.

Layer by layer, in topological order: on inputs as the already fitted part of the pruned model makes them, ridge
regression towards the original's outputs, centred on the weights there are. In front of a residual sum the target is
what the sum is to be, less what the other branch now gives, so that the errors upstream cancel. Layers in a row are
then fitted together to what the last one is to give, on part of the samples, and stay so if that helps on others.

Only one layer's Gram matrix is held at a time, summed in float64 over float32 products of each batch. What a row of
layers reads is kept for the next one to start from where the memory cap allows, else the model is run again from its
inputs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxcomp.chains import chains
from onnxcomp.core import Context
from onnxcomp.errors import OnnxcompError
from onnxcomp.graph import Builder, constant_of, single_consumer
from onnxcomp.layers import Layer, layers
from onnxcomp.numerics import joint
from onnxcomp.numerics.obs import refit
from onnxcomp.prefix import Prefix, part_between
from onnxcomp.runtime import Session
from onnxcomp.samples import Batch, Dataset

_ROWS_PER_INPUT = 96
_LEAST_ROWS = 32768
_START = 3
"""The part of the rows, one in so many, that is enough for layers that are fitted together afterwards."""

_JOINT_ROWS = 65536
_JOINT_SAMPLES = 32
"""At least, even where fewer have as many rows."""
_HELD_OUT = 0.2
"""Share of them on which it is judged whether fitting layers together helped."""

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
    twins = _Twins(Prefix(original, data, context), Prefix(pruned, data, context))
    by_name = {pair.after.name: pair for pair in pairs}
    done = 0
    for row in chains([pair.after for pair in pairs]):
        block = [by_name[layer.name] for layer in row]
        for pair in block:
            rows = max(_LEAST_ROWS, _ROWS_PER_INPUT * pair.after.input_width) / (1 if len(block) == 1 else _START)
            runs = twins.runs(pair.before.data, pair, starts=pair is block[0])
            _fit(pair, runs, rows / data.samples, context.seed, damping)
        if len(block) > 1:
            _fit_together(block, pruned, twins, data.samples, context, damping)
        done += len(block)
        context.progress(done, len(pairs), "fitting layers again")


class _Run(NamedTuple):
    """One batch in both models.

    Attributes:
        batch: of the data.
        before: a value of the original.
        data: what a layer, or the first of several in a row, reads in the pruned model.
        skips: what is added to the last one's output, in the original and in the pruned model, where that is computed.
    """

    batch: Batch
    before: NDArray[Any]
    data: NDArray[Any]
    skips: tuple[NDArray[Any], NDArray[Any]] | None


@dataclass(frozen=True)
class _Twins:
    """The original and the pruned model, run side by side."""

    original: Prefix
    pruned: Prefix

    def runs(self, before: ir.Value, last: Pair, first: Layer | None = None, *, starts: bool = False) -> Iterator[_Run]:
        """Each batch.

        Args:
            before: what is wanted of the original.
            last: the layer that is to give what it gave, together with what is added to it.
            first: the layer of whose input it is a function, if not of its own.
            starts: whether all that is asked for later may be run from these values.
        """
        wanted = [[before], [(first or last.after).data]]
        skips = _other_branch(last.before), _other_branch(last.after)
        if skips[0] is not None and skips[1] is not None:
            wanted = [[*wanted[0], skips[0]], [*wanted[1], skips[1]]]
        for (batch, original), (_, pruned) in zip(
            self.original.runs(wanted[0], starts=starts), self.pruned.runs(wanted[1], starts=starts), strict=True
        ):
            yield _Run(batch, original[0], pruned[0], (original[1], pruned[1]) if len(original) > 1 else None)


def _as_outputs(run: _Run, before: tuple[int, ...], after: tuple[int, ...]) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """What is added, in the shapes of the two outputs; None where there is nothing, or the sum is larger than they."""
    try:
        return run.skips and (np.broadcast_to(run.skips[0], before), np.broadcast_to(run.skips[1], after))
    except ValueError:
        return None


def _fit(pair: Pair, runs: Iterator[_Run], share: float, seed: int, damping: float) -> None:
    """Ridge regression of one layer, on so many rows of each sample."""
    before, after = pair.before, pair.after
    groups, width = after.groups, after.input_width
    kept = np.flatnonzero(pair.outputs)
    H = np.zeros((groups, width + 1, width + 1))
    G = np.zeros((groups, len(kept) // groups, width + 1))
    for number, run in enumerate(runs):
        rows, state = int(np.ceil(share * run.batch.valid)), [seed, number]  # the same positions in both models
        x = after.rows(run.data, rows, np.random.default_rng(state))
        target = _outputs(before, before.rows(run.before, rows, np.random.default_rng(state)), kept)
        if skips := _as_outputs(run, before.output_shape(run.before.shape), after.output_shape(run.data.shape)):
            target += before.output_rows(skips[0], rows, np.random.default_rng(state))[:, kept]
            target -= after.output_rows(skips[1], rows, np.random.default_rng(state))
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


def _fit_together(
    block: list[Pair], pruned: ir.Model, twins: _Twins, samples: int, context: Context, damping: float
) -> None:
    """Fit layers in a row to what the last one is to give, where that helps on samples held out."""
    layers_ = [pair.after for pair in block]
    parts = _parts(block, twins, samples, context)
    if parts is None:
        return
    try:
        links = _links(layers_, pruned, context)
        fitted = joint.fit(links, parts[0], context.seed, damping)
        better = [replace(link, weight=weight, bias=bias) for link, (weight, bias) in zip(links, fitted, strict=True)]
        helps = joint.error(better, parts[1]) < joint.error(links, parts[1])
    except (OnnxcompError, ValueError):  # constants of a batch's own size between them, or moments that are singular
        return
    if helps:
        for layer, (weight, bias) in zip(layers_, fitted, strict=True):
            set_matrix(layer, weight.reshape(-1, weight.shape[2]))
            if bias is not None:
                set_bias(layer, bias.ravel())


def _parts(
    block: list[Pair], twins: _Twins, samples: int, context: Context
) -> tuple[list[joint.Part], list[joint.Part]] | None:
    """What the block reads and is to give, on samples to fit and on others; None where that cannot be had."""
    first, last = block[0].after, block[-1]
    kept = np.flatnonzero(last.outputs)
    everything = np.iinfo(np.int64).max
    random = np.random.default_rng(context.seed)
    uses: NDArray[np.int64] | None = None  # by sample: 0 to fit, 1 held out, 2 not at all
    parts: tuple[list[joint.Part], list[joint.Part]] = [], []
    seen = 0
    for run in twins.runs(last.before.node.outputs[0], last, first):
        narrow = list(run.before.shape)
        narrow[last.after.output_axis] = len(kept)
        skips = _as_outputs(run, run.before.shape, tuple(narrow)) or ()
        arrays = [run.data, run.before, *skips]
        valid = run.batch.valid
        if any(array.dtype != np.float32 or array.shape[:1] != (valid,) for array in arrays):
            return None
        if uses is None:
            rows = run.before.size // last.before.outputs / valid
            room = context.memory / 8 / (4 * rows * sum(pair.after.input_width * pair.after.groups for pair in block))
            count = int(min(max(_JOINT_ROWS / rows, _JOINT_SAMPLES), room, samples * (1 - _HELD_OUT)))
            if count < min(_JOINT_SAMPLES, samples * (1 - _HELD_OUT) - 1):
                return None
            held_out = max(int(count * _HELD_OUT), 1)
            uses = np.repeat([0, 1, 2], [count, held_out, max(samples - count - held_out, 0)])
            random.shuffle(uses)
        for use, found in enumerate(parts):
            chosen = np.flatnonzero(uses[seen : seen + valid] == use)
            if len(chosen):
                target = last.before.output_rows(run.before[chosen], everything, random)[:, kept]
                if skips:
                    target = target + last.before.output_rows(skips[0][chosen], everything, random)[:, kept]
                    target -= last.after.output_rows(skips[1][chosen], everything, random)
                found.append(joint.Part(run.data[chosen], target))
        seen += valid
    return parts if all(parts) else None


def _links(row: list[Layer], model: ir.Model, context: Context) -> list[joint.Link]:
    result = []
    for layer, follower in zip(row, [*row[1:], None], strict=True):
        matrix = layer.matrix().astype(np.float64)
        bias = layer.bias_vector().reshape(layer.groups, -1) if layer.adds_bias else None
        function = _identity if follower is None else _function(layer.node.outputs[0], follower.data, model, context)
        everything = np.iinfo(np.int64).max
        drawn = np.random.default_rng(0)  # nothing is drawn where all rows are taken
        result.append(
            joint.Link(
                matrix.reshape(layer.groups, -1, matrix.shape[1]),
                bias,
                partial(layer.rows, count=everything, generator=drawn),
                layer.from_rows,
                layer.from_output_rows,
                partial(layer.output_rows, count=everything, generator=drawn),
                function,
            )
        )
    return result


def _identity(array: joint.Tensor) -> joint.Tensor:
    return array


def _function(source: ir.Value, result: ir.Value, model: ir.Model, context: Context) -> Callable[[joint.Tensor], Any]:
    """What leads from one value to another."""
    if source is result:
        return _identity
    given, made = source.name or "", result.name or ""
    session = Session(part_between(model, {given}, [made]), replace(context.target, threads=1), spinning=False)
    return lambda array: session.run({given: np.ascontiguousarray(array)})[made]


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


def ordered(model: ir.Model) -> Iterator[Layer]:
    """The main graph's layers in topological order."""
    for layer in layers(model):
        if layer.node.graph is model.graph:
            yield layer
