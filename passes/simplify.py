"""Clean-up: the same function with fewer, cheaper nodes.

1. Weights that are also graph inputs become constants, for only then can anything fold.
2. Constants fold, duplicates merge, functions inline, unused nodes go (onnxscript's optimizer).
3. Affine layers fold into the convolution beside them:  g (W x + b) + h  ->  (g W) x + (g b + h).
4. Targets of Reshape that are computed from shapes become constants where the arithmetic is provable.

The result is run beside the original on the same inputs. Should outputs differ, each step is tried alone and the guilty
one is taken back, with its reason.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
import onnx_ir.passes.common as common
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
from onnxcomp.model import all_nodes, free_inputs
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
        changes = _changes(model, candidate)
        return Outcome(candidate if changes else model, changes, tuple(skips))


def promote_weights(model: ir.Model) -> None:
    """Remove from the graph inputs those that have an initializer."""
    for value in list(model.graph.inputs):
        if value.name in model.graph.initializers:
            model.graph.inputs.remove(value)


def fold_constants(model: ir.Model) -> None:
    """Everything computed from constants becomes a constant, as long as the file does not grow for it."""
    optimize_ir(model, should_fold=_small_constant_of_shape)


def fold_affine(model: ir.Model) -> None:
    """BatchNormalization, Mul and Add fold into the convolution or Gemm beside them."""
    RewritePass(
        [
            fuse_batchnorm_into_conv_rule,
            fuse_batchnorm_into_conv_transpose_rule,
            fuse_batchnorm_into_gemm_rule,
            affine_conv_fusion_rule,
            conv_affine_fusion_rule,
        ]
    )(model)
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
            constant = ir.val(f"{node.outputs[0].name}_target", const_value=ir.tensor(target))
            model.graph.register_initializer(constant)
            node.replace_input_with(1, constant)
        fold_constants(model)


_STEPS: tuple[Callable[[ir.Model], None], ...] = (promote_weights, fold_constants, fold_affine, fold_shapes)


def _computed(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is None


def _small_constant_of_shape(node: ir.Node) -> bool | None:
    """Onnxscript never folds ConstantOfShape, to keep files small; small ones hold up whole shape chains."""
    if node.op_type != "ConstantOfShape" or node.inputs[0] is None or node.inputs[0].const_value is None:
        return None
    return bool(node.inputs[0].const_value.numpy().prod() <= _FOLDED_ELEMENTS)


def _try(step: Callable[[ir.Model], None], model: ir.Model) -> str | None:
    try:
        step(model)
    except Exception as error:  # third-party rules raise anything; the step is then taken back and the reason shown
        return f"{type(error).__name__}: {error}"
    return None


def _changes(before: ir.Model, after: ir.Model) -> tuple[Change, ...]:
    """Nodes gone, nodes whose operator or weights changed, and inputs that became constants."""
    changes = [
        Change(value.name or "", "overridable weight made constant")
        for value in before.graph.inputs
        if value.name in before.graph.initializers and value.name in {v.name for v in after.graph.initializers.values()}
        if value.name not in {v.name for v in after.graph.inputs}
    ]
    name_nodes(after)
    remaining = {node.name: node for node in all_nodes(after)}
    for node in all_nodes(before):
        twin = remaining.get(node.name)
        if twin is None:
            changes.append(Change(node.name or "", f"{node.op_type} folded away"))
        elif [v and v.name for v in node.inputs] != [v and v.name for v in twin.inputs]:
            changes.append(Change(node.name or "", f"{node.op_type} rewired"))
    return tuple(changes)
