"""Weights as they are stored in a model: which layer each belongs to, and the bytes that it takes."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxcomp.constants import weights_of
from onnxcomp.units import Units


@dataclass(frozen=True)
class Stored:
    """A weight.

    Attributes:
        part: name of the node that reads it, by which a pass that stores weights knows it.
        bytes: that they take.
    """

    part: str
    bytes: int


def stored_weights(model: ir.Model, units: Units) -> Mapping[str, Sequence[Stored]]:
    """The weights by unit; not those that several units read.

    What reads integers is often no layer, but what turns them into floats for one.

    Args:
        model: with constants as initializers, and names on its nodes.
        units: of what the model was made of.
    """
    found: dict[str, list[Stored]] = defaultdict(list)
    for weight in weights_of(model, integers=True):
        readers = {_unit(use.node, units) for use in weight.value.uses()}
        if len(readers) == 1 and (unit := readers.pop()):
            found[unit].append(Stored(weight.nodes[0].name or "", weight.array.nbytes))
    return found


def _unit(node: ir.Node, units: Units) -> str:
    """The unit of what became of one of its nodes, or of what alone reads that; empty where it has none."""
    while (unit := units.of(node.name or "")) not in units.members:
        readers = {use.node for value in node.outputs for use in value.uses()}
        if len(readers) != 1:
            return ""
        node = readers.pop()
    return unit
