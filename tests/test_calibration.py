"""Streaming statistics against all activations at once; their memory, their cap, and what they refuse."""

import tracemalloc
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from models.net import Net
from onnxcomp import model as models
from onnxcomp.calibration import calibrate
from onnxcomp.channels import Slot
from onnxcomp.core import Context
from onnxcomp.data import open_dataset
from onnxcomp.errors import DataError
from onnxcomp.graph import prepared
from onnxcomp.layers import Layer, layers
from onnxcomp.model import input_specs
from onnxcomp.numerics.affine import IntGrid
from onnxcomp.numerics.histogram import Histogram
from onnxcomp.numerics.moments import Moments
from onnxcomp.observations import Gram, Observed, Statistics
from onnxcomp.passes.prune import Prune
from onnxcomp.passes.quantize_static import QuantizeStatic, Range
from onnxcomp.runtime import Session, Target
from onnxcomp.samples import Dataset
from tests.passes.test_prune_depth import residual


def network() -> ir.Model:
    """Two convolutions and a Gemm, with BatchNorm-free ReLUs between."""
    net = Net(opset=17)
    x = net.input("x", ["batch", 3, 8, 8])
    x = net.relu(net.conv(x, 3, 8))
    x = net.relu(net.conv(x, 8, 8, group=2, stride=2))
    net.output("y", net.gemm(net.reshape(x, 0, -1), 128, 5), ["batch", 5])
    model = prepared(net.model(), 17)
    assert isinstance(model, ir.Model)
    return model


def images(count: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(count, 3, 8, 8)).astype(np.float32)


def dataset(model: ir.Model, x: NDArray[np.float32]) -> Dataset:
    return open_dataset({"x": x}, input_specs(model))


def requests(model: ir.Model) -> tuple[list[Observed], list[Layer]]:
    values = [node.outputs[0] for node in model.graph if node.op_type in {"Conv", "Relu"}]
    return [Observed(value, axis=1) for value in values], list(layers(model))


def slots(model: ir.Model) -> list[Slot]:
    """Every channel of the four activations, and channels in pairs."""
    alone, pairs = np.arange(8)[:, None], np.array([[0, 4], [7, 2], [1, 3]])
    return [Slot(seen.value, 1, positions) for seen in requests(model)[0] for positions in (alone, pairs)]


def gathered(model: ir.Model, x: NDArray[np.float32], **settings: Any) -> Statistics:
    tensors, found = requests(model)
    return calibrate(model, dataset(model, x), Context(**settings), tensors, found, channels=slots(model))


def activations(model: ir.Model, x: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """Every activation that is observed, on all the data at once."""
    whole = model.clone()
    wanted = {seen.value.name for seen in requests(model)[0]} | {layer.data.name for layer in requests(model)[1]}
    for node in whole.graph:
        for value in node.outputs:
            if value.name in wanted:
                value.type = ir.TensorType(ir.DataType.FLOAT)
                whole.graph.outputs.append(value)
    outputs = Session(whole).run({"x": x}) | {"x": x}
    return {name: np.asarray(array, np.float32) for name, array in outputs.items()}


def assert_same(left: Statistics, right: Statistics, rtol: float = 1e-12) -> None:
    assert left.tensors.keys() == right.tensors.keys()
    assert left.grams.keys() == right.grams.keys()
    for name, seen in left.tensors.items():
        other = right.tensors[name]
        np.testing.assert_array_equal(seen.low, other.low)
        np.testing.assert_array_equal(seen.high, other.high)
        np.testing.assert_array_equal(seen.histogram.counts, other.histogram.counts)
    for name, gram in left.grams.items():
        assert gram.rows == right.grams[name].rows
        np.testing.assert_allclose(gram.total, right.grams[name].total, rtol=rtol)
    assert left.channels.keys() == right.channels.keys()
    for place, moments in left.channels.items():
        assert_moments(moments, right.channels[place], rtol)


def assert_moments(left: Moments, right: Moments, rtol: float) -> None:
    np.testing.assert_array_equal(left.nonzeros, right.nonzeros)
    np.testing.assert_allclose(left.magnitudes, right.magnitudes, rtol=rtol)
    for one, other in ((left.values, right.values), (left.levels, right.levels)):
        assert one.count == other.count
        # A mean of both signs may be far smaller than what it is the mean of.
        scale = np.sqrt(other.variance).max(initial=0)
        np.testing.assert_allclose(one.mean, other.mean, rtol=rtol, atol=rtol * scale)
        squares = other.deviations + other.count * other.mean**2
        np.testing.assert_allclose(one.deviations, other.deviations, rtol=rtol, atol=rtol * squares.max(initial=0))


def moments_of(values: NDArray[np.float32], slot: Slot) -> Moments:
    """Of a whole activation in float64."""
    places = np.moveaxis(values, slot.axis, 1)[:, slot.positions].astype(np.float64)
    x = places.reshape(*places.shape[:2], -1)
    sums = {"sums": x, "squares": x**2, "magnitudes": np.abs(x), "nonzeros": (x != 0).astype(float)}
    return Moments.of(x.shape[2], **{name: array.sum(axis=2) for name, array in sums.items()})


def test_statistics_are_those_of_all_activations() -> None:
    model, x = network(), images(40)
    statistics, truth = gathered(model, x), activations(network(), x)
    tensors, found = requests(model)
    assert len(tensors) == 4
    for seen in tensors:
        values = truth[seen.value.name or ""]
        got = statistics.tensors[seen.value.name or ""]
        # A batch of another size may be summed in another order.
        np.testing.assert_allclose(got.low, values.min(axis=(0, 2, 3)), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(got.high, values.max(axis=(0, 2, 3)), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(got.absolute_maximum, np.abs(values).max(axis=(0, 2, 3)), rtol=1e-4)
    for layer in found:
        rows = layer.rows(truth[layer.data.name or ""], 10**9, np.random.default_rng(0)).astype(np.float64)
        gram = statistics.grams[layer.name]
        assert gram.rows == rows.shape[1]  # so few samples that every position is taken
        np.testing.assert_allclose(gram.second_moment, rows.swapaxes(1, 2) @ rows / gram.rows, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(gram.mean, rows.mean(axis=1), rtol=1e-3, atol=1e-4)


def test_moments_are_those_of_all_activations() -> None:
    model, x = network(), images(40)
    statistics, truth = gathered(model, x), activations(network(), x)
    assert len(slots(model)) == 8
    for slot in slots(model):
        # Sums of up to 128 values in float32.
        assert_moments(statistics.moments(slot), moments_of(truth[slot.tensor], slot), rtol=1e-5)


@pytest.mark.parametrize("opset", [11, 13, 17, 18, 21])
def test_channels_on_any_axis_in_any_opset(opset: int) -> None:
    net = Net(opset=opset)
    x = net.input("x", ["batch", 3, 4])
    y = net.op("Neg", x)
    half = net.op("Cast", x, to=ir.DataType.FLOAT16)
    turned = net.op("Transpose", x, perm=[1, 0, 2])
    flat = net.reshape(x, -1)
    half.type, half.shape = ir.TensorType(ir.DataType.FLOAT16), ir.Shape(["batch", 3, 4])
    net.output("half", net.op("Cast", half, to=ir.DataType.FLOAT), ["batch", 3, 4])
    net.output("turned", turned, [3, "batch", 4])
    net.output("flat", flat, ["all"])
    net.output("y", y, ["batch", 3, 4])
    model = net.model()
    values = np.round(np.random.default_rng(0).normal(size=(5, 3, 4)), 1).astype(np.float32)
    values[:, 1] = np.maximum(values[:, 1], 0)

    def moments(value: ir.Value, axis: int, size: int) -> Moments:
        slot = Slot(value, axis, np.arange(size)[:, None])
        return calibrate(model, open_dataset({"x": values}, input_specs(model)), Context(), channels=[slot]).moments(
            slot
        )

    def expected(array: NDArray[np.float32], axis: int) -> Moments:
        return moments_of(array, Slot(x, axis, np.arange(array.shape[axis])[:, None]))

    for axis, size in ((1, 3), (2, 4), (-1, 4), (-2, 3)):
        assert_moments(moments(x, axis, size), expected(values, axis), rtol=1e-6)
        assert_moments(moments(y, axis, size), expected(-values, axis), rtol=1e-6)
        assert_moments(
            moments(half, axis, size), expected(values.astype(np.float16).astype(np.float32), axis), rtol=1e-6
        )
    # Where the first axis counts channels, a run is one sample.
    assert_moments(moments(turned, 0, 3), expected(values.swapaxes(0, 1).reshape(1, 3, -1), 1), rtol=1e-6)
    assert_moments(moments(turned, -3, 3), expected(values.swapaxes(0, 1).reshape(1, 3, -1), 1), rtol=1e-6)
    assert_moments(moments(flat, 0, 60), expected(values.reshape(1, 60), 1), rtol=1e-6)


def test_moments_do_not_depend_on_batches() -> None:
    model, x = network(), images(20)
    asked = slots(model)

    def gather(size: int) -> Statistics:
        feeds = [{"x": x[start : start + size]} for start in range(0, 20, size)]
        return calibrate(model, open_dataset(feeds, input_specs(model)), Context(), channels=asked)

    whole = gather(20)
    for size in (1, 7):
        parts = gather(size)
        for slot in asked:
            assert_moments(parts.moments(slot), whole.moments(slot), rtol=1e-4)  # as for other sums of floats, above


@pytest.mark.parametrize("method", list(Range))
@pytest.mark.parametrize("signed", [False, True])
def test_ranges_are_those_of_all_activations(method: Range, signed: bool) -> None:
    model, x = network(), images(12)
    statistics, truth = gathered(model, x), activations(network(), x)
    grid = IntGrid(8, signed, symmetric=signed)
    for name, seen in statistics.tensors.items():
        expected = method.of(Histogram.of(truth[name]), grid)
        # The histogram sees every element of so small a batch; the sums may round otherwise.
        np.testing.assert_allclose(method.of(seen.histogram, grid), expected, rtol=1e-3, atol=1e-6)


def test_parts_merge_to_the_whole() -> None:
    model, x = network(), images(64)  # of which every input vector is taken
    parts = [gathered(model, x[start:stop]) for start, stop in ((0, 7), (7, 40), (40, 64))]
    merged = Statistics()
    for part in reversed(parts):
        merged = merged.merge(part)
    assert_same(merged, gathered(model, x))


def test_parts_merge_in_place_unless_they_are_read_only() -> None:
    vectors = np.random.default_rng(0).normal(size=(3, 1, 20, 4))
    first, second, third = (Gram.of(rows) for rows in vectors)
    both = first.merge(second)
    assert both.total is not first.total
    assert first.merge(second, in_place=True).total is first.total
    np.testing.assert_array_equal(first.total, both.total)
    third.total.flags.writeable = False
    np.testing.assert_array_equal(third.merge(both, in_place=True).total, both.merge(third).total)


def test_padding_does_not_count() -> None:
    model, x = network(), images(10)
    for value in (*model.graph.inputs, *model.graph.outputs):
        assert value.shape is not None
        value.shape = ir.Shape([8, *value.shape[1:]])
    statistics = gathered(model, x)  # the second run is filled up with six copies of its last row
    for name, seen in gathered(network(), x).tensors.items():
        assert statistics.tensors[name].histogram.count == seen.histogram.count
        np.testing.assert_allclose(statistics.tensors[name].histogram.squares, seen.histogram.squares, rtol=1e-4)
    for slot in slots(model):
        assert_moments(statistics.moments(slot), gathered(network(), x).moments(slot), rtol=1e-4)


def test_a_small_cap_gives_the_same_in_several_passes() -> None:
    model, x = network(), images(20)
    reports: list[str] = []
    whole = gathered(model, x)
    capped = gathered(model, x, memory=2 * 10**6, progress=lambda done, total, what: reports.append(what))
    assert any("part 2 of" in report for report in reports)
    # The batch size follows the cap, and sums of floats the batch size.
    for name, seen in whole.tensors.items():
        np.testing.assert_allclose(capped.tensors[name].high, seen.high, rtol=1e-4, atol=1e-6)
    for name, gram in whole.grams.items():
        np.testing.assert_allclose(capped.grams[name].total, gram.total, rtol=1e-3, atol=1e-3)
    for slot in slots(model):
        assert_moments(capped.moments(slot), whole.moments(slot), rtol=1e-4)


def test_a_cap_below_one_request_takes_each_apart() -> None:
    model, x = network(), images(6)
    reports: list[str] = []
    capped = gathered(model, x, memory=1, progress=lambda done, total, what: reports.append(what))
    assert any("of 15" in report for report in reports)  # four ranges, three Gram matrices, eight times moments
    for slot in slots(model):
        assert_moments(capped.moments(slot), gathered(model, x).moments(slot), rtol=1e-4)


def test_large_activations_make_runs_smaller_not_passes_more() -> None:
    model, x = network(), images(64)
    reports: list[str] = []
    context = Context(memory=1_600_000, progress=lambda done, total, what: reports.append(what))
    grams = calibrate(model, dataset(model, x), context, layers=list(layers(model))).grams
    assert {*reports} == {"calibrating"}  # 64 samples' inputs of all layers beside their statistics exceed the cap
    for name, gram in gathered(model, x).grams.items():
        np.testing.assert_allclose(grams[name].total, gram.total, rtol=1e-3, atol=1e-3)


def test_memory_does_not_grow_with_the_data() -> None:
    model = network()
    peaks = []
    for count in (1024, 4096):  # several shards each
        samples = list(dataset(model, images(32)))
        endless = Dataset(input_specs(model), count, lambda index, samples=samples: samples[index % 32])  # type: ignore[misc]
        tensors, found = requests(model)
        calibrate(model, endless.select(range(4)), Context(), tensors, found)  # imports and caches come first
        tracemalloc.start()
        statistics = calibrate(model, endless, Context(), tensors, found)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert all(gram.total.nbytes < 10**6 for gram in statistics.grams.values())
    assert peaks[1] < 1.1 * peaks[0]


def test_long_data_give_sampled_positions_in_bounded_number() -> None:
    model, x = network(), images(64)
    read = dataset(model, x).read
    many = Dataset(input_specs(model), 1024, lambda index: read(index % 64))
    statistics = calibrate(model, many, Context(), layers=list(layers(model)))
    first = next(layers(model))
    gram = statistics.grams[first.name]
    assert 4096 <= gram.rows < 1.1 * 4096  # of 65,536 positions
    truth = calibrate(model, dataset(model, x), Context(), layers=[first]).grams[first.name]
    error = np.linalg.norm(gram.second_moment - truth.second_moment) / np.linalg.norm(truth.second_moment)
    assert error < 0.15  # sampling noise of 27 x 27 entries from 4,096 rows


def test_the_same_seed_gives_the_same() -> None:
    model, x = network(), images(16)
    assert_same(gathered(model, x), gathered(model, x), rtol=0)


def test_what_is_gathered_is_the_same_to_the_last_bit_whatever_else_is_asked_for() -> None:
    """Sums that ONNX Runtime fuses with convolutions, batches and chance: none depend on it."""
    model = residual(1, 0.5, 0.7)
    x = np.random.default_rng(3).standard_normal((600, 3, 8, 8)).astype(np.float32)
    tensors = [Observed(value) for node in model.graph if node.op_type == "Conv" for value in node.outputs]
    wanted = list(layers(model))

    def found(tensors: list[Observed], wanted: list[Layer]) -> Statistics:
        given = Context(open_dataset({"image": x}, input_specs(model)), Target(threads=1), seed=0)
        assert given.data is not None
        return calibrate(model, given.data, given, tensors, wanted)

    both, grams, ranges = found(tensors, wanted), found([], wanted[1::2]), found(tensors[:2], [])
    assert grams.grams
    assert len(ranges.tensors) == 2
    for name, gram in grams.grams.items():
        assert gram.rows < 600 * 64, "some are drawn"
        np.testing.assert_array_equal(gram.total, both.grams[name].total)
    for name, statistics in ranges.tensors.items():
        np.testing.assert_array_equal(statistics.low, both.tensors[name].low)
        np.testing.assert_array_equal(statistics.high, both.tensors[name].high)
        np.testing.assert_array_equal(statistics.histogram.counts, both.tensors[name].histogram.counts)


def test_a_pass_gives_the_same_whatever_ran_before_it() -> None:
    """So that a search goes on from any part of its cache, and a recipe repeats a search."""
    model = residual(1, 0.5, 0.7)
    x = np.random.default_rng(3).standard_normal((600, 3, 8, 8)).astype(np.float32)
    prune = Prune(parts=(("Conv_15", 8),), jointly=False)

    def given() -> Context:
        return Context(open_dataset({"image": x}, input_specs(model)), Target(threads=1), seed=0)

    alone, shared = (models.to_bytes(prune(model, given()).model), given())
    QuantizeStatic()(model, shared)
    assert models.to_bytes(prune(model, shared).model) == alone


def test_known_statistics_are_not_gathered_again() -> None:
    model, data = network(), dataset(network(), images(16))
    reports: list[int] = []
    context = Context(progress=lambda done, total, what: reports.append(done))
    tensors, found = requests(model)
    plain = [Observed(seen.value) for seen in tensors]
    first = calibrate(model, data, context, plain, found)
    assert len(reports) == 1
    again = calibrate(model, data, context, plain, found)
    assert len(reports) == 1
    assert_same(first, again)
    # Asked per channel, what was seen as a whole is not enough.
    channels = calibrate(model, data, context, tensors, found)
    assert len(reports) == 2
    assert all(len(seen.low) == 8 for seen in channels.tensors.values())
    calibrate(model, dataset(model, images(16, seed=1)), context, plain, found)
    assert len(reports) == 3


def test_known_moments_are_not_gathered_again() -> None:
    model, data = network(), dataset(network(), images(16))
    reports: list[int] = []
    context = Context(progress=lambda done, total, what: reports.append(done))
    asked = slots(model)
    first = calibrate(model, data, context, channels=[*asked[:1], *asked[:1]])
    again = calibrate(model, data, context, channels=asked[:1])
    assert len(reports) == 1
    assert first.moments(asked[0]) is again.moments(asked[0])
    assert first.moments(asked[0]).levels.count == 16  # not twice what was asked for twice
    assert first.answers(asked[0])
    assert not first.answers(asked[1])  # other positions on the same axis
    calibrate(model, data, context, channels=asked[1:2])
    assert len(reports) == 2


def test_nan_in_activations_is_refused() -> None:
    net = Net(opset=17)
    x = net.relu(net.op("Log", net.input("x", ["batch", 4])))
    net.output("y", net.gemm(x, 4, 2), ["batch", 2])
    model = net.model()
    data = open_dataset({"x": -np.ones((4, 4), np.float32)}, input_specs(model))
    relu = next(node for node in model.graph if node.op_type == "Relu")
    with pytest.raises(DataError, match="not finite on the calibration data"):
        calibrate(model, data, Context(), [Observed(relu.outputs[0])])
    with pytest.raises(DataError, match="not finite on the calibration data"):
        calibrate(model, data, Context(), layers=list(layers(model)))
    relu.outputs[0].shape = ir.Shape(["batch", 4])
    with pytest.raises(DataError, match=f"tensor '{relu.outputs[0].name}' is not finite"):
        calibrate(model, data, Context(), channels=[Slot(relu.outputs[0], 1, np.arange(4)[:, None])])


def test_padding_of_a_fixed_batch_does_not_count() -> None:
    net = Net(opset=17)
    net.output("y", net.gemm(net.input("x", [4, 3]), 3, 2), [4, 2])
    model = net.model()
    x = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    (gram,) = calibrate(
        model, open_dataset({"x": x}, input_specs(model)), Context(), layers=list(layers(model))
    ).grams.values()
    assert gram.rows == 6
    np.testing.assert_allclose(gram.second_moment[0], x.T.astype(np.float64) @ x / 6, rtol=1e-6)


def test_half_precision_and_single_axes() -> None:
    net = Net(opset=18)
    x = net.input("x", ["batch", 3], ir.DataType.FLOAT)
    half = net.op("Cast", x, to=ir.DataType.FLOAT16)
    half.type, half.shape = ir.TensorType(ir.DataType.FLOAT16), ir.Shape(["batch", 3])
    row = net.op("ReduceMax", x, net.constant([0]), keepdims=0)
    row.type, row.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([3])
    net.output("y", net.op("Cast", half, to=ir.DataType.FLOAT), ["batch", 3])
    net.output("z", row, [3])
    model, values = net.model(), np.array([[1, -2, 3], [4, 0, -6]], np.float32)
    statistics = calibrate(
        model, open_dataset({"x": values}, input_specs(model)), Context(), [Observed(half, 1), Observed(row, 0)]
    )
    np.testing.assert_array_equal(statistics.tensors[half.name or ""].low, [1, -2, -6])
    np.testing.assert_array_equal(statistics.tensors[row.name or ""].high, [4, 0, 3])
