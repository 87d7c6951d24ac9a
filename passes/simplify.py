"""Clean-up: the same function with fewer, cheaper nodes.

1. Weights that are also graph inputs become constants, for only then can anything fold.
2. Constants fold, duplicates merge, functions inline, unused nodes go (onnxscript's optimizer).
3. Affine layers fold into the convolution beside them:  g (W x + b) + h  ->  (g W) x + (g b + h).
4. Targets of Reshape that are computed from shapes become constants where the arithmetic is provable.
5. A Slice of a Slice along other axes becomes one.

The result is run beside the original on the same inputs. Should outputs differ, each step is tried alone and the guilty
one is taken back, with its reason.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from numpy.typing import NDArray
from onnxscript.optimizer import optimize_ir
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules.common import (
    affine_conv_fusion_rule,
    conv_affine_fusion_rule,
    fuse_batchnorm_into_conv_rule,
    fuse_batchnorm_into_conv_transpose_rule,
    fuse_batchnorm_into_gemm_rule,
)

from onnxcomp.core import Change, Context, Outcome, Pass, Skip, name_nodes
from onnxcomp.equivalence import Reference
from onnxcomp.graph import Builder, declared_outputs, single_consumer
from onnxcomp.model import all_nodes
from onnxcomp.symbolic import reshape_target

_FOLDED_ELEMENTS = 4096
_SWEEPS = 4


@dataclass(frozen=True)
class Simplify(Pass):
    """Clean-up without any change of function.

    Attributes:
        keep_overridable: leave weights that are also graph inputs overridable by the caller.
    """

    name: ClassVar[str] = "simplify"
    summary: ClassVar[str] = "clean-up: constants, BatchNorm and shape arithmetic fold, exporters' detours disappear"
    exact: ClassVar[bool] = True

    keep_overridable: bool = False

    def apply(self, model: ir.Model, context: Context) -> Outcome:
        """Run the steps and check the result against the original."""
        reference = Reference(model, context)
        steps = [step for step in _STEPS if not (self.keep_overridable and step is promote_weights)]
        candidate = model.clone()
        problem = None
        for step in steps:
            problem = problem or _try(step, candidate)
        problem = problem or reference.difference(candidate)
        skips = []
        if problem is not None:
            candidate = model
            for step in steps:
                trial = candidate.clone()
                problem = _try(step, trial) or reference.difference(trial)
                if problem is None:
                    candidate = trial
                else:
                    skips.append(Skip(step.__name__, f"taken back: {problem}"))
        keep_names(model, candidate)
        changes = _changes(model, candidate)
        return Outcome(candidate if changes else model, changes, tuple(skips))


def promote_weights(model: ir.Model) -> None:
    """Remove from the graph inputs those that have an initializer."""
    for value in list(model.graph.inputs):
        if value.name in model.graph.initializers:
            model.graph.inputs.remove(value)


def fold_constants(model: ir.Model) -> None:
    """What is computed from constants becomes a constant if it is small or takes the place of as many elements."""
    for node in model.graph.all_nodes():
        _cast_as_told(node)
    with declared_outputs(model), _without_defaults(model):
        optimize_ir(model, output_size_limit=_FOLDED_ELEMENTS, should_fold=_small_constant_of_shape)


def _cast_as_told(node: ir.Node) -> None:
    """CastLike to float8 becomes a Cast here: onnxscript's rule drops `saturate`, on which overflow depends."""
    like = node.inputs[1] if node.op_type == "CastLike" and node.domain == "" else None
    if like is not None and like.dtype is not None and "saturate" in node.attributes:
        node.op_type, node.attributes["to"] = "Cast", ir.AttrInt64("to", like.dtype)
        node.resize_inputs(1)


def fold_affine(model: ir.Model) -> None:
    """BatchNormalization, Mul and Add fold into the convolution or Gemm beside them."""
    rules = [
        fuse_batchnorm_into_conv_rule,
        fuse_batchnorm_into_conv_transpose_rule,
        fuse_batchnorm_into_gemm_rule,
        affine_conv_fusion_rule,
        conv_affine_fusion_rule,
    ]
    with _without_defaults(model):
        RewritePass(rules)(model)
    common.RemoveUnusedNodesPass()(model)


def fold_shapes(model: ir.Model) -> None:
    """Computed Reshape targets become constants; each sweep makes more shapes known for the next."""
    for _ in range(_SWEEPS):
        nodes = [
            (node, target)
            for node in model.graph
            if node.op_type == "Reshape" and node.domain == "" and _computed(node.inputs[1])
            if (target := reshape_target(node)) is not None
        ]
        if not nodes:
            return
        for node, target in nodes:
            node.replace_input_with(1, Builder(model.graph).constant(target, f"{node.outputs[0].name}_target"))
            _forget_shapes(node.outputs[0])
        common.ShapeInferencePass()(model)
        fold_constants(model)


def _forget_shapes(value: ir.Value) -> None:
    """Drop what was inferred below a value: a name given to a size for want of knowledge outlives the knowledge."""
    front, seen = [value], set()
    while front:
        value = front.pop()
        node = value.producer()
        if value in seen or value.is_graph_output() or node is None or node.domain not in {"", "ai.onnx"}:
            continue
        seen.add(value)
        value.shape = None
        front.extend(output for use in value.uses() for output in use.node.outputs)


def merge_slices(model: ir.Model) -> None:
    """Slice(Slice(x)) with constant bounds becomes one Slice where each axis is cut once."""
    builder = Builder(model.graph)
    for node in list(model.graph):
        first = node.inputs[0].producer() if node.op_type == "Slice" and node.inputs[0] is not None else None
        if first is None or first.op_type != "Slice" or single_consumer(first.outputs[0]) is not node:
            continue
        inner, outer = _bounds(first), _bounds(node)
        if inner is None or outer is None or np.intersect1d(inner[2], outer[2]).size:
            continue
        node.resize_inputs(5)
        for index, name in enumerate(("starts", "ends", "axes", "steps")):
            merged = np.concatenate([inner[index], outer[index]])
            node.replace_input_with(1 + index, builder.constant(merged, f"{node.name}_{name}"))
        node.replace_input_with(0, first.inputs[0])
        model.graph.remove(first, safe=True)
    common.RemoveUnusedNodesPass()(model)


_STEPS: tuple[Callable[[ir.Model], None], ...] = (
    promote_weights,
    fold_constants,
    fold_affine,
    fold_shapes,
    merge_slices,
)


def keep_names(before: ir.Model, after: ir.Model) -> None:
    """Give nodes that a rewrite made anew the name of the original whose work they do.

    That is, of the nodes which led to the same output and are gone, the nearest of the same operator; else the one that
    computed the output. So a convolution that absorbed its BatchNormalization is still the user's convolution.
    """
    producers = {output.name: node for node in all_nodes(before) for output in node.outputs}
    originals = {node.name for node in all_nodes(before)}
    taken = {node.name for node in all_nodes(after)}
    for node in all_nodes(after):
        origin = None if node.name in originals else producers.get(node.outputs[0].name)
        gone = [] if origin is None or origin.name in taken else [origin]
        for candidate in gone:  # grows as it is read
            above = (value.producer() for value in candidate.inputs if value is not None)
            gone += [found for found in above if found is not None and found not in gone and found.name not in taken]
        if gone:
            node.name = next((found for found in gone if found.op_type == node.op_type), gone[0]).name
            taken.add(node.name)


def _computed(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is None


def _small_constant_of_shape(node: ir.Node) -> bool | None:
    """Onnxscript never folds ConstantOfShape, to keep files small; small ones hold up whole shape chains."""
    if node.op_type != "ConstantOfShape" or node.inputs[0] is None or node.inputs[0].const_value is None:
        return None
    return bool(node.inputs[0].const_value.numpy().prod() <= _FOLDED_ELEMENTS)


def _bounds(slice_: ir.Node) -> list[NDArray[np.int64]] | None:
    """Starts, ends, axes (counted from the front) and steps of a Slice, or None where they are not known."""
    data = slice_.inputs[0]
    if slice_.domain or data is None or data.shape is None or len(slice_.inputs) < 3:
        return None
    arrays: list[NDArray[np.int64]] = []
    for index in range(1, 5):
        value = slice_.inputs[index] if index < len(slice_.inputs) else None
        if value is None:
            arrays.append(np.arange(len(arrays[0])) if index == 3 else np.ones(len(arrays[0]), np.int64))
        elif value.const_value is None or value.is_graph_input():
            return None
        else:
            arrays.append(value.const_value.numpy().astype(np.int64))
    arrays[2] %= len(data.shape)
    return arrays


def _try(step: Callable[[ir.Model], None], model: ir.Model) -> str | None:
    try:
        step(model)
    except Exception as error:  # noqa: BLE001  (third-party rules raise anything; the reason is shown)
        return f"{type(error).__name__}: {error}"
    return None


@contextmanager
def _without_defaults(model: ir.Model) -> Iterator[None]:
    """Hide the values of overridable weights for a while: some rules fold them although a caller may feed others."""
    hidden: dict[ir.Value, ir.TensorProtocol | None] = {}
    for value in model.graph.inputs:
        if value.name is not None and value.name in model.graph.initializers:
            hidden[value] = value.const_value
            del model.graph.initializers[value.name]
            value.const_value = None
    yield
    for value, tensor in hidden.items():
        value.const_value = tensor
        model.graph.register_initializer(value)


def _changes(before: ir.Model, after: ir.Model) -> tuple[Change, ...]:
    """Nodes gone or with another operator or inputs, inputs that became constants, and tensors that nothing read."""
    kept, inputs = {value.name for value in _tensors(after)}, {value.name for value in after.graph.inputs}
    changes = []
    for value in _tensors(before):
        if value.name not in kept and not value.uses():
            changes.append(Change(value.name or "", "unused tensor removed"))
        elif value.is_graph_input() and value.name not in inputs:
            changes.append(Change(value.name or "", "overridable weight made constant"))
    name_nodes(after)
    remaining = {node.name: node for node in all_nodes(after)}
    for node in all_nodes(before):
        twin = remaining.get(node.name)
        if twin is None:
            changes.append(Change(node.name or "", f"{node.op_type} folded away"))
        elif node.op_type != twin.op_type:
            changes.append(Change(node.name or "", f"{node.op_type} became {twin.op_type}"))
        elif [v and v.name for v in node.inputs] != [v and v.name for v in twin.inputs]:
            known = {value.name for value in node.inputs if value is not None}
            new = [value.const_value for value in twin.inputs if value is not None and value.name not in known]
            what = "new constants" if new and None not in new else "other inputs"
            changes.append(Change(node.name or "", f"{node.op_type} with {what}"))
    return tuple(changes)


def _tensors(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        yield from graph.initializers.values()
