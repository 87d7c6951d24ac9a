"""Removes channels physically: smaller weights, and every number that tells an operator a size put right."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from numpy.typing import NDArray

from onnxcomp import movement
from onnxcomp.channels import ChannelGroup, ChannelGroups
from onnxcomp.errors import OnnxcompError
from onnxcomp.facts import all_values, is_fixed
from onnxcomp.graph import Builder, constant_of, declared_outputs, remove_unused

Kept = NDArray[np.bool_]


class SurgeryError(OnnxcompError):
    """Channels that cannot be removed, because a size is told where it cannot be put right."""


def without(groups: ChannelGroups, removed: Mapping[ChannelGroup, Iterable[int]], *, infer: bool = True) -> ir.Model:
    """The model without some channels.

    Args:
        groups: of the model.
        removed: which channels of which groups, by their number within the group.
        infer: shapes by ONNX shape inference; those of the tensors that are cut are right without it.

    Returns:
        A copy of `groups.model`, valid; the weights that remain are unchanged.

    Raises:
        SurgeryError: a size is computed in a way that is not understood, or nothing would be left of a tensor.
    """
    model = groups.model.clone()
    twins = dict(zip(all_values(groups.model), all_values(model), strict=True))
    kept: dict[ir.Value, dict[int, Kept]] = defaultdict(dict)
    for group, channels in removed.items():
        indices = np.asarray(sorted(set(channels)), np.int64)
        for slot in group.slots:
            axes = kept[twins[slot.value]]
            mask = axes.setdefault(slot.axis, np.ones(groups.facts.shapes[slot.value][slot.axis], bool))
            mask[slot.positions[indices].ravel()] = False
            if not mask.any():
                raise SurgeryError(
                    f"nothing would be left of '{slot.tensor}'", "all its channels are to go", "keep some"
                )
    kept = {value: {axis: mask for axis, mask in axes.items() if not mask.all()} for value, axes in kept.items()}
    kept = {value: axes for value, axes in kept.items() if axes}
    _Surgeon(model, kept, groups, twins).run()
    if infer:
        with declared_outputs(model):
            common.ShapeInferencePass()(model)
    return model


class _Surgeon:
    def __init__(
        self,
        model: ir.Model,
        kept: Mapping[ir.Value, Mapping[int, Kept]],
        groups: ChannelGroups,
        twins: Mapping[ir.Value, ir.Value],
    ) -> None:
        self._model, self._kept = model, kept
        self._shapes = {twins[value]: shape for value, shape in groups.facts.shapes.items() if value in twins}
        self._contents = {twins[value]: array for value, array in groups.facts.contents.items() if value in twins}
        self._opset = groups.facts.opset
        self._builder = Builder(model.graph)

    def run(self) -> None:
        """Put the parameters right while shapes are known, then cut the weights."""
        for node in list(self._model.graph.all_nodes()):
            if node.domain in {"", "ai.onnx"} and any(v in self._kept for v in (*node.inputs, *node.outputs) if v):
                self._adapt(node)
        for value, axes in self._kept.items():
            array = constant_of(value)
            if array is not None:
                for axis, mask in axes.items():
                    array = np.compress(mask, array, axis)
                value.const_value = ir.tensor(np.ascontiguousarray(array), name=value.name)
            if value.shape is not None:
                sizes = [self._size(value, axis) if axis in axes else size for axis, size in enumerate(value.shape)]
                value.shape = ir.Shape(sizes)
        remove_unused(self._model)

    def _adapt(self, node: ir.Node) -> None:
        moves = movement.is_movement(node, self._contents) and node.op_type not in {"Transpose", "Concat"}
        before = movement.origins(node, self._shapes, self._contents, self._opset) if moves else []
        adapt = getattr(self, f"_adapt_{node.op_type.lower()}", None)
        if adapt is not None:
            adapt(node)
        if moves:
            self._verify(node, before)

    # -- sizes ------------------------------------------------------------------------------------------------------

    def _size(self, value: ir.Value, axis: int) -> int:
        """What is left of an axis."""
        mask = self._kept.get(value, {}).get(axis)
        return self._shapes[value][axis] if mask is None else int(mask.sum())

    def _new_shape(self, value: ir.Value) -> tuple[int, ...]:
        return tuple(self._size(value, axis) for axis in range(len(self._shapes[value])))

    def _adapt_reshape(self, node: ir.Node) -> None:
        out, target = node.outputs[0], self._contents[_given(node, 1)]
        told = {axis: self._size(out, axis) for axis in self._kept.get(out, {}) if target[axis] > 0}
        self._tell(node, 1, told)

    def _adapt_expand(self, node: ir.Node) -> None:
        out, target = node.outputs[0], self._contents[_given(node, 1)]
        offset = len(self._shapes[out]) - len(target)
        axes = [axis for axis in self._kept.get(out, {}) if axis >= offset and target[axis - offset] > 1]
        self._tell(node, 1, {axis - offset: self._size(out, axis) for axis in axes})

    def _adapt_constantofshape(self, node: ir.Node) -> None:
        out = node.outputs[0]
        self._tell(node, 0, {axis: self._size(out, axis) for axis in self._kept.get(out, {})})

    def _adapt_resize(self, node: ir.Node) -> None:
        out = node.outputs[0]
        if len(node.inputs) > 3 and node.inputs[3] is not None:
            axes = list(node.attributes.get_ints("axes", range(len(self._shapes[out]))))
            told = {axes.index(axis): self._size(out, axis) for axis in self._kept.get(out, {}) if axis in axes}
            self._tell(node, 3, told)

    def _tell(self, node: ir.Node, index: int, sizes: Mapping[int, int]) -> None:
        """Change elements of the shape that a node is told."""
        value = _given(node, index)
        for place, size in sizes.items():
            value = self._told(value, place, size, node)
        if value is not node.inputs[index]:
            node.replace_input_with(index, value)

    def _told(self, value: ir.Value, place: int, size: int, reader: ir.Node) -> ir.Value:
        """A value like this one with another number in one place: of what is computed from sizes, a changed copy."""
        array = constant_of(value)
        if array is not None:
            if int(array.reshape(-1)[place]) in (size, -1, 0):
                return value
            changed = array.copy()
            changed.reshape(-1)[place] = size
            told = self._builder.constant(changed, f"{value.name}_pruned")
            self._shapes[told] = changed.shape
            return told
        node = value.producer()
        if node is None or node.domain not in {"", "ai.onnx"}:
            raise self._lost(reader)
        index, inner = self._source(node, place, reader)
        source = _given(node, index)
        if source is None or node.op_type == "Shape" or inner is None:
            return value
        told = self._told(source, inner, size, reader)
        if told is source:
            return value
        inputs = list(node.inputs)
        inputs[index] = told
        attributes: dict[str, Any] = dict(node.attributes)
        changed_node = self._builder.node(
            node.op_type, inputs, f"{value.name}_pruned", like=value, after=node, **attributes
        )
        self._shapes[changed_node] = self._shapes[value]
        return changed_node

    def _source(self, node: ir.Node, place: int, reader: ir.Node) -> tuple[int, int | None]:
        """The input that an element of computed sizes comes from, and its place there; none where it adapts itself."""
        if node.op_type == "Shape":
            return 0, None
        if node.op_type in {"Cast", "Identity"}:
            return 0, place
        if not movement.is_movement(node, self._contents):
            raise self._lost(reader)
        origin = int(movement.origins(node, self._shapes, self._contents, self._opset)[0][1].reshape(-1)[place])
        for index, source in enumerate(movement.data_inputs(node)):
            size = int(np.prod(self._shapes[source]))
            if origin < size:
                return index, origin
            origin -= size
        raise self._lost(reader)

    def _lost(self, node: ir.Node) -> SurgeryError:
        return SurgeryError(
            f"the sizes that {node.op_type} '{node.name}' is told are computed in a way that is not understood",
            "the exporter left shape arithmetic in the graph",
            "clean the model up first: onnxcomp simplify",
        )

    # -- positions --------------------------------------------------------------------------------------------------

    def _adapt_split(self, node: ir.Node) -> None:
        data = _given(node, 0)
        axis = node.attributes.get_int("axis", 0) % len(self._shapes[data])
        sizes = [self._size(out, axis) for out in node.outputs]
        if self._opset < 13:
            node.attributes["split"] = ir.AttrInt64s("split", sizes)
        else:
            node.attributes.pop("num_outputs", None)
            node.resize_inputs(2)
            node.replace_input_with(1, self._builder.constant(np.asarray(sizes, np.int64), f"{node.name}_sizes"))

    def _adapt_slice(self, node: ir.Node) -> None:
        data, out = _given(node, 0), node.outputs[0]
        rank = len(self._shapes[data])
        if self._opset < 10:
            starts, ends = (list(node.attributes.get_ints(name)) for name in ("starts", "ends"))
            axes, steps = list(node.attributes.get_ints("axes", range(len(starts)))), [1] * len(starts)
        else:
            starts, ends = (self._contents[_given(node, k)].tolist() for k in (1, 2))
            given = [node.inputs[k] if len(node.inputs) > k else None for k in (3, 4)]
            axes = list(range(len(starts))) if given[0] is None else self._contents[given[0]].tolist()
            steps = [1] * len(starts) if given[1] is None else self._contents[given[1]].tolist()
        changed = False
        for number, axis in enumerate(axis % rank for axis in axes):
            mask = self._kept.get(data, {}).get(axis)
            if mask is None or steps[number] != 1:
                continue
            first = range(len(mask))[slice(starts[number], None)]
            begin = int(mask[: first.start].sum())
            starts[number], ends[number] = begin, begin + self._size(out, axis)
            changed = True
        if changed and self._opset < 10:
            node.attributes["starts"], node.attributes["ends"] = (
                ir.AttrInt64s("starts", starts),
                ir.AttrInt64s("ends", ends),
            )
        elif changed:
            for index, numbers in ((1, starts), (2, ends)):
                dtype = self._contents[_given(node, index)].dtype
                self._replace(node, index, np.asarray(numbers, dtype))

    def _adapt_pad(self, node: ir.Node) -> None:
        out = node.outputs[0]
        rank = len(self._shapes[out])
        old = np.asarray(node.attributes.get_ints("pads") if self._opset < 11 else self._contents[_given(node, 1)])
        if len(node.inputs) > 3 and node.inputs[3] is not None:
            axes = [axis % rank for axis in self._contents[node.inputs[3]].tolist()]
        else:
            axes = list(range(rank))
        pads = old.copy()
        for number, axis in enumerate(axes):
            mask = self._kept.get(out, {}).get(axis)
            before, after = int(old[number]), int(old[number + len(axes)])
            if mask is not None and min(before, after) >= 0:
                pads[number] = mask[:before].sum()
                pads[number + len(axes)] = mask[len(mask) - after :].sum()
        if self._opset < 11:
            node.attributes["pads"] = ir.AttrInt64s("pads", pads.tolist())
        elif not np.array_equal(pads, old):
            self._replace(node, 1, pads)

    def _adapt_gather(self, node: ir.Node) -> None:
        data, indices = _given(node, 0), _given(node, 1)
        if indices not in self._contents:
            return
        axis = node.attributes.get_int("axis", 0) % len(self._shapes[data])
        mask = self._kept.get(data, {}).get(axis)
        if mask is None:
            return
        old = self._contents[indices] % len(mask)
        chosen = old[mask[old]] if old.ndim == 1 else old
        self._replace(node, 1, (np.cumsum(mask) - 1)[chosen].astype(self._contents[indices].dtype))

    def _replace(self, node: ir.Node, index: int, array: NDArray[Any]) -> None:
        if not is_fixed(_given(node, index)):
            raise self._lost(node)
        value = self._builder.constant(array, f"{_given(node, index).name}_pruned")
        node.replace_input_with(index, value)

    # -- attributes -------------------------------------------------------------------------------------------------

    def _adapt_conv(self, node: ir.Node) -> None:
        if node.attributes.get_int("group", 1) > 1:
            groups = self._size(_given(node, 0), 1) // self._size(_given(node, 1), 1)
            node.attributes["group"] = ir.AttrInt64("group", groups)

    def _adapt_convtranspose(self, node: ir.Node) -> None:
        if node.attributes.get_int("group", 1) > 1:
            groups = self._size(node.outputs[0], 1) // self._size(_given(node, 1), 1)
            node.attributes["group"] = ir.AttrInt64("group", groups)

    def _adapt_recurrent(self, node: ir.Node) -> None:
        node.attributes["hidden_size"] = ir.AttrInt64("hidden_size", self._size(_given(node, 2), 2))

    _adapt_lstm = _adapt_gru = _adapt_rnn = _adapt_recurrent

    def _adapt_groupnormalization(self, node: ir.Node) -> None:
        mask, groups = self._kept.get(node.outputs[0], {}).get(1), node.attributes.get_int("num_groups", 1)
        if mask is not None:
            whole = mask.reshape(groups, -1)
            if (whole.all(1) | ~whole.any(1)).all():
                node.attributes["num_groups"] = ir.AttrInt64("num_groups", int(whole.any(1).sum()))

    # -- verification -----------------------------------------------------------------------------------------------

    def _verify(self, node: ir.Node, before: list[tuple[ir.Value, NDArray[np.int64]]]) -> None:
        """Run the node with its new parameters, where they are known: elements must come from where they did."""
        parameters = dict(self._contents)
        for value in node.inputs[movement.DATA[node.op_type].stop or len(node.inputs) :]:
            array = constant_of(value)
            if value is not None and array is None:
                return  # computed from sizes as it runs
            if value is not None and array is not None:
                parameters[value] = array
        sources = movement.data_inputs(node)
        shapes = {value: self._new_shape(value) for value in sources} | dict.fromkeys(node.outputs, ())
        numbers = []
        start = 0
        for value in sources:
            size = int(np.prod(self._shapes[value]))
            numbers.append(self._cut(np.arange(start, start + size).reshape(self._shapes[value]), value).ravel())
            start += size
        pool = np.append(np.concatenate(numbers), movement.FILL)
        try:
            found = [pool[origin] for _, origin in movement.origins(node, shapes, parameters, self._opset)]
        except Exception as error:
            raise self._lost(node) from error
        for (output, origin), now in zip(before, found, strict=True):
            if not np.array_equal(self._cut(origin, output), now):
                raise self._lost(node)

    def _cut(self, array: NDArray[np.int64], value: ir.Value) -> NDArray[np.int64]:
        for axis, mask in self._kept.get(value, {}).items():
            array = np.compress(mask, array, axis)
        return array


def _given(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value
