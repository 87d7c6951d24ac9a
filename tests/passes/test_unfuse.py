"""Sums stay apart from normalizations: the same function, no fused kernel in ONNX Runtime's own graph."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from models.net import Net
from onnxcomp import kernels
from onnxcomp import model as models
from onnxcomp.branches import branches
from onnxcomp.core import Context, node_pattern
from onnxcomp.data import open_dataset
from onnxcomp.equivalence import unequal
from onnxcomp.errors import OnnxcompError, OptionError
from onnxcomp.facts import observe
from onnxcomp.passes.prune_depth import PruneDepth
from onnxcomp.passes.quantize_static import QuantizeStatic
from onnxcomp.passes.unfuse import Unfuse
from onnxcomp.profiling import Profile
from onnxcomp.runtime import Session, Target

SHAPE = [2, 6, 16]
FEEDS = {"x": np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)}


def encoder(opset: int = 17) -> ir.Model:
    """Three blocks x + f(x) with a normalization behind each, one node from opset 17 on, and one block without."""
    net = Net(opset)
    x = net.input("x", SHAPE)
    for _ in range(3):
        x = net.layer_norm(net.op("Add", x, net.linear(net.relu(net.linear(x, 16, 32)), 32, 16)), 16)
    net.output("y", net.op("Add", x, net.linear(x, 16, 16)), SHAPE)
    return net.model()


def doubles() -> ir.Model:
    """A sum that CPUs are seldom asked for."""
    net = Net(17)
    x, scale = net.input("x", SHAPE, ir.DataType.DOUBLE), net.weight(np.ones(16))
    net.output("y", net.op("LayerNormalization", net.op("Add", x, net.relu(x)), scale), SHAPE, ir.DataType.DOUBLE)
    return net.model()


def sums(model: ir.Model) -> list[str]:
    return [node.name or "" for node in model.graph if node.op_type == "Sum"]


def in_runtime(model: ir.Model, folder: Path) -> Counter[str]:
    """Operators of the graph that ONNX Runtime runs."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "run.onnx")
    ort.InferenceSession(models.to_bytes(model), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "run.onnx").graph.node)


@pytest.mark.parametrize("opset", [13, 17])
def test_onnx_runtime_fuses_none_and_the_function_is_the_same(opset: int, tmp_path: Path) -> None:
    model = encoder(opset)
    assert in_runtime(model, tmp_path)["SkipLayerNormalization"] == 3
    outcome = Unfuse()(model)
    left = in_runtime(outcome.model, tmp_path)
    assert (left["SkipLayerNormalization"], left["LayerNormalization"], left["Sum"]) == (0, 3, 3)
    assert [change.node for change in outcome.changes] == sums(outcome.model)
    assert {change.what for change in outcome.changes} == {"Sum in place of Add, which is not fused with what follows"}
    assert outcome.model.graph.outputs[0].producer().op_type == "Add"  # type: ignore[union-attr]  # no one reads it
    before, after = (Session(each).run(FEEDS)["y"] for each in (model, outcome.model))
    assert unequal(before, after) is None


def test_only_what_is_named_is_kept_apart() -> None:
    model = encoder()
    names = sums(Unfuse()(model).model)
    outcome = Unfuse(parts=(names[1],))(model)
    assert sums(outcome.model) == [names[1]]
    assert {skip.node for skip in outcome.skips} == {names[0], names[2]}
    with pytest.raises(OptionError, match=f"no sum 'other' in front of a normalization(?s:.*){names[0]}"):
        Unfuse(parts=("other",))(model)


def test_what_cannot_be_kept_apart_is_told() -> None:
    name = sums(Unfuse()(encoder()).model)[0]
    excluded = Unfuse()(encoder(), Context(exclude=node_pattern(f"^{name}$")))
    assert [(skip.node, skip.reason) for skip in excluded.skips] == [(name, "excluded by the user")]
    assert len(excluded.changes) == 2
    for model, count, reason in ((doubles(), 1, "it adds DOUBLE"), (encoder(7), 3, "before opset 8")):
        outcome = Unfuse()(model)
        assert not outcome.changes
        assert len(outcome.skips) == count
        assert all(reason in skip.reason for skip in outcome.skips)


def test_sums_that_are_apart_are_sums_to_other_passes() -> None:
    model = encoder()
    apart = Unfuse()(model).model
    found, same = (branches(each, observe(each, FEEDS).shapes) for each in (model, apart))
    assert found == same
    assert len(found) == 3
    gone = PruneDepth(parts=((found[1].join, found[1].operand),))
    made, expected = (gone(each, Context()) for each in (apart, model))
    assert [change.node for change in made.changes] == [change.node for change in expected.changes]
    outputs = [np.asarray(Session(each.model).run(FEEDS)["y"]) for each in (made, expected)]
    np.testing.assert_allclose(outputs[0], outputs[1], atol=1e-4)


def test_static_quantization_takes_them_for_the_sums_that_they_are() -> None:
    net = Net(17)
    x = net.input("x", SHAPE)
    both = net.op("Add", net.linear(x, 16, 16), net.linear(net.relu(x), 16, 16))
    net.output("z", net.linear(both, 16, 16), SHAPE)
    net.output("y", net.layer_norm(both, 16), SHAPE)
    model = net.model()
    apart = Unfuse()(model).model
    (name,) = sums(apart)
    context = Context(open_dataset([FEEDS], models.input_specs(model)))
    quantized = [QuantizeStatic()(each, context) for each in (model, apart)]
    assert name in {change.node for change in quantized[0].changes}
    assert quantized[0].changes == quantized[1].changes
    assert not sums(quantized[1].model)
    kept = QuantizeStatic(keep=(name,))(apart, context)
    assert sums(kept.model) == [name]


@pytest.mark.parametrize(
    ("fused", "apart", "better"),
    [
        (Profile({"other": 9.0}, {}, 100), Profile({"sum": 10.0, "norm": 40.0, "other": 500.0}, {}, 5), True),
        (Profile({"other": 9.0}, {}, 100), Profile({"sum": 40.0, "norm": 55.0, "other": 9.0}, {}, 0), False),
        (Profile({"sum": 99.0, "norm": 9.0}, {}, 6), Profile({"sum": 9.0, "norm": 9.0}, {}, 5), False),  # not fused
    ],
)
def test_they_are_kept_apart_where_that_takes_clearly_less(
    fused: Profile, apart: Profile, better: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made_up(pair: Sequence[ir.Model], *_: Any) -> list[Profile]:
        assert [len(sums(model)) for model in pair] == [0, 3]
        return [fused, apart]

    monkeypatch.setattr(kernels, "profiles", made_up)
    assert kernels.fuses_slowly(encoder(), Context(), FEEDS) == better
    assert not kernels.fuses_slowly(encoder(), Context(target=Target("cuda")), FEEDS)


def test_what_cannot_be_profiled_or_has_no_such_sums_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> list[Profile]:
        raise OnnxcompError("it does not run", "", "")

    monkeypatch.setattr(kernels, "profiles", failing)
    assert not kernels.fuses_slowly(encoder(), Context(), FEEDS)
    net = Net(17)
    net.output("y", net.relu(net.input("x", SHAPE)), SHAPE)
    monkeypatch.setattr(kernels, "profiles", lambda *_: pytest.fail("there is nothing to time"))
    assert [skip.reason for skip in Unfuse()(net.model()).skips] == ["no layer normalization in it reads a sum"]
    assert not kernels.fuses_slowly(net.model(), Context(), FEEDS)
