"""The command `inspect`: a model, node by node."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from onnxcomp import model as models
from onnxcomp import registry
from onnxcomp.channels import ChannelGroup, ChannelGroups, channel_groups
from onnxcomp.core import Context, Pass, name_nodes, no_progress
from onnxcomp.cost import NodeCost, Totals, node_costs
from onnxcomp.data import ImageOptions
from onnxcomp.errors import OnnxcompError
from onnxcomp.measure import Progress, circumstances, file_size, inputs_for
from onnxcomp.members import readers
from onnxcomp.model import ModelSource
from onnxcomp.padding import noted
from onnxcomp.passes.simplify import Simplify
from onnxcomp.report import (
    FrozenRow,
    GroupRow,
    Inspection,
    LatencyTable,
    NodeRow,
    OptionRow,
    WeightRow,
    source_name,
)
from onnxcomp.runtime import Feeds, Session, Target
from onnxcomp.store import Store
from onnxcomp.table import latency_table
from onnxcomp.timing import profiles
from onnxcomp.tolerance import weight_rows


def inspect(
    source: ModelSource,
    *,
    calib: Any = None,
    target: Target | str = Target(),
    batch: int = 1,
    seed: int = 0,
    images: ImageOptions | None = None,
    groups: bool = False,
    weights: bool = False,
    options: Sequence[str] = (),
    latency: bool = False,
    cache: str | os.PathLike[str] | None = None,
    progress: Progress = no_progress,
) -> Inspection:
    """What each node stores, computes, and takes of the time.

    Shapes and times are of one run. A model that ONNX Runtime does not load is described without times.

    Args:
        source: a path, bytes, `onnx.ModelProto` or `onnx_ir.Model`.
        calib: data whose first batch is the input; synthetic inputs without.
        target: execution provider and threads.
        batch: rows of that run, where the model leaves that open.
        seed: of synthetic inputs.
        images: how image files become inputs.
        groups: also find the channels that only go together, and those that cannot go.
        weights: also what each layer's weights bear: ranks and bits, by the covariance of its inputs on `calib`.
        options: names of passes; also what each could do to each part, and at what error, bytes and latency.
        latency: also the latency table, of the model after clean-up: what each kind of chain of nodes takes in every
            precision, and with fewer channels.
        cache: folder that keeps what was measured, see `store`; None for none.
        progress: called with (done, total, what).

    Raises:
        InputError: the model, the data or an option cannot be used.
    """
    target = Target.of(target)
    about = circumstances(target, batch)
    model = models.load(source)
    name_nodes(model)
    whole = model.clone()
    ShapeInferencePass()(model)
    notes: list[str] = []
    times: Mapping[str, float] = {}
    sizes: dict[str, int] = {}
    protocol = ""
    coupled: ChannelGroups | None = None
    borne: tuple[WeightRow, ...] = ()
    offered: tuple[OptionRow, ...] = ()
    table: LatencyTable | None = None
    techniques = [registry.named(name)() for name in options]
    if all(models.spec_of(value) is not None for value in models.free_inputs(model)):
        data = inputs_for(model, calib, batch, seed, images)
        feeds = next(iter(data.batches(batch))).feeds
        sizes = _axes(model, feeds)
        store = None if cache is None else Store(cache)
        context = Context(None, target, batch, seed, progress=progress, store=store)
        if weights or techniques:
            try:
                context = replace(context, data=None if calib is None else noted(data, lambda: Session(model, target)))
                borne = tuple(weight_rows(model, context)) if weights else ()
                offered = tuple(_offered(model, context, techniques, notes))
            except OnnxcompError as error:
                notes.append(f"Weights not looked at. {error.fact}")
        if groups:
            coupled = _traced(model, feeds, notes)
        try:
            _observe_shapes(model, target, feeds)
            progress(0, 0, "timing nodes")
            times = profiles([model], context, feeds)[0].times
            protocol = f"profiled on {data.origin}"
            table = _table(whole, replace(context, data=data), feeds, notes) if latency else None
        except OnnxcompError as error:
            notes.append(f"Not timed. {error.fact}")
    else:
        notes.append(f"Not timed{' or traced' if groups else ''}: an input is no tensor.")
    costs = node_costs(model, batch, sizes)
    totals = Totals.of(costs)
    if totals.unknown:
        notes.append(f"The FLOPs of {totals.unknown} nodes are unknown and not in the sum.")
    return Inspection(
        source=source_name(source),
        opset=models.opset(model),
        inputs=tuple(map(_described, models.free_inputs(model))),
        outputs=tuple(map(_described, model.graph.outputs)),
        size=file_size(source, model),
        parameters=totals.parameters,
        bytes=totals.bytes,
        flops=totals.flops,
        nodes=tuple(_row(cost, times) for cost in costs),
        environment=about,
        protocol=protocol,
        notes=tuple(notes),
        groups=() if coupled is None else tuple(map(_group_row, coupled)),
        frozen=() if coupled is None else tuple(FrozenRow(frozen.name, frozen.reason) for frozen in coupled.frozen),
        weights=borne,
        options=offered,
        latency=table,
    )


def _table(model: ir.Model, context: Context, feeds: Feeds, notes: list[str]) -> LatencyTable:
    """The table of the cleaned-up model."""
    clean = Simplify()(model, context).model
    return latency_table(clean, context, feeds, _traced(clean, feeds, notes))


def _offered(model: ir.Model, context: Context, techniques: Sequence[Pass], notes: list[str]) -> Iterator[OptionRow]:
    for technique in techniques:
        context.progress(0, 0, f"looking for what {technique.name} can do")
        options = technique.offered(model, context)
        if not options:
            notes.append(f"{technique.name} has no choice to offer here for single layers.")
        for option in options:
            yield OptionRow(technique.name, option.part, option.setting, option.error, option.bytes, option.latency)


def _traced(model: ir.Model, feeds: Feeds, notes: list[str]) -> ChannelGroups | None:
    """The coupled channels, None where they cannot be found, and notes on them."""
    try:
        coupled = channel_groups(model, feeds)
    except OnnxcompError as error:
        notes.append(f"Channels not traced. {error.fact}")
        return None
    if not coupled.groups and not coupled.frozen:
        notes.append("There are no channels: the model has no layer.")
    overridable = any(value.is_graph_input() for value in model.graph.initializers.values())
    if overridable or any(node.op_type == "BatchNormalization" for node in model.graph):
        notes.append("Channels are those of the model as it is; prune cleans up first, as simplify does.")
    return coupled


def _group_row(group: ChannelGroup) -> GroupRow:
    widths = {node.name: slot.positions.shape[1] for slot in group.slots if (node := slot.value.producer()) is not None}
    return GroupRow(
        group.name,
        group.size,
        widths.get(next(iter(group.made_by), None), 1),
        group.made_by,
        tuple(dict.fromkeys(reader.layer.name for reader in readers(group))),
        len({slot.value for slot in group.slots}),
        group.crossing,
    )


def _observe_shapes(model: ir.Model, target: Target, feeds: Feeds) -> None:
    """Write the shapes of a run onto the main graph's values: inference leaves many unknown behind a Reshape."""
    probe = model.clone()
    tensors = [
        value
        for node in probe.graph
        for value in node.outputs
        if value.name and (value.type is None or isinstance(value.type, ir.TensorType))
    ]
    shapes = [ir.node("Shape", [value], name=f"shape of {value.name}") for value in tensors]
    probe.graph.extend(shapes)
    for node in shapes:
        node.outputs[0].name, node.outputs[0].type = node.name, ir.TensorType(ir.DataType.INT64)
    probe.graph.outputs[:] = [node.outputs[0] for node in shapes]
    found = Session(probe, target, extended=False).run(feeds)
    for node in model.graph:
        for value in node.outputs:
            if (observed := found.get(f"shape of {value.name}")) is not None:
                value.shape = ir.Shape(observed.tolist())


def _axes(model: ir.Model, feeds: Feeds) -> dict[str, int]:
    """The lengths that a run gives to the named axes of the inputs."""
    return {
        axis: length
        for spec in models.input_specs(model)
        for axis, length in zip(spec.shape or (), feeds[spec.name].shape, strict=False)
        if isinstance(axis, str)
    }


def _described(value: ir.Value) -> str:
    spec = models.spec_of(value)
    if spec is None:
        return f"{value.name}: {value.type}"
    shape = "[...]" if spec.shape is None else f"[{', '.join('?' if a is None else str(a) for a in spec.shape)}]"
    return f"{spec.name}: {'string' if spec.dtype.hasobject else spec.dtype.name}{shape}"


def _row(cost: NodeCost, times: Mapping[str, float]) -> NodeRow:
    return NodeRow(
        cost.name,
        f"{cost.domain}::{cost.op}" if cost.domain else cost.op,
        cost.output_shape,
        cost.parameters,
        cost.bytes,
        cost.flops,
        times.get(cost.name),
        cost.note,
    )
