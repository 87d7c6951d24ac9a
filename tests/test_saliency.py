"""Scores of groups against what a reader would compute by hand, layer by layer."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from models import zoo
from models.net import Net
from onnxcomp import model as models
from onnxcomp.channels import ChannelGroup, ChannelGroups, channel_groups
from onnxcomp.core import Context
from onnxcomp.data import open_dataset
from onnxcomp.errors import OptionError
from onnxcomp.members import readers, writers
from onnxcomp.runtime import Session
from onnxcomp.saliency import Aggregate, Criterion, saliencies
from onnxcomp.samples import Dataset

Array = NDArray[np.float64]

SIZE, SIDE = 4, 6
EACH_AGGREGATE: dict[Aggregate, Callable[..., Any]] = {
    Aggregate.MEAN: np.mean,
    Aggregate.MAX: np.max,
    Aggregate.SUM: np.sum,
}
TWELVE = {"x": np.random.default_rng(7).normal(size=(12, 3, SIDE, SIDE)).astype(np.float32)}


@functools.cache
def residual() -> ChannelGroups:
    """Two convolutions write a stream, one with BatchNorm; they and a Gemm read it, that one behind a Flatten."""
    net = Net(opset=17)
    first = net.batch_norm(net.conv(net.input("x", ["batch", 3, SIDE, SIDE]), 3, SIZE, bias=False), SIZE)
    second = net.conv(net.relu(first), SIZE, SIZE, bias=False)
    stream = net.relu(net.op("Add", first, second))
    net.output("maps", net.conv(stream, SIZE, 5), ["batch", 5, SIDE, SIDE])
    flat = net.op("Flatten", stream)
    net.output("logits", net.gemm(flat, SIZE * SIDE * SIDE, 3), ["batch", 3])
    groups = channel_groups(net.model())
    weight = next(node for node in groups.model.graph if node.op_type == "Conv").inputs[1]
    assert weight is not None
    assert weight.const_value is not None
    sparse = weight.const_value.numpy() * (np.random.default_rng(0).random((SIZE, 3, 3, 3)) < 0.7)
    weight.const_value = ir.tensor(sparse.astype(np.float32), name=weight.name)
    return groups


def dataset(groups: ChannelGroups, feeds: dict[str, Any]) -> Dataset:
    return open_dataset([feeds], models.input_specs(groups.model))


def score(
    groups: ChannelGroups, criterion: Criterion, feeds: dict[str, Any] | None = None, **settings: Any
) -> Array | str:
    """Of the only group."""
    data = None if feeds is None else dataset(groups, feeds)
    (found,) = saliencies(groups, groups.groups, criterion, data, Context(), **settings)
    return found


def nodes(groups: ChannelGroups, *kinds: str) -> list[ir.Node]:
    return [node for node in groups.model.graph if node.op_type in kinds]


def constant(node: ir.Node, index: int) -> Array:
    value = node.inputs[index]
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy().astype(np.float64)


def activation(groups: ChannelGroups, value: ir.Value, feeds: dict[str, Any]) -> Array:
    """What goes through one tensor, by a run in which nothing is fused: that decides what is exactly zero."""
    model = groups.model.clone()
    for output in [output for node in model.graph for output in node.outputs]:
        if output not in model.graph.outputs and (output.name == value.name or output.dtype == ir.DataType.FLOAT):
            output.type = ir.TensorType(ir.DataType.FLOAT)
            model.graph.outputs.append(output)
    return np.asarray(Session(model).run(feeds)[value.name or ""], np.float64)


def expected_weights(criterion: Criterion) -> list[Array]:
    """Member by member, channel by channel."""
    first, second, _ = nodes(residual(), "Conv")
    if criterion is Criterion.GAMMA:
        return [np.abs(constant(nodes(residual(), "BatchNormalization")[0], 1))]
    result = []
    for weight in (constant(first, 1), constant(second, 1)):
        filters = [weight[c].ravel() for c in range(SIZE)]
        counts = [np.count_nonzero(f) for f in filters]
        result.append(
            np.array(
                {
                    Criterion.L1: [np.abs(f).sum() for f in filters],
                    Criterion.L2: [np.sqrt((f**2).sum()) for f in filters],
                    Criterion.L1_NONZERO: [np.abs(f).sum() / n for f, n in zip(filters, counts, strict=True)],
                    Criterion.L2_NONZERO: [np.sqrt((f**2).sum()) / n for f, n in zip(filters, counts, strict=True)],
                    Criterion.FPGM: [sum(float(np.linalg.norm(f - g)) for g in filters) for f in filters],
                }[criterion]
            )
        )
    return result


def expected_activity(criterion: Criterion) -> list[Array]:
    """Of what the convolutions read, and of what the Gemm reads: the same values, the positions on another axis."""
    first, second = nodes(residual(), "Relu")
    result = []
    for value in (first.outputs[0], second.outputs[0], second.outputs[0]):
        x = activation(residual(), value, TWELVE)
        channels = [x[:, c].reshape(len(x), -1) for c in range(SIZE)]
        result.append(
            np.array(
                {
                    Criterion.ACTIVATION: [np.abs(z).mean() for z in channels],
                    Criterion.ACTIVATION_STD: [np.abs(z).mean(axis=1).std() for z in channels],
                    Criterion.FEATURE_MAP: [np.abs(z).sum() / np.count_nonzero(z) for z in channels],
                    Criterion.APOZ: [1 - np.mean(z == 0) for z in channels],
                }[criterion]
            )
        )
    return result


def expected_reading(criterion: Criterion) -> list[Array]:
    """Of the second and third convolution and the Gemm, from all their input vectors."""
    _, second, third = nodes(residual(), "Conv")
    (gemm,) = nodes(residual(), "Gemm")
    result = []
    for node in (second, third, gemm):
        data = node.inputs[0]
        assert data is not None
        x = activation(residual(), data, TWELVE)
        W = constant(node, 1)
        if node is gemm:
            W, rows = (W if node.attributes.get_int("transB", 0) else W.T), x
        else:
            W = W.reshape(len(W), -1)
            rows = patches(x)
        S = np.arange(W.shape[1]).reshape(SIZE, -1)
        result.append(brute(criterion, W, rows, S, centred=True))
    return result


def patches(x: Array) -> Array:
    """The 3 x 3 neighbourhoods of images, padded by one: (positions, channels * 9)."""
    padded = np.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)])
    return np.array(
        [
            padded[n, :, i : i + 3, j : j + 3].ravel()
            for n in range(len(x))
            for i in range(x.shape[2])
            for j in range(x.shape[3])
        ]
    )


def brute(criterion: Criterion, W: Array, rows: Array, S: NDArray[np.int64], *, centred: bool) -> Array:
    """tr(dW H dW^T) of each channel's removal, by the definition of each criterion."""
    if criterion is Criterion.WANDA:
        return np.array([(np.abs(W) * np.sqrt((rows**2).mean(axis=0)))[:, s].sum() for s in S])
    if centred:
        rows = rows - rows.mean(axis=0)
    H = rows.T @ rows / len(rows)
    energy = np.square(rows @ W.T).sum() / len(rows)
    if criterion is Criterion.OBD:
        return np.array([sum(float(H[j, j] * (W[:, j] ** 2).sum()) for j in s) / float(energy) for s in S])
    damped = H + 1e-2 * np.diagonal(H).mean() * np.eye(len(H))
    costs = []
    for s in S:
        kept = np.setdiff1d(np.arange(len(H)), s)
        dW = np.array(W)
        dW[:, kept] = -W[:, s] @ damped[np.ix_(s, kept)] @ np.linalg.inv(damped[np.ix_(kept, kept)])
        costs.append(np.trace(dW @ damped @ dW.T) / energy)
    return np.array(costs)


WEIGHTS = [c for c in Criterion if not c.needs_data and c is not Criterion.RANDOM]
ACTIVITY = [Criterion.ACTIVATION, Criterion.ACTIVATION_STD, Criterion.FEATURE_MAP, Criterion.APOZ]
READING = [Criterion.WANDA, Criterion.OBD, Criterion.OBS]


def test_every_criterion_is_tested() -> None:
    assert {*WEIGHTS, *ACTIVITY, *READING, Criterion.RANDOM} == set(Criterion)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("aggregate", list(Aggregate))
@pytest.mark.parametrize("criterion", [*WEIGHTS, *ACTIVITY, *READING])
def test_scores_are_those_computed_by_hand(criterion: Criterion, aggregate: Aggregate, normalised: bool) -> None:
    (group,) = residual()
    assert group.size == SIZE
    by_hand = (
        expected_weights if criterion in WEIGHTS else expected_activity if criterion in ACTIVITY else expected_reading
    )
    members = by_hand(criterion)
    if normalised:
        members = [member / member.mean() for member in members]
    expected = EACH_AGGREGATE[aggregate](np.stack(members), axis=0)
    feeds = TWELVE if criterion.needs_data else None
    found = score(residual(), criterion, feeds, aggregate=aggregate, normalised=normalised)
    # Activations and their sums are float32.
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-4)


def test_the_members_are_those_that_write_and_read() -> None:
    (group,) = residual()
    first, second, third = (node.name or "" for node in nodes(residual(), "Conv"))
    (gemm,) = (node.name or "" for node in nodes(residual(), "Gemm"))
    assert {writer.layer.name for writer in writers(group)} == {first, second}
    found = {reader.layer.name: reader.columns for reader in readers(group)}
    assert found.keys() == {second, third, gemm}
    np.testing.assert_array_equal(found[third], np.arange(SIZE * 9).reshape(SIZE, 9))
    np.testing.assert_array_equal(found[gemm], np.arange(SIZE * SIDE**2).reshape(SIZE, SIDE**2))


def test_chance_goes_by_seed_and_name() -> None:
    groups = residual()
    first, again, other = (
        saliencies(groups, groups.groups, "random", None, Context(seed=seed))[0] for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_without_data_only_weights_tell() -> None:
    for criterion in Criterion:
        found = score(residual(), criterion)
        assert isinstance(found, str) == criterion.needs_data
        assert not criterion.needs_data or found == "the criterion needs calibration data"


def test_all_groups_share_one_pass() -> None:
    groups = case("resnet").groups
    reports: list[str] = []
    context = Context(progress=lambda done, total, what: reports.append(what))
    data = dataset(groups, case("resnet").feeds)
    for criterion, passes in ((Criterion.L1, 0), (Criterion.APOZ, 1), (Criterion.ACTIVATION, 1), (Criterion.OBS, 2)):
        assert len(saliencies(groups, groups.groups, criterion, data, context)) == len(groups) > 1
        assert len(reports) == passes  # what is known is not gathered again


def test_unknown_names_are_refused() -> None:
    with pytest.raises(OptionError, match="no criterion 'l3'"):
        score(residual(), "l3")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="no aggregate 'median'"):
        score(residual(), Criterion.L1, aggregate="median")


# -- other kinds of layers ---------------------------------------------------------------------------------------------


class Case:
    """A model of the zoo, traced."""

    def __init__(self, name: str) -> None:
        proto = zoo.build(name)
        self.groups, self.feeds = channel_groups(models.load(proto)), zoo.feeds(proto)


@functools.cache
def case(name: str) -> Case:
    return Case(name)


def one_group(build: Callable[[Net, ir.Value], ir.Value], inputs: list[Any], outputs: list[Any]) -> ChannelGroups:
    net = Net(opset=17)
    net.output("y", build(net, net.input("x", inputs)), outputs)
    groups = channel_groups(net.model())
    assert len(groups) == 1
    return groups


def test_heads_hold_many_positions() -> None:
    bert = case("bert")
    heads = [g for g in bert.groups if g.size == 4 and any(r.columns.shape[1] == 16 for r in readers(g))]
    for group in heads:
        ((layer, columns),) = readers(group)
        data = dataset(bert.groups, bert.feeds)

        def found(criterion: Criterion, group: ChannelGroup = group, data: Dataset = data) -> Array:
            (scores,) = saliencies(bert.groups, [group], criterion, data, Context(), normalised=False)
            assert not isinstance(scores, str)
            return scores

        weights = [constant(w.layer.node, w.layer.index) for w in writers(group)]
        by_head = [np.abs(weight.reshape(len(weight), 4, 16)).sum(axis=(0, 2)) for weight in weights]
        np.testing.assert_allclose(found(Criterion.L1), np.mean(by_head, axis=0), rtol=1e-6)
        x = activation(bert.groups, layer.data, bert.feeds)
        assert columns.shape == (4, 16)
        per_head = np.abs(x.reshape(*x.shape[:2], 4, 16))
        np.testing.assert_allclose(found(Criterion.ACTIVATION), per_head.mean(axis=(0, 1, 3)), rtol=1e-5)
        np.testing.assert_allclose(
            found(Criterion.ACTIVATION_STD), per_head.mean(axis=(1, 3)).std(axis=0), rtol=1e-4, atol=1e-6
        )
        W = constant(layer.node, layer.index).T
        for criterion in READING:
            expected = brute(criterion, W, x.reshape(-1, 64), columns, centred=False)
            np.testing.assert_allclose(found(criterion), expected, rtol=1e-3)
    assert heads


def test_a_depthwise_convolution_writes() -> None:
    groups = one_group(
        lambda net, x: net.conv(net.conv(net.conv(x, 3, 6), 6, 6, group=6), 6, 2),
        ["batch", 3, 5, 5],
        ["batch", 2, 5, 5],
    )
    first, middle, last = (node.name for node in nodes(groups, "Conv"))
    assert {writer.layer.name for writer in writers(groups[0])} == {first, middle}
    assert [reader.layer.name for reader in readers(groups[0])] == [last]


def test_a_grouped_convolution_reads_a_share_in_each_group() -> None:
    net = Net(opset=17)
    hidden = net.relu(net.conv(net.input("x", ["batch", 3, 5, 5]), 3, 8))
    net.output("y", net.conv(hidden, 8, 6, group=2), ["batch", 6, 5, 5])
    groups = channel_groups(net.model())
    group = next(g for g in groups if g.size == 4)
    feeds = {"x": np.random.default_rng(1).normal(size=(9, 3, 5, 5)).astype(np.float32)}
    x = activation(groups, nodes(groups, "Relu")[0].outputs[0], feeds)
    W = constant(nodes(groups, "Conv")[1], 1).reshape(6, -1)
    # As one layer: half of its outputs read half of its inputs, nothing the other half.
    whole = np.zeros((6, 72))
    whole[:3, :36], whole[3:, 36:] = W[:3], W[3:]
    S = np.array([[*range(9 * c, 9 * c + 9), *range(36 + 9 * c, 36 + 9 * c + 9)] for c in range(4)])
    rows = patches(x)
    data = dataset(groups, feeds)
    for criterion in (Criterion.WANDA, Criterion.OBD):
        (found,) = saliencies(groups, [group], criterion, data, Context(), normalised=False)
        np.testing.assert_allclose(np.asarray(found), brute(criterion, whole, rows, S, centred=True), rtol=1e-4)
    (l1,) = saliencies(groups, [group], Criterion.L1, None, Context(), normalised=False)
    filters = np.abs(constant(nodes(groups, "Conv")[0], 1)).sum(axis=(1, 2, 3))
    np.testing.assert_allclose(np.asarray(l1), filters[:4] + filters[4:], rtol=1e-6)


def transposed(group: int, inputs: int, outputs: int) -> ChannelGroups:
    net = Net(opset=17)
    hidden = net.relu(net.conv(net.input("x", ["batch", 3, 4, 4]), 3, inputs))
    weight = net.weight(net.normal(inputs, outputs // group, 2, 2, fan_in=inputs))
    up = net.op("ConvTranspose", hidden, weight, strides=[2, 2], group=group)
    net.output("y", net.conv(up, outputs, 2), ["batch", 2, 8, 8])
    return channel_groups(net.model())


def test_a_transposed_convolution_reads_and_writes_on_its_own_axes() -> None:
    groups = transposed(1, 6, 4)
    (up,) = nodes(groups, "ConvTranspose")
    before, after = (next(g for g in groups if g.size == size) for size in (6, 4))
    assert [reader.layer.node for reader in readers(before)] == [up]
    assert [writer.layer.node for writer in writers(after)] == [up]
    (l1,) = saliencies(groups, [after], Criterion.L1, None, Context(), normalised=False)
    np.testing.assert_allclose(np.asarray(l1), np.abs(constant(up, 1)).sum(axis=(0, 2, 3)), rtol=1e-6)
    feeds = {"x": np.random.default_rng(1).normal(size=(5, 3, 4, 4)).astype(np.float32)}
    (wanda,) = saliencies(groups, [before], Criterion.WANDA, dataset(groups, feeds), Context(), normalised=False)
    norms = np.sqrt(np.square(activation(groups, nodes(groups, "Relu")[0].outputs[0], feeds)).mean(axis=(0, 2, 3)))
    np.testing.assert_allclose(np.asarray(wanda), np.abs(constant(up, 1)).sum(axis=(1, 2, 3)) * norms, rtol=1e-4)


def test_grouped_transposed_convolutions_follow_the_same_rules() -> None:
    groups = transposed(2, 6, 4)
    (up,) = nodes(groups, "ConvTranspose")
    before = [g for g in groups if any(r.layer.node is up for r in readers(g))]
    assert [(g.size, next(r.columns for r in readers(g) if r.layer.node is up).tolist()) for g in before] == [
        (3, [[0], [1], [2]])
    ]
    feeds = {"x": np.random.default_rng(1).normal(size=(5, 3, 4, 4)).astype(np.float32)}
    (wanda,) = saliencies(groups, before, Criterion.WANDA, dataset(groups, feeds), Context(), normalised=False)
    norms = np.sqrt(np.square(activation(groups, nodes(groups, "Relu")[0].outputs[0], feeds)).mean(axis=(0, 2, 3)))
    each = np.abs(constant(up, 1)).sum(axis=(1, 2, 3)) * norms
    np.testing.assert_allclose(np.asarray(wanda), each[:3] + each[3:], rtol=1e-4)

    depthwise = transposed(6, 6, 6)
    (up,) = nodes(depthwise, "ConvTranspose")
    (group,) = depthwise
    assert up in {writer.layer.node for writer in writers(group)}
    assert up not in {reader.layer.node for reader in readers(group)}


def test_a_matrix_on_the_left() -> None:
    net = Net(opset=17)
    x = net.input("x", ["batch", 5, 7])
    first, second = net.weight(net.normal(6, 5, fan_in=5)), net.weight(net.normal(3, 6, fan_in=6))
    hidden = net.relu(net.op("MatMul", first, x))
    net.output("y", net.op("MatMul", second, hidden), ["batch", 3, 7])
    groups = channel_groups(net.model())
    feeds = {"x": np.random.default_rng(1).normal(size=(4, 5, 7)).astype(np.float32)}
    A, B = (constant(node, 0) for node in nodes(groups, "MatMul"))
    z = activation(groups, nodes(groups, "Relu")[0].outputs[0], feeds)
    settings: dict[str, Any] = {"feeds": feeds, "normalised": False}
    np.testing.assert_allclose(np.asarray(score(groups, Criterion.L1, **settings)), np.abs(A).sum(axis=1), rtol=1e-6)
    std = np.abs(z).mean(axis=2).std(axis=0)
    np.testing.assert_allclose(np.asarray(score(groups, Criterion.ACTIVATION_STD, **settings)), std, rtol=1e-5)
    rows = z.swapaxes(1, 2).reshape(-1, 6)
    for criterion in READING:
        expected = brute(criterion, B, rows, np.arange(6)[:, None], centred=False)
        np.testing.assert_allclose(np.asarray(score(groups, criterion, **settings)), expected, rtol=1e-4)


@pytest.mark.parametrize(("trans_a", "trans_b"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_a_gemm_in_every_orientation(trans_a: int, trans_b: int) -> None:
    net = Net(opset=17)
    first, second = net.normal(5, 6, fan_in=5), net.normal(6, 3, fan_in=6)
    hidden = net.relu(net.op("MatMul", net.input("x", ["batch", 5]), net.weight(first)))
    data = net.op("Transpose", hidden, perm=[1, 0]) if trans_a else hidden
    weight = net.weight(second.T.copy() if trans_b else second)
    net.output("y", net.op("Gemm", data, weight, transA=trans_a, transB=trans_b), ["batch", 3])
    groups = channel_groups(net.model())
    x = np.random.default_rng(1).normal(size=(9, 5)).astype(np.float32)
    z = np.maximum(x @ first, 0).astype(np.float64)
    settings: dict[str, Any] = {"feeds": {"x": x}, "normalised": False}
    np.testing.assert_allclose(
        np.asarray(score(groups, Criterion.L1, **settings)), np.abs(first).sum(axis=0), rtol=1e-6
    )
    np.testing.assert_allclose(np.asarray(score(groups, Criterion.ACTIVATION, **settings)), z.mean(axis=0), rtol=1e-5)
    for criterion in READING:
        expected = brute(criterion, second.T.astype(np.float64), z, np.arange(6)[:, None], centred=True)
        np.testing.assert_allclose(np.asarray(score(groups, criterion, **settings)), expected, rtol=1e-4)


def test_what_layers_share_counts_once() -> None:
    net = Net(opset=17)
    weight = net.weight(net.normal(5, 6, fan_in=5))
    parts = [net.op("MatMul", net.input(name, ["batch", 5]), weight) for name in ("x", "y")]
    hidden = net.relu(net.op("Add", *parts))
    for name in ("p", "q"):
        net.output(name, net.op("MatMul", hidden, net.weight(net.normal(6, 3, fan_in=6))), ["batch", 3])
    groups = channel_groups(net.model())
    assert (len(writers(groups[0])), len(readers(groups[0]))) == (2, 2)
    feeds = {name: np.random.default_rng(1).normal(size=(9, 5)).astype(np.float32) for name in ("x", "y")}
    settings: dict[str, Any] = {"feeds": feeds, "aggregate": Aggregate.SUM, "normalised": False}
    l1 = np.abs(constant(nodes(groups, "MatMul")[0], 1)).sum(axis=0)
    np.testing.assert_allclose(np.asarray(score(groups, Criterion.L1, **settings)), l1, rtol=1e-6)
    z = activation(groups, nodes(groups, "Relu")[0].outputs[0], feeds)
    found = np.asarray(score(groups, Criterion.ACTIVATION, **settings))
    np.testing.assert_allclose(found, z.mean(axis=0), rtol=1e-5)


def test_inputs_that_never_vary_are_worth_nothing_to_brain_surgeon() -> None:
    net = Net(opset=17)
    weight = net.normal(6, 5, fan_in=5)
    weight[2:5] = 0  # the bias alone
    bias = net.weight(np.arange(1, 7, dtype=np.float32) / 3)
    hidden = net.relu(net.op("Gemm", net.input("x", ["batch", 5]), net.weight(weight), bias, transB=1))
    net.output("y", net.gemm(hidden, 6, 3), ["batch", 3])
    groups = channel_groups(net.model())
    feeds = {"x": np.random.default_rng(1).normal(size=(99, 5)).astype(np.float32)}
    for criterion in (Criterion.OBD, Criterion.OBS):
        found = np.asarray(score(groups, criterion, feeds, normalised=False))
        assert found.min() >= 0
        # Damping alone gives what is constant any worth.
        assert found[2:5].max() < 0.05 * found[[0, 1, 5]].min()
    assert np.asarray(score(groups, Criterion.WANDA, feeds)).min() > 0.1


# -- what says nothing -------------------------------------------------------------------------------------------------


def test_reasons_are_given() -> None:
    bert = case("bert")
    data = dataset(bert.groups, bert.feeds)

    def reasons(criterion: Criterion) -> set[str]:
        found = saliencies(bert.groups, bert.groups.groups, criterion, data, Context())
        return {reason for reason in found if isinstance(reason, str)}

    assert reasons(Criterion.GAMMA) == {"no BatchNormalization scales its channels"}
    assert reasons(Criterion.OBS) == {"no layer reads its channels with weights of its own"}  # of queries and keys
    assert "none of the activations that are read is ever zero" in reasons(Criterion.APOZ)
    assert not reasons(Criterion.L1)


def test_a_layer_that_no_relu_precedes_has_no_say_by_apoz() -> None:
    net = Net(opset=17)
    hidden = net.op("MatMul", net.input("x", ["batch", 5]), net.weight(net.normal(5, 6, fan_in=5)))
    net.output("raw", net.op("MatMul", hidden, net.weight(net.normal(6, 3, fan_in=6))), ["batch", 3])
    net.output("y", net.op("MatMul", net.relu(hidden), net.weight(net.normal(6, 3, fan_in=6))), ["batch", 3])
    groups = channel_groups(net.model())
    feeds = {"x": np.random.default_rng(1).normal(size=(9, 5)).astype(np.float32)}
    z = activation(groups, nodes(groups, "Relu")[0].outputs[0], feeds)
    found = score(groups, Criterion.APOZ, feeds, aggregate=Aggregate.MAX, normalised=False)
    np.testing.assert_allclose(np.asarray(found), (z != 0).mean(axis=0))


def test_bodies_of_control_flow_are_not_observed() -> None:
    flow = case("control_flow")
    for criterion in (Criterion.ACTIVATION, Criterion.OBS):
        found = saliencies(flow.groups, flow.groups.groups, criterion, dataset(flow.groups, flow.feeds), Context())
        assert set(map(str, found)) == {"a body of control flow reads its channels"}
    assert all(isinstance(s, np.ndarray) for s in saliencies(flow.groups, flow.groups.groups, "l1", None, Context()))


ZOO = ["resnet", "preact_resnet", "mobilenetv2", "shufflenet", "densenet", "senet", "unet", "superres", "gpt", "mixer",
       "lstm_tagger", "conv3d", "control_flow", "functions", "shared_weights", "string_lookup"]  # fmt: skip


@pytest.mark.parametrize("name", ZOO)
def test_every_group_has_finite_scores_or_a_reason(name: str) -> None:
    groups, context = case(name).groups, Context()
    data = dataset(groups, case(name).feeds)
    told = set()
    for criterion in Criterion:
        for group, found in zip(groups, saliencies(groups, groups.groups, criterion, data, context), strict=True):
            if isinstance(found, str):
                assert len(found.split()) > 3
            else:
                told.add(group)
                assert found.shape == (group.size,)
                assert found.dtype == np.float64
                assert np.isfinite(found).all()
                assert (found >= 0).all()
    assert told == set(groups)


@pytest.mark.parametrize("name", ["resnet", "shufflenet", "unet", "gpt"])
def test_l1_is_what_goes_from_the_writers(name: str) -> None:
    groups = case(name).groups
    for group, found in zip(
        groups,
        saliencies(groups, groups.groups, "l1", None, Context(), Aggregate.SUM, normalised=False),
        strict=True,
    ):
        slots = dict.fromkeys(writer.slot for writer in writers(group))
        for channel in range(group.size):
            lost = 0.0
            for slot in slots:
                assert slot.value.const_value is not None
                weight = slot.value.const_value.numpy()
                lost += float(np.abs(np.take(weight, slot.positions[channel], slot.axis)).sum(dtype=np.float64))
            assert found[channel] == pytest.approx(lost, rel=1e-6)
