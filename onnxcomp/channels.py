"""Coupled channels: which positions of which axes of which tensors must go together, so that the rest still fits.

From the output channels of a layer, labels spread through the graph both ways until nothing is left to label: operators
that compute tie axes as their relation says, operators that only move data are run on the labels. Where an operator
cannot lose just any channels (a Reshape into heads, a grouped convolution), the possible ways are followed apart, each
with the channels joined that it needs to be joined. Channels that reach an input or output of the model, or an operator
that nothing is known of, are frozen, with that reason.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from onnxcomp import movement
from onnxcomp.facts import Facts, is_fixed, made_up, observe, traceable
from onnxcomp.layers import FLOATS, is_empty, layer_of
from onnxcomp.relations import Relation, relations
from onnxcomp.runtime import Feeds

Labels = NDArray[np.int64]

_MOST_WAYS = 24
"""Ways to cut one layer's channels that are followed; real models have three at most."""


@dataclass(frozen=True, eq=False)
class Slot:
    """Where a group's channels lie in one tensor.

    Attributes:
        value: the tensor, a weight or an activation.
        axis: its axis.
        positions: (size, n): the n positions along the axis that belong to each channel of the group.
    """

    value: ir.Value
    axis: int
    positions: NDArray[np.int64]

    @property
    def tensor(self) -> str:
        """The tensor's name."""
        return self.value.name or ""

    @property
    def offset(self) -> int:
        """The first position that belongs to the group."""
        return int(self.positions.min())


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels of which any may go, if it goes everywhere.

    Attributes:
        name: of the layer that makes them, numbered where it makes several kinds (heads and head dimensions).
        size: how many channels.
        slots: everywhere they lie.
        crossing: normalisations and reductions over them: without a channel the others get other values.
        made_by: the layers, embeddings and recurrent networks that make them, by name.
    """

    name: str
    size: int
    slots: tuple[Slot, ...]
    crossing: tuple[str, ...] = ()
    made_by: tuple[str, ...] = ()

    @property
    def block(self) -> int:
        """Neighbouring positions that each channel takes in all weights: the size of a head, 1 for most others."""
        weights = [slot.positions for slot in self.slots if slot.value.const_value is not None]
        return min((each.shape[1] if (np.diff(each) == 1).all() else 1 for each in weights), default=1)


@dataclass(frozen=True)
class Frozen:
    """Channels that cannot go, by the layer that makes them, and why."""

    name: str
    reason: str


@dataclass(frozen=True, eq=False)
class ChannelGroups(Sequence[ChannelGroup]):
    """All groups of a model, and what is in none."""

    groups: tuple[ChannelGroup, ...]
    frozen: tuple[Frozen, ...]
    model: ir.Model
    facts: Facts

    @overload
    def __getitem__(self, index: int) -> ChannelGroup: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[ChannelGroup, ...]: ...
    def __getitem__(self, index: int | slice) -> ChannelGroup | tuple[ChannelGroup, ...]:
        return self.groups[index]

    def __len__(self) -> int:
        return len(self.groups)


class _AmbiguousError(Exception):
    """The labels of a tensor vary along several axes, or a node has several relations: one must be chosen."""

    def __init__(self, place: ir.Value | ir.Node, choices: Sequence[int]) -> None:
        super().__init__(place)
        self.place, self.choices = place, choices


class _Family:
    """Labels that spread from one tensor, under a choice for each place that leaves one."""

    def __init__(self, model: ir.Model, facts: Facts, choices: Mapping[Any, int]) -> None:
        self._inputs, self._outputs = set(model.graph.inputs), set(model.graph.outputs)
        self._facts, self._choices = facts, choices
        self._owners = _body_owners(model)
        self._parents = np.zeros(0, np.int64)
        self._reasons: dict[int, str] = {}
        self._crossing: dict[int, set[str]] = defaultdict(set)
        self._todo: dict[ir.Node, None] = {}
        self._lost = False
        self.axes: dict[ir.Value, dict[int, Labels]] = defaultdict(dict)

    # -- labels -----------------------------------------------------------------------------------------------------

    def fresh(self, count: int) -> Labels:
        """New labels."""
        labels = np.arange(len(self._parents), len(self._parents) + count)
        self._parents = np.concatenate([self._parents, labels])
        return labels

    def find(self, labels: Labels) -> Labels:
        """What labels have become by being joined."""
        return self._parents[labels]

    def join(self, first: Labels, second: Labels) -> None:
        """Make pairs of labels one."""
        first, second = np.broadcast_arrays(self.find(first), self.find(second))
        apart = first != second
        if not apart.any():
            return
        total = len(self._parents)
        pairs = coo_array((np.ones(int(apart.sum())), (first[apart], second[apart])), shape=(total, total))
        count, component = connected_components(pairs, directed=False)
        smallest = np.full(count, total)
        np.minimum.at(smallest, component, np.arange(total))
        self._parents = smallest[component][self._parents]
        for label in [label for label in self._reasons if self._parents[label] != label]:
            self._reasons.setdefault(int(self._parents[label]), self._reasons.pop(label))
        for label in [label for label in self._crossing if self._parents[label] != label]:
            self._crossing[int(self._parents[label])] |= self._crossing.pop(label)

    def freeze(self, labels: Labels, reason: str) -> None:
        """Forbid labels to go."""
        for label in np.unique(self.find(labels)).tolist():
            self._reasons.setdefault(label, reason)

    # -- spreading --------------------------------------------------------------------------------------------------

    def put(self, value: ir.Value, axis: int, labels: Labels) -> None:
        """Label an axis of a tensor, or join with the labels that it has."""
        if axis in self.axes[value]:
            self.join(self.axes[value][axis], labels)
            return
        self.axes[value][axis] = labels
        if value in self._inputs:
            self.freeze(labels, f"'{value.name}' is an input of the model")
        if value in self._outputs:
            self.freeze(labels, f"'{value.name}' is an output of the model")
        for node in (value.producer(), self._owners.get(value), *(use.node for use in value.uses())):
            if node is not None:
                self._todo[node] = None

    def spread(self, value: ir.Value, axis: int) -> bool:
        """Label an axis and all that hangs together with it. What is all frozen is not followed where it is ambiguous.

        Returns:
            Whether some of it may go.

        Raises:
            _AmbiguousError: there is a choice to make first.
        """
        first = self.fresh(self._facts.shapes[value][axis])
        self.put(value, axis, first)
        known = -1
        while self._todo:
            if len(self._reasons) != known:
                known = len(self._reasons)
                self._lost = all(int(label) in self._reasons for label in np.unique(self.find(first)))
            node = next(iter(self._todo))
            del self._todo[node]
            self._pass_through(node)
        return not self._lost

    def _pass_through(self, node: ir.Node) -> None:
        tensors = [value for value in (*node.inputs, *node.outputs) if value is not None]
        if node.op_type == "Shape" and not node.domain:
            return self._tell_shape(node)
        if node.op_type == "ConstantOfShape" and not node.domain:
            return None
        if node.op_type in {"If", "Loop"} and not node.domain:
            return self._through_bodies(node)
        if movement.is_movement(node, self._facts.contents):
            if all(value in self._facts.shapes for value in (*movement.data_inputs(node), *node.outputs)):
                return self._move(node)
            return self._refuse(node, "has unknown shapes")
        if any(value not in self._facts.shapes for value in tensors):
            return self._refuse(node, "has unknown shapes")
        ways = relations(node, self._facts.shapes)
        if not ways:
            return self._refuse(node, "is an operator whose channels nothing is known of")
        if len(ways) > 1 and node not in self._choices:
            return self._choose(node, range(len(ways)))
        return self._relate(node, ways[self._choices.get(node, 0)])

    def _choose(self, place: ir.Value | ir.Node, choices: Sequence[int]) -> None:
        if not self._lost:
            raise _AmbiguousError(place, choices)

    def _refuse(self, node: ir.Node, why: str) -> None:
        for value in {*node.inputs, *node.outputs}:
            for labels in self.axes.get(value, {}).values() if value is not None else ():
                self.freeze(labels, f"{node.op_type} '{node.name}' {why}")

    def _through_bodies(self, node: ir.Node) -> None:
        """Either branch of an If gives the same outputs; what a Loop carries comes in, goes round and comes out."""
        bodies = [
            attribute.as_graph() for attribute in node.attributes.values() if attribute.type == ir.AttributeType.GRAPH
        ]
        alike: list[list[tuple[ir.Value | None, int]]] = []
        if node.op_type == "If":
            alike = [
                [(value, 0) for value in same] for same in zip(node.outputs, *(b.outputs for b in bodies), strict=True)
            ]
        else:
            body, carried = bodies[0], len(node.inputs) - 2
            for k in range(carried):
                values = node.inputs[2 + k], body.inputs[2 + k], body.outputs[1 + k], node.outputs[k]
                alike.append([(value, 0) for value in values])
            for inner, outer in zip(body.outputs[1 + carried :], node.outputs[carried:], strict=True):
                alike.append([(inner, 0), (outer, 1)])  # stacked along a new first axis
        for same in alike:
            for value, shift in same:
                for axis, labels in list(self.axes.get(value, {}).items()) if value is not None else ():
                    if axis < shift:
                        self.freeze(labels, f"{node.op_type} '{node.name}' stacks what it gives along it")
                        continue
                    for other, moved in same:
                        if other is not None:
                            self.put(other, axis - shift + moved, labels)

    def _tell_shape(self, node: ir.Node) -> None:
        """A size may tell other operators what shape to make, and must not enter the arithmetic."""
        source = node.inputs[0]
        assert source is not None
        if source not in self._facts.shapes:
            return self._refuse(node, "has unknown shapes")
        rank = len(self._facts.shapes[source])
        stop = node.attributes.get_int("end", rank)
        told = np.arange(rank)[node.attributes.get_int("start", 0) : stop]
        front = [(node.outputs[0], told)]
        while front:
            value, axes = front.pop()
            for use in value.uses():
                reader = use.node
                if movement.takes_shape(reader, use.idx):
                    continue
                known = [v in self._facts.shapes for v in (*reader.inputs, *reader.outputs) if v is not None]
                if movement.is_movement(reader, self._facts.contents) and all(known):
                    front += movement.follow(
                        reader, value, axes, self._facts.shapes, self._facts.contents, self._facts.opset
                    )
                elif reader.op_type in {"Cast", "Identity"} and reader.attributes.get_int("to", 7) in (6, 7):
                    front.append((reader.outputs[0], axes))
                else:
                    for axis, labels in self.axes.get(source, {}).items():
                        if axis in np.asarray(axes):
                            self.freeze(labels, f"{reader.op_type} '{reader.name}' computes with their number")
        return None

    def _relate(self, node: ir.Node, relation: Relation) -> None:
        """Tie the axes of a computing node's tensors."""
        named: dict[Any, Labels] = {}
        labelled = [
            (axes[place], labels)
            for value, axes in relation.tensors
            for place, labels in self.axes.get(value, {}).items()
        ]
        for axis, labels in labelled:
            if axis is None:
                self.freeze(labels, f"{node.op_type} '{node.name}' mixes them or fixes their number")
                continue
            grid = labels.reshape(axis.tiles, -1, axis.repeats)
            one = grid[0, :, 0]
            self.join(grid, one[None, :, None])
            if axis.name in named:
                self.join(named[axis.name], one)
            named.setdefault(axis.name, one)
        for name, labels in named.items():
            if name in relation.blocked:
                self.freeze(labels, f"{node.op_type} '{node.name}': {relation.blocked[name]}")
            if name in relation.crossing:
                for label in np.unique(self.find(labels)).tolist():
                    self._crossing[label].add(f"{node.op_type} '{node.name}'")
            for value, axes in relation.tensors:
                for place, axis in enumerate(axes):
                    if axis is not None and axis.name == name:
                        self.put(value, place, np.repeat(np.tile(labels, axis.tiles), axis.repeats))

    def _move(self, node: ir.Node) -> None:
        """Run the node on the labels, forwards and backwards."""
        facts = self._facts
        sources = movement.data_inputs(node)
        for value in {*sources, *node.outputs}:
            if len(self.axes.get(value, {})) > 1:
                return self._refuse(node, "would lose positions on two axes at once")
        before = np.concatenate([self._whole(value).ravel() for value in sources])
        if self._parameters_labelled(node):
            return None
        for output, origin in movement.origins(node, facts.shapes, facts.contents, facts.opset):
            real = origin != movement.FILL
            after = np.full(origin.shape, -1)
            after[real] = before[origin[real]]
            own = self._whole(output)
            both = (after >= 0) & (own >= 0)
            self.join(after[both], own[both])
            after = np.where(after < 0, own, after)
            if (after >= 0).any():
                self._complete(output, after)
        before = np.concatenate([self._whole(value).ravel() for value in sources])
        for output, origin in movement.origins(node, facts.shapes, facts.contents, facts.opset):
            if not self.axes.get(output):
                continue
            whole, real = self._whole(output), origin != movement.FILL
            places, labels = origin[real], whole[real]
            known = before[places] >= 0
            self.join(before[places[known]], labels[known])
            before[places[~known]] = labels[~known]
            self.join(before[places], labels)
        start = 0
        for value in sources:
            size = int(np.prod(facts.shapes[value]))
            part = before[start : start + size].reshape(facts.shapes[value])
            start += size
            if (part >= 0).any():
                self._complete(value, part)
        return None

    def _parameters_labelled(self, node: ir.Node) -> bool:
        data = movement.data_inputs(node)
        labelled = [v for v in node.inputs if v is not None and v in self.axes and v not in data]
        if labelled:
            self._refuse(node, "uses them as a parameter")
        return bool(labelled)

    def _whole(self, value: ir.Value) -> Labels:
        """A label for each element of a tensor, -1 where there is none."""
        shape = self._facts.shapes[value]
        if not self.axes.get(value):
            return np.full(shape, -1)
        axis, labels = next(iter(self.axes[value].items()))
        sides = [1] * len(shape)
        sides[axis] = -1
        return np.broadcast_to(self.find(labels).reshape(sides), shape)

    def _complete(self, value: ir.Value, labels: Labels) -> None:
        """Label the axis along which the labels of some elements vary; they hold for all that lies across."""
        shape = labels.shape
        known = labels >= 0
        labels = np.where(known, self.find(np.maximum(labels, 0)), -1)
        varying = [axis for axis in range(labels.ndim) if _varies(labels, axis)]
        if not varying:
            if labels.size > 1:
                self.freeze(labels[known], f"'{value.name}' would be empty without one")
            elif labels.ndim:
                self.put(value, 0, labels.reshape(-1))
            return
        if len(varying) > 1 and value not in self._choices:
            # Labels that are unknown in part may vary along one axis only, once completed.
            varying = [axis for axis in varying if _varies_known(labels, axis)] or varying
            if len(varying) > 1:
                self._choose(value, varying)
                return
        axis = self._choices.get(value, varying[0])
        slabs = np.moveaxis(labels, axis, 0).reshape(shape[axis], -1)
        line = slabs.max(axis=1)
        missing = line < 0
        line[missing] = self.fresh(int(missing.sum()))
        self.join(np.where(slabs < 0, line[:, None], slabs), line[:, None])
        self.put(value, axis, line)

    def labelled(self) -> Iterator[tuple[ir.Value, int, Labels]]:
        """Every axis that has labels."""
        for value, axes in self.axes.items():
            for axis, labels in axes.items():
                yield value, axis, labels

    # -- the outcome ------------------------------------------------------------------------------------------------

    def reasons(self) -> dict[int, str]:
        """Labels that are frozen, those that would empty a tensor among them."""
        for value, _, labels in self.labelled():
            if np.ptp(self.find(labels)) == 0:
                self.freeze(labels, f"'{value.name}' would be empty without one")
        return self._reasons

    def groups(self) -> Iterator[tuple[list[int], list[Slot], tuple[str, ...]]]:
        """Labels that lie on the same axes, as often on each, with where they lie."""
        places: dict[int, list[tuple[ir.Value, int, list[int]]]] = defaultdict(list)
        for value, axis, labels in self.labelled():
            found: dict[int, list[int]] = defaultdict(list)
            for position, label in enumerate(self.find(labels).tolist()):
                found[label].append(position)
            for label, positions in found.items():
                places[label].append((value, axis, positions))
        alike: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for label in sorted(places):
            alike[tuple((value, axis, len(found)) for value, axis, found in places[label])].append(label)
        for signature, members in alike.items():
            slots = [
                Slot(value, axis, np.array([places[label][number][2] for label in members]))
                for number, (value, axis, _) in enumerate(signature)
            ]
            crossing = sorted(set().union(*(self._crossing.get(label, set()) for label in members)))
            yield members, slots, tuple(crossing)


def _body_owners(model: ir.Model) -> dict[ir.Value, ir.Node]:
    """The control-flow node behind each input and output of a body."""
    return {
        value: node
        for node in model.graph.all_nodes()
        for attribute in node.attributes.values()
        if attribute.type == ir.AttributeType.GRAPH
        for value in (*attribute.as_graph().inputs, *attribute.as_graph().outputs)
    }


def _varies(labels: Labels, axis: int) -> bool:
    first = np.take(labels, [0], axis)
    return bool((labels != first).any())


def _varies_known(labels: Labels, axis: int) -> bool:
    """Whether two known labels differ along an axis."""
    known = labels >= 0
    low = np.where(known, labels, np.iinfo(np.int64).max).min(axis)
    return bool((np.where(known, labels, -1).max(axis) > low).any())


def channel_groups(model: ir.Model, feeds: Feeds | None = None) -> ChannelGroups:
    """All groups of channels that may go, and the layers whose channels may not.

    Args:
        model: any model; not modified. Groups refer to a copy of it with functions inlined, `ChannelGroups.model`.
        feeds: one run's inputs, for the shapes of what depends on them; made-up ones by default.

    Raises:
        OnnxcompError: the model does not run on the inputs.
    """
    traced = traceable(model)
    facts = observe(traced, feeds or made_up(traced))
    makers = list(_makers(traced, facts))
    made = {(value, axis): name for name, value, axis in makers}
    names: dict[str, int] = defaultdict(int)
    covered: set[tuple[ir.Value, int]] = set()
    seen: set[frozenset[Any]] = set()
    reasons: dict[tuple[ir.Value, int], str] = {}
    groups: list[ChannelGroup] = []
    for name, value, axis in makers:
        if (value, axis) in covered:
            continue
        for family, complete, only in _ways(traced, facts, value, axis):
            stuck = family.reasons()
            for other, place, labels in family.labelled():
                if (other, place) in made:
                    own = family.find(labels).tolist()
                    found = [stuck[label] for label in own if label in stuck]
                    if found:
                        reasons.setdefault((other, place), found[0])
                    if only and (complete or len(found) == len(own)):
                        covered.add((other, place))
            for members, slots, crossing in family.groups() if complete else ():
                signature = frozenset((slot.value, slot.axis, slot.positions.tobytes()) for slot in slots)
                if signature in seen or any(label in stuck for label in members):
                    continue
                seen.add(signature)
                where = {(slot.value, slot.axis) for slot in slots}
                made_by = tuple(maker for place, maker in made.items() if place in where)
                title = made_by[0] if made_by else name
                names[title] += 1
                title += f"#{names[title]}" if names[title] > 1 else ""
                groups.append(ChannelGroup(title, len(members), tuple(slots), crossing, made_by))
    grouped = {(slot.value, slot.axis) for group in groups for slot in group.slots}
    frozen = [
        Frozen(name, reasons.get(place, "there are too many ways to cut them"))
        for place, name in made.items()
        if place not in grouped
    ]
    frozen += _not_followed(traced, facts, set(made.values()))
    return ChannelGroups(tuple(groups), tuple(frozen), traced, facts)


def _ways(model: ir.Model, facts: Facts, value: ir.Value, axis: int) -> Iterator[tuple[_Family, bool, bool]]:
    """The families that spread from an axis, one for each way to choose, with what is true of each.

    Whether it is complete, for what is all frozen is not followed to its end; whether there was nothing to choose.
    """
    waiting: list[dict[Any, int]] = [{}]
    for _ in range(_MOST_WAYS):
        if not waiting:
            return
        choices = waiting.pop()
        family = _Family(model, facts, choices)
        try:
            complete = family.spread(value, axis)
        except _AmbiguousError as ambiguous:
            waiting += [choices | {ambiguous.place: choice} for choice in reversed(ambiguous.choices)]
            continue
        yield family, complete, not choices


def _makers(model: ir.Model, facts: Facts) -> Iterator[tuple[str, ir.Value, int]]:
    """Every axis along which a layer makes channels: its name, its output and the axis."""
    for node in model.graph.all_nodes():
        out = node.outputs[0] if node.outputs else None
        if out is None or out not in facts.shapes or node.domain not in {"", "ai.onnx"}:
            continue
        rank = len(facts.shapes[out])
        layer = layer_of(node)
        axis = None
        if layer is not None and rank:
            axis = layer.output_axis % rank
        elif node.op_type in {"LSTM", "GRU", "RNN"}:
            recurrent = next((value for value in node.outputs if value in facts.shapes), None)
            out, axis = recurrent, len(facts.shapes[recurrent]) - 1 if recurrent is not None else None
        elif node.op_type == "Gather" and node.inputs[0] is not None and node.inputs[0] not in facts.contents:
            table = node.inputs[0].const_value
            if table is not None and table.dtype in FLOATS and len(table.shape) == 2:
                axis = rank - 1
        if axis is not None and out is not None and facts.shapes[out][axis] > 1:
            yield node.name or "", out, axis


_CONVOLUTIONS = {"Conv": 1, "ConvTranspose": 1, "FusedConv": 1, "ConvInteger": 1, "QLinearConv": 3}
_RECURRENT = dict.fromkeys(("LSTM", "GRU", "RNN", "DynamicQuantizeLSTM"), 1)
_PRODUCTS = {
    **dict.fromkeys(("Gemm", "MatMul", "FusedGemm", "FusedMatMul", "MatMulInteger", "MatMulIntegerToFloat"), 1),
    **dict.fromkeys(("DynamicQuantizeMatMul", "MatMulNBits"), 1),
    **dict.fromkeys(("QLinearMatMul", "QGemm"), 3),
}
_WEIGHT = {**_CONVOLUTIONS, **_RECURRENT, **_PRODUCTS}
"""What anyone would call a layer, and which input is its weight; of products either operand may be."""


def _not_followed(model: ir.Model, facts: Facts, makers: Collection[str]) -> Iterator[Frozen]:
    """The layers whose channels are not known as such, and why."""
    for node in model.graph.all_nodes():
        if node.op_type in _WEIGHT and node.name not in makers and (reason := _obstacle(model, facts, node)):
            yield Frozen(node.name or "", reason)


def _obstacle(model: ir.Model, facts: Facts, node: ir.Node) -> str | None:
    """Why a layer's channels are not known as such; None for a product of activations, which is no layer."""
    places = (_WEIGHT[node.op_type], 0) if node.op_type in _PRODUCTS else (_WEIGHT[node.op_type],)
    operands = [value for place in places if place < len(node.inputs) and (value := node.inputs[place]) is not None]
    weight = next((value for value in operands if is_fixed(value, overridable=True)), None)
    if weight is None:
        return None if node.op_type in _PRODUCTS else "its weight is not a constant"
    stored, maker = weight, weight.producer()
    while (producer := stored.producer()) is not None and producer.inputs and producer.inputs[0] is not None:
        stored = producer.inputs[0]
    if stored.const_value is not None and stored.const_value.dtype.bitwidth <= 8:
        return "its weights are quantized already"
    if stored in model.graph.inputs:
        return f"its weight '{stored.name}' is also an input of the model, and may be overridden"
    if maker is not None:
        return f"its weight is not stored as such, but comes from {maker.op_type}"
    if node.domain not in {"", "ai.onnx"}:
        return f"{node.op_type} is an operator whose channels nothing is known of"
    if is_empty(weight) or is_empty(node.outputs[0]):
        return "it has nothing to compute"
    if node.outputs[0] not in facts.shapes:
        return "the shape of its output is unknown"
    if layer_of(node) is not None or node.op_type in _RECURRENT:
        return "it makes only one channel"
    return "its weight is not a matrix in the usual place"
