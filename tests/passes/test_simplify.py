"""Clean-up: fewer nodes, equal outputs, the user's names, and a step that goes wrong is taken back."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from models import zoo
from models.net import Net
from onnxcomp import model as models
from onnxcomp.core import Change, Context, Outcome
from onnxcomp.data import open_dataset
from onnxcomp.equivalence import unequal
from onnxcomp.passes import simplify
from onnxcomp.passes.simplify import Simplify
from onnxcomp.runtime import Feeds, Session

MODELS = Path(zoo.__file__).parent
RUNNABLE = [name for name in [*zoo.BUILDERS, *zoo.PROTO_BUILDERS] if name not in zoo.UNRUNNABLE]


def simplified(model: models.ModelSource, **settings: bool) -> Outcome:
    return Simplify(**settings)(models.load(model), Context(batch=2))


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in models.all_nodes(model))


def assert_equal_outputs(before: ir.Model, after: ir.Model, feeds: dict[str, Any]) -> None:
    outputs = Session(after).run(feeds)
    for name, expected in Session(before).run(feeds).items():
        assert unequal(expected, outputs[name]) is None


@pytest.mark.parametrize("name", RUNNABLE)
def test_outputs_stay_equal_on_other_inputs_and_batches(name: str) -> None:
    proto = zoo.build(name)
    outcome = simplified(proto)
    assert not outcome.skips
    fixed = proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    for batch, seed in ((1, 1), (3, 2)):
        assert_equal_outputs(models.load(proto), outcome.model, zoo.feeds(proto, fixed or batch, seed))


@pytest.mark.parametrize("name", ["resnet", "mobilenetv2", "unet", "conv3d", "weights_as_inputs"])
def test_batch_norm_is_gone(name: str) -> None:
    assert operators(models.load(zoo.build(name)))["BatchNormalization"] > 0
    assert operators(simplified(zoo.build(name)).model)["BatchNormalization"] == 0


def test_digits_is_as_good_and_has_no_batch_norm_left() -> None:
    data = np.load(MODELS / "digits_eval.npz")
    outcome = simplified(MODELS / "digits.onnx")
    assert operators(outcome.model)["BatchNormalization"] == 0
    assert_equal_outputs(models.load(MODELS / "digits.onnx"), outcome.model, {"input": data["input"][:50]})


def test_shape_arithmetic_of_letters_is_folded() -> None:
    before, outcome = models.load(MODELS / "letters.onnx"), simplified(MODELS / "letters.onnx")
    assert operators(before)["Shape"] > 10
    left = operators(outcome.model)
    assert left["Reshape"] > 0
    for operator in ("Concat", "Constant", "ConstantOfShape", "Where", "Identity"):
        assert left[operator] == 0
    assert left["Shape"] <= 2
    data = np.load(MODELS / "letters_eval.npz")
    for length in (32, 20):  # dynamic axes stay dynamic
        feeds = {key: data[key][:7, :length] for key in ("input_ids", "attention_mask")}
        assert_equal_outputs(before, outcome.model, feeds)


def test_what_has_nothing_to_clean_is_left_alone() -> None:
    model = models.load(zoo.build("superres"))
    outcome = Simplify()(model)
    assert outcome.model is model
    assert outcome == Outcome(model, (), ())


def test_a_second_run_finds_nothing() -> None:
    once = simplified(zoo.build("resnet")).model
    assert Simplify()(once).changes == ()


# Overridable weights


def test_weights_given_as_inputs_become_constants() -> None:
    outcome = simplified(zoo.build("weights_as_inputs"))
    assert [value.name for value in outcome.model.graph.inputs] == ["input"]
    promoted = [change for change in outcome.changes if change.what == "overridable weight made constant"]
    assert promoted


def overridden(model: ir.Model, feeds: dict[str, Any], name: str) -> Any:
    """The first output with another value fed for one weight."""
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return next(iter(Session(model).run({**feeds, name: tensor.numpy() * 2 + 1}).values()))


def test_weights_can_stay_overridable() -> None:
    proto = zoo.build("weights_as_inputs")
    proto.ir_version = 8  # ONNX Runtime lets callers override weights since version 4
    before, outcome = models.load(proto), simplified(proto, keep_overridable=True)
    assert [v.name for v in outcome.model.graph.inputs] == [v.name for v in before.graph.inputs]
    feeds = zoo.feeds(proto, 1)
    assert_equal_outputs(before, outcome.model, feeds)
    for weight in before.graph.initializers:  # whatever a caller feeds instead has the effect it had
        assert unequal(overridden(before, feeds, weight), overridden(outcome.model, feeds, weight)) is None


def test_nothing_folds_that_a_caller_may_override() -> None:
    graph = helper.make_graph(
        [
            helper.make_node("Concat", ["rows", "columns"], ["shape"], axis=0),
            helper.make_node("Reshape", ["x", "shape"], ["y"]),
            helper.make_node("Mul", ["scale", "scale"], ["square"]),
            helper.make_node("Mul", ["y", "square"], ["z"]),
        ],
        "overridable",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [12]),
            helper.make_tensor_value_info("rows", TensorProto.INT64, [1]),
            helper.make_tensor_value_info("scale", TensorProto.FLOAT, [1]),
        ],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["rows", "columns"])],
        [
            numpy_helper.from_array(np.array([3], np.int64), "rows"),
            numpy_helper.from_array(np.array([-1], np.int64), "columns"),
            numpy_helper.from_array(np.array([2], np.float32), "scale"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    outcome = simplified(model, keep_overridable=True)
    x = np.arange(12, dtype=np.float32)
    kept = Session(outcome.model).run({"x": x, "rows": np.array([2]), "scale": np.array([3], np.float32)})["z"]
    np.testing.assert_array_equal(kept, 9 * x.reshape(2, 6))
    assert Session(simplified(model).model).run({"x": x})["z"].shape == (3, 4)


# Names


@pytest.mark.parametrize("name", ["resnet", "unet", "preact_resnet", "weights_as_inputs"])
def test_convolutions_keep_their_names(name: str) -> None:
    before = models.load(zoo.build(name))
    after = simplified(zoo.build(name)).model
    outputs = {node.outputs[0].name: node.name for node in before.graph}
    assert {n.name for n in after.graph if n.op_type == "Conv"} == {n.name for n in before.graph if n.op_type == "Conv"}
    assert {n.name for n in after.graph} <= set(outputs.values())
    # The name goes to the node that does the work: the convolution before the normalisation it absorbed.
    for node in after.graph:
        if node.op_type == "Conv":
            origin = next(n for n in before.graph if n.name == node.name)
            readers = {use.node.outputs[0].name for use in origin.outputs[0].uses()} | {origin.outputs[0].name}
            assert node.outputs[0].name in readers


def test_changes_speak_of_the_users_nodes() -> None:
    before = models.load(zoo.build("resnet"))
    names = {node.name for node in before.graph} | set(before.graph.initializers)
    changes = simplified(zoo.build("resnet")).changes
    assert {change.node for change in changes} <= names
    assert sum(change.what == "BatchNormalization folded away" for change in changes) == 8


# Slices


def cropped(*slices: tuple[list[int], ...]) -> ir.Model:
    """x cut by each of the slices in turn: starts, ends, and optionally axes and steps."""
    net = Net(17)
    x = net.input("x", ["batch", 6, 7, 8])
    for bounds in slices:
        x = net.op("Slice", x, *map(net.constant, bounds))
    net.output("y", net.op("Relu", x), ["b", "c", "h", "w"])
    return net.model()


@pytest.mark.parametrize(
    ("slices", "count"),
    [
        ((([1], [5], [2]), ([0], [4], [3])), 1),
        ((([1], [-1], [-1]), ([2], [99], [1], [2])), 1),  # axes from the end, steps
        ((([0, 1], [1, 3]), ([1], [5], [3])), 1),  # axes not given
        ((([1], [5], [2]), ([0], [4], [3]), ([1], [3], [1])), 1),
        ((([1], [5], [2]), ([1], [3], [2])), 2),  # the same axis twice
        ((([1], [5], [3]), ([1], [3], [-1])), 2),
        ((([5], [1], [2], [-1]), ([0], [4], [3])), 1),  # backwards
    ],
)
def test_slices_along_other_axes_merge(slices: Any, count: int) -> None:
    model = cropped(*slices)
    outcome = Simplify()(model, Context(batch=2))
    assert operators(outcome.model)["Slice"] == count
    x = np.random.default_rng(1).normal(size=(2, 6, 7, 8)).astype(np.float32)
    assert_equal_outputs(model, outcome.model, {"x": x})
    if count == 1:
        last = [node.name for node in model.graph if node.op_type == "Slice"][-1]
        assert [node.name for node in outcome.model.graph if node.op_type == "Slice"] == [last]


def test_a_slice_that_others_read_stays() -> None:
    net = Net(17)
    first = net.op("Slice", net.input("x", [6, 7]), net.constant([1]), net.constant([5]), net.constant([0]))
    second = net.op("Slice", first, net.constant([1]), net.constant([5]), net.constant([1]))
    net.output("y", second, [4, 4])
    net.output("z", net.op("Relu", first), [4, 7])
    assert operators(Simplify()(net.model()).model)["Slice"] == 2


def test_slices_with_attributes_are_left_alone() -> None:
    net = Net(9)
    first = net.op("Slice", net.input("x", [6, 7]), starts=[1], ends=[5], axes=[0])
    net.output("y", net.op("Slice", first, starts=[1], ends=[5], axes=[1]), [4, 4])
    assert operators(Simplify()(net.model()).model)["Slice"] == 2


# What goes wrong


def test_a_guilty_step_is_taken_back_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def drop_relus(model: ir.Model) -> None:
        for node in [node for node in model.graph if node.op_type == "Relu"]:
            source = node.inputs[0]
            assert source is not None
            node.outputs[0].replace_all_uses_with(source)
            model.graph.remove(node, safe=True)

    def fail(model: ir.Model) -> None:
        raise KeyError("a rule's own mistake")

    monkeypatch.setattr(simplify, "_STEPS", (drop_relus, *simplify._STEPS, fail))
    before, outcome = models.load(zoo.build("resnet")), simplified(zoo.build("resnet"))
    assert operators(outcome.model)["BatchNormalization"] == 0
    assert operators(outcome.model)["Relu"] == operators(before)["Relu"]
    first, second = outcome.skips
    assert first.node == "drop_relus"
    assert first.reason.startswith("taken back: output 'logits' differs by")
    assert second.reason == 'taken back: KeyError: "a rule\'s own mistake"'


def test_unused_tensors_are_a_change_too() -> None:
    proto = zoo.build("superres")
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros(9, np.float32), "forgotten"))
    outcome = simplified(proto)
    assert outcome.changes == (Change("forgotten", "unused tensor removed"),)
    assert "forgotten" not in outcome.model.graph.initializers


@pytest.mark.parametrize("name", ["gpt", "bert", "vit", "fp16_weights", "functions", "quantized_already"])
def test_files_do_not_grow(name: str) -> None:
    proto = zoo.build(name)
    before, after = models.load(proto), simplified(proto).model
    assert models.tensor_bytes(after) <= models.tensor_bytes(before) + 4 * 4096  # a small constant here and there


def test_large_constants_are_not_spelt_out() -> None:
    net = Net(17)
    mask = net.op("Expand", net.constant(0, np.float32), net.constant([100, 100]))
    net.output("y", net.op("Add", net.input("x", [100, 100]), mask), [100, 100])
    assert models.tensor_bytes(Simplify()(net.model()).model) < 1000


def test_data_are_used_where_there_are_some(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    run = Session.run

    def noted(self: Session, feeds: Feeds, names: Sequence[str] | None = None) -> Any:
        seen.append(feeds["input"])
        return run(self, feeds, names)

    monkeypatch.setattr(Session, "run", noted)
    model = models.load(zoo.build("resnet"))
    data = open_dataset({"input": np.full((3, 3, 32, 32), 7, np.float32)}, models.input_specs(model))
    Simplify()(model, Context(data=data))
    assert seen
    assert all((array == 7).all() for array in seen)


def test_functions_are_inlined_and_bodies_kept() -> None:
    assert not simplified(zoo.build("functions")).model.functions
    onnx.checker.check_model(ir.to_proto(simplified(zoo.build("control_flow")).model))
    assert operators(simplified(zoo.build("control_flow")).model)["Loop"] == 1
