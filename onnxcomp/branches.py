"""Branches that a model can do without: x + f(x) becomes x, and all that f alone needed goes.

Residual networks keep working without some of their blocks (Veit et al. 2016, "Residual Networks Behave Like Ensembles
of Relatively Shallow Networks"). Unlike narrower layers, a missing one saves its time whatever the kernels.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, TypeAlias

import onnx_ir as ir

from onnxcomp.core import Change, Skip
from onnxcomp.errors import OptionError
from onnxcomp.graph import constant_of, is_sum, remove_unused
from onnxcomp.layers import layer_of, layers
from onnxcomp.relations import Shapes
from onnxcomp.settings import within

Operands: TypeAlias = tuple[tuple[str, Annotated[int, within(0, 1)]], ...]
"""By the name of a sum, which of its operands goes."""
STAYS = "stays: "
"""What is said of a branch that could have gone, before the reason."""


@dataclass(frozen=True)
class Branch:
    """One operand of a sum that can go.

    Attributes:
        join: name of the sum.
        operand: which of its operands goes, 0 or 1.
        nodes: names of the nodes that only this operand needs, and of the sum.
    """

    join: str
    operand: int
    nodes: frozenset[str]

    def changes(self) -> list[Change]:
        """What becomes of the sum, and of all that goes with it."""
        gone = sorted(self.nodes - {self.join})
        said = f"without a branch of {len(gone)} {'node' if len(gone) == 1 else 'nodes'}"
        return [Change(self.join, said), *(Change(name, f"gone with the branch at '{self.join}'") for name in gone)]


def named(known: Iterable[Branch], operands: Operands, setting: str) -> list[Branch]:
    """Branches by the names of their sums, and which operand.

    Args:
        known: those there are.
        operands: those wanted.
        setting: of a pass that names them, for messages.

    Raises:
        OptionError: there is none.
    """
    by_name = {(branch.join, branch.operand): branch for branch in known}
    found: list[Branch] = []
    for join, operand in operands:
        if (join, operand) not in by_name:
            names = ", ".join(sorted({join for join, _ in by_name})) or "none"
            raise OptionError(
                f"'{join}' has no operand {operand} that can go",
                remedy=f"sums that can lose one: {names}",
                setting=(setting, join),
            )
        found.append(by_name[join, operand])
    return found


def branches(model: ir.Model, shapes: Shapes) -> list[Branch]:
    """The operands of sums in the main graph that hold layers and whose loss leaves the shape of the sum as it is.

    Args:
        model: with names on its nodes.
        shapes: of its tensors in one run.
    """
    order = {node: number for number, node in enumerate(model.graph)}
    found = []
    for join in model.graph:
        if not is_sum(join) or join.outputs[0].is_graph_output():
            continue
        for operand in (0, 1):
            other, whole = join.inputs[1 - operand], shapes.get(join.outputs[0])
            if other is None or constant_of(other) is not None or whole is None or shapes.get(other) != whole:
                continue
            nodes = _only_for(join, operand, order)
            if any(layer_of(node) for node in nodes):
                names = frozenset(node.name or "" for node in (*nodes, join))
                found.append(Branch(join.name or "", operand, names))
    return found


def spared(
    model: ir.Model, known: Iterable[Branch], gone: Collection[Branch], reason: str | Callable[[Branch], str]
) -> list[Skip]:
    """Why sums keep operands that can go, and with them the layers that these hold.

    Args:
        model: with all of them.
        known: branches that can go.
        gone: those that do.
        reason: why the others do not, or each of them.
    """
    lost = {name for branch in gone for name in branch.nodes}
    weighty = {layer.name for layer in layers(model)}
    staying = [branch for branch in known if branch.join not in lost]
    joins = Counter(branch.join for branch in staying)
    inside = {name: branch for branch in staying for name in sorted(branch.nodes & weighty - lost)}
    said = reason if callable(reason) else lambda _: reason
    found = []
    for name, branch in [*((branch.join, branch) for branch in staying), *inside.items()]:
        which = f" (operand {branch.operand})" if joins[branch.join] > 1 else ""
        found.append(Skip(name, f"the branch at '{branch.join}'{which} {STAYS}{said(branch)}"))
    return found


def _only_for(join: ir.Node, operand: int, order: Mapping[ir.Node, int]) -> set[ir.Node]:
    """The nodes of the main graph that nothing but one operand of a node needs."""
    value = join.inputs[operand]
    if value is None or join.inputs[0] is join.inputs[1]:
        return set()
    found: set[ir.Node] = set()
    waiting = {maker for maker in [value.producer()] if maker is not None and maker in order}
    while waiting:
        node = max(waiting, key=lambda node: order[node])
        waiting.discard(node)
        uses = [use for output in node.outputs for use in output.uses()]
        if any(output.is_graph_output() for output in node.outputs):
            continue
        if all(use.node in found or (use.node is join and use.idx == operand) for use in uses):
            found.add(node)
            makers = (given.producer() for given in node.inputs if given is not None)
            waiting |= {maker for maker in makers if maker is not None and maker in order}
    return found


def without_branches(model: ir.Model, gone: Iterable[tuple[str, int]]) -> ir.Model:
    """A clone in which sums have lost an operand, by name and which."""
    made = model.clone()
    nodes = {node.name: node for node in made.graph}
    for join, operand in gone:
        node = nodes[join]
        other = node.inputs[1 - operand]
        assert other is not None
        ir.convenience.replace_all_uses_with(node.outputs[0], other)
        for use in list(other.uses()):  # Relu(Relu(x)) = Relu(x)
            maker = other.producer()
            if maker is not None and maker.op_type == use.node.op_type == "Relu":
                use.node.replace_input_with(0, maker.inputs[0])
        made.graph.remove(node, safe=True)
    remove_unused(made)
    return made
