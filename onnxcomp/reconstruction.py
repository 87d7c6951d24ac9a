"""Weights of a changed model fitted again, so that each layer gives what it gave in the original.

Layer by layer, in topological order: on inputs as the already fitted part of the changed model makes them, ridge
regression towards the original's outputs, centred on the weights there are. In front of a residual sum the target is
what the sum is to be, less what the other branch now gives, so that the errors upstream cancel. Layers in a row are
then fitted together (`together`). Normalisations get the statistics that bring each channel's mean and spread back.

Only one layer's Gram matrix is held at a time, summed in float64 over float32 products of each batch. What a row of
layers reads is kept for the next one to start from where the memory cap allows, else the model is run again from its
inputs.
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxcomp.chains import chains
from onnxcomp.core import Change, Context, Skip
from onnxcomp.errors import DataError
from onnxcomp.executors import ahead, beside
from onnxcomp.graph import Builder, constant_of, is_sum
from onnxcomp.layers import Layer, layers
from onnxcomp.numerics.blas import as_pays, one_thread
from onnxcomp.numerics.moments import Spread
from onnxcomp.numerics.regression import Moments, best_damping
from onnxcomp.prefix import BATCH, Prefix
from onnxcomp.samples import Dataset
from onnxcomp.together import fit_together
from onnxcomp.twins import Pair, Run, Twins

_ROWS_PER_INPUT = 64
_LEAST_ROWS = 16384
Project: TypeAlias = Callable[[Layer, NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]
"""From a layer, weights (out, in) that fit it and H (groups, in, in) of its inputs, the weights that it gets."""

_IN_VAIN = 2
"""Rows of the same kind, in turn, that fitting together did not help, after which others are left out."""
_DAMPING = (0.1, 1.0)
"""Of the regression, as shares of the mean of H's diagonal: whichever is better on batches held out."""
_HELD_OUT = 8
"""One batch in so many is, or the last one of fewer."""


def reconstruct(
    original: ir.Model,
    changed: ir.Model,
    outputs: Mapping[str, NDArray[np.bool_]],
    data: Dataset,
    context: Context,
    project: Project | None = None,
    jointly: bool = True,
    most: int | None = None,
) -> tuple[list[Change], list[Skip]]:
    """Fit the layers of the changed model, in place.

    Args:
        original: before channels went.
        changed: with nodes of the same names.
        outputs: by node name (out,) which of its output channels are left, where some are gone.
        data: samples to fit on.
        context: target, seed, progress.
        project: makes of each layer's fitted weights those that it gets. Layers are then fitted one by one only.
        jointly: also fit layers in a row together, which takes longer than all else.
        most: fit so many layers only, the first ones that what changed reaches.

    Returns:
        What was fitted, and what was not and why.
    """
    nodes = {node.name or "": node for node in original.graph}
    left = {node.name or "" for node in changed.graph}
    twins = Twins(Prefix(original, data, context), Prefix(changed, data, context), nodes, left)
    pairs, skips = _pairs(original, changed, outputs, context)
    if project is None:
        alike = _untouched(original, changed)
        pairs = [pair for pair in pairs if pair.after.name not in alike]
    pairs = pairs[:most]
    norms = _Norms(original, changed, outputs, twins, context)
    fitted: list[str] = []
    by_name = {pair.after.name: pair for pair in pairs}
    every = min(max(-(-data.samples // BATCH), 2), _HELD_OUT)
    in_vain: Counter[Hashable] = Counter()  # by what a row's layers were, and which lost outputs
    done = 0
    factors = {pair.after.name for pair in pairs if pair.before is None}
    for row in chains([pair.after for pair in pairs], factors):
        block = [by_name[layer.name] for layer in row]
        kind = tuple(((pair.before or pair.after).weight_shape, bool(pair.outputs.all())) for pair in block)
        both = jointly and len(block) > 1 and project is None and block[-1].before is not None
        both = both and in_vain[kind] < _IN_VAIN
        start: Layer | None = block[0].after
        for pair in block:
            norms.adjust(pair.after.node)
            if pair.before is not None:
                rows = max(_LEAST_ROWS, _ROWS_PER_INPUT * pair.after.input_width)
                runs = twins.runs(pair, starts=start, settled=not both)
                reason = _fit(pair, runs, rows / data.samples, every, context.seed, project)
                if reason:
                    skips.append(Skip(pair.after.name, f"not fitted again: {reason}"))
                else:
                    fitted.append(pair.after.name)
                both = both and not reason
                start = None
        if both:
            helped = fit_together(block, changed, twins, data.samples, context)
            in_vain[kind] = in_vain[kind] + 1 if helped is False else 0
            if isinstance(helped, str):
                skips += [Skip(pair.after.name, f"fitted by itself only: {helped}") for pair in block]
        done += len(block)
        context.progress(done, len(pairs), "fitting layers again")
    norms.adjust()
    what = f"fitted again{' on made-up inputs' if context.data is None else ''}"
    return [Change(name, what) for name in (*fitted, *norms.adjusted)], skips


def _pairs(
    original: ir.Model, changed: ir.Model, outputs: Mapping[str, NDArray[np.bool_]], context: Context
) -> tuple[list[Pair], list[Skip]]:
    """The main graph's layers in topological order, and those that stay as they are."""
    befores = {layer.name: layer for layer in layers(original)}
    pairs, skips = [], []
    for after in layers(changed):
        reason, before = None, befores.get(after.name)
        if context.excludes(after.node):
            reason = "excluded by the user"
        elif before is not None and len(before.weight.uses()) > 1:
            reason = "another node shares its weight"
        elif after.node.graph is not changed.graph:
            reason = "a body of control flow holds it"
        elif not np.isfinite(after.matrix()).all():
            reason = "its weights are not finite"
        elif after.is_scaled:
            reason = "it scales its product or its bias"
        elif after.node.op_type == "ConvTranspose":
            reason = "least squares is not worked out for ConvTranspose"
        if reason:
            skips.append(Skip(after.name, f"not fitted again: {reason}"))
        else:
            pairs.append(Pair(before, after, outputs.get(after.name, np.ones((before or after).outputs, bool))))
    return pairs, skips


def _untouched(original: ir.Model, changed: ir.Model) -> set[str]:
    """Names of nodes whose inputs and readers are what they were, and so are those of the sums that they are in."""
    twins = {node.name: node for node in original.graph}
    alike: set[ir.Value] = {value for value in changed.graph.inputs if not value.is_initializer()}
    for node in changed.graph:
        twin = twins.get(node.name)
        if twin is not None and node.op_type == twin.op_type and str(node.attributes) == str(twin.attributes):
            pairs = zip(node.inputs, twin.inputs, strict=False)
            if len(node.inputs) == len(twin.inputs) and all(_same(new, old, alike) for new, old in pairs):
                alike |= set(node.outputs)

    def settled(value: ir.Value) -> bool:
        return value in alike and all(
            (twin := twins.get(use.node.name)) is not None
            and use.idx < len(twin.inputs)
            and (read := twin.inputs[use.idx]) is not None
            and read.name == value.name
            for use in value.uses()
        )

    found = set()
    for node in changed.graph:
        sums = [use.node.outputs[0] for value in node.outputs for use in value.uses() if is_sum(use.node)]
        if all(settled(value) for value in (*node.outputs, *sums)):
            found.add(node.name or "")
    return found


def _same(value: ir.Value | None, twin: ir.Value | None, alike: set[ir.Value]) -> bool:
    if value is None or twin is None:
        return value is twin
    if value in alike:
        return value.name == twin.name
    return value.const_value is not None and value.const_value is twin.const_value


class _Norms:
    """The main graph's BatchNormalization nodes, whose statistics follow what reaches them after channels are gone.

    Attributes:
        adjusted: names of those whose statistics are others now.
    """

    def __init__(
        self,
        original: ir.Model,
        changed: ir.Model,
        outputs: Mapping[str, NDArray[np.bool_]],
        twins: Twins,
        context: Context,
    ) -> None:
        self._befores = {node.name or "": node for node in original.graph}
        self._outputs, self._twins = outputs, twins
        self.adjusted: list[str] = []
        self._waiting = [
            node
            for node in changed.graph
            if node.op_type == "BatchNormalization"
            and len(node.outputs) == 1
            and all(constant_of(value) is not None for value in node.inputs[1:])
            and not context.excludes(node)
        ]

    def adjust(self, before: ir.Node | None = None) -> None:
        """Those on which a node depends, or all that are left."""
        ready = [node for node in self._waiting if before is None or node in _ancestors(before)]
        for node in ready:
            self._adjust(node)
        self._waiting = [node for node in self._waiting if node not in ready]

    def _adjust(self, after: ir.Node) -> None:
        """Mean and variance so that each channel's output has the mean and spread that it had.

        With input moments (m, v) before and (m', v') now, var' + eps = (var + eps) v' / v and
        (m' - mean') / sqrt(var' + eps) = (m - mean) / sqrt(var + eps).
        """
        before = self._befores[after.name or ""]
        data, given = before.inputs[0], after.inputs[0]
        assert data is not None
        assert given is not None
        old, new = None, None
        for original, changed in self._twins.values(data, given):
            parts = [Spread.of(np.moveaxis(array, 1, -1).reshape(-1, array.shape[1])) for array in (original, changed)]
            old, new = parts if old is None or new is None else (old.merge(parts[0]), new.merge(parts[1]))
        if old is None or new is None:
            return
        kept = self._outputs.get(after.name or "", np.ones(len(old.mean), bool))
        epsilon = after.attributes.get_float("epsilon", 1e-5)
        mean, variance = (np.asarray(constant_of(value), np.float64) for value in after.inputs[3:])
        known = (old.variance[kept] > 0) & (new.variance > 0)
        ratio = np.divide(new.variance, old.variance[kept], out=np.ones_like(mean), where=known)
        ratio = np.maximum(ratio, epsilon / (variance + epsilon))  # so that the variance is not negative
        shifted = new.mean - (old.mean[kept] - mean) * np.sqrt(ratio)
        graph = after.graph
        assert isinstance(graph, ir.Graph)
        for index, values in ((3, shifted), (4, (variance + epsilon) * ratio - epsilon)):
            value = after.inputs[index]
            array = constant_of(value)
            assert value is not None
            assert array is not None
            fitted = Builder(graph).constant(values.astype(array.dtype), f"{value.name}_fitted")
            after.replace_input_with(index, fitted)
        self.adjusted.append(after.name or "")


def _ancestors(node: ir.Node) -> set[ir.Node]:
    found: set[ir.Node] = set()
    open_ends = [node]
    while open_ends:
        for value in open_ends.pop().inputs:
            maker = None if value is None else value.producer()
            if maker is not None and maker not in found:
                found.add(maker)
                open_ends.append(maker)
    return found


def _fit(pair: Pair, runs: Iterator[Run], share: float, every: int, seed: int, project: Project | None) -> str | None:
    """Ridge regression of one layer, on so many rows of each sample, one batch in `every` held out; or why not."""
    after = pair.after
    groups, width = after.groups, after.input_width

    def products(numbered: tuple[int, Run]) -> tuple[int, Moments] | None:
        number, run = numbered
        if pair.outputs.size * math.prod(after.positions(run.data.shape)) != run.wanted.size:
            return None
        rows = int(np.ceil(share * run.batch.valid))

        def same() -> np.random.Generator:
            return np.random.default_rng([seed, number])  # the same positions everywhere

        x = after.rows(run.data, rows, same())
        with np.errstate(invalid="ignore", over="ignore"):  # refused below, by name
            target = run.target(pair, rows, same)
        if not (np.isfinite(run.data).all() and np.isfinite(target).all()):
            raise DataError(
                f"the input or the output of '{after.name}' is not finite",
                "an activation overflows, or the data hold NaN or infinity",
                "check the data, or leave the layer out with --exclude",
            )
        return number, Moments.of(x, target.reshape(len(target), groups, -1).transpose(1, 2, 0).astype(x.dtype))

    reason = None
    total, held_out = Moments(), Moments()
    with one_thread():  # for each of those beside each other
        for found in beside(products, enumerate(ahead(runs))):
            if found is None:
                reason = "channels that are gone are rows of its input"
                continue  # and not the end: what leads to later layers is still to be kept
            number, sums = found
            if (number + 1) % every:
                total += sums
            else:
                held_out += sums
    if reason:
        return reason
    with as_pays(width):
        old = after.matrix().astype(np.float64).reshape(groups, -1, width)
        damping = best_damping(_DAMPING, total, held_out, old, biased=after.adds_bias)
        total += held_out
        moments = total.centred(biased=after.adds_bias)
        matrices = moments.fitted(old, damping)
        if project is not None:
            H = np.asarray(moments.xx, np.float64)
            matrices = project(after, np.asarray(matrices.reshape(-1, width), np.float64), H).reshape(matrices.shape)
    after.set_matrix(matrices.reshape(-1, width))
    if after.adds_bias:
        after.set_bias((moments.y - np.matmul(matrices, moments.x[:, :, None])[:, :, 0]).ravel())
    return None
