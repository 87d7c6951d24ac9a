"""Nodes that run as one: a node with the element-wise nodes behind it, and whatever passes made of them.

ONNX Runtime fuses element-wise nodes into the kernel before them, so that only sums over such units compare between a
model and what became of it. What passes add is named after the node or the tensor that it stands for.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from copy import copy
from typing import Self

import onnx_ir as ir

from onnxcomp.cost import NodeCost, node_costs
from onnxcomp.graph import single_consumer
from onnxcomp.profiling import Profile

# fmt: off
_ELEMENTWISE = frozenset({
    "Abs", "Add", "BatchNormalization", "Celu", "Clip", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish",
    "Identity", "LeakyRelu", "Mish", "Mul", "Neg", "PRelu", "Pow", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign",
    "Sqrt", "Sub", "Swish", "Tanh", "ThresholdedRelu",
})
# fmt: on


class Units:
    """A model's units, each known by the name of its first node.

    Args:
        original: with names on its nodes.

    Attributes:
        heads: the name of its unit for every node, in order.
        members: the nodes of the main graph by unit.
    """

    def __init__(self, original: ir.Model, running: set[str] | None = None) -> None:
        self.heads: dict[str, str] = {}
        self.members: dict[str, list[ir.Node]] = defaultdict(list)
        self._makers: dict[str, str] = {}
        running = {cost.name for cost in node_costs(original)} if running is None else running
        for node in original.graph.all_nodes():
            head = self.heads[node.name or ""] = self._head(node, running)
            self._makers |= {value.name or "": head for value in node.outputs}
            if node.graph is original.graph:
                self.members[head].append(node)

    def _head(self, node: ir.Node, running: set[str]) -> str:
        computed = [value for value in node.inputs if value is not None and is_computed(value, running)]
        if node.op_type in _ELEMENTWISE and len(computed) == 1 and single_consumer(computed[0]) is node:
            maker = computed[0].producer()
            if maker is not None and maker.graph is node.graph:
                return self.heads[maker.name or ""]
        return node.name or ""

    def of(self, name: str) -> str:
        """The unit of a node of the model or of what became of it: its own name where it belongs to none."""
        start = name
        while start:
            if (head := self.heads.get(start) or self._makers.get(start)) is not None:
                return head
            start = start.rpartition("_")[0]
        return name

    def of_result(self, result: ir.Model, running: set[str]) -> Self:
        """The same units, for what became of the model.

        Where the first node of a unit is gone, what is left of it belongs to what it now follows.

        Args:
            result: with names on its nodes.
            running: names of those that run.
        """
        now, found = Units(result, running).heads, copy(self)
        left = {name: self.of(now[name]) for name, head in self.heads.items() if name in now and head not in now}
        found.heads = self.heads | {name: head for name, head in left.items() if head in now}
        return found

    def bytes(self, costs: Iterable[NodeCost], parameters: Mapping[str, int]) -> dict[str, int]:
        """Bytes of weights by unit; the sum is the model's, but for rounding.

        Args:
            costs: of either model.
            parameters: of the original's nodes, by which tensors that several layers read are shared out.
        """
        readers: dict[ir.Value, dict[str, int]] = defaultdict(dict)
        found: dict[str, float] = {}
        for cost in costs:
            head = self.of(cost.name)
            found.setdefault(head, 0.0)
            for value in (value for weight in cost.weights for value in weight.stored):
                readers[value][head] = parameters.get(head, 0)
        for value, shares in readers.items():
            tensor = value.const_value or ir.convenience.get_const_tensor(value)
            whole = sum(shares.values())
            for head, share in shares.items():
                part = share / whole if whole else 1 / len(shares)
                found[head] += part * (tensor.nbytes if tensor is not None else 0)
        return {head: round(size) for head, size in found.items()}

    def times(self, profile: Profile) -> dict[str, float]:
        """Microseconds by unit."""
        found: dict[str, float] = defaultdict(float)
        for name, taken in profile.times.items():
            found[self.of(name)] += taken
        return found


def is_computed(value: ir.Value, running: set[str]) -> bool:
    """Whether it depends on the model's inputs, given the names of the nodes that run."""
    if value.const_value is not None:
        return False
    producer = value.producer()
    return producer is None or producer.name in running
