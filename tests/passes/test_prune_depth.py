"""Depth pruning: the branch whose loss is least goes, and what is left makes up for it."""

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from models.net import Net
from onnxcomp import model as models
from onnxcomp import reconstruction
from onnxcomp.branches import branches, spared, without_branches
from onnxcomp.core import Context, Outcome, node_pattern
from onnxcomp.errors import OptionError
from onnxcomp.facts import observe
from onnxcomp.layers import layers
from onnxcomp.passes.prune_depth import PruneDepth
from onnxcomp.passes.simplify import Simplify
from onnxcomp.runtime import Session
from onnxcomp.synthetic import synthetic
from onnxcomp.twins import Pair
from onnxcomp.widths import Cost
from tests.passes.small import context, error, network


def residual(*strengths: float) -> ir.Model:
    """Blocks x + f(x) of 16 channels whose branches are so strong."""
    net = Net(opset=13)
    x = net.relu(net.conv(net.input("image", ["batch", 3, 8, 8]), 3, 16))
    for _ in strengths:
        x = net.relu(net.op("Add", x, net.conv(net.relu(net.conv(x, 16, 16)), 16, 16)))
    net.classify(x, 16)
    model = Simplify()(models.load(net.model())).model
    for strength, layer in zip(strengths, list(layers(model))[2:-1:2], strict=True):
        layer.set_matrix(layer.matrix() * strength)
        layer.set_bias(layer.bias_vector() * strength)
    return model


def joins(model: ir.Model) -> list[str]:
    return [node.name or "" for node in model.graph if node.op_type == "Add"]


def shortened(outcome: Outcome) -> list[str]:
    """The sums that lost a branch."""
    return [change.node for change in outcome.changes if change.what.startswith("without a branch")]


def test_the_branches_of_a_model_are_found_with_the_nodes_that_they_alone_need() -> None:
    model = residual(1, 1)
    feeds = next(iter(context(2).examples(model)))
    found = branches(model, observe(model, feeds).shapes)
    assert [branch.join for branch in found] == joins(model)
    assert all(len(branch.nodes) == 4 for branch in found)  # two convolutions, what is between them, and the sum
    made = without_branches(model, [(found[0].join, found[0].operand)])
    assert {node.name for node in model.graph} - {node.name for node in made.graph} >= found[0].nodes


def test_both_operands_of_a_sum_may_go_but_not_one_that_others_read() -> None:
    feeds = next(iter(context(2).examples(network())))
    found = branches(network(), observe(network(), feeds).shapes)
    first, second = joins(network())
    assert [branch.join for branch in found] == [first, second, second]  # the second one has a convolution as shortcut


def test_of_a_sum_that_may_lose_either_operand_both_are_told() -> None:
    feeds = next(iter(context(2).examples(network())))
    found = branches(network(), observe(network(), feeds).shapes)
    first, second = joins(network())
    said = [(skip.node, skip.reason) for skip in spared(network(), found, [], lambda branch: f"{branch.operand}")]
    assert [each for each in said if each[0] in {first, second}] == [
        (first, f"the branch at '{first}' stays: 0"),
        (second, f"the branch at '{second}' (operand 0) stays: 0"),
        (second, f"the branch at '{second}' (operand 1) stays: 1"),
    ]


@pytest.mark.parametrize("cost", list(Cost))
def test_the_weakest_branch_goes_first(cost: Cost) -> None:
    model = residual(1, 0.01, 1)
    outcome = PruneDepth(0.95, cost)(model, context())
    assert shortened(outcome) == [joins(model)[1]]
    assert {skip.node for skip in outcome.skips} >= {joins(model)[0], joins(model)[2]}
    assert error(model, outcome.model) < 1e-3  # the branch's strength squared is 1e-4


def test_more_go_until_no_more_than_the_target_remains() -> None:
    model = residual(0.5, 0.5, 0.5)
    left = [len(list(layers(PruneDepth(share, Cost.PARAMS)(model, context()).model))) for share in (0.8, 0.5, 0.01)]
    assert left == [6, 4, 2]


def test_what_is_left_makes_up_for_it() -> None:
    model = residual(1, 0.5, 0.5)
    gone = tuple((option.part, int(option.setting)) for option in list(PruneDepth().options(model, context()))[1:])
    plain, fitted = (
        error(model, PruneDepth(parts=gone, reconstruct=on)(model, context(512)).model) for on in (False, True)
    )
    assert fitted < 0.5 * plain


@pytest.mark.parametrize(("helped", "expected"), [(False, 2), (True, 4), ("it does not run", 4)])
def test_fitting_together_is_given_up_where_two_rows_of_the_same_shapes_gained_nothing(
    monkeypatch: pytest.MonkeyPatch, helped: bool | str, expected: int
) -> None:
    tried: list[list[str]] = []

    def fit(block: list[Pair], *_: Any) -> bool | str:
        tried.append([pair.after.name for pair in block])
        return helped

    monkeypatch.setattr(reconstruction, "fit_together", fit)
    model = residual(0.5, 1, 1, 1, 1)
    PruneDepth(parts=((joins(model)[0], 1),))(model, context())
    assert len([row for row in tried if len(row) == 2]) == expected


def test_what_comes_before_stays_as_it_is() -> None:
    """Byte for byte: nothing there has changed."""
    model = residual(1, 1, 0.1)
    before = {layer.name: layer.matrix() for layer in layers(model)}
    made = PruneDepth(0.8, Cost.PARAMS)(model, context()).model
    after = {layer.name: layer.matrix() for layer in layers(made)}
    same = [name for name, matrix in after.items() if np.array_equal(matrix, before[name])]
    assert same == list(before)[:4]  # up to the layer in front of the sum that takes the missing one's place
    assert len(after) == len(before) - 2


def test_parts_name_the_branches() -> None:
    model = residual(1, 1)
    name = joins(model)[0]
    options = list(PruneDepth().options(model, context()))
    assert [option.part for option in options] == joins(model)
    assert all(option.error > 0 and option.latency == 0 for option in options)
    outcome = PruneDepth().taking(options[:1])(model, context())
    assert shortened(outcome) == [name]
    with pytest.raises(OptionError, match=name):
        PruneDepth(parts=(("nothing", 0),))(model, context())


def test_excluded_nodes_stay() -> None:
    model = residual(1, 1)
    inside = list(layers(model))[1].name
    outcome = PruneDepth(0.01)(model, context(exclude=node_pattern(f"^{inside}$")))
    assert shortened(outcome) == [joins(model)[1]]


def test_nothing_to_remove_is_no_change() -> None:
    net = Net(opset=13)
    net.classify(net.relu(net.conv(net.input("image", ["batch", 3, 8, 8]), 3, 16)), 16)
    outcome = PruneDepth()(models.load(net.model()), Context())
    assert not outcome.modified


def test_dynamic_shapes_stay() -> None:
    made = PruneDepth(0.5, Cost.PARAMS)(residual(1, 1), context()).model
    for rows in (1, 5):
        data = synthetic(models.input_specs(made), rows, 0)
        assert next(iter(Session(made).run(next(iter(data.batches(rows))).feeds).values())).shape[0] == rows


def test_a_sum_keeps_one_operand() -> None:
    with pytest.raises(OptionError, match="'sum' is there twice"):
        PruneDepth(parts=(("sum", 0), ("sum", 1)))


def test_without_known_shapes_nothing_can_go() -> None:
    assert branches(residual(1), {}) == []
