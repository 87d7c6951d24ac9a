"""Removing coupled channels is the same as never computing them, on every model of the zoo."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models import zoo
from models.masking import answers, masked
from models.net import Net
from onnxcomp import model as models
from onnxcomp.channels import ChannelGroup, ChannelGroups, channel_groups
from onnxcomp.layers import layers
from onnxcomp.members import writers
from onnxcomp.runtime import Session
from onnxcomp.surgery import SurgeryError, without

RUNNABLE = [name for name in zoo.BUILDERS if name not in zoo.UNRUNNABLE]

WITHOUT_GROUPS = {"weights_as_inputs", "fp16_weights", "quantized_already"}
"""Their weights are no plain constants: clean-up comes first, or they are integers."""


class Case(NamedTuple):
    groups: ChannelGroups
    feeds: dict[str, Any]


@functools.cache
def case(name: str) -> Case:
    proto = zoo.build(name)
    return Case(channel_groups(models.load(proto)), zoo.feeds(proto))


def assert_removal_is_masking(case: Case, removed: Mapping[ChannelGroup, Sequence[int]]) -> None:
    cut = without(case.groups, removed)
    assert models.input_specs(cut) == models.input_specs(case.groups.model)
    shapes = [str(value.shape) for value in cut.graph.outputs]
    assert shapes == [str(value.shape) for value in case.groups.model.graph.outputs]
    models.load(models.to_bytes(cut))  # checked
    actual: dict[str, Any] = dict(Session(cut).run(case.feeds))
    expected = answers(masked(case.groups, removed), case.feeds)
    for name, want in expected.items():
        if want.dtype.kind == "f":  # rounding of sums in another order, over tens of layers
            np.testing.assert_allclose(actual[name], want, rtol=0, atol=2e-4 * max(np.abs(want).max(), 1e-3))


@pytest.mark.parametrize("name", [name for name in RUNNABLE if name not in WITHOUT_GROUPS])
@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_removing_is_masking(name: str, data: st.DataObject) -> None:
    groups = case(name).groups
    chosen = data.draw(st.lists(st.sampled_from(range(len(groups))), min_size=1, unique=True))
    removed = {}
    for index in chosen:
        size = groups[index].size
        most = max(1, size // 2)
        removed[groups[index]] = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=most, unique=True))
    assert_removal_is_masking(case(name), removed)


@pytest.mark.parametrize("name", RUNNABLE)
def test_each_layer_is_in_a_group_or_frozen_with_a_reason(name: str) -> None:
    groups = case(name).groups
    assert (len(groups) == 0) == (name in WITHOUT_GROUPS)
    assert all(len(frozen.reason.split()) > 2 for frozen in groups.frozen)
    assert len({group.name for group in groups}) == len(groups)
    made, frozen = {maker for group in groups for maker in group.made_by}, {frozen.name for frozen in groups.frozen}
    weighted = {"Conv", "ConvTranspose", "Gemm", "LSTM", "GRU", "RNN"}
    nodes = {node.name for node in groups.model.graph.all_nodes() if node.op_type in weighted}
    assert made.isdisjoint(frozen)
    assert made | frozen >= nodes | {layer.name for layer in layers(groups.model)}
    assert all({writer.layer.name for writer in writers(group)} <= set(group.made_by) for group in groups)


def sizes(name: str) -> set[tuple[int, int]]:
    """Of each group: channels, and positions that one takes where it takes most."""
    return {(g.size, max(slot.positions.shape[1] for slot in g.slots)) for g in case(name).groups}


def test_attention_has_heads_and_head_dimensions() -> None:
    heads, dimension = 4, 16
    assert {(heads, dimension), (dimension, heads)} <= sizes("bert")
    assert {(heads, 3 * dimension), (dimension, 2 * heads), (dimension, heads)} <= sizes(
        "gpt"
    )  # q, k and v in one matrix


def test_channels_of_heads_are_blocks() -> None:
    blocks = {(group.size, group.block) for group in case("bert").groups}
    assert {(4, 16), (16, 1)} <= blocks  # a head's channels lie side by side, those of one dimension do not
    assert {group.block for group in case("resnet").groups} == {1}  # though the classifier may read several of each


def test_residual_streams_are_one_group() -> None:
    spine = next(group for group in case("resnet").groups if group.name == "Conv_1")
    consumers = [slot for slot in spine.slots if slot.axis == 1 and slot.value.const_value is not None]
    assert len(consumers) >= 3


def test_outputs_freeze() -> None:
    assert [f.reason for f in case("resnet").groups.frozen] == ["'logits' is an output of the model"]


def test_every_layer_of_a_stream_that_is_frozen_is_named() -> None:
    stuck = [f.name for f in case("bert").groups.frozen if f.reason == "'last_hidden_state' is an output of the model"]
    layers_of_two_blocks = 4
    embeddings = 2
    assert len(stuck) == layers_of_two_blocks + embeddings


def reasons(model: ir.Model) -> list[str]:
    return [frozen.reason for frozen in channel_groups(model).frozen]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("fp16_weights", "its weight is not stored as such, but comes from Cast"),
        ("quantized_already", "its weights are quantized already"),
        ("weights_as_inputs", "is also an input of the model, and may be overridden"),
    ],
)
def test_weights_that_are_no_plain_constants_freeze(name: str, reason: str) -> None:
    found = [frozen.reason for frozen in case(name).groups.frozen]
    assert found
    assert all(reason in one for one in found)


@pytest.mark.parametrize(
    ("operator", "operands"),
    [
        ("MatMulInteger", "xw"),
        ("QLinearMatMul", "xszwszsz"),
        ("com.microsoft.QGemm", "xszwsz_sz"),
        ("com.microsoft.MatMulIntegerToFloat", "xwss"),
    ],
)
def test_integer_layers_freeze(operator: str, operands: str) -> None:
    net = Net(opset=17)
    net.graph.opset_imports["com.microsoft"] = 1
    given = {
        "x": net.input("x", [2, 4], ir.DataType.UINT8),
        "w": net.weight(np.ones((4, 3), np.uint8)),
        "s": net.constant(1, np.float32),
        "z": net.constant(0, np.uint8),
    }
    domain, _, name = operator.rpartition(".")
    y = net.op(name, *(given.get(operand) for operand in operands), domain=domain)
    integers = {"MatMulInteger": ir.DataType.INT32, "MatMulIntegerToFloat": ir.DataType.FLOAT}
    net.output("y", y, [2, 3], integers.get(name, ir.DataType.UINT8))
    assert reasons(net.model()) == ["its weights are quantized already"]


def test_odd_layers_freeze_and_products_of_activations_are_none() -> None:
    net = Net(opset=17)
    net.graph.opset_imports["com.microsoft"] = 1
    x = net.input("x", [1, 4, 8, 8])
    fused = net.op("FusedConv", x, net.weight(net.normal(4, 4, 1, 1, fan_in=4)), domain="com.microsoft")
    computed = net.op("Conv", fused, net.op("ReduceMean", x, axes=[0], keepdims=1))
    product = net.op("MatMul", net.op("MatMul", fused, fused), net.weight(net.normal(4, 8, 8, fan_in=8)))
    single = net.op("Conv", product, net.weight(net.normal(1, 4, 1, 1, fan_in=4)))
    net.output("y", net.op("Add", single, net.op("ReduceMean", computed, keepdims=1)), [1, 1, 8, 8])
    assert reasons(net.model()) == [
        "FusedConv is an operator whose channels nothing is known of",
        "its weight is not a constant",
        "its weight is not a matrix in the usual place",
        "it makes only one channel",
    ]


def test_a_size_in_the_arithmetic_freezes() -> None:
    net = Net(opset=17)
    x = net.input("x", ["batch", 8])
    hidden = net.gemm(x, 8, 16)
    size = net.op("Cast", net.op("Gather", net.op("Shape", hidden), net.constant(1)), to=ir.DataType.FLOAT)
    net.output("y", net.gemm(net.op("Div", hidden, net.op("Sqrt", size)), 16, 4), ["batch", 4])
    groups = channel_groups(net.model())
    assert len(groups) == 0
    assert "computes with their number" in groups.frozen[0].reason


def test_a_size_told_to_a_reshape_follows() -> None:
    net = Net(opset=17)
    x = net.input("x", ["batch", 8])
    hidden = net.gemm(x, 8, 12)
    batch = net.op("Gather", net.op("Shape", x), net.constant([0]))
    shape = net.op("Concat", batch, net.constant([3]), net.constant([4]), axis=0)
    turned = net.op("Transpose", net.op("Reshape", hidden, shape), perm=[0, 2, 1])
    flat = net.op("Reshape", turned, net.op("Concat", batch, net.constant([12]), axis=0))
    net.output("y", net.gemm(flat, 12, 4), ["batch", 4])
    model = net.model()
    groups = channel_groups(model)
    assert sorted(group.size for group in groups) == [3, 4]
    feeds = {"x": np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)}
    for group in groups:
        assert_removal_is_masking(Case(groups, feeds), {group: [1]})
    assert_removal_is_masking(Case(groups, feeds), {group: [0, 2] for group in groups})


def test_removing_everything_is_an_error() -> None:
    groups = case("vgg").groups
    with pytest.raises(SurgeryError, match="nothing would be left"):
        without(groups, {groups[0]: range(groups[0].size)})


def test_the_model_given_stays_as_it_is() -> None:
    proto = zoo.build("gpt")
    model = models.load(proto)
    before = models.to_bytes(model)
    groups = channel_groups(model)
    without(groups, {group: [0] for group in groups})
    assert models.to_bytes(model) == before
