"""What a model without some channels should compute, from the model that still has them: a reference for surgery."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from onnxcomp import model as models
from onnxcomp.channels import ChannelGroup, ChannelGroups
from onnxcomp.facts import all_values
from onnxcomp.graph import Builder
from onnxcomp.runtime import Session


def masked(groups: ChannelGroups, removed: Mapping[ChannelGroup, Sequence[int]]) -> ir.Model:
    """The model with zeros wherever a removed channel would be, its size unchanged.

    Every tensor with such channels is multiplied by a mask, and the weights by which a recurrent state meets itself
    lose the rows. What averages over channels does so over the survivors, in NumPy.
    """
    model = groups.model.clone()
    twins = dict(zip(all_values(groups.model), all_values(model), strict=True))
    masks: dict[ir.Value, dict[int, NDArray[np.float32]]] = {}
    for group, indices in removed.items():
        for slot in group.slots:
            length = groups.facts.shapes[slot.value][slot.axis]
            mask = masks.setdefault(twins[slot.value], {}).setdefault(slot.axis, np.ones(length, np.float32))
            mask[slot.positions[list(indices)].ravel()] = 0
    averaging = {"LayerNormalization", "ReduceMean"}
    ranks = {twins[value]: len(shape) for value, shape in groups.facts.shapes.items() if value in twins}
    for value, axes in masks.items():
        rank = ranks[value]
        shaped = [mask.reshape([-1 if k == axis else 1 for k in range(rank)]) for axis, mask in axes.items()]
        producer = value.producer()
        if value.const_value is not None:
            if any(use.node.op_type in {"LSTM", "GRU", "RNN"} and use.idx == 2 for use in value.uses()):
                value.const_value = ir.tensor(value.const_value.numpy() * shaped[-1], name=value.name)
            continue
        if value.dtype not in {ir.DataType.FLOAT, None} or producer is None:
            continue
        uses = list(value.uses())
        builder = Builder(producer.graph)  # type: ignore[arg-type]
        product = functools.reduce(np.multiply, shaped)
        zeroed = builder.node(
            "Mul", [value, builder.constant(product, "mask")], "masked", after=producer, dtype=ir.DataType.FLOAT
        )
        for use in uses:
            use.node.replace_input_with(use.idx, zeroed)
            if use.node.op_type in averaging and use.idx == 0:
                use.node.domain = "survivors"
                use.node.resize_inputs(len(use.node.inputs) + 1)
                use.node.replace_input_with(len(use.node.inputs) - 1, builder.constant(product, "survivors"))
        for graph in model.graphs():
            for position, output in enumerate(graph.outputs):
                if output is value and graph is not model.graph:
                    graph.outputs[position] = zeroed
    model.graph.opset_imports["survivors"] = 1
    return model


class LayerNormalization(OpRun):
    """Over the survivors along the last axes (Ba et al. 2016, equation 3)."""

    op_domain = "survivors"

    def _run(self, x: Any, scale: Any, *rest: Any, axis: int = -1, epsilon: float = 1e-5, **_: Any) -> tuple[Any]:
        bias, alive = (rest[0] if len(rest) > 1 else 0), np.broadcast_to(rest[-1], x.shape)
        axes = tuple(range(axis % x.ndim, x.ndim))
        count = alive.sum(axes, keepdims=True)
        mean = (x * alive).sum(axes, keepdims=True) / count
        variance = (np.square(x - mean) * alive).sum(axes, keepdims=True) / count
        return (((x - mean) / np.sqrt(variance + epsilon) * scale + bias).astype(np.float32),)


class ReduceMean(OpRun):
    """Over the survivors."""

    op_domain = "survivors"

    def _run(self, x: Any, *rest: Any, axes: Any = None, keepdims: int = 1, **_: Any) -> tuple[Any]:
        given = rest[0] if len(rest) > 1 else axes
        over = tuple(int(axis) for axis in given) if given is not None else tuple(range(x.ndim))
        alive = np.broadcast_to(rest[-1], x.shape)
        count = np.maximum(alive.sum(over, keepdims=bool(keepdims)), 1)  # where all is masked, the mean is to be zero
        return (((x * alive).sum(over, keepdims=bool(keepdims)) / count).astype(np.float32),)


def answers(model: ir.Model, feeds: dict[str, Any]) -> dict[str, Any]:
    """By ONNX Runtime, or NumPy where there are operators of our own."""
    if not any(node.domain == "survivors" for node in models.all_nodes(model)):
        return dict(Session(model).run(feeds))
    evaluator = ReferenceEvaluator(ir.to_proto(model), new_ops=[LayerNormalization, ReduceMean])
    return dict(zip(evaluator.output_names, evaluator.run(None, feeds), strict=True))
