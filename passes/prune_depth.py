"""Depth pruning: branches of residual blocks go whole, and what is left makes up for them.

    x + f(x)  ->  x

1. Every sum with an operand that holds layers and can go is found (`branches`).
2. What the model's outputs lose without it is measured, one branch at a time.
3. The branch goes whose loss is least for the cost that it saves; then the best of the others are measured again, as
   each counts for more once others are gone; until no more than the target remains.
4. Every layer from there on is fitted again, those before a missing sum to what that sum was.

Narrow layers often take as long as wide ones (kernels work in blocks of channels); a layer that is gone takes nothing.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import onnx_ir as ir

from onnxcomp.branches import Branch, Operands, branches, named, spared, without_branches
from onnxcomp.core import NOT_NAMED, Context, Option, Outcome, Pass, Skip, name_nodes
from onnxcomp.cost import node_costs
from onnxcomp.effects import Answers
from onnxcomp.errors import OnnxcompError
from onnxcomp.facts import observe, sized
from onnxcomp.graph import remove_unused
from onnxcomp.model import free_inputs, spec_of
from onnxcomp.reconstruction import reconstruct
from onnxcomp.relations import Shapes
from onnxcomp.samples import Dataset
from onnxcomp.settings import within
from onnxcomp.timing import profiles
from onnxcomp.widths import Cost

_SHORTLIST = 6
"""Branches that are measured again when others are gone."""


@dataclass(frozen=True)
class PruneDepth(Pass):
    """Depth pruning to a share of a cost.

    Attributes:
        remains: share of the cost that is to remain.
        cost: which cost.
        reconstruct: fit every layer again that comes after.
        jointly: also fit the layers of a row together, which takes longer than all else.
        parts: by the name of a sum, which of its operands goes, 0 or 1; where any is named, no other goes.

    Raises:
        OptionError: a setting out of range, or a sum that would lose both operands.
    """

    name: ClassVar[str] = "prune-depth"
    summary: ClassVar[str] = "depth pruning: branches of residual blocks go whole, the others are fitted again"

    remains: Annotated[float, within(above=0, most=1)] = 0.9
    cost: Cost = Cost.FLOPS
    reconstruct: bool = True
    jointly: bool = True
    parts: Operands = ()

    def apply(self, model: ir.Model, context: Context) -> Outcome:
        """Find, choose, remove; then fit."""
        found = _Found.of(model, context)
        if isinstance(found, str):
            return Outcome(model, (), (Skip("model", found),))
        if self.parts:
            gone = named(found.branches, self.parts, "parts")
            reason = NOT_NAMED
        else:
            gone = found.chosen(self.remains, found.costs(self.cost)) if found.branches else []
            reason = "the target is met at less loss elsewhere"
        skips = spared(found.model, found.branches, gone, reason)
        if not gone:
            return Outcome(model, (), tuple(skips))
        made = without_branches(found.model, [(branch.join, branch.operand) for branch in gone])
        changes = [change for branch in gone for change in branch.changes()]
        if self.reconstruct:
            fitted, unfitted = reconstruct(found.model, made, {}, found.data, context, jointly=self.jointly)
            changes, skips = changes + fitted, skips + unfitted
            remove_unused(made)  # the weights as they were before
        return Outcome(made, tuple(changes), tuple(skips))

    def options(self, model: ir.Model, context: Context) -> Iterator[Option]:
        """Each branch that can go; the error is that of the model's outputs, as measured."""
        copy = model.clone()
        name_nodes(copy)
        found = _Found.of(copy, context)
        if isinstance(found, str):
            return
        for branch in found.branches:
            yield Option(branch.join, branch.operand, found.error([branch]), 0, 0.0)


@dataclass(frozen=True, eq=False)
class _Found:
    """The branches of a model, and the shapes of its tensors in a run of one sample."""

    model: ir.Model
    shapes: Shapes
    branches: tuple[Branch, ...]
    data: Dataset
    context: Context
    answers: Answers

    @classmethod
    def of(cls, model: ir.Model, context: Context) -> "_Found | str":
        """Find them, or say why not."""
        if any(spec_of(value) is None for value in free_inputs(model)):
            return "an input is no tensor, so that shapes cannot be observed"
        data = context.samples(model)
        try:
            shapes = observe(model, next(iter(data.batches(1))).feeds).shapes
            nodes = {node.name or "": node for node in model.graph}
            found = [
                branch
                for branch in branches(model, shapes)
                if not any(context.excludes(nodes[name]) for name in branch.nodes)
            ]
            return cls(model, shapes, tuple(found), data, context, Answers(model, data, context))
        except OnnxcompError as error:
            return f"it cannot be observed: {error.fact}"

    def error(self, gone: list[Branch]) -> float:
        """Relative squared error of the outputs without some branches."""
        return self.answers.error(without_branches(self.model, [(branch.join, branch.operand) for branch in gone]))

    def costs(self, which: Cost) -> Mapping[str, float]:
        """Of each node."""
        if which is Cost.LATENCY:
            rows = self.data.select(row % len(self.data) for row in range(self.context.batch))
            feeds = next(iter(rows.batches(self.context.batch))).feeds
            return profiles([self.model], self.context, feeds)[0].times
        values = {"flops": "flops", "params": "parameters", "size": "bytes"}[which]
        return {cost.name: float(getattr(cost, values) or 0) for cost in node_costs(sized(self.model, self.shapes))}

    def chosen(self, remains: float, costs: Mapping[str, float]) -> list[Branch]:
        """The branches that go so that a share of the cost remains, or all that save anything."""
        total = sum(costs.values())
        saved = {branch: sum(costs.get(name, 0.0) for name in branch.nodes) for branch in self.branches}
        prices = {branch: self.error([branch]) / saved[branch] for branch in self.branches if saved[branch]}
        gone: list[Branch] = []
        left = total
        while prices and left > remains * total:
            if gone:
                base = self.error(gone)
                for branch in sorted(prices, key=lambda branch: prices[branch])[:_SHORTLIST]:
                    prices[branch] = (self.error([*gone, branch]) - base) / saved[branch]
            best = min(prices, key=lambda branch: prices[branch])
            gone.append(best)
            left -= saved[best]
            prices = {branch: price for branch, price in prices.items() if not branch.nodes & best.nodes}
        return gone
