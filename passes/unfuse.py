"""Sums that ONNX Runtime would fuse with the normalization behind them stay nodes of their own.

    Add(x, y) -> LayerNormalization     becomes     Sum(x, y) -> LayerNormalization

ONNX Runtime replaces the former by SkipLayerNormalization, whose kernel on the CPU adds up one number after another:
it takes several times as long as Add and LayerNormalization do one after the other, which compute many numbers at once.
A Sum of two is the same function, and nothing fuses it. Kernels for other types than float32 were not measured, so
those stay.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
import onnx_ir.passes.common as common

from onnxcomp.core import NOT_NAMED, Change, Context, Outcome, Pass, Skip
from onnxcomp.errors import OptionError
from onnxcomp.graph import constant_of, declared_outputs
from onnxcomp.model import all_nodes, opset

_OPSET = 8
"""From which on Sum takes tensors of different shapes, as Add does."""


@dataclass(frozen=True)
class Unfuse(Pass):
    """Writes sums in front of a normalization so that they are not fused with it.

    Attributes:
        parts: names of the sums; all in front of a normalization where none is named.

    Raises:
        OptionError: no such sum.
    """

    name: ClassVar[str] = "unfuse"
    summary: ClassVar[str] = "sums stay apart from the normalization behind them, where the fused kernel is slow"
    exact: ClassVar[bool] = True

    parts: tuple[str, ...] = ()

    def apply(self, model: ir.Model, context: Context) -> Outcome:
        """Find the sums, and write them otherwise."""
        found = {node.name or "": node for node in normalized_sums(model)}
        if any(node.outputs[0].dtype is None for node in found.values()):
            with declared_outputs(model):
                common.ShapeInferencePass()(model)
        if unknown := [name for name in self.parts if name not in found]:
            raise OptionError(
                f"there is no sum '{unknown[0]}' in front of a normalization",
                remedy=f"those there are: {', '.join(found) or 'none'}",
                setting=("parts", unknown[0]),
            )
        if not found:
            return Outcome(model, (), (Skip("model", "no layer normalization in it reads a sum"),))
        changes, skips = [], []
        for name, node in found.items():
            if self.parts and name not in self.parts:
                skips.append(Skip(name, NOT_NAMED))
            elif context.excludes(node):
                skips.append(Skip(name, "excluded by the user"))
            elif (dtype := node.outputs[0].dtype) != ir.DataType.FLOAT:
                kind = "an unknown type" if dtype is None else dtype.name
                skips.append(Skip(name, f"it adds {kind}, and only sums of FLOAT are known to be worth it"))
            elif opset(model) < _OPSET:
                skips.append(Skip(name, f"before opset {_OPSET} Sum takes tensors of one shape alone"))
            else:
                node.op_type = "Sum"
                changes.append(Change(name, "Sum in place of Add, which is not fused with what follows"))
        return Outcome(model, tuple(changes), tuple(skips))


def normalized_sums(model: ir.Model) -> Iterator[ir.Node]:
    """The Adds of two computed tensors that a layer normalization reads, be it one node or spelt out."""
    for node in all_nodes(model):
        if (
            node.op_type == "Add"
            and not node.domain
            and not any(constant_of(value) is not None for value in node.inputs)
        ):
            readers = {use.node.op_type for use in node.outputs[0].uses()}
            if "LayerNormalization" in readers or readers >= {"ReduceMean", "Sub"}:
                yield node
