"""A layer replaced by several in a row, and what either costs by itself."""

from collections.abc import Collection, Hashable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxcomp.core import Context
from onnxcomp.graph import Builder, single_consumer
from onnxcomp.layers import Layer, layer_of, layers
from onnxcomp.model import opset
from onnxcomp.numerics.lowrank import Factors, Stage
from onnxcomp.runtime import Protocol
from onnxcomp.timing import ratio

_PROTOCOL = Protocol(block=10, rounds=7, warmup=2, seconds=0.3)

_PER_AXIS = {"strides": 1, "dilations": 1, "pads": 0}
"""Attributes with an element for each spatial axis, or two, and what they are where a stage has no part in it."""


def kernel_of(layer: Layer) -> NDArray[np.float64]:
    """The layer's weight as (out, in, *kernel)."""
    matrix = layer.matrix().astype(np.float64)
    return matrix.reshape(len(matrix), -1, *layer.kernel)


def split(layer: Layer, factors: Factors) -> None:
    """Put the stages in the layer's place. The last one keeps its node, name, bias and output."""
    node, graph, dtype = layer.node, layer.node.graph, layer.weight.dtype
    assert isinstance(graph, ir.Graph)
    assert dtype is not None
    builder = Builder(graph)
    *before, last = factors.stages
    data: ir.Value = layer.data
    for number, stage in enumerate(before, 1):
        weight = _constant(builder, layer, stage, f"{node.name}_factor_{number}_weight")
        inputs = [data, weight] if layer.index == 1 else [weight, data]
        attributes = _attributes(layer, stage, first=number == 1)
        data = builder.node(
            node.op_type, inputs, f"{node.name}_factor_{number}", dtype=dtype, before=node, **attributes
        )
    attributes = _attributes(layer, last, first=False)
    node.replace_input_with(layer.index, _constant(builder, layer, last, f"{node.name}_factor_weight"))
    node.replace_input_with(1 - layer.index, data)
    for name in [*node.attributes]:
        if name not in {"alpha", "beta"}:
            del node.attributes[name]
    for name, value in attributes.items():
        node.attributes[name] = ir.convenience.convert_attribute(name, value)


def _constant(builder: Builder, layer: Layer, stage: Stage, name: str) -> ir.Value:
    """A stage's weight in the layout that the operator takes."""
    assert layer.weight.const_value is not None
    array = stage.kernel.astype(layer.weight.const_value.dtype.numpy())
    if "Conv" not in layer.node.op_type:
        matrix = array.reshape(array.shape[:2])
        array = matrix.T if layer.channel_axis == 1 else matrix
    return builder.constant(array, name)


def _attributes(layer: Layer, stage: Stage, *, first: bool) -> dict[str, Any]:
    """A convolution's along the axes of the stage; how a Gemm takes its weight, and the first its data."""
    given = layer.node.attributes
    if layer.node.op_type == "Gemm":
        return {"transB": given.get_int("transB", 0)} | ({"transA": given.get_int("transA", 0)} if first else {})
    if layer.node.op_type != "Conv":
        return {}
    rank = len(layer.kernel)
    found: dict[str, Any] = {"group": stage.groups} if stage.groups > 1 else {}
    for name, default in _PER_AXIS.items():
        if name in given:
            values = given.get_ints(name)
            assert values is not None
            found[name] = [value if place % rank in stage.axes else default for place, value in enumerate(values)]
    mode = given.get_string("auto_pad", "NOTSET")
    if mode != "NOTSET" and stage.axes:
        found["auto_pad"] = mode
        found.pop("pads", None)
    return found


def alone(layer: Layer, shape: tuple[int, ...], version: int, factors: Factors | None = None) -> ir.Model:
    """A model of nothing but the layer, as it is or in factors, for an input of some shape."""
    dtype = layer.weight.dtype
    assert dtype is not None
    data = ir.val("data", dtype=dtype, shape=shape)
    constants = [
        ir.val(f"constant_{index}", const_value=value.const_value)
        for index, value in enumerate(layer.node.inputs)
        if index != 1 - layer.index and value is not None
    ]
    inputs: list[ir.Value | None] = [*constants]
    inputs.insert(1 - layer.index, data)
    node = ir.node(layer.node.op_type, inputs, dict(layer.node.attributes), name="layer")
    node.outputs[0].name, node.outputs[0].dtype = "result", dtype
    graph = ir.Graph(
        [data], node.outputs, nodes=[node], initializers=constants, opset_imports={"": version}, name="layer"
    )
    model = ir.Model(graph, ir_version=8)
    twin = layer_of(node)
    assert twin is not None
    if factors is not None:
        split(twin, factors)
    ir.passes.common.ShapeInferencePass()(model)
    return model


def alike(layer: Layer, shape: tuple[int, ...]) -> Hashable:
    """The same for all layers that take as long and store as much, for inputs of some shape."""
    node = layer.node
    return node.op_type, layer.weight_shape, shape, str(node.attributes), layer.bias is None, layer.weight.dtype


class Clock:
    """Times forms of a model's layers on the target, each by itself and once for all layers of the same shapes.

    Args:
        model: that has the layers.
        context: target, seed.
    """

    def __init__(self, model: ir.Model, context: Context) -> None:
        self._opset, self._context = opset(model), context
        self._known: dict[Hashable, float] = {}

    def slowdowns(self, layer: Layer, shape: tuple[int, ...], forms: Sequence[Factors]) -> NDArray[np.float64]:
        """(forms,) what each takes, relative to the layer as it is, for an input of some shape."""
        context, same = self._context, alike(layer, shape)
        missing = [form for form in forms if (same, form.title) not in self._known]
        if missing:
            feeds = {"data": np.random.default_rng(context.seed).normal(size=shape).astype(np.float32)}
            whole = alone(layer, shape, self._opset)
        for form in missing:
            split_up = alone(layer, shape, self._opset, form)
            self._known[same, form.title] = ratio(whole, split_up, context, feeds, _PROTOCOL)
        return np.array([self._known[same, form.title] for form in forms])


def merge_into_followers(model: ir.Model, names: Collection[str]) -> dict[str, str]:
    """Multiply pointwise layers into the layers that alone read them, where nothing lies between, in place.

    V (W x + b) + c = (V W) x + (V b + c): what the first one widened is then never computed.

    Args:
        model: to change.
        names: of the layers that may go.

    Returns:
        The layers that took them up, by the names of those that went.
    """
    merged: dict[str, str] = {}
    for layer in list(layers(model)):
        reader = single_consumer(layer.node.outputs[0]) if layer.name in names else None
        follower = None if reader is None else layer_of(reader)
        if follower is None or follower.data is not layer.node.outputs[0] or not _merges(layer, follower):
            continue
        first, second = kernel_of(layer), kernel_of(follower)
        weight = np.einsum("oc...,cr->or...", second, first.reshape(first.shape[:2]))
        if layer.bias is not None:
            shift = np.einsum("oct,c->o", second.reshape(*second.shape[:2], -1), layer.bias_vector())
            follower.set_bias(follower.bias_vector() + shift)
        graph = follower.node.graph
        assert isinstance(graph, ir.Graph)
        name = f"{follower.name}_merged_weight"
        constant = _constant(Builder(graph), follower, Stage(weight), name)
        follower.node.replace_input_with(follower.index, constant)
        follower.node.replace_input_with(1 - follower.index, layer.data)
        graph.remove(layer.node, safe=True)
        merged[layer.name] = follower.name
    return merged


def _merges(layer: Layer, follower: Layer) -> bool:
    """Whether one product of both weights does the same."""
    first, second = layer.node, follower.node
    same = first.op_type == second.op_type and layer.index == follower.index and first.graph is second.graph
    if not same or layer.is_scaled or follower.is_scaled or layer.groups > 1 or follower.groups > 1:
        return False
    if len(follower.weight.uses()) > 1 or (first.op_type == "Gemm" and second.attributes.get_int("transA", 0) != 0):
        return False
    if layer.bias is not None and not (layer.adds_bias and follower.adds_bias):
        return False
    if first.op_type != "Conv":
        return first.op_type in {"Gemm", "MatMul"}
    strides, pads = (set(first.attributes.get_ints(name, [usual])) for name, usual in (("strides", 1), ("pads", 0)))
    pointwise = set(layer.kernel) == {1} and strides == {1} and pads == {0}
    # A convolution pads with zeros, not with the bias of what it reads.
    padded = any(second.attributes.get_ints("pads", [0]))
    padded = padded or second.attributes.get_string("auto_pad", "NOTSET") not in {"NOTSET", "VALID"}
    return pointwise and not (padded and layer.bias is not None)
